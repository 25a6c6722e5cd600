"""Codes to pairs of bfloat16 in registers, by byte permutes.

The magnitudes of a level table have few significant bits, so a bfloat16's high byte and its low
byte are looked up alike, from 8-byte tables by the same selectors, and then interleaved. A register
of four weights k = 16 R + 4 t + i becomes two: pair 0 holds i = 0, 1 and pair 1 holds i = 2, 3.
"""

import dataclasses
from typing import Any, Final, Self

import ml_dtypes
import numpy as np

from pallas_kernels.levels import LevelTable
from pallas_kernels.mosaic import emit

REGISTERS: Final = 4
"""Registers (of 16 columns each) that are decoded together: half a chunk."""

_SIGNS = 0x80808080
_LOW_BITS = 0x33333333  # bits 0 and 1 of every nibble
_EVEN_BITS = 0x55555555
_LOWEST_BIT = 0x11111111
_SELECT = 0xCA  # of lop3: a ? b : c, bit by bit
_INTERLEAVE = (0x5140, 0x7362)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairTables:
    """Magnitudes of the levels as the (low, high) bytes of bfloat16; hashable."""

    base: tuple[tuple[int, ...], tuple[int, ...]]
    children: tuple[tuple[int, ...], tuple[int, ...]]
    residual: tuple[Any, Any]
    """Under the inner and under the outer magnitude."""

    @classmethod
    def of(cls, table: LevelTable) -> Self:
        def to_bytes(magnitudes: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
            """Exact: an e4m3, which every magnitude is, is a bfloat16."""
            padded = np.zeros(8, np.float32)
            padded[: np.size(magnitudes)] = np.ravel(magnitudes)
            halves = padded.astype(ml_dtypes.bfloat16).view(np.uint16)
            return tuple((halves & 255).tolist()), tuple((halves >> 8).tolist())

        steps = np.arange(0.5, 8)
        inner, outer = (to_bytes(steps * step) for step in table.residual_step)
        return cls(
            base=to_bytes(table.base), children=to_bytes(table.children), residual=(inner, outer)
        )


def decode_half_chunk(tables: PairTables, planes: list[Any], half: int) -> list[tuple[Any, Any]]:
    """Words of the planes of one row's chunk to pairs of unscaled weights.

    ``planes`` has 2, 4 or 8 words; ``half`` says which registers: R = 4 half to 4 half + 3, each
    of which gives (pair 0, pair 1). At 8 bits main and residual are added, and rounded to the 8
    bits of a bfloat16 where the sum has more (that of the default table has not).
    """
    if len(planes) == 2:
        words = [emit.and_(emit.shift_right(planes[1], 2 * half + p), _LOWEST_BIT) for p in (0, 1)]
        return _signed_pairs(_lookup(tables.base, _by_register(words)), planes[0], half)
    selectors = _by_register(_selectors(planes[1:4], half))
    main = _signed_pairs(_lookup(tables.children, selectors), planes[0], half)
    if len(planes) == 4:
        return main
    outer = [emit.permute_bytes(emit.const(0), emit.const(0xFFFFFFFF), s) for s in selectors]
    steps = _by_register(_selectors(planes[5:8], half))
    both = [_lookup(table, steps) for table in tables.residual]
    chosen = [
        tuple(emit.lop3(o, b, a, _SELECT) for a, b in zip(inner, outside, strict=True))
        for o, inner, outside in zip(outer, *both, strict=True)
    ]
    residual = _signed_pairs(chosen, planes[4], half)
    return [
        tuple(_add(a, b) for a, b in zip(m, r, strict=True))
        for m, r in zip(main, residual, strict=True)
    ]


def scale_pair(pair: Any, scale: Any) -> Any:
    """Product of two bfloat16 pairs, rounded."""
    return emit.asm("mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [pair, scale], emit.i32_type())


def _add(a: Any, b: Any) -> Any:
    return emit.asm("add.rn.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], emit.i32_type())


def _selectors(planes: list[Any], half: int) -> list[Any]:
    """Nibbles of three planes, most significant first, for the two pairs of registers of a half.

    This transposes the 4 x 4 bits of (plane 3, 2, 1, none) x (pair 0 to 3) in every nibble, in two
    stages of swaps, of which each half chunk needs its own part.
    """
    bit2, bit1, bit0 = planes
    if half == 0:
        even = emit.lop3(emit.const(_LOW_BITS), bit0, emit.shift_right(bit2, -2), _SELECT)
        odd = emit.and_(bit1, _LOW_BITS)
    else:
        even = emit.lop3(emit.const(_LOW_BITS), emit.shift_right(bit0, 2), bit2, _SELECT)
        odd = emit.and_(emit.shift_right(bit1, 2), _LOW_BITS)
    mask = emit.const(_EVEN_BITS)
    return [
        emit.lop3(mask, even, emit.shift_right(odd, -1), _SELECT),
        emit.lop3(mask, emit.shift_right(even, 1), odd, _SELECT),
    ]


def _by_register(words: list[Any]) -> list[Any]:
    """A selector a register: a byte permute reads the low 16 bits only."""
    return [emit.shift_right(words[index // 2], 16 * (index % 2)) for index in range(REGISTERS)]


def _lookup(tables: Any, selectors: list[Any]) -> list[tuple[Any, Any]]:
    """(low bytes, high bytes) of each register."""
    words = [[emit.const(emit.table_word(part)) for part in (t[:4], t[4:])] for t in tables]
    return [tuple(emit.permute_bytes(a, b, s) for a, b in words) for s in selectors]


def _signed_pairs(
    magnitudes: list[tuple[Any, Any]], signs: Any, half: int
) -> list[tuple[Any, Any]]:
    pairs = []
    for index, (low, high) in enumerate(magnitudes):
        shifted = emit.shift_right(signs, REGISTERS * half + index - 7)
        high = emit.and_or(shifted, _SIGNS, high)
        pairs.append(tuple(emit.permute_bytes(low, high, s) for s in _INTERLEAVE))
    return pairs
