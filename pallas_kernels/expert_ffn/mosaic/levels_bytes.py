"""Codes to float8 bytes in registers: a level table as the 8-byte tables of the byte permute.

A register holds the four weights k = 16 R + 4 t + i of a row, as e4m3 bytes (tensor cores that take
float8) or e5m2 bytes, which are the high bytes of float16 (those that do not).
"""

import dataclasses
from typing import Any, Final, Self

import ml_dtypes
import numpy as np

from pallas_kernels.levels import Bits, LevelTable
from pallas_kernels.mosaic import emit

REGISTERS: Final = 8
"""Registers that a lane makes of the words of one chunk and row."""

_SIGNS = 0x80808080


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteTables:
    """Magnitudes of the levels as bytes of one float8 type; hashable.

    Raises ValueError for a level table that the byte permute cannot serve.
    """

    base: tuple[int, ...]
    children: tuple[int, ...]
    residual: tuple[int, ...]
    residual_outer: int
    """Added to a residual's byte under the outer magnitude: a power of two in the exponent."""

    @classmethod
    def of(cls, table: LevelTable, dtype: Any = ml_dtypes.float8_e4m3fn) -> Self:
        def to_bytes(magnitudes: Any) -> tuple[int, ...]:
            exact = np.asarray(magnitudes, np.float32)
            rounded = exact.astype(dtype)
            if not np.array_equal(rounded.astype(np.float32), exact):
                raise ValueError(f"magnitudes {exact} are not exact in {np.dtype(dtype).name}")
            return tuple(rounded.view(np.uint8).tolist())

        steps = np.arange(0.5, 8)
        inner = to_bytes(steps * table.residual_step[0])
        outer = to_bytes(steps * table.residual_step[1])
        difference = set(np.subtract(outer, inner).tolist())
        if len(difference) != 1:
            raise ValueError(
                "a kernel needs residual steps whose ratio is a power of two and whose halves "
                f"are normal in {np.dtype(dtype).name}, got {table.residual_step}"
            )
        return cls(
            base=to_bytes(table.base),
            children=to_bytes(np.ravel(table.children)),
            residual=inner,
            residual_outer=difference.pop(),
        )


def held_word(tables: ByteTables, bits: Bits) -> Any:
    """Of a level's table the word for ``decode_chunk``: once, ahead of loops over chunks."""
    magnitudes = tables.base * 2 if bits == 2 else tables.children[:4]
    return _opaque(_word(magnitudes))


def decode_chunk(
    tables: ByteTables, planes: list[Any], held: Any
) -> tuple[list[Any], list[Any] | None]:
    """Words of the planes of one row's chunk to registers of bytes: main, and residual at 8 bits.

    ``planes`` has 2, 4 or 8 words; held: ``held_word``. The weight is main + residual.
    """
    if len(planes) == 2:
        return _lookup_one(held, *planes), None
    selectors = _selectors(*planes[1:4])
    main = _lookup(held, tables.children[4:], selectors, planes[0])
    if len(planes) == 4:
        return main, None
    low = _word_from(held, tables.children[:4], tables.residual[:4])
    of_outer = (tables.residual_outer,) * 4
    residual = _lookup(low, tables.residual[4:], _selectors(*planes[5:8]), None)
    by_outer = _lookup(emit.const(0), of_outer, selectors, None)
    signed = [
        _with_sign(emit.add(r, o), planes[4], index)
        for index, (r, o) in enumerate(zip(residual, by_outer, strict=True))
    ]
    return main, signed


def _lookup_one(word: Any, signs: Any, plane: Any) -> list[Any]:
    """Two magnitudes by one plane of bits, with their signs; word: both, twice.

    A nibble of the plane holds the bits of the four pairs of registers, and a table for each pair
    looks at its bit alone: nothing is moved to the lowest bit. The highest of a nibble would
    repeat a sign, so it is cleared, and that of the last pair takes the place of the one below.
    """

    def bytes_of(selector: int) -> Any:
        return emit.permute_bytes(word, word, selector)

    by_pair = [(word, word), (bytes_of(0x1100),) * 2, (bytes_of(0x0000), bytes_of(0x1111))]
    kept = emit.and_(plane, 0x77777777)
    last = emit.and_(emit.shift_right(plane, 1), 0x77777777)
    registers = []
    for index in range(REGISTERS):
        pair = index // 2
        selector = emit.shift_right(kept if pair < 3 else last, 16 * (index % 2))
        magnitude = emit.permute_bytes(*by_pair[min(pair, 2)], selector)
        registers.append(_with_sign(magnitude, signs, index))
    return registers


def _selectors(two: Any, one: Any, zero: Any) -> list[Any]:
    """Nibbles of three planes, most significant first, in such words.

    Transposes the bits of each nibble in two rounds of exchanges.
    """

    def merge(a: Any, mask: int, b: Any) -> Any:
        """``(a & mask) | (b & ~mask)``"""
        return emit.lop3(a, emit.const(mask), b, 0xE2)

    low = merge(zero, 0x33333333, emit.shift_right(two, -2))  # bits 0, 1: of pairs 0 and 1
    high = merge(emit.shift_right(zero, 2), 0x33333333, two)
    low_one = emit.and_(one, 0x33333333)
    high_one = emit.and_(emit.shift_right(one, 2), 0x33333333)
    return [
        merge(low, 0x55555555, emit.shift_right(low_one, -1)),
        merge(emit.shift_right(low, 1), 0x55555555, low_one),
        merge(high, 0x55555555, emit.shift_right(high_one, -1)),
        merge(emit.shift_right(high, 1), 0x55555555, high_one),
    ]


def _opaque(word: Any) -> Any:
    """The same word, which the assembler takes for a variable: it would move a constant to a new
    register before each of its uses."""
    text = (
        "{ .reg .b32 t; mov.u32 t, %laneid; add.u32 t, t, $1; "
        "shfl.sync.idx.b32 $0, t, 0, 31, 0xffffffff; }"
    )
    return emit.asm(text, "=r,r", [word], emit.i32_type())


def _word(magnitudes: tuple[int, ...]) -> Any:
    return emit.const(emit.table_word(magnitudes))


def _word_from(held: Any, magnitudes: tuple[int, ...], others: tuple[int, ...]) -> Any:
    """Word of the others out of that of the magnitudes, which is opaque."""
    return emit.xor(held, emit.table_word(magnitudes) ^ emit.table_word(others))


def _lookup(low: Any, high: tuple[int, ...], selectors: list[Any], signs: Any) -> list[Any]:
    """By nibbles in a table of eight: the word of the first four, and the others."""
    registers = []
    for index in range(REGISTERS):
        selector = emit.shift_right(selectors[index // 2], 16 * (index % 2))
        magnitude = emit.permute_bytes(low, _word(high), selector)
        registers.append(magnitude if signs is None else _with_sign(magnitude, signs, index))
    return registers


def _with_sign(magnitude: Any, signs: Any, register: int) -> Any:
    return emit.and_or(emit.shift_right(signs, register - 7), _SIGNS, magnitude)
