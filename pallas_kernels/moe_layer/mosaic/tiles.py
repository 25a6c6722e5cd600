"""Tokens into tiles that share an expert, by the threads of a block, inside ``inline_mgpu``."""

from functools import partial
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels.moe_layer.mosaic.deal import emit_bounds, emit_cost
from pallas_kernels.moe_layer.mosaic.routed import ChoosePlan, Routed
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.loops import loop, when
from pallas_kernels.mosaic.workers import WARPS


def emit_tiles(plan: ChoosePlan, routed: Routed, block: Any) -> None:
    """Thread t of a warpgroup counts for ``per_thread`` experts from t * per_thread."""
    per_thread = -(-plan.experts // emit.WARPGROUP)
    zero = emit.const(0)
    experts = [emit.add(emit.mul(emit.thread(), per_thread), i) for i in range(per_thread)]
    counts = []
    for expert in experts:
        exists = arith.cmpi(arith.CmpIPredicate.ult, expert, emit.const(plan.experts))
        count = _count_tokens(plan, routed, arith.select(exists, expert, zero), plan.tokens)
        count = arith.select(exists, count, zero)
        counts.append(
            (expert, exists, arith.divui(emit.add(count, plan.rows - 1), emit.const(plan.rows)))
        )
    mine, cost_of_mine, costs = zero, zero, []
    for expert, exists, tiles in counts:
        mine = arith.addi(mine, tiles)
        if plan.deal is not None:
            costs.append(emit_cost(plan.deal, routed.dealt, arith.select(exists, expert, zero)))
            cost_of_mine = arith.addi(cost_of_mine, arith.muli(costs[-1], tiles))
    (first, *before), (_, *total) = _scan(
        [mine, cost_of_mine] if plan.deal is not None else [mine], routed.used
    )
    first = arith.subi(first, mine)
    if plan.deal is not None:
        tiles_before, cost_before = first, arith.subi(before[0], cost_of_mine)
        for (_, _, tiles), cost in zip(counts, costs, strict=True):
            emit_bounds(
                plan.deal, routed.dealt, block, total[0], cost_before, cost, tiles, tiles_before
            )
            cost_before = arith.addi(cost_before, arith.muli(cost, tiles))
            tiles_before = arith.addi(tiles_before, tiles)
    for expert, exists, tiles in counts:
        place = emit.pointer(routed.first, emit.mul(expert, 4))
        when(exists, partial(emit.store_words, place, [first]))
        following = arith.addi(first, tiles)

        def store(tile: Any, expert: Any = expert) -> None:
            emit.store_words(emit.pointer(routed.expert, emit.mul(tile, 4)), [expert])

        loop(first, following, 1, store)
        first = following


def emit_places(plan: ChoosePlan, routed: Routed, thread: Any) -> None:
    """A thread of the block deals out each assignment."""
    zero, count = emit.const(0), plan.tokens * plan.top_k

    def deal(number: Any) -> None:
        at = emit.mul(number, 4)
        (expert,) = emit.load_words(emit.pointer(routed.ids, at), 1)
        branch = scf.IfOp(arith.cmpi(arith.CmpIPredicate.sge, expert, zero))
        with ir.InsertionPoint(branch.then_block):
            token = arith.divui(number, emit.const(plan.top_k))
            rank = _count_tokens(plan, routed, expert, token)
            (first,) = emit.load_words(emit.pointer(routed.first, emit.mul(expert, 4)), 1)
            tile = arith.addi(first, arith.divui(rank, emit.const(plan.rows)))
            row = arith.remui(rank, emit.const(plan.rows))
            place = arith.addi(emit.mul(tile, plan.rows), row)
            emit.store_words(emit.pointer(routed.assignment, emit.mul(place, 4)), [number])
            emit.store_words(emit.pointer(routed.place, at), [place])
            scf.yield_([])

    loop(thread, count, 32 * WARPS, deal)


def _count_tokens(plan: ChoosePlan, routed: Routed, expert: Any, before: Any) -> Any:
    """How many of the tokens under ``before`` (int or register) chose the expert."""
    start = emit.pointer(routed.masks, emit.mul(emit.shift_right(expert, 5), 4))
    bit = emit.and_(expert, 31)
    at_once = next(n for n in (8, 4, 2, 1) if plan.tokens % n == 0)

    def add(first: Any, count: Any) -> list[Any]:
        line = emit.move(start, emit.mul(first, 4 * plan.words))
        for index in range(at_once):
            (mask,) = emit.load_words(emit.move(line, 4 * plan.words * index), 1)
            chose = emit.and_(arith.shrui(mask, bit), 1)
            if not isinstance(before, int):
                counts = emit.less(emit.add(first, index), before)
                chose = arith.select(counts, chose, emit.const(0))
            count = arith.addi(count, chose)
        return [count]

    if plan.tokens == at_once:
        return add(emit.const(0), emit.const(0))[0]
    return loop(0, before, at_once, add, [emit.const(0)])[0]


def _scan(values: list[Any], scratch: Any) -> tuple[list[Any], list[Any]]:
    """Inclusive sums over the threads of the warpgroup, and totals; scratch[0] becomes the first.

    scratch: int32 [4 + 4 values].
    """
    lane, warp = emit.lane(), emit.warp()
    for distance in (1, 2, 4, 8, 16):
        far = arith.cmpi(arith.CmpIPredicate.uge, lane, emit.const(distance))
        moved = [
            emit.asm(
                f"shfl.sync.up.b32 $0, $1, {distance}, 0, 0xffffffff;",
                "=r,r",
                [value],
                emit.i32_type(),
                effects=True,
            )
            for value in values
        ]
        values = [
            arith.select(far, arith.addi(value, more), value)
            for value, more in zip(values, moved, strict=True)
        ]
    last = scf.IfOp(arith.cmpi(arith.CmpIPredicate.eq, lane, emit.const(31)))
    with ir.InsertionPoint(last.then_block):
        where = emit.pointer(scratch, emit.add(emit.mul(warp, 4), 16))
        for index, value in enumerate(values):
            emit.store_words(emit.move(where, 16 * index), [value])
        scf.yield_([])
    emit.barrier()
    totals = []
    for number, value in enumerate(values):
        before = total = emit.const(0)
        for index in range(4):
            where = emit.pointer(scratch, 16 + 16 * number + 4 * index)
            (of_warp,) = emit.load_words(where, 1)
            earlier = arith.cmpi(arith.CmpIPredicate.ult, emit.const(index), warp)
            before = arith.addi(before, arith.select(earlier, of_warp, emit.const(0)))
            total = arith.addi(total, of_warp)
        values[number] = arith.addi(value, before)
        totals.append(total)
    emit.store_words(emit.pointer(scratch), totals[:1])  # every thread the same
    return values, totals
