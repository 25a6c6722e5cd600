"""Counts of finished work in global memory: who needs a tile waits for that tile, not for all.

A tile has some number of items, numbered through all tiles, and every worker a contiguous part of
them. Counts start from zero: ``clear`` runs where barriers over the grid lie both between it and
the last wait, and between it and the first add. All workers are on the GPU at once and none waits
ahead of its own adds, so every count is whole in the end. Nothing waits in interpret mode.
"""

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
from pallas_kernels.mosaic.workers import BLOCK_AXIS, WARPS

_LINE_WORDS: Final = 32
"""Words of a count, of which the first counts: a line of the L2 cache for itself."""
_WAITS: Final = 1
"""Warp of a warpgroup that waits. The first asks for pages meanwhile."""
_TELLS: Final = 3
"""Warp of a warpgroup that adds. Its fence waits for loads of its own that are under way."""
_SPLAT: Final = plgpu.Layout.WG_SPLAT


def counts_shape(tiles: int) -> jax.ShapeDtypeStruct:
    """The counts of so many tiles."""
    return jax.ShapeDtypeStruct((tiles, _LINE_WORDS), jnp.int32)


def clear(array: Any) -> None:
    """Zero as the first word of each row of an array of words [N, ...], by the first block."""
    if interpreting():
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SPLAT))
    def run(ctx: Any, array: Any, block: Any) -> None:
        del ctx
        rows, *row = ir.MemRefType(array.type).shape
        emit_clear(emit.pointer(array), rows, row[0] if row else 1, emit.scalar(block))

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


def emit_clear(array: Any, rows: int, row_words: int, block: Any) -> None:
    """``clear`` inside ``plgpu.inline_mgpu``, of a pointer."""

    def store(at: Any) -> None:
        row = emit.add(emit.block_thread(), at)
        where = emit.move(array, emit.mul(row, 4 * row_words))
        when(emit.less(row, rows), lambda: emit.store_words(where, [emit.const(0)]))

    def by_all() -> None:
        loop(0, rows, 32 * WARPS, store)

    when(arith.cmpi(arith.CmpIPredicate.eq, block, emit.const(0)), by_all)


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

    def spin(where: Any, mine: Any) -> None:
        del mine
        emit.asm(_SPIN, "l,r", [where, emit.const(whole)], effects=True)

    when(_is_warp(_WAITS), partial(_each_tile, counts, start, end, items, spin))
    emit.barrier()


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
    return arith.cmpi(arith.CmpIPredicate.eq, emit.warp(), emit.const(number))


_SPIN: Final = """{
    .reg .pred less;
    .reg .u32 now;
AGAIN:
    ld.acquire.gpu.global.u32 now, [$0];
    setp.lt.u32 less, now, $1;
    @less bra AGAIN;
}"""
