"""A grid of workers: warpgroups that stay on the GPU for a whole kernel of several phases.

Every multiprocessor runs one block of ``WARPGROUPS`` warpgroups. Each warpgroup is a worker with
its own shared memory; phases are separated by a barrier over the grid, behind which the next
phase's weights are already on their way. All blocks must be resident at once, so the grid is never
larger than the number of multiprocessors.
"""

import dataclasses
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.target import interpreting

WARPGROUPS: Final = 3
"""Warpgroups of a block: 168 registers a thread."""
BLOCK_AXIS: Final = "block"
WARPGROUP_AXIS: Final = "warpgroup"
WARPS: Final = 4 * WARPGROUPS
"""Of a block."""
LEAD_WARP: Final = WARPS - 1
"""Of a block: waits for the grid. Its fence also waits for loads of its own that are under way."""
_H100_MULTIPROCESSORS: Final = 132


def multiprocessors() -> int:
    """Of the GPU that is here; of an H100 where none is, for lowering."""
    return getattr(jax.devices()[0], "core_count", None) or _H100_MULTIPROCESSORS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workers:
    """Shape of the grid; hashable."""

    blocks: int

    @staticmethod
    def of_device() -> "Workers":
        """One block a multiprocessor; two in interpret mode, to test the sharing of work."""
        return Workers(blocks=2 if interpreting() else multiprocessors())

    @property
    def count(self) -> int:
        """Workers of the grid."""
        return self.blocks * WARPGROUPS

    def kernel(self, body: Any, *, name: str, out_type: Any, scratch_types: Any) -> Any:
        """``plgpu.kernel`` over these workers."""
        return plgpu.kernel(
            body,
            out_type=out_type,
            scratch_types=scratch_types,
            kernel_name=name,
            grid=(self.blocks,),
            grid_names=(BLOCK_AXIS,),
            num_threads=WARPGROUPS,
            thread_name=WARPGROUP_AXIS,
            compiler_params=plgpu.CompilerParams(
                unsafe_no_auto_barriers=True, lowering_semantics=mgpu.LoweringSemantics.Lane
            ),
        )

    def share(self, items: Any) -> tuple[Any, Any]:
        """This worker's contiguous part [start, end) of ``items``; int32, traced.

        The parts of one block lie side by side, so that blocks differ by at most one item.
        """
        worker = lax.axis_index(BLOCK_AXIS) * WARPGROUPS + warpgroup()
        start, end = (quotient(number * items, self.count) for number in (worker, worker + 1))
        return start, end


def quotient(number: Any, divisor: int) -> Any:
    """``number // divisor`` of an int32 that is not negative, which takes fewer instructions."""
    return lax.div(number, jnp.int32(divisor))


def warpgroup() -> Any:
    """Index of this warpgroup in its block."""
    return lax.axis_index(WARPGROUP_AXIS)


def sync_warpgroup() -> None:
    """All threads of this warpgroup are done with what they did so far."""
    if not interpreting():
        _run(emit.barrier)


def sync_block() -> None:
    """All threads of the block are; what they wrote to shared memory is seen."""
    if not interpreting():
        _run(lambda: emit.asm("bar.sync 0;", "", [], effects=True))


def sync_grid(counter: Any, workers: Workers) -> None:
    """All workers are; what they wrote to global memory is seen.

    ``counter`` int32 [1] is in global memory and used for nothing else; its low bits are zero
    before and after. Each barrier flips its top bit: block 0 adds what the others leave missing.
    Not for interpret mode, in which phases are kernels of their own.
    """
    if interpreting():
        raise NotImplementedError("interpret mode has no barrier over the grid")

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def run(ctx: Any, counter: Any, block: Any) -> None:
        del ctx
        emit_sync_grid(counter, emit.scalar(block), workers)

    run(counter, jnp.int32(lax.axis_index(BLOCK_AXIS)))


def emit_sync_grid(counter: Any, block: Any, workers: Workers) -> None:
    """The same inside ``plgpu.inline_mgpu``, by every thread of the block."""
    counts = [emit.const(workers.blocks), emit.const(LEAD_WARP * 32)]
    emit.asm(_GRID_BARRIER, "l,r,n,n", [emit.pointer(counter), block, *counts], effects=True)


# The counter's top bit cannot flip before this block has arrived, so it is read ahead of that,
# and nobody has to wait for what an atomic operation returns.
_GRID_BARRIER: Final = """{
    .reg .pred lead, first, same;
    .reg .u32 tid, add, old, now;
    mov.u32 tid, %tid.x;
    setp.ne.u32 lead, tid, $3;
    @!lead ld.relaxed.gpu.global.u32 old, [$0];
    bar.sync 0;
    @lead bra DONE;
    setp.eq.u32 first, $1, 0;
    sub.u32 add, 0x80000001, $2;
    selp.u32 add, add, 1, first;
    red.release.gpu.global.add.u32 [$0], add;
SPIN:
    ld.acquire.gpu.global.u32 now, [$0];
    xor.b32 now, now, old;
    setp.ge.s32 same, now, 0;
    @same bra SPIN;
DONE:
    bar.sync 0;
}"""


def _run(emitted: Any) -> None:
    @plgpu.inline_mgpu()
    def run(ctx: Any) -> None:
        del ctx
        emitted()

    run()
