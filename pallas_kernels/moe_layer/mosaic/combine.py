"""Last phase: every token's weighted sum over its experts, and the residual."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.expert_ffn.mosaic.sums import in_order_of_rows, row_of_place
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.target import interpreting
from pallas_kernels.mosaic.workers import Workers

COMBINE_COLUMNS = emit.WARPGROUP
"""Columns of an output row that a worker combines at a time, one a thread."""


def combine(workers: Workers, sums: Any, place: Any, weights: Any, residual: Any, out: Any) -> None:
    """out[t] = residual[t] + sum_j weights[t, j] * sums[place[t, j]], in the order of j.

    sums float32 [I, M, H] in the order of ``store_sums``, residual and out [T, H] in global memory;
    place int32 and weights float32 [T, k] in shared memory; -1 is no place. A worker does 128
    columns of a token at a time.
    """
    tokens, hidden = out.shape
    top_k, rows = place.shape[1], sums.shape[1]
    slices = hidden // COMBINE_COLUMNS
    start, end = workers.share(tokens * slices)

    def do(item: Any, _: Any) -> Any:
        token, first = item // slices, (item % slices) * COMBINE_COLUMNS
        if interpreting():
            columns = pl.ds(first, COMBINE_COLUMNS)
            total = jnp.zeros(COMBINE_COLUMNS, jnp.float32)
            for j in range(top_k):
                where = place[token, j]
                row = jnp.maximum(where, 0)
                y = in_order_of_rows(sums[row // rows, row % rows, columns])
                total = total + jnp.where(where < 0, 0.0, weights[token, j] * y)
            y = residual[token, columns].astype(jnp.float32) + total
            out[token, columns] = y.astype(out.dtype)
        else:
            _emit_combine(sums, place, weights, residual, out, token, first)
        return 0

    lax.fori_loop(start, end, do, 0)


def _emit_combine(
    sums: Any, place: Any, weights: Any, residual: Any, out: Any, token: Any, first: Any
) -> None:
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 5, splat, splat))
    def run(
        ctx: Any, sums: Any, place: Any, weights: Any, residual: Any, out: Any, token: Any,
        first: Any,
    ) -> None:  # fmt: skip
        del ctx
        width = ir.MemRefType(sums.type).shape[-1]
        top_k = ir.MemRefType(place.type).shape[1]
        hidden = ir.MemRefType(out.type).shape[1]
        token, first = emit.scalar(token), emit.scalar(first)
        of_token = emit.mul(token, 4 * top_k)
        where_place, where_weight = emit.pointer(place, of_token), emit.pointer(weights, of_token)
        start = emit.move(emit.pointer(sums), emit.mul(emit.add(emit.thread(), first), 4))
        zero = emit.const(0)
        values = []
        for j in range(top_k):
            (row,) = emit.load_words(emit.move(where_place, 4 * j), 1)
            (weight,) = emit.load_words(emit.move(where_weight, 4 * j), 1)
            missing = arith.cmpi(arith.CmpIPredicate.slt, row, zero)
            (y,) = emit.load_words(
                emit.move64(start, arith.select(missing, zero, row), 4 * width), 1
            )
            # what an unused row holds may be anything, so it must not be multiplied
            values.append((weight, arith.select(missing, zero, y)))
        total = emit.const_f32(0.0)
        for weight, y in values:
            total = emit.fma(emit.as_f32(weight), emit.as_f32(y), total)
        at = emit.mul(emit.add(row_of_place(emit.thread()), first), 2)
        before = emit.load_half(
            emit.move(emit.move64(emit.pointer(residual), token, 2 * hidden), at)
        )
        total = arith.addf(total, emit.as_f32(emit.shift_right(before, -16)))
        emit.store_bf16(emit.move(emit.move64(emit.pointer(out), token, 2 * hidden), at), total)

    run(sums, place, weights, residual, out, token, first)
