"""Tokens into tiles that share an expert, by the threads of a block, inside ``inline_mgpu``."""

from functools import partial, reduce
from typing import Any, NamedTuple

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels.moe_layer.mosaic.deal import emit_bounds, emit_cost
from pallas_kernels.moe_layer.mosaic.routed import ChoosePlan, Routed
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.loops import loop, when
from pallas_kernels.mosaic.workers import WARPS


class _Expert(NamedTuple):
    """What a thread knows of one of its experts; registers."""

    number: Any
    exists: Any
    tiles: Any
    """How many it needs; 0 if it does not exist."""
    cost: Any
    """Of an item of it; None if all experts are at one level."""


def emit_tiles(plan: ChoosePlan, routed: Routed, block: Any) -> None:
    """Tiles of experts, and where there are levels the bounds of the block's workers.

    Thread t of a warpgroup counts for ``per_thread`` experts from t * per_thread.
    """
    per_thread = -(-plan.experts // emit.WARPGROUP)
    numbers = [emit.add(emit.mul(emit.thread(), per_thread), i) for i in range(per_thread)]
    experts = [_count_tiles(plan, routed, number) for number in numbers]
    counted = [[expert.tiles for expert in experts]]
    if plan.deal is not None:
        counted.append([arith.muli(expert.cost, expert.tiles) for expert in experts])
    mine = [reduce(arith.addi, values) for values in counted]
    sums, totals = _scan(mine, routed.used)
    ahead = [arith.subi(value, own) for value, own in zip(sums, mine, strict=True)]
    for index, expert in enumerate(experts):
        first = ahead[0]
        if plan.deal is not None:
            emit_bounds(
                plan.deal, routed.dealt, block, totals[1], ahead[1], expert.cost, expert.tiles,
                first,
            )  # fmt: skip
        ahead = [arith.addi(value, more[index]) for value, more in zip(ahead, counted, strict=True)]
        place = emit.pointer(routed.first, emit.mul(expert.number, 4))
        when(expert.exists, partial(emit.store_words, place, [first]))

        def store(tile: Any, expert: Any = expert.number) -> None:
            emit.store_words(emit.pointer(routed.expert, emit.mul(tile, 4)), [expert])

        loop(first, ahead[0], 1, store)


def _count_tiles(plan: ChoosePlan, routed: Routed, number: Any) -> _Expert:
    zero = emit.const(0)
    exists = arith.cmpi(arith.CmpIPredicate.ult, number, emit.const(plan.experts))
    some = arith.select(exists, number, zero)  # whose memory is there
    count = arith.select(exists, _count_tokens(plan, routed, some, plan.tokens), zero)
    tiles = arith.divui(emit.add(count, plan.rows - 1), emit.const(plan.rows))
    cost = None if plan.deal is None else emit_cost(plan.deal, routed.dealt, some)
    return _Expert(number, exists, tiles, cost)


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
    sums = values
    for distance in (1, 2, 4, 8, 16):
        far = arith.cmpi(arith.CmpIPredicate.uge, lane, emit.const(distance))
        text = f"shfl.sync.up.b32 $0, $1, {distance}, 0, 0xffffffff;"
        moved = [emit.asm(text, "=r,r", [value], emit.i32_type(), effects=True) for value in sums]
        sums = [
            arith.select(far, arith.addi(value, more), value)
            for value, more in zip(sums, moved, strict=True)
        ]
    of_warps = [emit.pointer(scratch, 16 * (1 + index)) for index in range(len(values))]

    def store() -> None:
        for where, value in zip(of_warps, sums, strict=True):
            emit.store_words(emit.move(where, emit.mul(warp, 4)), [value])

    when(arith.cmpi(arith.CmpIPredicate.eq, lane, emit.const(31)), store)
    emit.barrier()
    totals = []
    for index, where in enumerate(of_warps):
        before = total = emit.const(0)
        for other, of_warp in enumerate(emit.load_words(where, 4)):
            earlier = arith.cmpi(arith.CmpIPredicate.ult, emit.const(other), warp)
            before = arith.addi(before, arith.select(earlier, of_warp, emit.const(0)))
            total = arith.addi(total, of_warp)
        sums[index] = arith.addi(sums[index], before)
        totals.append(total)
    emit.store_words(emit.pointer(scratch), totals[:1])  # every thread the same
    return sums, totals
