"""Counts of finished work in global memory: who needs a tile waits for that tile, not for all.

A tile has some number of items, numbered through all tiles, and every worker a contiguous part of
them. Counts start from zero: ``fill`` runs where barriers over the grid lie both between it and the
last wait, and between it and the first add. All workers are on the GPU at once and none waits ahead
of its own adds, so every count is whole in the end. Nothing waits in interpret mode.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.loops import loop, when
from pallas_kernels.mosaic.target import interpreting
from pallas_kernels.mosaic.workers import BLOCK_AXIS, WARPS, Workers

_LINE_WORDS: Final = 32
"""Words of a count, of which the first counts: a line of the L2 cache for itself."""
_WAITS: Final = 1
"""Warp of a warpgroup that waits. Pages are asked for before (``bulk.fetch``)."""
_TELLS: Final = 3
"""Warp of a warpgroup that adds: one that asks for no pages, for its fence waits for loads of its
own that are under way."""
_SPLAT: Final = plgpu.Layout.WG_SPLAT


def counts_shape(tiles: int) -> jax.ShapeDtypeStruct:
    """The counts of so many tiles."""
    return jax.ShapeDtypeStruct((tiles, _LINE_WORDS), jnp.int32)


def fill(array: Any, value: int, workers: Workers) -> None:
    """``value`` as every word of an array, by all blocks."""
    if interpreting():
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SPLAT))
    def run(ctx: Any, array: Any, block: Any) -> None:
        del ctx
        words = math.prod(ir.MemRefType(array.type).shape)
        emit_fill(emit.pointer(array), words, value, emit.scalar(block), workers.blocks)

    run(array, jnp.int32(lax.axis_index(BLOCK_AXIS)))


def add(counts: Any, start: Any, end: Any, items: int) -> None:
    """Counts this worker's items [start, end), ``items`` a tile, which it has stored.

    Every thread of the warpgroup calls it; whoever finds them counted sees what was stored.
    """
    if interpreting():
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SPLAT, _SPLAT))
    def run(ctx: Any, counts: Any, start: Any, end: Any) -> None:
        del ctx
        emit_add(emit.pointer(counts), emit.scalar(start), emit.scalar(end), items)

    run(counts, start, end)


def wait(counts: Any, start: Any, end: Any, items: int, whole: int) -> None:
    """Until the tiles of the items [start, end), ``items`` a tile, are counted ``whole``.

    Every thread of the warpgroup calls it. The items may be others than those that are counted.
    """
    if interpreting():
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SPLAT, _SPLAT))
    def run(ctx: Any, counts: Any, start: Any, end: Any) -> None:
        del ctx
        emit_wait(emit.pointer(counts), emit.scalar(start), emit.scalar(end), items, whole)

    run(counts, start, end)


def emit_fill(array: Any, words: int, value: int, block: Any, blocks: int) -> None:
    """``fill`` inside ``plgpu.inline_mgpu``, of a pointer."""
    mine = emit.add(emit.mul(block, 32 * WARPS), emit.block_thread())
    width = 4 if words % 4 == 0 else 1
    values = [emit.const(value)] * width
    for start in range(0, words // width, 32 * WARPS * blocks):  # once, as a rule
        place = emit.add(mine, start)
        where = emit.move(array, emit.mul(place, 4 * width))
        when(emit.less(place, words // width), partial(emit.store_words, where, values))


def emit_add(counts: Any, start: Any, end: Any, items: int) -> None:
    """``add`` inside ``plgpu.inline_mgpu``, of a pointer."""

    def count(where: Any, mine: Any) -> None:
        emit.asm("red.relaxed.gpu.global.add.u32 [$0], $1;", "l,r", [where, mine], effects=True)

    def tell() -> None:
        emit.asm("fence.acq_rel.gpu;", "", [], effects=True)
        _each_tile(counts, start, end, items, count)

    emit.barrier()  # all threads have stored
    when(_is_warp(_TELLS), tell)


def emit_wait(counts: Any, start: Any, end: Any, items: int, whole: int) -> None:
    """``wait`` inside ``plgpu.inline_mgpu``, of a pointer."""

    def wait(where: Any, mine: Any) -> None:
        del mine
        _spin(where, whole)

    when(_is_warp(_WAITS), partial(_each_tile, counts, start, end, items, wait))
    emit.barrier()


def emit_add_one(count: Any) -> None:
    """One more at the pointer ``count``, like ``emit_add``."""
    emit.barrier()
    text = "red.release.gpu.global.add.u32 [$0], $1;"
    tell = partial(emit.asm, text, "l,r", [count, emit.const(1)], effects=True)
    when(_is_thread(32 * _TELLS), tell)


def emit_wait_one(count: Any, whole: int) -> None:
    """Until the count at the pointer is whole: one thread, with which others must synchronize."""
    when(_is_thread(32 * _WAITS), partial(_spin, count, whole))


def _each_tile(
    counts: Any, start: Any, end: Any, items: int, body: Callable[[Any, Any], None]
) -> None:
    """``body(where the tile's count is, how many of the items are the tile's)``, a lane a tile."""

    def do(first: Any) -> None:
        tile = emit.add(first, emit.lane())
        begin = emit.mul(tile, items)
        to = arith.minsi(end, emit.add(begin, items))
        mine = arith.subi(to, arith.maxsi(start, begin))
        where = emit.move(counts, emit.mul(tile, 4 * _LINE_WORDS))
        when(emit.less(0, mine), partial(body, where, mine))

    of_tile = emit.const(items)
    last = arith.divui(emit.add(end, items - 1), of_tile)
    loop(arith.divui(start, of_tile), last, 32, do)


def _is_warp(number: int) -> Any:
    warp = emit.shift_right(emit.thread(), 5)
    return arith.cmpi(arith.CmpIPredicate.eq, warp, emit.const(number))


def _is_thread(number: int) -> Any:
    return arith.cmpi(arith.CmpIPredicate.eq, emit.thread(), emit.const(number))


def _spin(count: Any, whole: int) -> None:
    emit.asm(_SPIN, "l,r", [count, emit.const(whole)], effects=True)


_SPIN: Final = """{
    .reg .pred less;
    .reg .u32 now;
AGAIN:
    ld.acquire.gpu.global.u32 now, [$0];
    setp.lt.u32 less, now, $1;
    @less bra AGAIN;
}"""
