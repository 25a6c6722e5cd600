"""A tile's sums to global memory: y [64, M] in the layout of accumulators (``chunk``)."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.expert_ffn.mosaic.silu import emit_silu
from pallas_kernels.expert_ffn.mosaic_mma.fragments import ACCUMULATORS
from pallas_kernels.layout import ROW_TILE
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.target import interpreting
from pallas_kernels.pages import GATE_UP_ROWS

GATED_ROWS = ROW_TILE // 2
"""Columns of the hidden rows that a tile of gate_up gives."""


def store_sums(y: jax.Array, scale: Any, factor: Any, out: Any, n: Any) -> None:
    """The sums of row tile ``n`` to out float32 [M, 64 B].

    scale float32 [M] of the input rows in shared memory; factor float32 [] multiplies all.
    """
    if interpreting():
        out[:, pl.ds(n * ROW_TILE, ROW_TILE)] = (y * (scale[...] * factor)).T
        return

    def store(where: Any, halves: list[Any]) -> None:
        for half, value in enumerate(halves):
            emit.store_words(emit.move(where, 4 * 8 * half), [emit.bits_of(value)])

    _store(y, scale, factor, out, n, store, rows_of_warp=16)


def store_gated(y: jax.Array, scale: Any, factor: Any, out: Any, n: Any) -> None:
    """``silu(gate) * up`` of row tile ``n`` of gate_up to out float32 [M, 32 B]."""
    if interpreting():
        pairs = (y * (scale[...] * factor)).reshape(-1, 2, GATE_UP_ROWS, y.shape[1])
        gated = (jax.nn.silu(pairs[:, 0]) * pairs[:, 1]).reshape(GATED_ROWS, -1)
        out[:, pl.ds(n * GATED_ROWS, GATED_ROWS)] = gated.T
        return

    def store(where: Any, halves: list[Any]) -> None:
        gate, up = halves  # rows alternate in eights
        emit.store_words(where, [emit.bits_of(arith.mulf(emit_silu(gate), up))])

    _store(y, scale, factor, out, n, store, rows_of_warp=8)


def _store(
    y: jax.Array, scale: Any, factor: Any, out: Any, n: Any,
    store: Callable[[Any, list[Any]], None], *, rows_of_warp: int,
) -> None:  # fmt: skip
    """Calls ``store(where, both halves)`` for each row of the input that a thread holds sums of."""
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(ACCUMULATORS, plgpu.RefType(), splat, plgpu.RefType(), splat))
    def run(ctx: Any, y: Any, scale: Any, factor: Any, out: Any, n: Any) -> None:
        del ctx
        stride = 4 * ir.MemRefType(out.type).shape[1]
        lane = emit.lane()
        column = emit.add(emit.mul(emit.scalar(n), 4 * rows_of_warp), emit.shift_right(lane, 2))
        column = emit.add(column, emit.mul(emit.warp(), rows_of_warp))
        first = emit.mul(emit.and_(lane, 3), 2)
        registers = list(y.registers.flat)  # column tile * 2 + half
        for tile in range(len(registers) // 2):
            m = emit.add(first, 8 * tile)
            scales = emit.load_words(emit.pointer(scale, emit.mul(m, 4)), 2)
            where = emit.pointer(out, emit.add(emit.mul(m, stride), emit.mul(column, 4)))
            for c in range(2):
                of_row = arith.mulf(emit.as_f32(scales[c]), emit.scalar(factor))
                halves = [
                    arith.mulf(vector.extract(registers[2 * tile + half], [], [c]), of_row)
                    for half in range(2)
                ]
                store(emit.move(where, stride * c), halves)

    run(y, scale, factor, out, n)
