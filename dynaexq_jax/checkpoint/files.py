"""Checksums of files: how they are recorded, and how a file that changed is found."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from dynaexq_jax.errors import InputError

_REMEDY: Final = "copy the checkpoint again or convert the model again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What a file was when it was written."""

    nbytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """Reads a file and records it."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
            return cls(nbytes=file.tell(), sha256=digest.hexdigest())

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "FileRecord":
        """Inverse of ``dataclasses.asdict``."""
        return cls(nbytes=int(data["nbytes"]), sha256=str(data["sha256"]))


FileRecords = dict[str, FileRecord]
"""By path, relative to the folder that was recorded."""


def record_files(folder: Path) -> FileRecords:
    """Records every file under a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): FileRecord.of(path) for path in paths}


def verify_files(folder: Path, records: FileRecords) -> None:
    """Raises InputError if a recorded file is missing, has another size or other bytes."""
    for name, record in records.items():
        path = folder / name
        try:
            nbytes = path.stat().st_size
            if nbytes != record.nbytes:
                raise InputError(
                    f"{path}: has {nbytes} bytes, the checkpoint recorded {record.nbytes}; "
                    f"{_REMEDY}"
                )
            found = FileRecord.of(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from error
        if found != record:
            raise InputError(
                f"{path}: sha256 is {found.sha256[:16]}..., the checkpoint recorded "
                f"{record.sha256[:16]}...; the file is damaged, {_REMEDY}"
            )
