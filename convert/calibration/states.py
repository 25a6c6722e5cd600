"""Hidden states of all rows between two layers, in a file of the work folder."""

import os
from pathlib import Path

import numpy as np
from jaxtyping import Float32


class HiddenStates:
    """Float32 [rows, W, H] in a file that is read and written in pieces and never mapped.

    So memory holds what is being worked on, and what the system keeps of the file beside it.
    """

    def __init__(self, path: Path, *, rows: int, window: int, hidden: int) -> None:
        self.rows = rows
        self._path = path
        self._row_shape = (window, hidden)
        self._row_bytes = 4 * window * hidden

    @property
    def nbytes(self) -> int:
        """Of the whole file."""
        return self.rows * self._row_bytes

    def is_whole(self) -> bool:
        """Whether the file is there and of the right size."""
        return self._path.is_file() and self._path.stat().st_size == self.nbytes

    def create(self) -> None:
        """Makes the file, all zeros; one that is there is replaced."""
        with self._path.open("wb") as file:
            file.truncate(self.nbytes)

    def read(self, start: int, stop: int) -> Float32[np.ndarray, "n W H"]:
        """Rows from ``start`` to ``stop``."""
        shape = (stop - start, *self._row_shape)
        count, offset = int(np.prod(shape)), start * self._row_bytes
        return np.fromfile(self._path, np.float32, count, offset=offset).reshape(shape)

    def write(self, start: int, states: Float32[np.ndarray, "n W H"]) -> None:
        """Puts rows in their place, from ``start`` on."""
        with self._path.open("r+b") as file:
            file.seek(start * self._row_bytes)
            file.write(np.ascontiguousarray(states, np.float32).data)

    def sync(self) -> None:
        """Returns once the file is durable."""
        for path in (self._path, self._path.parent):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def remove(self) -> None:
        """Removes the file, if it is there."""
        self._path.unlink(missing_ok=True)
