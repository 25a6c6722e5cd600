"""A grid of workers: warpgroups that stay on the GPU for a whole kernel of several phases.

Every multiprocessor runs one block of ``WARPGROUPS`` warpgroups. Each warpgroup is a worker with
its own shared memory; phases are separated by a barrier over the grid, behind which the next
phase's weights are already on their way. All blocks must be resident at once, so the grid is never
larger than the number of multiprocessors.
"""

import dataclasses
import math
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
SPARE_WARP: Final = LEAD_WARP - 1
"""Of a block: free to do something else while the grid is waited for."""
_SHARED_BYTES: Final = 227 * 1024
"""Of a block, at most."""
_SHARED_ALIGNMENT: Final = 1024
"""Of each array of it."""
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


def fits(scratch: list[Any]) -> bool:
    """Whether a block's shared memory holds arrays of these scratch types."""
    sizes = [math.prod(kind.shape) * jnp.dtype(kind.dtype).itemsize for kind in scratch]
    return sum(-(-s // _SHARED_ALIGNMENT) * _SHARED_ALIGNMENT for s in sizes) <= _SHARED_BYTES


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


def counter_ref(counter: jax.Array) -> Any:
    """A reference [1, 1] to the counter int32 [1] of barriers over the grid, for a kernel.

    No other argument of a kernel may have this shape: XLA makes one array of constants that are
    equal, and one operand of it in a fusion around a kernel. A counter that starts as zero beside a
    layer 0 would be read as the layer while blocks count in it.
    """
    return jax.new_ref(counter.reshape(1, 1))


def freeze_counter(ref: Any) -> jax.Array:
    """What a kernel has left in a ``counter_ref``, int32 [1]."""
    return jax.freeze(ref).reshape(1)


def sync_grid(counter: Any, workers: Workers) -> None:
    """All workers are; what they wrote to global memory is seen.

    ``counter`` is a ``counter_ref`` and used for nothing else; its low bits are zero before and
    after. Each barrier flips its top bit: block 0 adds what the others leave missing. Not for
    interpret mode, in which phases are kernels of their own.
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
    emit_await_grid(counter, emit_arrive_grid(counter, block, workers))


def emit_arrive_grid(counter: Any, block: Any, workers: Workers) -> Any:
    """First half of it. What it returns is for ``emit_await_grid``, whatever happens in between.

    All threads of the block have arrived when one goes on.
    """
    operands = [emit.pointer(counter), block, emit.const(workers.blocks), _lead()]
    return emit.asm(_ARRIVE, "=&r,l,r,n,n", operands, emit.i32_type(), effects=True)


def emit_await_grid(counter: Any, arrived: Any) -> None:
    """Second half of it, by every thread of the block."""
    emit.asm(_AWAIT, "r,l,n", [arrived, emit.pointer(counter), _lead()], effects=True)


def _lead() -> Any:
    """The thread that waits for the grid."""
    return emit.const(LEAD_WARP * 32)


# The counter's top bit cannot flip before this block has arrived, so it is read ahead of that,
# and nobody has to wait for what an atomic operation returns.
_ARRIVE: Final = """{
    .reg .pred lead, first;
    .reg .u32 tid, add;
    mov.u32 tid, %tid.x;
    setp.eq.u32 lead, tid, $4;
    mov.u32 $0, 0;
    @lead ld.relaxed.gpu.global.u32 $0, [$1];
    bar.sync 0;
    setp.eq.u32 first, $2, 0;
    sub.u32 add, 0x80000001, $3;
    selp.u32 add, add, 1, first;
    @lead red.release.gpu.global.add.u32 [$1], add;
}"""
_AWAIT: Final = """{
    .reg .pred lead, same;
    .reg .u32 tid, now;
    mov.u32 tid, %tid.x;
    setp.eq.u32 lead, tid, $2;
    @!lead bra DONE;
SPIN:
    ld.acquire.gpu.global.u32 now, [$1];
    xor.b32 now, now, $0;
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
