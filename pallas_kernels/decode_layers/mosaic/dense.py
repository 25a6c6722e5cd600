"""Phases of the decode kernel before those of ``moe_layer``, each a function of references.

Weights of the projections come to shared memory while earlier phases run, to where the rings of the
expert matmuls are: those of ``qkv`` to its end, as many as lie apart from the rings while the
experts still run, those of ``output`` to its start, behind which attention has its sums. Limbs of
their inputs are beside the weights, where experts and attention are done.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.decode_layers.mosaic.attend import emit_attend
from pallas_kernels.decode_layers.mosaic.attend_plan import (
    GROUP,
    HEAD,
    WARPS,
    WORK_BYTES,
    AttendMemory,
    AttendPlan,
)
from pallas_kernels.decode_layers.mosaic.project import emit_project
from pallas_kernels.decode_layers.mosaic.project_fetch import emit_fetch, emit_fetched
from pallas_kernels.decode_layers.mosaic.project_plan import ProjectPlan, Threads, Weight
from pallas_kernels.decode_layers.shapes import RING_BYTES, LayerWeights
from pallas_kernels.linear.weights import Int8Matrix
from pallas_kernels.moe_layer.mosaic.phases import Arguments
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.loops import when
from pallas_kernels.mosaic.workers import (
    BLOCK_AXIS,
    SPARE_WARP,
    Workers,
    emit_arrive_grid,
    emit_await_grid,
    warpgroup,
)

_SPLAT = plgpu.Layout.WG_SPLAT
_QKV_FIRST = 1
"""Pieces of the first projection's weights that the last barrier of a layer asks for: what the
memory brings while the barrier is waited for."""
_OUTPUT_UNDER_WAY = 1
"""Pieces of the second projection's weights at once."""


class Inputs(NamedTuple):
    """Arrays in global memory, beside those of ``moe_layer``."""

    weights: LayerWeights
    cos: Any
    sin: Any
    positions: Any
    keys: Any
    """A reference, like values: written in place."""
    values: Any


class Outputs(NamedTuple):
    """What phases leave in global memory for the next, beside those of ``moe_layer``."""

    qkv: Any
    parts: Any
    part_sums: Any
    arrivals: Any
    y: Any


class Shared(NamedTuple):
    """Shared memory."""

    ring: Any
    """RING_BYTES, with the expert matmuls' rings at the start."""
    qkv_arrived: Any
    """Barriers of the pieces of a projection's weights."""
    output_arrived: Any
    small: Any
    """Where the expert matmuls' limbs are."""


class References(NamedTuple):
    """All that the phases use."""

    inputs: Inputs
    outputs: Outputs
    shared: Shared
    moe: Arguments


@dataclasses.dataclass(frozen=True, kw_only=True)
class DensePhases:
    """The phases, each a function of references and the number of a layer; hashable."""

    workers: Workers
    qkv: ProjectPlan
    attend: AttendPlan
    output: ProjectPlan
    expert_bytes: int
    """Of the expert matmuls' rings."""

    def __post_init__(self) -> None:
        behind = max(WORK_BYTES, self.output.stage_bytes)
        assert self.output.shared_bytes + behind <= RING_BYTES
        assert self.qkv.stage_bytes <= self.qkv_at

    @property
    def qkv_at(self) -> int:
        """Where the first projection's weights begin in the ring, in bytes."""
        return (RING_BYTES - self.qkv.shared_bytes) // 16 * 16

    @property
    def apart(self) -> int:
        """First piece of the first projection's weights that lies apart from the experts'."""
        piece = self.qkv.piece_rows * self.qkv.row_stride
        return min(-(-max(self.expert_bytes - self.qkv_at, 0) // piece), self.qkv.pieces)

    def sync(self, refs: References, layer: Any, *pieces: tuple[int, int]) -> None:
        """A barrier over the grid, and meanwhile ``ask``."""

        def run(counter: Any, *args: Any) -> None:
            came = emit_arrive_grid(counter, args[-2].block, self.workers)
            self._ask(pieces, *args)
            emit_await_grid(counter, came)

        _inline(run, layer, refs.moe.counter, *self._asked(refs))

    def ask(self, refs: References, layer: Any, *pieces: tuple[int, int]) -> None:
        """Asks for pieces of weights for ``project_qkv`` of a layer, if there is such a layer.

        pieces: first and end of ranges. No warp of the block may use their place any more.
        """
        _inline(partial(self._ask, pieces), layer, *self._asked(refs))

    def _asked(self, refs: References) -> list[Any]:
        weights, shared = refs.inputs.weights, refs.shared
        return [shared.qkv_arrived, shared.ring, weights.attention_norm, *_refs(weights.qkv)]

    def _ask(
        self, pieces: tuple[tuple[int, int], ...], arrived: Any, ring: Any, norm: Any, *args: Any
    ) -> None:
        *matrix, threads, layer = args
        count = ir.MemRefType(norm.type).shape[0]
        bring = self._bring_qkv(matrix, threads, layer, ring, arrived)
        for start, end in pieces:
            if start < end:
                wanted = arith.andi(_is_spare(threads), emit.less(layer, count))
                when(wanted, partial(bring, start, end))

    def _bring_qkv(
        self, matrix: list[Any], threads: Threads, layer: Any, ring: Any, arrived: Any
    ) -> Callable[[int, int], None]:
        weight = _at_layer(self.qkv, matrix, layer)
        target = emit.add(emit.shared_address(ring), self.qkv_at)
        return partial(emit_fetch, self.qkv, threads, weight, target, arrived, layer)

    def first_of_layer(self) -> tuple[int, int]:
        """Pieces for the barrier ahead of the experts' weighted sum."""
        return 0, min(_QKV_FIRST, self.apart)

    def apart_of_layer(self) -> tuple[int, int]:
        """Pieces that may come while the experts are multiplied."""
        return self.apart, self.qkv.pieces

    def project_qkv(self, refs: References, layer: Any) -> None:
        """x -> queries, keys and values, behind a barrier over the grid."""
        weights, plan, shared = refs.inputs.weights, self.qkv, refs.shared

        def run(
            norm: Any, x: Any, qkv: Any, arrived: Any, counter: Any, ring: Any, *args: Any
        ) -> None:
            *matrix, threads, layer = args
            came = emit_arrive_grid(counter, threads.block, self.workers)
            bring = self._bring_qkv(matrix, threads, layer, ring, arrived)
            when(_is_spare(threads), partial(bring, self.first_of_layer()[1], self.apart))
            emit_project(
                plan, threads, _at_layer(plan, matrix, layer),
                emit.move(emit.pointer(ring), self.qkv_at), emit.pointer(ring),
                partial(emit_fetched, plan, arrived, layer),
                partial(emit_await_grid, counter, came), emit.pointer(x),
                emit.move64(emit.pointer(norm), layer, 2 * plan.inputs), None,
                _store_rows(plan, qkv),
            )  # fmt: skip

        _inline(
            run, layer, weights.attention_norm, refs.moe.x, refs.outputs.qkv, shared.qkv_arrived,
            refs.moe.counter, shared.ring, *_refs(weights.qkv),
        )  # fmt: skip

    def attend_heads(self, refs: References, layer: Any) -> None:
        """Queries, keys, values -> y, behind a barrier; the new key and value go into the cache.

        Meanwhile the output projection's weights come.
        """
        inputs, outputs, shared, moe = refs
        weights, plan, output = inputs.weights, self.attend, self.output
        of_memory = (
            inputs.positions, inputs.cos, inputs.sin, outputs.qkv, weights.q_norm, weights.k_norm,
            inputs.keys, inputs.values, outputs.parts, outputs.part_sums, outputs.arrivals,
            outputs.y, shared.ring, shared.small,
        )  # fmt: skip

        def run(counter: Any, arrived: Any, ring: Any, *args: Any) -> None:
            *soon, router = args[:3]
            *others, threads, layer = args[3:]
            matrix, rest = others[: -len(of_memory)], others[-len(of_memory) :]
            memory = AttendMemory(*map(emit.pointer, rest))
            of_layer = 2 * plan.slots * plan.context * plan.kv_heads * HEAD
            memory = memory._replace(
                work=emit.move(memory.work, output.shared_bytes),
                q_norm=emit.move64(memory.q_norm, layer, 2 * HEAD),
                k_norm=emit.move64(memory.k_norm, layer, 2 * HEAD),
                keys=emit.move64(memory.keys, layer, of_layer),
                values=emit.move64(memory.values, layer, of_layer),
            )
            weight, target = _at_layer(output, matrix, layer), emit.shared_address(ring)
            bring = partial(emit_fetch, output, threads, weight, target, arrived, layer)
            came = emit_arrive_grid(counter, threads.block, self.workers)
            when(_is_spare(threads), partial(bring, 0, _OUTPUT_UNDER_WAY))

            def rest_of_output() -> None:
                _prefetch(soon, router, layer, threads.block, self.workers.blocks)
                bring(_OUTPUT_UNDER_WAY, output.pieces, _OUTPUT_UNDER_WAY)

            wait = partial(emit_await_grid, counter, came)
            emit_attend(plan, threads, memory, wait, rest_of_output)

        _inline(
            run, layer, moe.counter, shared.output_arrived, shared.ring, weights.attention_norm,
            weights.mlp_norm, weights.router, *_refs(weights.o), *of_memory,
        )  # fmt: skip

    def project_output(self, refs: References, layer: Any) -> None:
        """x + y's projection -> x, in place, behind a barrier over the grid."""
        plan, weight, shared = self.output, refs.inputs.weights.o, refs.shared

        def run(x: Any, y: Any, arrived: Any, counter: Any, ring: Any, *args: Any) -> None:
            *matrix, threads, layer = args
            came = emit_arrive_grid(counter, threads.block, self.workers)
            emit_project(
                plan, threads, _at_layer(plan, matrix, layer), emit.pointer(ring),
                emit.move(emit.pointer(ring), plan.shared_bytes),
                partial(emit_fetched, plan, arrived, layer),
                partial(emit_await_grid, counter, came), emit.pointer(y), None, emit.pointer(x),
                _store_rows(plan, x),
            )  # fmt: skip

        _inline(
            run, layer, refs.moe.x, refs.outputs.y, shared.output_arrived, refs.moe.counter,
            shared.ring, *_refs(weight),
        )  # fmt: skip


def _inline(run: Callable[..., None], layer: Any, *refs: Any) -> None:
    """``run(*refs, threads, layer)`` as ``plgpu.inline_mgpu``."""

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * len(refs), _SPLAT, _SPLAT, _SPLAT))
    def inlined(ctx: Any, *args: Any) -> None:
        del ctx
        *given, layer, block, group = args
        run(*given, Threads.of(block, group), emit.scalar(layer))

    block, group = lax.axis_index(BLOCK_AXIS), warpgroup()
    inlined(*refs, jnp.int32(layer), jnp.int32(block), jnp.int32(group))


def _store_rows(plan: ProjectPlan, out: Any) -> Callable[[Any, Any, Any], None]:
    """Stores outputs as bfloat16 [T, N]."""

    def store(token: Any, row: Any, y: Any) -> None:
        where = emit.move64(emit.pointer(out), token, 2 * plan.outputs)
        emit.store_bf16(emit.move(where, emit.mul(row, 2)), y)

    return store


def _prefetch(norms: list[Any], router: Any, layer: Any, block: Any, blocks: int) -> None:
    """Brings small weights of the next phases into the L2 cache, where they will be waited for."""
    count, experts, hidden = ir.MemRefType(router.type).shape
    total = 2 * experts * hidden
    share = -(-total // blocks // 16) * 16
    start = emit.mul(block, share)
    of_router = emit.move(emit.move64(emit.pointer(router), layer, total), start)
    left = arith.subi(emit.const(total), start)
    following = arith.minsi(emit.add(layer, 1), emit.const(count - 1))
    first = arith.cmpi(arith.CmpIPredicate.eq, emit.lane(), emit.const(0))
    jobs = [(emit.less(0, left), of_router, arith.minsi(left, emit.const(share)))]
    for number, (norm, of) in enumerate(zip(norms, (following, layer), strict=True)):
        mine = arith.cmpi(arith.CmpIPredicate.eq, block, emit.const(number))
        jobs.append((mine, emit.move64(emit.pointer(norm), of, 2 * hidden), emit.const(2 * hidden)))
    for wanted, where, size in jobs:
        when(arith.andi(first, wanted), partial(emit.prefetch, where, size))


def _is_spare(threads: Threads) -> Any:
    """Whether it is the warp that asks for weights."""
    return arith.cmpi(arith.CmpIPredicate.eq, threads.warp, emit.const(SPARE_WARP))


def _refs(weight: Any) -> tuple[Any, ...]:
    return tuple(weight) if isinstance(weight, Int8Matrix) else (weight,)


def _at_layer(plan: ProjectPlan, matrix: list[Any], layer: Any) -> Weight:
    """Pointers to a layer of a stack of matrices, given by ``_refs``."""
    pointers = [emit.pointer(ref) for ref in matrix]
    rows = emit.move64(pointers[0], layer, plan.outputs * plan.row_bytes)
    scale = emit.move64(pointers[1], layer, 4 * plan.outputs) if plan.bits == 8 else None
    return Weight(rows, scale)


assert WARPS >= GROUP + 2  # a warp for each query head, the new key and the new value
