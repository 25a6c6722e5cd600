"""First phase: the norm of the input and the router's logits, a worker for each expert.

Where there are more workers than experts, some share an expert and take every so many tokens. A
worker norms each of its tokens anew, which costs less than waiting for others.

Who reads a logit waits for it alone (``mosaic/presence.py``).
"""

import dataclasses
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels.mosaic import emit, shuffle
from pallas_kernels.mosaic.counts import emit_add_one
from pallas_kernels.mosaic.loops import loop, when
from pallas_kernels.mosaic.presence import emit_store
from pallas_kernels.mosaic.target import interpreting
from pallas_kernels.mosaic.workers import BLOCK_AXIS, Workers, warpgroup

PIECE = 8
"""Columns of a 16-byte access."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitsPlan:
    """Shapes; hashable."""

    tokens: int
    hidden: int
    experts: int
    eps: float

    def sharing(self, workers: int) -> int:
        """Workers of an expert."""
        return min(max(workers // self.experts, 1), self.tokens)


def write_logits(
    plan: LogitsPlan, workers: Workers, x: Any, norm: Any, norm_layer: Any, router: Any, layer: Any,
    h: Any, count: Any, logits: Any, scratch: Any,
) -> None:  # fmt: skip
    """h = rms_norm(x), bfloat16 [T, H], and logits = h @ router[layer].T, float32 [T, E].

    x bfloat16 [T, H], norm [L, H], router [L, E, H], all in global memory; scratch float32 [.., 8]
    in shared memory of the worker. ``count``: of the workers that have stored their part of h,
    ``plan.sharing`` in the end.
    """
    if interpreting():
        first = (lax.axis_index(BLOCK_AXIS) == 0) & (warpgroup() == 0)
        pl.when(first)(lambda: _twin(plan, x, norm, norm_layer, router, layer, h, logits))
        return
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 7, splat, splat, splat))
    def run(ctx: Any, *args: Any) -> None:
        del ctx
        refs, (norm_layer, layer, worker) = args[:7], map(emit.scalar, args[7:])
        x, norm, router, *others = map(emit.pointer, refs)
        norm = emit.move64(norm, norm_layer, 2 * plan.hidden)
        router = emit.move64(router, layer, 2 * plan.hidden * plan.experts)
        emit_logits(plan, worker, workers.count, x, norm, router, *others)

    # workers side by side are on different multiprocessors
    worker = jnp.int32(warpgroup() * workers.blocks + lax.axis_index(BLOCK_AXIS))
    run(x, norm, router, h, count, logits, scratch, norm_layer, layer, worker)


def emit_logits(
    plan: LogitsPlan, worker: Any, workers: int, x: Any, norm: Any, router: Any, h: Any, count: Any,
    logits: Any, scratch: Any,
) -> None:  # fmt: skip
    """``write_logits`` inside ``plgpu.inline_mgpu``, of pointers; norm and router of the layer."""
    sharing, experts = plan.sharing(workers), emit.const(plan.experts)

    def do(task: Any) -> None:
        expert, first = arith.remui(task, experts), arith.divui(task, experts)
        of_expert = emit.move64(router, expert, 2 * plan.hidden)
        writes_h = arith.cmpi(arith.CmpIPredicate.eq, expert, emit.const(0))
        _emit(plan, expert, writes_h, first, sharing, x, norm, of_expert, h, logits, scratch)
        when(writes_h, partial(emit_add_one, count))

    loop(worker, sharing * plan.experts, workers, do)


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
    plan: LogitsPlan, expert: Any, writes_h: Any, first: Any, stride: int, x: Any, norm: Any,
    router: Any, h: Any, logits: Any, scratch: Any,
) -> None:  # fmt: skip
    """Tokens ``first``, ``first + stride`` and so on with one expert; all else are pointers."""
    places = []  # (offset, whether there is one) of each piece of a row of this thread
    for start in range(0, plan.hidden, PIECE * emit.WARPGROUP):
        column = emit.add(emit.mul(emit.thread(), PIECE), start)
        whole = start + PIECE * emit.WARPGROUP <= plan.hidden
        exists = None if whole else emit.less(column, plan.hidden)
        places.append((emit.mul(column, 2), exists))

    def read(line: Any) -> list[Any]:
        return [
            word
            for place, exists in places
            for word in emit.load_if(exists, emit.move(line, place), 4, "shared")
        ]

    def line_of(token: Any, ref: Any) -> Any:
        return emit.move64(ref, token, 2 * plan.hidden)

    def sum_of_warps(value: Any, place: int) -> Any:
        where = emit.move(scratch, place)
        total = emit.bits_of(shuffle.sum_of_warp(value))
        emit.store_words(emit.move(where, emit.mul(emit.warp(), 4)), [total])
        emit.barrier()
        a, b, c, d = map(emit.as_f32, emit.load_words(where, 4))
        return arith.addf(arith.addf(a, b), arith.addf(c, d))

    def do(token: Any, *words: Any) -> list[Any]:
        after = arith.minui(emit.add(token, stride), emit.const(plan.tokens - 1))
        ahead = read(line_of(after, x))
        values = [half for word in words for half in emit.bf16_pair(word)]
        squares = emit.const_f32(0.0)
        for value in values:
            squares = emit.fma(value, value, squares)
        mean = arith.mulf(sum_of_warps(squares, 0), emit.const_f32(1 / plan.hidden))
        scale = emit.rsqrt(arith.addf(mean, emit.const_f32(plan.eps)))
        normed = [
            arith.mulf(arith.mulf(value, scale), weight)
            for value, weight in zip(values, norms, strict=True)
        ]
        rounded = [emit.to_bf16_pair(*normed[i : i + 2]) for i in range(0, len(normed), 2)]

        def store_h() -> None:
            line = line_of(token, h)
            for index, (place, exists) in enumerate(places):
                words = rounded[4 * index : 4 * index + 4]
                when(exists, partial(emit.store_words, emit.move(line, place), words))

        when(writes_h, store_h)
        total = emit.const_f32(0.0)
        for word, weight in zip(rounded, weights, strict=True):
            for a, b in zip(emit.bf16_pair(word), emit.bf16_pair(weight), strict=True):
                total = emit.fma(a, b, total)
        total = sum_of_warps(total, 16)
        place = emit.mul(emit.add(emit.mul(token, plan.experts), expert), 4)
        emit_store(emit.move(logits, place), [emit.bits_of(total)])  # each thread the same
        return ahead

    words, norms, weights = read(line_of(first, x)), read(norm), read(router)
    norms = [half for word in norms for half in emit.bf16_pair(word)]
    loop(first, plan.tokens, stride, do, words)
