"""Brings a projection's tile of weights into shared memory, by one warp, at leisure."""

from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels.decode_layers.mosaic.project_plan import (
    ROW_PAD,
    TILE,
    ProjectPlan,
    Threads,
    Weight,
    both,
    has_tile,
)
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.bulk import BARRIERS, barrier_address, emit_wait

FETCHES = BARRIERS
"""Pieces in which a resident tile is brought."""
_UNDER_WAY = 1  # of them at once


def emit_fetch(
    plan: ProjectPlan, threads: Threads, weight: Weight, tile: Any, barriers: Any, layer: Any
) -> None:
    """Brings the block's tile of the weights into shared memory; by one warp.

    In pieces, with a barrier each, of which few are under way at once, so that what others
    read need not queue behind them; waits for all but the last. Blocks without a tile bring
    nothing.
    """
    rows = TILE // FETCHES
    mine = has_tile(plan, threads, 0)
    size = emit.const(rows * plan.row_bytes)
    if mine is not None:
        size = arith.select(mine, size, emit.const(0))
    copies = both(emit.less(emit.lane(), rows), mine)
    loop = scf.ForOp(emit.const(0), emit.const(FETCHES), emit.const(1))
    with ir.InsertionPoint(loop.body):
        piece = loop.induction_variable
        use = fetch_use(layer, piece)
        behind = scf.IfOp(emit.less(_UNDER_WAY - 1, piece))
        with ir.InsertionPoint(behind.then_block):
            emit_wait(barriers, emit.add(use, -_UNDER_WAY))
            scf.yield_([])
        barrier = barrier_address(barriers, use)
        first = scf.IfOp(arith.cmpi(arith.CmpIPredicate.eq, emit.lane(), emit.const(0)))
        with ir.InsertionPoint(first.then_block):
            text = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;"
            emit.asm(text, "r,r", [barrier, size], effects=True)
            scf.yield_([])
        emit.asm("bar.warp.sync 0xffffffff;", "", [], effects=True)
        copying = scf.IfOp(copies)
        with ir.InsertionPoint(copying.then_block):
            number = arith.addi(emit.mul(piece, rows), emit.lane())
            row = arith.addi(emit.mul(threads.block, TILE), number)
            target = emit.add(tile, emit.mul(number, plan.row_bytes + ROW_PAD))
            source = emit.move64(weight.rows, row, plan.row_bytes)
            emit.asm(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                "[$0], [$1], $2, [$3];",
                "r,l,r,r",
                [target, source, emit.const(plan.row_bytes), barrier],
                effects=True,
            )
            scf.yield_([])
        scf.yield_([])


def emit_fetched(barriers: Any, layer: Any) -> None:
    """Until all pieces of the layer's tile are there."""
    loop = scf.ForOp(emit.const(0), emit.const(FETCHES), emit.const(1))
    with ir.InsertionPoint(loop.body):
        emit_wait(barriers, fetch_use(layer, loop.induction_variable))
        scf.yield_([])


def fetch_use(layer: Any, piece: Any) -> Any:
    """Use of the barriers for a piece of a layer's tile."""
    return arith.addi(emit.mul(layer, FETCHES), piece)
