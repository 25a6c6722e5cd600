"""Attention: sums of a block's warps, and of the blocks that share a slot and head."""

from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels.decode_layers.mosaic.attend_plan import (
    AT_LAST,
    AT_NEW,
    AT_TOP,
    AT_TOTAL,
    AT_V,
    GROUP,
    HEAD,
    OUTPUTS,
    ROW_BYTES,
    WARP_BYTES,
    WARPS,
    AttendMemory,
    AttendPlan,
    Item,
    sync_attending,
)
from pallas_kernels.decode_layers.mosaic.project_plan import Threads
from pallas_kernels.mosaic import emit, shuffle

_LOWEST = -1e30
_AT_ONCE = 8
"""Splits whose sums are loaded together."""


def add_warps(plan: AttendPlan, threads: Threads, memory: AttendMemory, item: Item) -> None:
    """Sums of the warps and the new position: a warp for each head, four columns a lane."""
    branch = scf.IfOp(emit.less(threads.warp, GROUP))
    with ir.InsertionPoint(branch.then_block):
        lane, head = emit.lane(), threads.warp
        of_head = emit.mul(head, 4)
        # a lane for each warp's sums, and one for the new position
        is_new = arith.cmpi(arith.CmpIPredicate.eq, lane, emit.const(WARPS))
        has_part = emit.less(lane, WARPS)
        at = emit.mul(arith.select(has_part, lane, emit.const(0)), 4 * GROUP)
        place = emit.add(arith.addi(at, of_head), AT_TOP)
        place = arith.select(is_new, emit.add(of_head, AT_NEW), place)
        (top,) = emit.load_words(emit.move(memory.small, place), 1)
        (total,) = emit.load_words(emit.move(memory.small, emit.add(place, AT_TOTAL - AT_TOP)), 1)
        total = arith.select(is_new, emit.const_f32(1.0), emit.as_f32(total))
        exists = arith.ori(has_part, is_new)
        new = emit.load_words(emit.move(memory.small, emit.add(emit.mul(lane, 8), AT_V)), 2)
        at = emit.add(emit.mul(lane, 16), emit.mul(head, 4 * HEAD))
        sums = [_floats(emit.move(memory.work, emit.add(at, WARP_BYTES * w))) for w in range(WARPS)]
        sums.append([half for word in new for half in emit.bf16_pair(word)])
        top, total, shrink = _joined(exists, emit.as_f32(top), total)
        y = _weighted([emit.const_f32(0.0)] * 4, shrink, 0, sums)
        if plan.splits == 1:
            _store_y(plan, memory, item, head, total, y)
        else:
            part = arith.addi(emit.mul(item.pair, plan.splits), item.split)
            where = emit.move(emit.move64(memory.parts, part, 4 * OUTPUTS), at)
            emit.store_words(where, [emit.bits_of(value) for value in y])
            where = emit.move(emit.move64(memory.part_sums, part, 8 * GROUP), of_head)
            emit.store_words(where, [emit.bits_of(top)])  # every lane the same
            emit.store_words(emit.move(where, 4 * GROUP), [emit.bits_of(total)])
        scf.yield_([])


def add_splits(plan: AttendPlan, threads: Threads, memory: AttendMemory, item: Item) -> None:
    """The last block of the pair to come here adds up what all have left."""
    sync_attending()
    flag = emit.move(memory.small, AT_LAST)
    first = scf.IfOp(arith.cmpi(arith.CmpIPredicate.eq, emit.block_thread(), emit.const(0)))
    with ir.InsertionPoint(first.then_block):
        # wraps to zero by itself when all have come
        before = emit.asm(
            "atom.acq_rel.gpu.global.inc.u32 $0, [$1], $2;",
            "=r,l,r",
            [emit.move(memory.arrivals, emit.mul(item.pair, 4)), emit.const(plan.splits - 1)],
            emit.i32_type(),
            effects=True,
        )
        emit.store_words(flag, [before])
        scf.yield_([])
    sync_attending()
    (before,) = emit.load_words(flag, 1)
    is_last = arith.cmpi(arith.CmpIPredicate.eq, before, emit.const(plan.splits - 1))
    branch = scf.IfOp(arith.andi(is_last, emit.less(threads.warp, GROUP)))
    with ir.InsertionPoint(branch.then_block):
        lane, head = emit.lane(), threads.warp
        start = emit.mul(item.pair, plan.splits)
        sums_of = emit.move(emit.move64(memory.part_sums, start, 8 * GROUP), emit.mul(head, 4))
        parts_of = emit.move64(memory.parts, start, 4 * OUTPUTS)
        parts_of = emit.move(parts_of, emit.add(emit.mul(lane, 16), emit.mul(head, 4 * HEAD)))
        exists = emit.less(lane, plan.splits)
        where = emit.move(sums_of, emit.mul(arith.select(exists, lane, emit.const(0)), 8 * GROUP))
        top, total = _fresh(where), _fresh(emit.move(where, 4 * GROUP))
        _, total, shrink = _joined(exists, top, total)
        zero = [emit.const_f32(0.0)] * 4
        loop = scf.ForOp(emit.const(0), emit.const(plan.splits), emit.const(_AT_ONCE), zero)
        with ir.InsertionPoint(loop.body):
            split, sums = loop.induction_variable, []
            for offset in range(_AT_ONCE):
                number = emit.add(split, offset)
                where = emit.move(parts_of, emit.mul(number, 4 * OUTPUTS))
                words = emit.load_if(emit.less(number, plan.splits), where, 4, "shared")
                sums.append([emit.as_f32(word) for word in words])
            scf.yield_(_weighted(list(loop.inner_iter_args), shrink, split, sums))
        _store_y(plan, memory, item, head, total, list(loop.results))
        scf.yield_([])


def _joined(exists: Any, top: Any, total: Any) -> tuple[Any, Any, Any]:
    """Parts of a softmax, one a lane: their maximum and sum of weights; the lane's factor."""
    lowest = emit.const_f32(_LOWEST)
    top = arith.select(exists, emit.max_f32(top, lowest), lowest)
    largest = shuffle.max_of_warp(top)
    shrink = emit.exp2(arith.subf(top, largest))
    total = arith.select(exists, arith.mulf(total, shrink), emit.const_f32(0.0))
    return largest, shuffle.sum_of_warp(total), shrink


def _weighted(y: list[Any], shrink: Any, first: Any, sums: list[list[Any]]) -> list[Any]:
    """y plus the sums of parts from ``first`` (int or register) on, each times its factor."""
    for index, values in enumerate(sums):
        lane = first + index if isinstance(first, int) else emit.add(first, index)
        factor = shuffle.from_lane(shrink, lane)
        y = [emit.fma(value, factor, total) for value, total in zip(values, y, strict=True)]
    return y


def _store_y(
    plan: AttendPlan, memory: AttendMemory, item: Item, head: Any, total: Any, y: list[Any]
) -> None:
    """y / total, not for heads that only fill up the group.

    An idle slot has no weights but that of its own value: void, but finite.
    """
    real = scf.IfOp(emit.less(head, plan.group))
    with ir.InsertionPoint(real.then_block):
        factor = arith.divf(emit.const_f32(1.0), total)
        y = [arith.mulf(value, factor) for value in y]
        row = arith.addi(emit.mul(item.slot, plan.q_heads), emit.mul(item.kv_head, plan.group))
        where = emit.move64(memory.y, arith.addi(row, head), ROW_BYTES)
        words = [emit.to_bf16_pair(*y[:2]), emit.to_bf16_pair(*y[2:])]
        emit.store_words(emit.move(where, emit.mul(emit.lane(), 8)), words)
        scf.yield_([])


def _floats(where: Any) -> list[Any]:
    return [emit.as_f32(word) for word in emit.load_words(where, 4)]


def _fresh(where: Any) -> Any:
    """A float32 that another multiprocessor has written in the same kernel."""
    text = "ld.global.cg.f32 $0, [$1];"
    return emit.asm(text, "=f,l", [where], emit.f32_type(), effects=True)
