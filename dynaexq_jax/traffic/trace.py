"""Routing traces: what the controller learns in each interval, appended to a file as it comes.

The file is one line of JSON, padded to 64 bytes, and then records of one size: the interval's
tokens (int64) and its router mass (float32 [L, E]), little-endian. A run that is killed leaves all
that it had appended; of a record that was cut short nothing is used.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from dynaexq_jax.errors import InputError
from dynaexq_jax.json_file import parse_json_object
from dynaexq_jax.output_file import check_place
from dynaexq_jax.traffic.file_kind import FileKind
from dynaexq_jax.traffic.model import RoutedModel
from pallas_kernels.levels import LEVEL_BITS, Bits

KIND: Final = FileKind(
    name="routing trace", version=1, remedy="record it again with --routing-trace"
)
_ALIGNMENT: Final = 64
_MAX_HEADER_BYTES: Final = 2**24
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TraceHeader:
    """The ladder and the run, so that a trace can be replayed without its checkpoint.

    Raises ValueError for parts that contradict each other.
    """

    model: RoutedModel
    bits: tuple[Bits, ...]
    """Levels that the checkpoint holds, ascending from 2."""
    benefit: np.ndarray
    """float64 [L, S] or [L, S, E]: what each step of the ladder gains, S one less than levels."""
    pinned: tuple[tuple[int, int], ...]
    """(row of axis L, expert) of those that are never demoted."""
    base_bits: Bits
    pool_pages: int
    interval: int
    """Steps of each record, fewer where they read many tokens."""
    max_transitions: int
    """Promotions of one plan."""

    def __post_init__(self) -> None:
        if not self.bits or self.bits != LEVEL_BITS[: len(self.bits)]:
            raise ValueError(f"bits must begin {LEVEL_BITS}, got {self.bits}")
        if self.base_bits not in self.bits:
            raise ValueError(f"base_bits must be one of {self.bits}, got {self.base_bits}")
        shape = (self.model.layers, len(self.bits) - 1)
        by_expert = (*shape, self.model.experts)
        if self.benefit.shape not in (shape, by_expert):
            raise ValueError(
                f"benefit must have shape {shape} or {by_expert}, got {self.benefit.shape}"
            )
        if not (np.all(self.benefit >= 0) and np.all(self.benefit < np.inf)):
            raise ValueError("benefit must be finite and not negative")
        for layer, expert in self.pinned:
            if not (0 <= layer < self.model.layers and 0 <= expert < self.model.experts):
                raise ValueError(f"pinned expert {expert} of layer {layer} is not of {self.model}")
        for name, least in (("pool_pages", 0), ("interval", 1), ("max_transitions", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def record_type(self) -> np.dtype[Any]:
        """Of one interval in the file."""
        shape = (self.model.layers, self.model.experts)
        return np.dtype([("tokens", "<i8"), ("mass", "<f4", shape)])

    def to_line(self) -> bytes:
        """The first line of the file."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields |= {"model": dataclasses.asdict(self.model), "benefit": self.benefit.tolist()}
        line = json.dumps({**KIND.head, **fields}).encode()
        return line + b" " * (-(len(line) + 1) % _ALIGNMENT) + b"\n"

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Reads what ``to_line`` writes. Raises KeyError, TypeError or ValueError."""
        fields: dict[str, Any] = {field.name: data[field.name] for field in dataclasses.fields(cls)}
        fields["model"] = RoutedModel.from_json(data["model"])
        fields["bits"] = tuple(data["bits"])
        fields["benefit"] = np.array(data["benefit"], np.float64)
        fields["pinned"] = tuple((int(layer), int(expert)) for layer, expert in data["pinned"])
        return cls(**fields)


def check_new_trace(path: Path) -> None:
    """Raises InputError unless a trace can be begun there."""
    check_place("routing_trace", path)
    if path.exists():
        raise InputError(f"routing_trace {path}: exists already; give another file, or delete it")


class TraceWriter:
    """Begins a trace, and appends to it."""

    def __init__(self, path: Path, header: TraceHeader) -> None:
        """Raises InputError if the file exists or cannot be written."""
        check_new_trace(path)
        self._path = path
        self._record_type = header.record_type
        self._failed = False
        try:
            path.write_bytes(header.to_line())
        except OSError as error:
            raise InputError(
                f"routing_trace {path}: cannot be written ({error.strerror}); name another place"
            ) from error

    def add(self, mass: np.ndarray, tokens: int) -> None:
        """Appends one interval: router mass float32 [L, E] of ``tokens``.

        Where that fails the trace ends, with a line in the log: the run is worth more than it.
        """
        if self._failed:
            return
        record = np.array((tokens, mass), self._record_type)
        try:
            with self._path.open("ab", buffering=0) as file:
                file.write(record.tobytes())
        except OSError:
            self._failed = True
            _log.exception("the routing trace %s ends here", self._path)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """A recorded trace; its records stay in the file until they are asked for."""

    header: TraceHeader
    records: np.ndarray
    """[N] of ``TraceHeader.record_type``."""
    dropped_bytes: int
    """Of a last record that was cut short."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises InputError for a file that is missing, damaged, or holds no interval."""
        try:
            with path.open("rb") as file:
                line = file.readline(_MAX_HEADER_BYTES)
                size = os.fstat(file.fileno()).st_size - len(line)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); {KIND.remedy}") from error
        body = parse_json_object(line, str(path), KIND.remedy)
        KIND.check_head(path, body)
        with KIND.reading(path):
            header = TraceHeader.from_json(body)
        count, dropped = divmod(size, header.record_type.itemsize)
        if not count:
            raise InputError(f"{path}: holds no interval; {KIND.remedy}, of a longer run")
        records = np.memmap(path, header.record_type, "r", offset=len(line), shape=(count,))
        mass = records["mass"]
        if not (mass.min() >= 0 and mass.max() < np.inf and records["tokens"].min() >= 0):
            raise InputError(
                f"{path}: its mass or tokens are negative or not finite; {KIND.remedy}"
            )
        return cls(header=header, records=records, dropped_bytes=dropped)

    def intervals(self, merge: int = 1) -> Iterator[tuple[np.ndarray, int]]:
        """(router mass [L, E], tokens) of every ``merge`` records together, at the end of fewer."""
        for start in range(0, len(self.records), merge):
            part = self.records[start : start + merge]
            mass = part["mass"][0] if len(part) == 1 else part["mass"].sum(0, dtype=np.float64)
            yield np.asarray(mass), int(part["tokens"].sum())
