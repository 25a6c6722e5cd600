"""How items are dealt out: by what they cost, not by number.

Stretches lie one after another on a line, on which workers have equal shares. An item is eight
long, and a stretch begins with what it costs to begin one: an item belongs to who has its start.

Where experts are at several levels, a tile's share of the line goes by its level, too.
The page table of a layer is in shared memory, so that nobody waits for it: who streams an expert's
pages, and here who asks for its level. An item at 2 bits takes less time than one at 4, so a worker
gets more of them.
"""

import dataclasses
from functools import reduce
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxlib.mlir.dialects import arith

from pallas_kernels.expert_ffn.mosaic.stream import MatmulPlan
from pallas_kernels.levels import LEVEL_BITS, PAGES_OF_BITS, Bits
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.loops import loop, when
from pallas_kernels.mosaic.workers import BLOCK_AXIS, WARPGROUPS, WARPS, quotient

COST_OF_BITS: Final[dict[int, int]] = {2: 5, 4: 8, 8: 16}
"""Time of an item, up to a factor. Alone, items at 2 bits take 0.7 times as long as at 4 on an
H200; beside them, those at 4 find the memory less busy."""
BOUNDS: Final = WARPGROUPS + 1
"""Places at which the workers of a block begin, and the last one ends."""
_ITEM: Final = 8
"""Length of an item."""
_BEGIN: Final = 3
"""Length of the beginning of a stretch, in which its ring is empty."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """The stretches of one matmul; hashable."""

    row_tiles: int
    """Items of a stretch."""
    parts: int
    """Stretches of a tile."""
    begin: int
    """Length of the beginning of a stretch."""

    @property
    def stretch(self) -> int:
        """Length of a stretch."""
        return self.begin + _ITEM * self.row_tiles

    @property
    def tile(self) -> int:
        """Length of a tile."""
        return self.parts * self.stretch

    def items_before(self, place: Any) -> Any:
        """How many items start ahead of a place on the line; int32."""
        stretch = quotient(place, self.stretch)
        within = jnp.maximum(place - stretch * self.stretch - self.begin, 0)
        return stretch * self.row_tiles + quotient(within + _ITEM - 1, _ITEM)


def line_of(plan: MatmulPlan, tokens: int) -> Line:
    """Of one token a worker has an item or two: with beginnings, some would have one more."""
    begin = _BEGIN if tokens > 1 else 0
    return Line(row_tiles=plan.row_tiles, parts=plan.parts, begin=begin)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DealPlan:
    """Shapes; hashable."""

    experts: int
    base_bits: Bits
    levels: tuple[Bits, ...]
    """That an expert can be at, ascending; more than one."""
    table_stride: int
    """L E: entries of a rung of the table."""
    lengths: tuple[int, ...]
    """Of a tile on each matmul's line."""
    workers: int

    @property
    def rungs(self) -> int:
        """Pages above the base."""
        return PAGES_OF_BITS[LEVEL_BITS[-1]] - PAGES_OF_BITS[self.base_bits]

    @property
    def words(self) -> int:
        """Of what a block knows: page ids [rungs, E], and bounds [matmuls, BOUNDS]."""
        return self.rungs * self.experts + len(self.lengths) * BOUNDS

    def page(self, rung: int, expert: Any) -> Any:
        """Where the page id is."""
        return rung * self.experts + expert

    def bound(self, matmul: int, index: Any) -> Any:
        """Where the bound is."""
        return self.rungs * self.experts + matmul * BOUNDS + index

    def above(self, bits: Bits) -> int:
        """Pages above the base of a level."""
        return PAGES_OF_BITS[bits] - PAGES_OF_BITS[self.base_bits]


def emit_fetch_pages(plan: DealPlan, table: Any, layer: Any, dealt: Any, thread: Any) -> None:
    """Starts to bring a layer's page ids into ``dealt`` int32 [words], by all threads.

    table: a pointer. Who waits is ``emit.wait_for_copies``.
    """
    first = emit.move(table, emit.mul(layer, 4 * plan.experts))

    def bring(index: Any) -> None:
        rung = arith.divui(index, emit.const(plan.experts))
        expert = arith.remui(index, emit.const(plan.experts))
        place = emit.add(emit.mul(rung, plan.table_stride), expert)
        source = emit.move(first, emit.mul(place, 4))
        emit.copy_word_async(emit.pointer(dealt, emit.mul(index, 4)), source)

    loop(thread, plan.rungs * plan.experts, 32 * WARPS, bring)


def emit_cost(plan: DealPlan, dealt: Any, expert: Any) -> Any:
    """Of an item of the expert."""
    ids = []
    for rung in range(plan.rungs):
        place = emit.mul(emit.add(expert, plan.page(rung, 0)), 4)
        ids += emit.load_words(emit.pointer(dealt, place), 1)
    cost = emit.const(COST_OF_BITS[plan.base_bits])
    for bits in plan.levels[1:]:
        missing = reduce(arith.ori, ids[: plan.above(bits)])  # negative if one is
        held = arith.cmpi(arith.CmpIPredicate.sge, missing, emit.const(0))
        cost = arith.select(held, emit.const(COST_OF_BITS[bits]), cost)
    return cost


def emit_bounds(
    plan: DealPlan, dealt: Any, block: Any, total: Any, before: Any, cost: Any, tiles: Any,
    first: Any,
) -> None:  # fmt: skip
    """Bounds of the block, places on lines, that are in an expert's tiles.

    The expert has ``tiles`` tiles from number ``first`` on; what is ahead of them costs ``before``
    and all ``total``, in costs of one item a tile. Bounds in no expert's stay: those must be 0.
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
            for matmul, length in enumerate(plan.lengths):
                on_line = arith.divui(emit.mul(within, length), of_tile)
                on_line = emit.add(emit.mul(first, length), on_line)
                place = emit.mul(emit.add(index, plan.bound(matmul, 0)), 4)
                emit.store_words(emit.pointer(dealt, place), [on_line])

        when(is_mine, store)

    loop(0, BOUNDS, 1, do)


def emit_even_bounds(plan: DealPlan, dealt: Any, block: Any, used: Any) -> None:
    """Bounds of the block where an item costs the same at all levels; ``used``: tiles.

    For one token, of which a worker has an item or two: a third would be the last one everywhere.
    """

    def store(index: Any) -> None:
        worker = emit.add(emit.mul(block, WARPGROUPS), index)
        for matmul, length in enumerate(plan.lengths):
            share = arith.muli(worker, emit.mul(used, length))
            on_line = arith.divui(share, emit.const(plan.workers))
            place = emit.mul(emit.add(index, plan.bound(matmul, 0)), 4)
            emit.store_words(emit.pointer(dealt, place), [on_line])

    loop(emit.block_thread(), BOUNDS, 32 * WARPS, store)


def deal_twin(
    plan: DealPlan, table: Any, layer: Any, experts: jax.Array, dealt: Any, *, even: bool
) -> None:
    """Fills ``dealt`` in interpret mode. experts int32 [I]: of each tile, or -1.

    ``even``: an item costs the same at all levels.
    """
    for rung in range(plan.rungs):
        start = rung * plan.table_stride + layer * plan.experts
        dealt[pl.ds(plan.page(rung, 0), plan.experts)] = table[pl.ds(start, plan.experts)]
    ids = dealt[pl.ds(0, plan.rungs * plan.experts)].reshape(plan.rungs, plan.experts)
    costs = jnp.full(plan.experts, COST_OF_BITS[plan.base_bits], jnp.int32)
    for bits in () if even else plan.levels[1:]:
        held = jnp.all(ids[: plan.above(bits)] >= 0, axis=0)
        costs = jnp.where(held, COST_OF_BITS[bits], costs)
    cost = jnp.where(experts < 0, 0, costs[jnp.maximum(experts, 0)])
    before = jnp.cumsum(cost) - cost
    worker = lax.axis_index(BLOCK_AXIS) * WARPGROUPS + lax.iota(jnp.int32, BOUNDS)
    within = worker[:, None] * jnp.sum(cost) - before * plan.workers
    of_tile = jnp.maximum(cost, 1) * plan.workers
    for matmul, length in enumerate(plan.lengths):
        most = jnp.where(cost > 0, length, 0)
        places = jnp.sum(jnp.clip(within * length // of_tile, 0, most), axis=1)
        dealt[pl.ds(plan.bound(matmul, 0), BOUNDS)] = places
