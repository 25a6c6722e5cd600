"""One safetensors file, read without trust: the header is checked whole before any tensor is.

The file is an unsigned 64-bit little-endian length, that many bytes of JSON, then the data. The
JSON names for every tensor its dtype, shape and ``data_offsets`` [begin, end) into the data.
Tensors are read with ordinary reads and not through a memory map, so that memory holds one
tensor at a time and a file that shrinks meanwhile is an error and not a crash.
"""

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

from dynaexq_jax.errors import InputError
from dynaexq_jax.json_file import parse_json_object

DTYPES: Final[dict[str, np.dtype]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
_EXPONENT_MASKS: Final = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
_LENGTH_BYTES: Final = 8
_MAX_HEADER_BYTES: Final = 100_000_000
_REMEDY: Final = "the file is damaged, download or write it again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """Where a tensor lies."""

    name: str
    path: Path
    dtype: str
    """Key of ``DTYPES``."""
    shape: tuple[int, ...]
    begin: int
    """Byte of the file at which the data starts."""

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self, index: int | None = None) -> np.ndarray:
        """The array, or entry ``index`` of its first axis; bfloat16 through ml_dtypes.

        Raises InputError if the file is shorter than its header said, or holds NaN or infinity.
        """
        shape = self.shape if index is None else self.shape[1:]
        count = math.prod(shape)
        itemsize = DTYPES[self.dtype].itemsize
        offset = self.begin + (index or 0) * count * itemsize
        try:
            bits = np.fromfile(self.path, f"<u{itemsize}", count, offset=offset)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror})") from error
        if len(bits) != count:
            raise InputError(
                f"{self.path}: {self.name} ends after {len(bits)} of {count} values; {_REMEDY}"
            )
        mask = bits.dtype.type(_EXPONENT_MASKS[self.dtype])
        not_finite = int(np.count_nonzero((bits & mask) == mask))
        if not_finite:
            part = "" if index is None else f"[{index}]"
            raise InputError(
                f"{self.path}: {self.name}{part} has {not_finite} NaN or infinite values of "
                f"{count}; weights must be finite, use an undamaged copy of the model"
            )
        return bits.view(DTYPES[self.dtype]).reshape(shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SafetensorsFile:
    """A file whose header was checked."""

    path: Path
    nbytes: int
    header_sha256: str
    tensors: dict[str, Tensor]

    @classmethod
    def open(cls, path: Path) -> "SafetensorsFile":
        """Reads and checks the header. Raises InputError for everything that is wrong."""
        try:
            nbytes = path.stat().st_size
            with path.open("rb") as file:
                header = _read_header(path, file, nbytes)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        entries = parse_json_object(header, f"{path}: header", _REMEDY)
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise InputError(f"{path}: __metadata__ must map names to strings; {_REMEDY}")
        data_begin = _LENGTH_BYTES + len(header)
        spans = {name: _span(path, name, entry) for name, entry in entries.items()}
        _check_cover(path, spans, nbytes - data_begin)
        tensors = {
            name: Tensor(
                name=name,
                path=path,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                begin=data_begin + spans[name][0],
            )
            for name, entry in entries.items()
        }
        sha256 = hashlib.sha256(header).hexdigest()
        return cls(path=path, nbytes=nbytes, header_sha256=sha256, tensors=tensors)


def _read_header(path: Path, file: Any, nbytes: int) -> bytes:
    length_field = file.read(_LENGTH_BYTES)
    if len(length_field) < _LENGTH_BYTES:
        raise InputError(f"{path}: {nbytes} bytes are too few for a safetensors file; {_REMEDY}")
    length = int.from_bytes(length_field, "little")
    room = min(nbytes - _LENGTH_BYTES, _MAX_HEADER_BYTES)
    if length > room:
        raise InputError(
            f"{path}: header says it has {length} bytes, at most {room} are possible; {_REMEDY}"
        )
    header = file.read(length)
    if len(header) != length:
        raise InputError(f"{path}: header ends after {len(header)} of {length} bytes; {_REMEDY}")
    return header


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Checked ``data_offsets`` of a tensor."""
    fields = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != fields:
        raise InputError(f"{path}: entry of {name!r} must have {sorted(fields)}; {_REMEDY}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(
            f"{path}: {name} has dtype {dtype!r}, weights must be one of {sorted(DTYPES)}; "
            "use an unquantized copy of the model"
        )
    if not _are_sizes(shape):
        raise InputError(f"{path}: {name} has shape {shape!r}, not a list of sizes; {_REMEDY}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise InputError(
            f"{path}: {name} has data_offsets {offsets!r}, not [begin, end]; {_REMEDY}"
        )
    begin, end = offsets
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise InputError(
            f"{path}: {name} of shape {shape} and dtype {dtype} takes {nbytes} bytes, "
            f"its data_offsets {offsets} span {end - begin}; {_REMEDY}"
        )
    return begin, end


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _check_cover(path: Path, spans: dict[str, tuple[int, int]], data_bytes: int) -> None:
    """Raises InputError unless the spans tile the data without gap or overlap."""
    position = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != position:
            kind = "overlaps what lies before it" if begin < position else "leaves a gap before it"
            raise InputError(
                f"{path}: {name} starts at byte {begin} of the data and {kind}, "
                f"which ends at {position}; {_REMEDY}"
            )
        position = end
    if position != data_bytes:
        raise InputError(
            f"{path}: tensors take {position} bytes of data, the file has {data_bytes}; {_REMEDY}"
        )
