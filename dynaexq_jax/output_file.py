"""Files that a run leaves: whether they can be, and writing them whole."""

import os
from pathlib import Path

from dynaexq_jax.errors import InputError


def check_place(name: str, path: Path) -> None:
    """Raises InputError unless ``path`` can be a file in a directory that exists.

    To be called before the work whose results it is for; ``name`` is the option's.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{name} {path}: give a file in a directory that exists")


def write_whole(path: Path, text: str) -> None:
    """Writes ``text`` beside ``path`` and renames it: whoever reads sees the old file or the new.

    Raises InputError if it cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            aside.write_text(text, encoding="utf-8")
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); free space there or name another place"
        ) from error
