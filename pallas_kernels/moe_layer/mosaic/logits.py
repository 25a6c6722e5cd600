"""First phase: the norm of the input and the router's logits, a warp for each (token, experts)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.target import interpreting
from pallas_kernels.mosaic.workers import BLOCK_AXIS, WARPS, Workers, warpgroup

LANE_COLUMNS = 8
"""Columns of a 16-byte access."""
COLUMNS = 32 * LANE_COLUMNS
"""Columns that a warp reads at once: the hidden size is a multiple of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitsPlan:
    """Shapes; hashable."""

    tokens: int
    hidden: int
    experts: int
    eps: float

    @property
    def experts_of_task(self) -> int:
        """So many that a warp of the grid has about one task: each needs the token's norm anew."""
        wanted = -(-self.tokens // 8)
        return next(n for n in (1, 2, 4, 8) if n >= wanted and self.experts % n == 0)


def write_logits(
    plan: LogitsPlan, workers: Workers, x: Any, norm: Any, norm_layer: Any, router: Any, layer: Any,
    h: Any, logits: Any,
) -> None:  # fmt: skip
    """h = rms_norm(x), bfloat16 [T, H], and logits = h @ router[layer].T, float32 [T, E].

    x bfloat16 [T, H], norm [L, H], router [L, E, H], all in global memory.
    """
    if interpreting():
        first = (lax.axis_index(BLOCK_AXIS) == 0) & (warpgroup() == 0)
        pl.when(first)(lambda: _twin(plan, x, norm, norm_layer, router, layer, h, logits))
        return
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 5, splat, splat, splat, splat))
    def run(
        ctx: Any, x: Any, norm: Any, router: Any, h: Any, logits: Any, norm_layer: Any, layer: Any,
        block: Any, group: Any,
    ) -> None:  # fmt: skip
        del ctx
        warp = emit.add(emit.mul(emit.scalar(group), 4), emit.warp())
        # tasks side by side go to different multiprocessors
        mine = emit.add(emit.mul(warp, workers.blocks), emit.scalar(block))
        slices = plan.experts // plan.experts_of_task
        tasks = plan.tokens * slices
        for start in range(0, tasks, workers.blocks * WARPS):
            task = emit.add(mine, start)
            branch = scf.IfOp(arith.cmpi(arith.CmpIPredicate.ult, task, emit.const(tasks)))
            with ir.InsertionPoint(branch.then_block):
                token = arith.divui(task, emit.const(slices))
                part = arith.remui(task, emit.const(slices))
                _emit(
                    plan, token, part, x, norm, emit.scalar(norm_layer), router,
                    emit.scalar(layer), h, logits,
                )  # fmt: skip
                scf.yield_([])

    block = jnp.int32(lax.axis_index(BLOCK_AXIS))
    run(x, norm, router, h, logits, norm_layer, layer, block, jnp.int32(warpgroup()))


def _twin(
    plan: LogitsPlan, x: Any, norm: Any, norm_layer: Any, router: Any, layer: Any, h: Any,
    logits: Any,
) -> None:  # fmt: skip
    wide = x[...].astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(jnp.square(wide), axis=1, keepdims=True) + plan.eps)
    normed = (wide * scale * norm[norm_layer].astype(jnp.float32)).astype(h.dtype)
    h[...] = normed
    weight = router[layer].astype(jnp.float32)
    logits[...] = jnp.dot(normed.astype(jnp.float32), weight.T, precision=lax.Precision.HIGHEST)


def _emit(
    plan: LogitsPlan, token: Any, part: Any, x: Any, norm: Any, norm_layer: Any, router: Any,
    layer: Any, h: Any, logits: Any,
) -> None:  # fmt: skip
    row_bytes = 2 * plan.hidden
    mine = emit.mul(emit.lane(), 2 * LANE_COLUMNS)
    places = [emit.add(mine, 2 * start) for start in range(0, plan.hidden, COLUMNS)]

    def read(line: Any) -> list[Any]:
        return [
            half
            for place in places
            for word in emit.load_words(emit.move(line, place), 4)
            for half in emit.bf16_pair(word)
        ]

    values = read(emit.move64(emit.pointer(x), token, row_bytes))
    weights = read(emit.move64(emit.pointer(norm), norm_layer, row_bytes))
    squares = emit.const_f32(0.0)
    for value in values:
        squares = emit.fma(value, value, squares)
    mean = arith.mulf(emit.sum_of_warp(squares), emit.const_f32(1 / plan.hidden))
    scale = emit.asm(
        "rsqrt.approx.f32 $0, $1;",
        "=f,f",
        [arith.addf(mean, emit.const_f32(plan.eps))],
        emit.f32_type(),
    )
    words = []
    for index in range(0, len(values), 2):
        pair = [
            arith.mulf(arith.mulf(value, scale), weight)
            for value, weight in zip(
                values[index : index + 2], weights[index : index + 2], strict=True
            )
        ]
        words.append(emit.to_bf16_pair(*pair))
    rounded = [half for word in words for half in emit.bf16_pair(word)]

    first = arith.cmpi(arith.CmpIPredicate.eq, part, emit.const(0))
    branch = scf.IfOp(first)
    with ir.InsertionPoint(branch.then_block):
        line = emit.move64(emit.pointer(h), token, row_bytes)
        for index, place in enumerate(places):
            emit.store_words(emit.move(line, place), words[4 * index : 4 * index + 4])
        scf.yield_([])

    of_layer = emit.move64(emit.pointer(router), layer, plan.experts * row_bytes)
    for index in range(plan.experts_of_task):
        expert = emit.add(emit.mul(part, plan.experts_of_task), index)
        total = emit.const_f32(0.0)
        for value, weight in zip(
            rounded, read(emit.move64(of_layer, expert, row_bytes)), strict=True
        ):
            total = emit.fma(value, weight, total)
        total = emit.sum_of_warp(total)
        place = emit.add(emit.mul(token, plan.experts), expert)
        emit.store_words(emit.pointer(logits, emit.mul(place, 4)), [emit.bits_of(total)])
