"""A tile's sums to global memory.

The sums y [64, 2M] are in the layout of wgmma's accumulators: a thread (warp, g, t) holds rows
16 warp + g and 16 warp + 8 + g at columns 8 j + 2 t and + 1, which are the two limbs of input row
4 j + t. So the limbs meet in one thread.
"""

from functools import partial
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.expert_ffn.mosaic.input_rows import LOW_LIMB, SCALE_WORDS
from pallas_kernels.expert_ffn.mosaic.wgmma_step import ACCUMULATORS
from pallas_kernels.layout import ROW_TILE
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.loops import when
from pallas_kernels.mosaic.target import interpreting


def store_sums(y: Any, scale: Any, rows: Any, factor: Any, out: Any, first: Any) -> None:
    """Writes the sums, times the scale of their input row, to out float32 [M, N].

    ``first``: the first of the 64 columns; scale as ``make_limbs`` leaves it; rows int32 [M] in
    shared memory: -1 is a row that nothing is written for; factor float32 []
    multiplies all (the base of a matrix's log8 scales).
    """
    if interpreting():
        sums = (y[:, 0::2] + y[:, 1::2] * LOW_LIMB) * scale[:, 0] * factor
        out[:, pl.ds(first, ROW_TILE)] = sums.T
        return
    splat = plgpu.Layout.WG_SPLAT

    ref = plgpu.RefType()

    @plgpu.inline_mgpu(arg_types=(ACCUMULATORS, ref, ref, splat, ref, splat))
    def run(ctx: Any, y: Any, scale: Any, rows: Any, factor: Any, out: Any, first: Any) -> None:
        del ctx
        stride = 4 * ir.MemRefType(out.type).shape[1]
        lane = emit.lane()
        column = emit.add(emit.shift_right(lane, 2), emit.mul(emit.warp(), 16))
        column = emit.add(column, emit.scalar(first))
        registers = list(y.registers.flat)  # column tile * 2 + half
        for tile in range(len(registers) // 2):
            row = emit.add(emit.and_(lane, 3), 4 * tile)
            (bits,) = emit.load_words(emit.pointer(scale, emit.mul(row, 4 * SCALE_WORDS)), 1)
            (number,) = emit.load_words(emit.pointer(rows, emit.mul(row, 4)), 1)
            present = emit.less(-1, number)
            of_row = arith.mulf(emit.as_f32(bits), emit.scalar(factor))
            where = emit.pointer(out, emit.add(emit.mul(row, stride), emit.mul(column, 4)))
            for half in range(2):
                pair = registers[2 * tile + half]
                high, low = (vector.extract(pair, [], [c]) for c in range(2))
                total = arith.mulf(emit.fma(low, emit.const_f32(LOW_LIMB), high), of_row)
                place = emit.move(where, 4 * 8 * half)
                when(present, partial(emit.store_words, place, [emit.bits_of(total)]))

    run(y, scale, rows, factor, out, first)
