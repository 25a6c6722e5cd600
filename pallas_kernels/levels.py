"""The precision ladder: what a code means at 2, 4 and 8 bits, in units of its group's scale.

A code is nested: the first two bits are the 2-bit code, the first four the 4-bit code.

    bit 0    sign
    bit 1    outer: picks one of two base magnitudes (2 bits: +-base[outer])
    bits 2-3 child: picks one of four magnitudes under it (4 bits: +-children[outer][child])
    bit 4    sign of the residual
    bits 5-7 m, magnitude of the residual: (m + 1/2) * residual_step[outer]

and at 8 bits the value is the 4-bit value plus the residual. Every magnitude is exact in float8
e4m3, so that a kernel may feed table bytes to the tensor cores as they are.
"""

import dataclasses
import functools
from typing import Any, Final, Literal, Self

import ml_dtypes
import numpy as np

Bits = Literal[2, 4, 8]

LEVEL_BITS: Final[tuple[Bits, ...]] = (2, 4, 8)
"""Cumulative bits of each level."""

PAGES_OF_BITS: Final[dict[int, int]] = {2: 1, 4: 2, 8: 4}
"""Pages that an expert holds at each precision, those below included."""


def level_of_bits(bits: int) -> int:
    """Level (0, 1, 2) that has ``bits`` cumulative bits. Raises ValueError for other bits."""
    if bits not in LEVEL_BITS:
        raise ValueError(f"bits must be one of {LEVEL_BITS}, got {bits}")
    return LEVEL_BITS.index(bits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelTable:
    """Magnitudes of every level, in units of the scale; hashable, so static under jit.

    Raises ValueError if a magnitude is not positive, not ascending or not exact in e4m3.
    """

    base: tuple[float, float]
    children: tuple[tuple[float, float, float, float], tuple[float, float, float, float]]
    residual_step: tuple[float, float]

    def __post_init__(self) -> None:
        shapes = (np.shape(self.base), np.shape(self.children), np.shape(self.residual_step))
        if shapes != ((2,), (2, 4), (2,)):
            raise ValueError(
                "a level table has base [2], children [2][4] and residual_step [2], "
                f"got shapes {shapes}"
            )
        half_steps = np.arange(0.5, 8.0)
        named = {
            "base": np.asarray(self.base),
            "children": np.asarray(self.children).reshape(-1),
            "residual_step[0]": half_steps * self.residual_step[0],
            "residual_step[1]": half_steps * self.residual_step[1],
        }
        for name, magnitudes in named.items():
            if not np.all(np.diff(magnitudes, prepend=0.0) > 0):
                raise ValueError(
                    f"level table: {name} must be positive and ascending: {magnitudes}"
                )
            if not np.array_equal(magnitudes, magnitudes.astype(ml_dtypes.float8_e4m3fn)):
                raise ValueError(f"level table: {name} must be exact in e4m3: {magnitudes}")

    def values(self, bits: int) -> np.ndarray:
        """Value of each code prefix of ``bits`` bits: float32 [2**bits]."""
        level_of_bits(bits)
        return _values(self, bits)

    def to_json(self) -> dict[str, Any]:
        """The table as plain JSON data, for a checkpoint's header."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Inverse of ``to_json``. Raises ValueError for missing or extra fields."""
        fields = {field.name for field in dataclasses.fields(cls)}
        if set(data) != fields:
            raise ValueError(f"a level table has fields {sorted(fields)}, got {sorted(data)}")
        inner, outer = data["children"]
        return cls(
            base=tuple(data["base"]),
            children=(tuple(inner), tuple(outer)),
            residual_step=tuple(data["residual_step"]),
        )


@functools.cache
def _values(table: LevelTable, bits: int) -> np.ndarray:
    code = np.arange(2**bits)
    sign = 1.0 - 2.0 * (code >> (bits - 1) & 1)
    outer = code >> (bits - 2) & 1
    if bits == 2:
        magnitude = np.asarray(table.base)[outer]
    else:
        magnitude = np.asarray(table.children)[outer, code >> (bits - 4) & 3]
    values = sign * magnitude
    if bits == 8:
        residual_sign = 1.0 - 2.0 * (code >> 3 & 1)
        values = (
            values + residual_sign * ((code & 7) + 0.5) * np.asarray(table.residual_step)[outer]
        )
    values = values.astype(np.float32)
    values.flags.writeable = False
    return values


DEFAULT_TABLE: Final = LevelTable(
    base=(0.5, 1.75),
    children=((7 / 64, 3 / 8, 5 / 8, 7 / 8), (5 / 4, 3 / 2, 2.0, 5 / 2)),
    residual_step=(1 / 32, 1 / 16),
)
"""Where it comes from: ``docs/format.md``; what other residual steps give:
``docs/results/quantizer.md``."""
