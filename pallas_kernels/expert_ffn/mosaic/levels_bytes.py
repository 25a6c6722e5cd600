"""Codes to float8 bytes in registers: a level table as the 8-byte tables of the byte permute.

A register holds the four weights k = 16 R + 4 t + i of a row, as e4m3 bytes (tensor cores that take
float8) or e5m2 bytes, which are the high bytes of float16 (those that do not).
"""

import dataclasses
from typing import Any, Final, Self

import ml_dtypes
import numpy as np

from pallas_kernels.levels import LevelTable
from pallas_kernels.mosaic import emit

REGISTERS: Final = 8
"""Registers that a lane makes of the words of one chunk and row."""

_FIELD = (0x44444444, 0x22222222, 0x11111111)
"""Bits 2, 1 and 0 of every nibble."""
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
            base=(*to_bytes(table.base), 0, 0),
            children=to_bytes(np.ravel(table.children)),
            residual=inner,
            residual_outer=difference.pop(),
        )


def decode_chunk(tables: ByteTables, planes: list[Any]) -> tuple[list[Any], list[Any] | None]:
    """Words of the planes of one row's chunk to registers of bytes: main, and residual at 8 bits.

    ``planes`` has 2, 4 or 8 words. The weight is main + residual.
    """
    if len(planes) == 2:
        selectors = _selectors([None, None, planes[1]])
        main = _lookup((*tables.base, 0, 0, 0, 0), selectors, planes[0])
        return main, None
    selectors = _selectors(planes[1:4])
    main = _lookup(tables.children, selectors, planes[0])
    if len(planes) == 4:
        return main, None
    residual = _lookup(tables.residual, _selectors(planes[5:8]), None)
    by_outer = _lookup((0, 0, 0, 0, *(tables.residual_outer,) * 4), selectors, None)
    signed = [
        _with_sign(emit.add(r, o), planes[4], index)
        for index, (r, o) in enumerate(zip(residual, by_outer, strict=True))
    ]
    return main, signed


def _selectors(planes: list[Any]) -> list[Any]:
    """Nibbles of three planes, most significant first (None: absent), for each pair of registers.

    The low half of word r selects for register 2 r, the high half for register 2 r + 1.
    """
    words = []
    for pair in range(REGISTERS // 2):
        word = None
        for plane, place in zip(planes, (2, 1, 0), strict=True):
            if plane is None:
                continue
            shifted = emit.shift_right(plane, pair - place)
            mask = _FIELD[2 - place]
            word = emit.and_(shifted, mask) if word is None else emit.and_or(shifted, mask, word)
        words.append(word)
    return words


def _lookup(table: tuple[int, ...], selectors: list[Any], signs: Any) -> list[Any]:
    low, high = (emit.const(emit.table_word(half)) for half in (table[:4], table[4:]))
    registers = []
    for index in range(REGISTERS):
        selector = emit.shift_right(selectors[index // 2], 16 * (index % 2))
        magnitude = emit.permute_bytes(low, high, selector)
        registers.append(magnitude if signs is None else _with_sign(magnitude, signs, index))
    return registers


def _with_sign(magnitude: Any, signs: Any, register: int) -> Any:
    return emit.and_or(emit.shift_right(signs, register - 7), _SIGNS, magnitude)
