"""Brings a block's rows of a projection's weights into shared memory, by one warp.

They come in pieces, with a barrier each. Who reads what was written by others queues behind bytes
that are under way, so few pieces are asked for where the next phase waits for such a read.
"""

from typing import Any

from jaxlib.mlir.dialects import arith

from pallas_kernels.decode_layers.mosaic.project_plan import (
    TILE,
    ProjectPlan,
    Threads,
    Weight,
    rows_of,
)
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.bulk import BARRIERS, barrier_address, emit_wait, emit_wait_turn
from pallas_kernels.mosaic.loops import loop, when


def emit_fetch(
    plan: ProjectPlan, threads: Threads, weight: Weight, target: Any, barriers: Any, layer: Any,
    start: int, end: int, under_way: int = BARRIERS,
) -> None:  # fmt: skip
    """Pieces ``start`` to ``end`` of the block's rows; by one warp.

    Waits so that at most ``under_way`` are, of those before ``start``, too. target: address in
    shared memory. Rows that the block does not have are not brought.
    """
    size, lane = plan.piece_rows, emit.lane()
    first, count = rows_of(plan, threads.block)

    def bring(piece: Any) -> None:
        if under_way < plan.pieces:
            when(
                emit.less(under_way - 1, piece),
                lambda: emit_wait(barriers, _use(layer, emit.add(piece, -under_way))),
            )
        barrier = barrier_address(barriers, _use(layer, piece))
        begin = emit.mul(piece, size)
        rows = arith.minsi(arith.subi(count, begin), emit.const(size))
        rows = arith.maxsi(rows, emit.const(0))
        text = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;"
        expected = [barrier, emit.mul(rows, plan.row_bytes)]
        is_first = arith.cmpi(arith.CmpIPredicate.eq, lane, emit.const(0))
        when(is_first, lambda: emit.asm(text, "r,r", expected, effects=True))
        emit.sync_warp()

        def copy() -> None:
            number = arith.addi(begin, lane)
            where = emit.add(target, emit.mul(number, plan.row_stride))
            source = emit.move64(weight.rows, arith.addi(first, number), plan.row_bytes)
            emit.asm(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                "[$0], [$1], $2, [$3];",
                "r,l,r,r",
                [where, source, emit.const(plan.row_bytes), barrier],
                effects=True,
            )

        when(emit.less(lane, rows), copy)

    loop(start, min(end, plan.pieces), 1, bring)


def emit_fetched(plan: ProjectPlan, barriers: Any, layer: Any, tile: Any) -> None:
    """Until the rows of the block's tile are there."""
    size = plan.piece_rows
    start = arith.divui(emit.mul(tile, TILE), emit.const(size))
    end = emit.add(start, max(TILE // size, 1))
    end = arith.minsi(end, emit.const(plan.pieces))
    loop(start, end, 1, lambda piece: emit_wait_turn(barriers, piece, layer))


def _use(layer: Any, piece: Any) -> Any:
    """Of the barriers, of which a layer uses each at most once."""
    return arith.addi(emit.mul(layer, BARRIERS), piece)
