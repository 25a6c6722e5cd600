"""Bulk copies from global to shared memory, several to a barrier, issued by one thread.

A transaction barrier counts the bytes of all copies of a step, whatever their number, and one
thread of a warpgroup starts them; no tensor map is needed where both ends are contiguous. Barriers
are used in turn: use number q is barrier ``q % BARRIERS``, in phase ``q // BARRIERS``.

In interpret mode a copy is a plain one and is done at once.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.target import interpreting
from pallas_kernels.mosaic.workers import WARPGROUPS

BARRIERS: Final = 8
"""Of a worker: at most so many steps may be under way."""


class Copy(NamedTuple):
    """One contiguous copy: ``rows`` rows of a 2-D array."""

    source: Any
    """Global memory [R, C]."""
    first: Any
    """int32: first row."""
    target: Any
    """Shared memory [rows, C]."""


def barriers_scratch(workers: int) -> Any:
    """Scratch type of the barriers of all workers of a block."""
    return plgpu.SMEM((workers, BARRIERS, 2), jnp.uint32)


def initialize(barriers: Any) -> None:
    """Makes all barriers ready; by every thread of the block, which must then synchronize."""
    if interpreting():
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def run(ctx: Any, barriers: Any) -> None:
        del ctx
        workers = ir.MemRefType(barriers.type).shape[0]
        address = emit.shared_address(barriers)
        branch = scf.IfOp(_is_first(emit.block_thread()))
        with ir.InsertionPoint(branch.then_block):
            for index in range(workers * BARRIERS):
                where = emit.add(address, 8 * index)
                emit.asm("mbarrier.init.shared::cta.b64 [$0], 1;", "r", [where], effects=True)
            emit.asm("fence.mbarrier_init.release.cluster;", "", [], effects=True)
            scf.yield_([])

    run(barriers)


def fetch(copies: Sequence[Copy], barriers: Any, use: Any) -> None:
    """Starts copies; every thread of a warpgroup calls it, one issues.

    barriers [BARRIERS, 2]: of this worker; use: int32, the number of this use.
    """
    if interpreting():
        for copy in copies:
            copy.target[...] = copy.source[pl.ds(copy.first, copy.target.shape[0])]
        return
    count = len(copies)
    refs = (plgpu.RefType(),) * (2 * count + 1)
    splats = (plgpu.Layout.WG_SPLAT,) * (count + 1)

    @plgpu.inline_mgpu(arg_types=(*refs, *splats))
    def run(ctx: Any, *args: Any) -> None:
        del ctx
        sources, targets = args[:count], args[count : 2 * count]
        barriers, firsts, use = args[2 * count], args[2 * count + 1 : -1], args[-1]
        branch = scf.IfOp(_asks())
        with ir.InsertionPoint(branch.then_block):
            barrier = barrier_address(barriers, emit.scalar(use))
            sizes = [_bytes(target) for target in targets]
            emit.asm(
                "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;",
                "r,r",
                [barrier, emit.const(sum(sizes))],
                effects=True,
            )
            for source, target, size, first in zip(sources, targets, sizes, firsts, strict=True):
                row = size // ir.MemRefType(target.type).shape[0]
                emit.asm(
                    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                    "[$0], [$1], $2, [$3];",
                    "r,l,r,r",
                    [
                        emit.shared_address(target),
                        emit.move64(emit.pointer(source), emit.scalar(first), row),
                        emit.const(size),
                        barrier,
                    ],
                    effects=True,
                )
            scf.yield_([])

    run(
        *(copy.source for copy in copies),
        *(copy.target for copy in copies),
        barriers,
        *(jnp.asarray(copy.first, jnp.int32) for copy in copies),
        jnp.asarray(use, jnp.int32),
    )


def wait(barriers: Any, use: Any) -> None:
    """Until the copies of that use have arrived; every thread of the warpgroup calls it."""
    if interpreting():
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def run(ctx: Any, barriers: Any, use: Any) -> None:
        del ctx
        emit_wait(barriers, emit.scalar(use))

    run(barriers, jnp.asarray(use, jnp.int32))


def emit_wait(barriers: Any, use: Any) -> None:
    """The same inside ``plgpu.inline_mgpu``; use: a register."""
    turn = emit.shift_right(use, BARRIERS.bit_length() - 1)
    emit_wait_turn(barriers, use, turn)


def emit_wait_turn(barriers: Any, number: Any, turn: Any) -> None:
    """For barrier ``number % BARRIERS``, used for the ``turn``-th time; registers."""
    address = barrier_address(barriers, number)
    emit.asm(_WAIT, "r,r", [address, emit.and_(turn, 1)], effects=True)


_WAIT: Final = """{
    .reg .pred done;
TRY:
    mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1;
    @!done bra TRY;
}"""


def barrier_address(barriers: Any, use: Any) -> Any:
    """Shared address of the barrier of use number ``use``."""
    return emit.add(emit.shared_address(barriers), emit.mul(emit.and_(use, BARRIERS - 1), 8))


def _asks() -> Any:
    """Whether this thread starts its warpgroup's copies.

    Warps at the same place of their warpgroups share a scheduler, so each warpgroup has another
    warp for it: the third of the first, the second of the second, the first of the third.
    """
    group = emit.shift_right(emit.block_thread(), emit.WARPGROUP.bit_length() - 1)
    first = emit.mul(arith.subi(emit.const(WARPGROUPS - 1), group), 32)
    return arith.cmpi(arith.CmpIPredicate.eq, emit.thread(), first)


def _is_first(thread: Any) -> Any:
    return arith.cmpi(arith.CmpIPredicate.eq, thread, emit.const(0))


def _bytes(ref: Any) -> int:
    kind = ir.MemRefType(ref.type)
    size = emit.bit_width(kind.element_type) // 8
    for extent in kind.shape:
        size *= extent
    return size
