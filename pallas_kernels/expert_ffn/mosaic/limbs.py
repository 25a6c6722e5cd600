"""Limbs in shared memory, in the order that wgmma reads without swizzle.

A bfloat16 has 8 significant bits and an e4m3 limb 4: with a power of two a row,

    x = scale * (high + low / 16)

is exact for all but numbers 2**15 times smaller than the largest of the row. Row m's limbs are
rows 2 m and 2 m + 1 of the operand [K/16, 2M, 16].
"""

import dataclasses
from collections.abc import Sequence
from functools import reduce
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.expert_ffn.mosaic.wgmma_step import BLOCK
from pallas_kernels.mosaic import emit, shuffle

LOW_LIMB: Final = 1 / 16
SCALE_WORDS: Final = 8
"""Words of shared memory a row: its scale, three unused, the largest number of each warp."""
_LARGEST: Final = 4 * 4
"""Offset of the largest numbers."""
_HIGHEST_EXPONENT: Final = 6  # of a scaled number: below 128, so that rounding stays finite
_LEAST_EXPONENT: Final = -100  # of a scale
_BIAS: Final = 127
_MANTISSA_BITS: Final = 23


def store_limbs_twin(limbs: Any, scale: Any, m: int, values: jax.Array) -> None:
    """Row m from its values, float32 [columns] that are bfloat16, in interpret mode."""
    bits = lax.bitcast_convert_type(jnp.max(jnp.abs(values)), jnp.int32)
    exponent = (bits >> _MANTISSA_BITS) - _HIGHEST_EXPONENT
    exponent = jnp.maximum(exponent, _BIAS + _LEAST_EXPONENT)
    power = lax.bitcast_convert_type(exponent << _MANTISSA_BITS, jnp.float32)
    scaled = values / power
    high = lax.reduce_precision(scaled, 4, 3)
    low = lax.reduce_precision((scaled - high) / LOW_LIMB, 4, 3)
    limbs[:, 2 * m, :] = high.reshape(-1, BLOCK).astype(limbs.dtype)
    limbs[:, 2 * m + 1, :] = low.reshape(-1, BLOCK).astype(limbs.dtype)
    scale[m, 0] = power


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Columns side by side of a thread: those from ``start + own`` on."""

    start: int
    """A multiple of ``BLOCK``."""
    own: Any
    row_bytes: int
    """Of 16 columns of all rows."""

    def pointer(self, limbs: Any, m: Any) -> Any:
        """To row m's high limbs of these columns; the low ones are ``BLOCK`` bytes on."""
        return self._pointer(limbs, m, emit.and_(self.own, BLOCK - 1))

    def raw_pointer(self, limbs: Any, m: Any) -> Any:
        """To the bytes of row m's limbs in which its bfloat16 come."""
        return self._pointer(limbs, m, emit.mul(emit.and_(self.own, BLOCK - 1), 2))

    def _pointer(self, limbs: Any, m: Any, within: Any) -> Any:
        block = emit.mul(emit.shift_right(self.own, BLOCK.bit_length() - 1), self.row_bytes)
        place = emit.add(emit.add(block, within), emit.mul(m, 2 * BLOCK))
        return emit.move(emit.pointer(limbs, place), self.start // BLOCK * self.row_bytes)


def pieces_of(limbs: Any, beside: int) -> list[Piece]:
    """Of a row's columns those of this thread, ``beside`` at a time.

    Where columns do not suffice for all threads, some have the same, and do the same to them.
    """
    blocks, rows, _ = ir.MemRefType(limbs.type).shape
    own, stride = emit.mul(emit.thread(), beside), emit.WARPGROUP * beside
    pieces = []
    for start in range(0, blocks * BLOCK, stride):
        left = blocks * BLOCK - start
        mine = own if left >= stride else arith.select(emit.less(own, left), own, emit.const(0))
        pieces.append(Piece(start=start, own=mine, row_bytes=rows * BLOCK))
    return pieces


def emit_limbs(
    limbs: Any, scale: Any, m: Any, pieces: list[Piece], values: list[list[Any]]
) -> None:
    """Row m's limbs and scale from the values of each piece, float32 that are bfloat16.

    Every thread of the warpgroup calls it. It has a barrier, before which nothing is written to
    the limbs; they are seen by tensor cores behind ``emit.commit_shared``.
    """
    of_row = emit.pointer(scale, emit.mul(m, 4 * SCALE_WORDS))
    flat = [value for of_piece in values for value in of_piece]
    largest = reduce(emit.max_magnitude, flat[1:], emit.magnitude(flat[0]))
    largest = shuffle.reduce_of_warp("max", emit.bits_of(largest))
    of_warps = emit.move(of_row, _LARGEST)
    warp = emit.shift_right(emit.thread(), 5)
    emit.store_words(emit.move(of_warps, emit.mul(warp, 4)), [largest])
    emit.barrier()
    largest = reduce(arith.maxui, emit.load_words(of_warps, 4))
    power = emit.and_(largest, 0xFF << _MANTISSA_BITS)
    power = emit.add(power, -_HIGHEST_EXPONENT << _MANTISSA_BITS)
    power = arith.maxsi(power, emit.const(_BIAS + _LEAST_EXPONENT << _MANTISSA_BITS))
    emit.store_words(of_row, [power])  # every thread the same
    inverse = emit.as_f32(arith.subi(emit.const(2 * _BIAS << _MANTISSA_BITS), power))
    for piece, of_piece in zip(pieces, values, strict=True):
        scaled = [arith.mulf(value, inverse) for value in of_piece]
        pairs = [_limbs_of_pair(*scaled[i : i + 2]) for i in range(0, len(scaled), 2)]
        where = piece.pointer(limbs, m)
        for place, halves in enumerate(zip(*pairs, strict=True)):
            _store_halves(emit.move(where, place * BLOCK), halves)


def _limbs_of_pair(a: Any, b: Any) -> tuple[Any, Any]:
    """Two bytes of high limbs and two of low ones. A float16 holds whatever limbs hold of a
    number, and what the high limb leaves."""
    both = emit.to_f16_pair(a, b)
    high = emit.to_e4m3_pair(both)
    rest = emit.sub_f16_pair(both, emit.from_e4m3_pair(high))
    return high, emit.to_e4m3_pair(emit.mul_f16_pair(rest, 1 / LOW_LIMB))


def _store_halves(where: Any, halves: Sequence[Any]) -> None:
    if len(halves) == 1:
        emit.store_half(where, halves[0])
        return
    words = [emit.join_halves(*halves[i : i + 2]) for i in range(0, len(halves), 2)]
    emit.store_words(where, words)
