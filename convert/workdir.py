"""Where a conversion works until it is finished: a folder beside the output, renamed last.

OUT.partial/
  lock          held (flock) by the one process that works here
  job.json      source and options; a resumed conversion must have the same
  done/NAME     one record for each finished step, written after its units were synced
  checkpoint/   becomes OUT
  hidden/       of a calibrated conversion: hidden states between two layers
  replaced/     the old OUT, for the moment between two renames
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from dynaexq_jax.checkpoint import is_converted
from dynaexq_jax.checkpoint.files import verify_files
from dynaexq_jax.checkpoint.units import UnitRecord
from dynaexq_jax.errors import InputError
from dynaexq_jax.json_file import read_json_object


class WorkDir:
    """The folder of one conversion, locked while it is open."""

    def __init__(self, output: Path, *, force: bool) -> None:
        self._output = output
        self._force = force
        self._folder = output.with_name(output.name + ".partial")
        self._lock = -1
        self.checkpoint = self._folder / "checkpoint"
        self.hidden = self._folder / "hidden"
        """Whoever uses it makes it."""

    def __enter__(self) -> Self:
        """Raises InputError if the output exists, or if another process works on it."""
        with reporting_write_errors(self._folder):
            self._check_output()
            self._lock = self._acquire()
        try:
            self._check_output()  # another process may have finished before the lock was ours
        except InputError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Keeps the folder for a later run, unless it holds no finished step and nothing else."""
        if self._is_ours():
            (self._folder / "lock").unlink()
            held = {path.name for path in self._folder.iterdir()}
            is_known = not held or (
                "job.json" in held and held <= {"job.json", "done", "checkpoint", "hidden"}
            )
            if is_known and not any((self._folder / "done").glob("*")):
                self._remove()
        os.close(self._lock)

    def start(self, job: dict[str, Any]) -> None:
        """Begins or resumes the job. Raises InputError if the folder holds another one."""
        with reporting_write_errors(self._folder):
            path = self._folder / "job.json"
            begun = {"lock", "job.json", "job.json.aside"}
            others = [p.name for p in self._folder.iterdir() if p.name not in begun]
            if not path.exists() and others:
                raise InputError(
                    f"{self._folder}: is not the work of a conversion (it holds {others[0]}); "
                    "remove it or choose another output"
                )
            if path.exists():
                self._check_same(read_json_object(path, f"remove {self._folder}"), job)
            if not path.exists():
                _write_synced(path, job)
            (self._folder / "done").mkdir(exist_ok=True)
            self.checkpoint.mkdir(exist_ok=True)

    def finished(self, step: str) -> dict[str, Any] | None:
        """The record of a step that an earlier run finished, if its files are still whole."""
        path = self._folder / "done" / step
        if not path.exists():
            return None
        try:
            record = read_json_object(path, "")
            for unit, data in record["units"].items():
                verify_files(self.checkpoint / unit, UnitRecord.from_json(data).files)
        except (InputError, KeyError, TypeError):
            return None
        return record

    def finish(self, step: str, record: dict[str, Any]) -> None:
        """Makes the units of a step durable, then its record."""
        with reporting_write_errors(self._folder):
            for unit in record["units"]:
                _sync_tree(self.checkpoint / unit)
            _write_synced(self._folder / "done" / step, record)

    def publish(self) -> None:
        """Renames the finished checkpoint to the output, replacing an old one only now."""
        with reporting_write_errors(self._output):
            _sync_tree(self.checkpoint)
            if self._output.exists():
                replaced = self._folder / "replaced"
                shutil.rmtree(replaced, ignore_errors=True)
                self._output.rename(replaced)
            self.checkpoint.rename(self._output)
            _sync(self._output.parent)
            self._remove()

    def _check_output(self) -> None:
        if not os.path.lexists(self._output):
            return
        if not self._force:
            raise InputError(
                f"{self._output}: output exists; choose another directory, or replace it with "
                "--force"
            )
        is_empty = self._output.is_dir() and not any(self._output.iterdir())
        if not is_empty and not is_converted(self._output):
            raise InputError(
                f"{self._output}: is not a converted checkpoint, --force does not replace it; "
                "choose another directory"
            )

    def _check_same(self, old: dict[str, Any], job: dict[str, Any]) -> None:
        differences = [
            f"{name} was {old.get(name)!r}, is {job.get(name)!r}"
            for name in (old | job)
            if old.get(name) != job.get(name)
        ]
        if not differences:
            return
        if not self._force:
            raise InputError(
                f"{self._folder}: holds an unfinished conversion of another kind "
                f"({'; '.join(differences[:3])}); repeat that one, or start afresh with --force"
            )
        (self._folder / "job.json").unlink()
        for name in ("done", "checkpoint", "hidden"):
            shutil.rmtree(self._folder / name, ignore_errors=True)

    def _acquire(self) -> int:
        while True:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / "lock"
            try:
                lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:
                continue  # the folder was removed by a process that finished
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(lock), os.stat(path)):
                    return lock
            except BlockingIOError:
                os.close(lock)
                raise InputError(
                    f"{self._output}: another process is converting to it; wait for it or choose "
                    "another output"
                ) from None
            except FileNotFoundError:
                pass
            os.close(lock)

    def _is_ours(self) -> bool:
        """Whether the folder is still the one that was locked, and not removed or another's."""
        lock = self._folder / "lock"
        return lock.exists() and os.path.samestat(os.fstat(self._lock), lock.stat())

    def _remove(self) -> None:
        """Removes the folder, first from its name, so that nobody can start in it meanwhile."""
        removed = self._folder.with_name(self._folder.name + ".removed")
        shutil.rmtree(removed, ignore_errors=True)
        self._folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


@contextlib.contextmanager
def reporting_write_errors(path: Path) -> Iterator[None]:
    """Turns errors of writing into InputError; Orbax hides the errno of some in its messages."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        is_full = os.strerror(errno.ENOSPC) in str(error)
        if not is_full and not isinstance(error, OSError):
            raise
        reason = os.strerror(errno.ENOSPC) if is_full else error.strerror  # type: ignore[attr-defined]
        raise InputError(
            f"{path}: cannot be written ({reason}); what is finished was kept, make room or choose "
            "another output and repeat the same command"
        ) from error


def _write_synced(path: Path, data: dict[str, Any]) -> None:
    """Writes JSON so that after any crash the file is whole or is not there."""
    aside = path.with_name(path.name + ".aside")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(data, file)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
    _sync(path.parent)


def _sync_tree(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
