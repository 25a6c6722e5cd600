"""Attention of a decode step: a block holds a slot, a key-value head and a split of the context.

Each warp multiplies tiles of 16 old positions by ``mma``, with an online softmax of its own; keys
and values of its first tile are on their way before the queries are there. The block adds up its
warps and the new position, which comes from the projection; the last block of a slot and head to
finish adds up the splits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels.decode_layers.mosaic.attend_heads import (
    Turn,
    load_turn,
    prepare_heads,
    score_new,
)
from pallas_kernels.decode_layers.mosaic.attend_plan import (
    WARPS,
    AttendMemory,
    AttendPlan,
    Item,
    find_item,
    sync_attending,
)
from pallas_kernels.decode_layers.mosaic.attend_sums import add_splits, add_warps
from pallas_kernels.decode_layers.mosaic.attend_tiles import load_tile, sum_tiles
from pallas_kernels.decode_layers.mosaic.project_plan import Threads
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.loops import when
from pallas_kernels.mosaic.workers import LEAD_WARP


def emit_attend(
    plan: AttendPlan, threads: Threads, memory: AttendMemory, wait: Callable[[], None],
    meanwhile: Callable[[], None],
) -> None:  # fmt: skip
    """Everything between the projections; ``memory.qkv`` is there after ``wait``.

    LEAD_WARP does ``meanwhile`` instead, and waits at once.
    """
    branch = scf.IfOp(emit.less(threads.warp, WARPS), has_else=True)
    with ir.InsertionPoint(branch.then_block):
        exists = emit.less(threads.block, plan.pairs * plan.splits)
        item, first = find_item(plan, threads, memory, exists)
        words, turn = load_tile(plan, memory, item, first), load_turn(threads, memory, item)
        wait()
        when(exists, partial(_attend, plan, threads, memory, item, first, words, turn))
        scf.yield_([])
    with ir.InsertionPoint(branch.else_block):
        wait()
        when(arith.cmpi(arith.CmpIPredicate.eq, threads.warp, emit.const(LEAD_WARP)), meanwhile)
        scf.yield_([])


def _attend(
    plan: AttendPlan, threads: Threads, memory: AttendMemory, item: Item, first: Any,
    words: list[Any], turn: Turn,
) -> None:  # fmt: skip
    prepare_heads(plan, threads, memory, item, turn)
    sync_attending()
    score_new(threads, memory, item)
    sum_tiles(plan, threads, memory, item, first, words)
    sync_attending()
    add_warps(plan, threads, memory, item)
    if plan.splits > 1:
        add_splits(plan, threads, memory, item)
