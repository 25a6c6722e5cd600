"""A tile's sums to global memory.

The sums y [64, 2M] are in the layout of wgmma's accumulators: a thread (warp, g, t) holds rows
16 warp + g and 16 warp + 8 + g at columns 8 j + 2 t and + 1, which are the two limbs of input row
4 j + t. So the limbs meet in one thread.

In memory the two rows of a thread are neighbours: row 16 warp + 8 half + g is at place
16 warp + 2 g + half. Of gate_up's sums these are gate and up of one unit.
"""

from functools import partial
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.expert_ffn.mosaic.limbs import LOW_LIMB, SCALE_WORDS
from pallas_kernels.expert_ffn.mosaic.wgmma_step import ACCUMULATORS
from pallas_kernels.layout import ROW_TILE
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.loops import when
from pallas_kernels.mosaic.presence import emit_store
from pallas_kernels.mosaic.target import interpreting


def store_sums(
    y: Any, scale: Any, rows: Any, factor: Any, out: Any, *, most: int, first: Any, tell: bool
) -> None:
    """Writes the sums, times the scale of their input row, to out float32 [M, N].

    ``first``: the first of the 64 places; scale as ``make_limbs`` leaves it; rows int32 [M] in
    shared memory: -1 is a row that nothing is written for, as are those from ``most`` on; factor
    float32 [] multiplies all (the base of a matrix's log8 scales); ``tell``: whoever waits for one
    of the sums (``mosaic/presence.py``) may have it.
    """
    if interpreting():
        sums = (y[:, 0::2] + y[:, 1::2] * LOW_LIMB) * scale[:, 0] * factor
        out[:, pl.ds(first, ROW_TILE)] = _swap(sums.T, 2, 8)
        return
    splat = plgpu.Layout.WG_SPLAT

    ref = plgpu.RefType()

    @plgpu.inline_mgpu(arg_types=(ACCUMULATORS, ref, ref, splat, ref, splat))
    def run(ctx: Any, y: Any, scale: Any, rows: Any, factor: Any, out: Any, first: Any) -> None:
        del ctx
        stride = 4 * ir.MemRefType(out.type).shape[1]
        lane = emit.lane()
        place = emit.mul(emit.shift_right(emit.thread(), 2), 2)  # 16 warp + 2 g
        place = emit.mul(emit.add(place, emit.scalar(first)), 4)
        registers = list(y.registers.flat)  # column tile * 2 + half
        for tile in range(-(-most // 4)):
            row = emit.add(emit.and_(lane, 3), 4 * tile)
            (bits,) = emit.load_words(emit.pointer(scale, emit.mul(row, 4 * SCALE_WORDS)), 1)
            present = emit.less(row, most)
            if most > 1:  # else the first row is there
                (number,) = emit.load_words(emit.pointer(rows, emit.mul(row, 4)), 1)
                present = emit.less(-1, number)
            of_row = arith.mulf(emit.as_f32(bits), emit.scalar(factor))
            totals = []
            for pair in registers[2 * tile : 2 * tile + 2]:
                high, low = (vector.extract(pair, [], [c]) for c in range(2))
                total = arith.mulf(emit.fma(low, emit.const_f32(LOW_LIMB), high), of_row)
                totals.append(emit.bits_of(total))
            where = emit.pointer(out, emit.add(emit.mul(row, stride), place))
            when(present, partial(emit_store if tell else emit.store_words, where, totals))

    run(y, scale, rows, factor, out, first)


def row_of_place(place: Any) -> Any:
    """The row whose sum is at a place, a register."""
    within = emit.add(emit.and_(emit.shift_right(place, 1), 7), emit.mul(emit.and_(place, 1), 8))
    return emit.add(emit.and_(place, -16), within)


def in_order_of_rows(sums: jax.Array) -> jax.Array:
    """Sums [..., N] as they lie in memory, row by row."""
    return _swap(sums, 8, 2)


def _swap(sums: jax.Array, *sizes: int) -> jax.Array:
    """Exchanges the two axes of these sizes that the last axis is made of, in sixteens."""
    return sums.reshape(*sums.shape[:-1], -1, *sizes).swapaxes(-1, -2).reshape(sums.shape)
