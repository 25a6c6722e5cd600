"""How the items of a matmul are dealt out to workers: by what they cost, not by number.

The stretches of all tiles lie one after another on a line. An item is eight long, ahead of the
first of a stretch lies what it costs to begin one, and an item belongs to the worker in whose part
its start is. Where all experts are at one level, workers have equal parts of the line. Where there
are levels, they have equal parts of what all tiles cost: an item at 2 bits takes less time than one
at 4, so a worker gets more of them. Of one token, though, a worker has an item or two and some
would have one more: these are dealt out by number (``Phases``).

Levels come from the page table, whose entries of the layer are brought to shared memory ahead of
the choice: neither this nor who asks for an expert's pages waits for them.
"""

import dataclasses
from functools import reduce
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels.expert_ffn.mosaic.stream import MatmulPlan
from pallas_kernels.levels import LEVEL_BITS, PAGES_OF_BITS, Bits
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.loops import loop, when
from pallas_kernels.mosaic.workers import BLOCK_AXIS, WARPGROUPS, WARPS, quotient

COST_OF_BITS: Final[dict[int, int]] = {2: 6, 4: 8, 8: 16}
"""Time of an item, up to a factor. Where all are at 2 bits an item takes 0.76 times as long as
where all are at 4 (H200, eight rows)."""
BOUNDS: Final = WARPGROUPS + 1
"""Places on a line at which the workers of a block begin, and the last one ends."""
ITEM: Final = 8
"""Length of an item on a line."""
BEGIN: Final = 3
"""Length of the beginning of a stretch, while its ring is empty."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """On which the stretches of a matmul lie; hashable."""

    row_tiles: int
    """Items of a stretch."""
    parts: int
    """Stretches of a tile."""

    @staticmethod
    def of(plan: MatmulPlan) -> "Line":
        """Line of a matmul."""
        return Line(row_tiles=plan.row_tiles, parts=plan.parts)

    @property
    def stretch(self) -> int:
        """Length of a stretch."""
        return BEGIN + ITEM * self.row_tiles

    @property
    def tile(self) -> int:
        """Length of a tile."""
        return self.parts * self.stretch

    def items_before(self, place: Any) -> Any:
        """How many items start ahead of a place on the line; int32."""
        stretch = quotient(place, self.stretch)
        within = jnp.maximum(place - stretch * self.stretch - BEGIN, 0)
        return stretch * self.row_tiles + quotient(within + ITEM - 1, ITEM)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DealPlan:
    """Where there are levels; hashable. Axis letters: R rungs, the pages above the base; E experts.

    A block knows page ids [R, E] and, for each line, bounds [BOUNDS], all in one array.
    """

    experts: int
    base_bits: Bits
    levels: tuple[Bits, ...]
    """That an expert can be at, ascending; more than one."""
    table_stride: int
    """L E: entries of a rung of the table."""
    lines: tuple[Line, ...]
    """Of each matmul."""
    workers: int

    def rungs_of(self, bits: Bits) -> int:
        """Of a level: the first so many."""
        return PAGES_OF_BITS[bits] - PAGES_OF_BITS[self.base_bits]

    @property
    def rungs(self) -> int:
        """R"""
        return self.rungs_of(LEVEL_BITS[-1])

    @property
    def pages(self) -> int:
        """Page ids: words ahead of the bounds."""
        return self.rungs * self.experts

    @property
    def bounds(self) -> int:
        """Bounds: words behind the page ids."""
        return len(self.lines) * BOUNDS

    def page(self, rung: int, expert: Any) -> Any:
        """Where the page id is."""
        return rung * self.experts + expert

    def bound(self, line: Line, index: Any) -> Any:
        """Where the bound is; lines that are equal have the same."""
        return self.pages + self.lines.index(line) * BOUNDS + index


def dealt_scratch(plan: DealPlan) -> Any:
    """Scratch type of what a block knows: ``dealt`` below."""
    return plgpu.SMEM((plan.pages + plan.bounds,), jnp.int32)


def fetch_pages(plan: DealPlan, table: Any, layer: Any, dealt: Any) -> None:
    """Starts to bring a layer's page ids of ``table`` int32 [R L E] into ``dealt``.

    All threads of the block call it; each waits for its own by ``emit.wait_for_copies``.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def run(ctx: Any, table: Any, dealt: Any, layer: Any) -> None:
        del ctx
        emit_fetch_pages(plan, emit.pointer(table), emit.scalar(layer), dealt)

    run(table, dealt, layer)


def emit_fetch_pages(plan: DealPlan, table: Any, layer: Any, dealt: Any) -> None:
    """The same inside ``plgpu.inline_mgpu``; table is a pointer."""
    first = emit.move(table, emit.mul(layer, 4 * plan.experts))

    def bring(index: Any) -> None:
        rung = arith.divui(index, emit.const(plan.experts))
        expert = arith.remui(index, emit.const(plan.experts))
        place = emit.add(emit.mul(rung, plan.table_stride), expert)
        source = emit.move(first, emit.mul(place, 4))
        emit.copy_word_async(emit.pointer(dealt, emit.mul(index, 4)), source)

    loop(emit.block_thread(), plan.pages, 32 * WARPS, bring)


def emit_cost(plan: DealPlan, dealt: Any, expert: Any) -> Any:
    """Of an item of the expert, whose page ids are there."""
    ids = []
    for rung in range(plan.rungs):
        place = emit.mul(emit.add(expert, plan.page(rung, 0)), 4)
        ids += emit.load_words(emit.pointer(dealt, place), 1)
    cost = emit.const(COST_OF_BITS[plan.base_bits])
    for bits in plan.levels[1:]:
        missing = reduce(arith.ori, ids[: plan.rungs_of(bits)])  # negative if one is
        held = arith.cmpi(arith.CmpIPredicate.sge, missing, emit.const(0))
        cost = arith.select(held, emit.const(COST_OF_BITS[bits]), cost)
    return cost


def emit_bounds(
    plan: DealPlan, dealt: Any, block: Any, total: Any, before: Any, cost: Any, tiles: Any,
    first: Any,
) -> None:  # fmt: skip
    """Stores those bounds of the block that are in an expert's tiles, or where these end.

    The expert has ``tiles`` tiles from number ``first`` on; a tile costs ``cost``, those ahead of
    them ``before`` and all ``total``. What nobody stores stays: these bounds must be 0 before.
    """
    start = emit.mul(before, plan.workers)
    of_tile = emit.mul(cost, plan.workers)
    end = emit.add(start, arith.muli(of_tile, tiles))

    def do(index: Any) -> None:
        worker = emit.add(emit.mul(block, WARPGROUPS), index)
        position = arith.muli(worker, total)
        within = arith.subi(position, start)
        is_mine = arith.andi(emit.less(0, within), emit.less(position, emit.add(end, 1)))

        def store() -> None:
            for line in plan.lines:
                on_line = arith.divui(emit.mul(within, line.tile), of_tile)
                on_line = emit.add(emit.mul(first, line.tile), on_line)
                place = emit.mul(emit.add(index, plan.bound(line, 0)), 4)
                emit.store_words(emit.pointer(dealt, place), [on_line])

        when(is_mine, store)

    loop(0, BOUNDS, 1, do)


def deal_twin(plan: DealPlan, table: Any, layer: Any, experts: jax.Array, dealt: Any) -> None:
    """Fills ``dealt`` in interpret mode. experts int32 [I]: of each tile, or -1."""
    for rung in range(plan.rungs):
        start = rung * plan.table_stride + layer * plan.experts
        dealt[pl.ds(plan.page(rung, 0), plan.experts)] = table[pl.ds(start, plan.experts)]
    ids = dealt[pl.ds(0, plan.pages)].reshape(plan.rungs, plan.experts)
    costs = jnp.full(plan.experts, COST_OF_BITS[plan.base_bits], jnp.int32)
    for bits in plan.levels[1:]:
        held = jnp.all(ids[: plan.rungs_of(bits)] >= 0, axis=0)
        costs = jnp.where(held, COST_OF_BITS[bits], costs)
    cost = jnp.where(experts < 0, 0, costs[jnp.maximum(experts, 0)])
    before = jnp.cumsum(cost) - cost
    worker = lax.axis_index(BLOCK_AXIS) * WARPGROUPS + lax.iota(jnp.int32, BOUNDS)
    within = worker[:, None] * jnp.sum(cost) - before * plan.workers
    of_tile = jnp.maximum(cost, 1) * plan.workers
    for line in plan.lines:
        most = jnp.where(cost > 0, line.tile, 0)
        places = jnp.sum(jnp.clip(within * line.tile // of_tile, 0, most), axis=1)
        dealt[pl.ds(plan.bound(line, 0), BOUNDS)] = places
