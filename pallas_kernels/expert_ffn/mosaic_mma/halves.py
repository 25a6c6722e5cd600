"""Codes to float16 fragments in registers: a level table as 8-byte tables of the byte permute.

Every magnitude of a level is exact in float16 with a low byte of 0 or 128, most with 0. One byte
permute fetches the high bytes of the four weights k = 16 R + 4 t + i of a row; two more spread them
to two registers of two float16, with a zero or the low bytes between.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Self

import numpy as np

from pallas_kernels.levels import LevelTable
from pallas_kernels.mosaic import emit

REGISTERS: Final = 8
"""Blocks of 16 columns in a chunk."""

_FIELD: Final = (0x11111111, 0x22222222, 0x44444444)
"""Bits 0, 1 and 2 of every nibble."""
_SIGNS: Final = 0x80808080
_SPREAD: Final = (0x5140, 0x7362)
"""Selectors of bytes (low 0, high 0, low 1, high 1) and (low 2, high 2, low 3, high 3)."""
_SPREAD_ZERO: Final = (0x1404, 0x3424)
"""The same of (zero, high 0, zero, high 1) and so on: the zero word comes second."""

Pairs = Callable[[int], tuple[Any, Any]]
"""Makes the values of a block of 16 columns: columns 4 t, 4 t + 1, and 4 t + 2, 4 t + 3."""


class Magnitudes(NamedTuple):
    """Eight float16 as the tables of a byte permute."""

    high: tuple[int, ...]
    low: tuple[int, ...]

    @classmethod
    def of(cls, magnitudes: Any) -> Self:
        """Magnitudes that are exact in e4m3, as all of a ``LevelTable`` are."""
        bits = np.zeros(8, np.uint16)
        halves = np.ravel(magnitudes).astype(np.float16)
        bits[: halves.size] = halves.view(np.uint16)
        return cls(tuple((bits >> 8).tolist()), tuple((bits & 0xFF).tolist()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfTables:
    """Magnitudes of the levels; hashable."""

    base: Magnitudes
    children: Magnitudes
    residual: Magnitudes
    residual_outer: int
    """Added to a residual's high byte under the outer magnitude: a power of two in the exponent."""

    @classmethod
    def of(cls, table: LevelTable) -> Self:
        steps = np.arange(0.5, 8)
        inner, outer = (Magnitudes.of(steps * step) for step in table.residual_step)
        difference = set(np.subtract(outer.high, inner.high).tolist())
        # only powers of two are steps whose half and 15 halves are exact in e4m3
        assert len(difference) == 1
        assert outer.low == inner.low
        return cls(
            base=Magnitudes.of(table.base),
            children=Magnitudes.of(table.children),
            residual=inner,
            residual_outer=difference.pop(),
        )


def decode_main(tables: HalfTables, planes: list[Any]) -> Pairs:
    """Words of planes 0 and 1, or 0 to 3, of one row's chunk to the values at 2 or 4 bits."""
    if len(planes) == 2:
        selectors = _selectors([None, None, planes[1]])
        return _pairs(tables.base, selectors, planes[0], None)
    return _pairs(tables.children, _selectors(planes[1:4]), planes[0], None)


def decode_residual(tables: HalfTables, outer: Any, planes: list[Any]) -> Pairs:
    """Words of plane 1 and of planes 4 to 7 to what 8 bits add to the value at 4 bits."""
    added = None
    if tables.residual_outer:
        added = (_selectors([outer, None, None]), (0, 0, 0, 0, *(tables.residual_outer,) * 4))
    return _pairs(tables.residual, _selectors(planes[1:4]), planes[0], added)


def _selectors(planes: list[Any]) -> list[Any]:
    """Nibbles of three planes, most significant first (None: absent), for each pair of blocks.

    The low half of word r selects for block 2 r, the high half for block 2 r + 1.
    """
    words = []
    for pair in range(REGISTERS // 2):
        word = None
        for plane, place in zip(planes, (2, 1, 0), strict=True):
            if plane is None:
                continue
            shifted = emit.shift_right(plane, pair - place)
            mask = _FIELD[place]
            word = emit.and_(shifted, mask) if word is None else emit.and_or(shifted, mask, word)
        words.append(word)
    return words


def _pairs(table: Magnitudes, selectors: list[Any], signs: Any, added: Any) -> Pairs:
    def make(block: int) -> tuple[Any, Any]:
        high = _lookup(table.high, selectors, block)
        if added is not None:
            high = emit.add(high, _lookup(added[1], added[0], block))
        high = emit.and_or(emit.shift_right(signs, block - 7), _SIGNS, high)
        if any(table.low):
            low = _lookup(table.low, selectors, block)
            return tuple(emit.permute_bytes(low, high, spread) for spread in _SPREAD)
        zero = emit.const(0)
        return tuple(emit.permute_bytes(high, zero, spread) for spread in _SPREAD_ZERO)

    return make


def _lookup(table: tuple[int, ...], selectors: list[Any], block: int) -> Any:
    low, high = (emit.const(emit.table_word(half)) for half in (table[:4], table[4:]))
    return emit.permute_bytes(low, high, emit.shift_right(selectors[block // 2], 16 * (block % 2)))
