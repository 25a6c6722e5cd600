"""All layers of a decode step as one kernel on Hopper, for few tokens.

A layer is seven phases over one grid of workers, with a barrier over the grid before each:

    qkv       norm, and the projection to queries, keys and values
    attend    attention over the old positions and the new one
    output    the output projection and the residual
    (then the phases of ``moe_layer``: logits, gate_up, down, combine)

The weights of a projection do not depend on what comes before it, so they are under way while
earlier phases run. They come to the shared memory of the expert matmuls' rings, which is idle then.

Code that runs once a layer is bound by the fetch of its instructions, more so if the loop outgrows
the instruction cache: phases are worth their instructions.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.decode_layers.mosaic.attend import emit_attend
from pallas_kernels.decode_layers.mosaic.attend_plan import (
    GROUP,
    HEAD,
    SMALL_BYTES,
    WARPS,
    WORK_BYTES,
    AttendMemory,
    AttendPlan,
)
from pallas_kernels.decode_layers.mosaic.project import emit_project
from pallas_kernels.decode_layers.mosaic.project_fetch import emit_fetch, emit_fetched
from pallas_kernels.decode_layers.mosaic.project_plan import ProjectPlan, Threads, Weight
from pallas_kernels.decode_layers.shapes import RING_BYTES, DecodeShapes, LayerWeights
from pallas_kernels.layout import LINE_WORDS
from pallas_kernels.linear.weights import Int8Matrix
from pallas_kernels.moe_layer.mosaic.kernel import default_config, moe_phases
from pallas_kernels.moe_layer.mosaic.phases import Arguments, Between, Phases
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.bulk import barriers_scratch, initialize
from pallas_kernels.mosaic.loops import when
from pallas_kernels.mosaic.workers import (
    BLOCK_AXIS,
    SPARE_WARP,
    WARPGROUPS,
    Workers,
    emit_arrive_grid,
    emit_await_grid,
    sync_grid,
    warpgroup,
)
from pallas_kernels.pages import PagedExperts

_SPLAT = plgpu.Layout.WG_SPLAT
_RING_LINES = RING_BYTES // (4 * LINE_WORDS * WARPGROUPS)
_QKV_EARLY = (1, 3)
"""Pieces of the first projection's weights that are asked for by the last barrier of a layer and
by the first of the next: what the memory brings while these are waited for."""
_OUTPUT_UNDER_WAY = 1
"""Pieces of the second projection's weights at once."""


class _Inputs(NamedTuple):
    """Arrays in global memory, beside those of ``moe_layer``."""

    weights: LayerWeights
    cos: Any
    sin: Any
    positions: Any
    keys: Any
    """A reference, like values: written in place."""
    values: Any


class _Outputs(NamedTuple):
    """What phases leave in global memory for the next, beside those of ``moe_layer``."""

    qkv: Any
    parts: Any
    part_sums: Any
    arrivals: Any
    y: Any


class _Shared(NamedTuple):
    """Shared memory of the phases before those of ``moe_layer``."""

    ring: Any
    """Where the expert matmuls' rings are."""
    qkv_arrived: Any
    """Barriers of the pieces of a projection's weights."""
    output_arrived: Any
    small: Any
    """Where the expert matmuls' limbs are."""


class _Layers(NamedTuple):
    """The phases before those of ``moe_layer``."""

    workers: Workers
    qkv: ProjectPlan
    attend: AttendPlan
    output: ProjectPlan


@partial(jax.jit, static_argnames=("shapes", "eps", "top_k", "normalize"))
def decode_layers_kernel(
    x: jax.Array,
    weights: LayerWeights,
    experts: PagedExperts,
    cos: jax.Array,
    sin: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    mass: jax.Array,
    counter: jax.Array,
    *,
    shapes: DecodeShapes,
    eps: float,
    top_k: int,
    normalize: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """``decode_layers`` of api.py, whose arguments are checked."""
    tokens, hidden = x.shape
    phases, matrices, between = moe_phases(
        experts, tokens=tokens, eps=eps, top_k=top_k, normalize=normalize,
        config=default_config(tokens, experts),
    )  # fmt: skip
    workers = phases.workers
    layers = _Layers(
        workers,
        ProjectPlan(
            tokens=tokens, outputs=shapes.qkv_rows, inputs=hidden, blocks=workers.blocks,
            bits=_bits(weights.qkv), eps=eps,
        ),
        AttendPlan(
            slots=tokens, context=shapes.context, q_heads=shapes.q_heads,
            kv_heads=shapes.kv_heads, blocks=workers.blocks, eps=eps,
        ),
        ProjectPlan(
            tokens=tokens, outputs=hidden, inputs=shapes.q_heads * HEAD, blocks=workers.blocks,
            bits=_bits(weights.o), eps=None,
        ),
    )  # fmt: skip
    assert layers.output.shared_bytes + WORK_BYTES <= RING_BYTES
    x_ref, keys_ref, values_ref, mass_ref, counter_ref = (
        jax.new_ref(array) for array in (x, keys, values, mass, counter)
    )
    pairs, splits = layers.attend.pairs, layers.attend.splits
    inputs = _Inputs(weights, cos, sin, positions, keys_ref, values_ref)
    moe = Arguments(
        x_ref, weights.mlp_norm, None, weights.router, None, (positions >= 0).astype(jnp.int32),
        *matrices, mass_ref, counter_ref,
    )  # fmt: skip
    outputs = _Outputs(
        jax.ShapeDtypeStruct((tokens, shapes.qkv_rows), jnp.bfloat16),
        jax.ShapeDtypeStruct((pairs, splits, GROUP, HEAD), jnp.float32),
        jax.ShapeDtypeStruct((pairs, splits, 2, GROUP), jnp.float32),
        jax.ShapeDtypeStruct((pairs,), jnp.int32),
        jax.ShapeDtypeStruct((tokens, shapes.q_heads * HEAD), jnp.bfloat16),
    )
    flat, tree = jax.tree.flatten((inputs, moe))
    left, left_tree = jax.tree.flatten((outputs, between._replace(out=None)))

    def kernel(*refs: Any) -> None:
        inputs, moe = jax.tree.unflatten(tree, refs[: len(flat)])
        outputs, between = jax.tree.unflatten(left_tree, refs[len(flat) :][: len(left)])
        scratch = list(refs[len(flat) + len(left) :])
        arrived, *scratch = scratch
        shared = _Shared(scratch[0], arrived.at[0], arrived.at[1], scratch[3])
        between = between._replace(out=moe.x)
        for barriers in (scratch[2], arrived):
            initialize(barriers)
        _clear(outputs.arrivals)
        _fetch_qkv(layers, inputs, moe, shared, jnp.int32(0))
        run = partial(_layer, layers, phases, inputs, moe, outputs, between, shared, scratch)
        lax.fori_loop(0, shapes.layers, run, jnp.int32(0))

    call = workers.kernel(
        kernel, name="decode_layers", out_type=tuple(left),
        scratch_types=[
            barriers_scratch(2),
            plgpu.SMEM((WARPGROUPS, _RING_LINES, LINE_WORDS), jnp.uint32),
            *_with_small(phases.scratch()[1:]),
        ],
    )  # fmt: skip
    call(*flat)
    x, keys, values = (jax.freeze(ref) for ref in (x_ref, keys_ref, values_ref))
    return x, keys, values, jax.freeze(mass_ref), jax.freeze(counter_ref)


def _with_small(scratch: list[Any]) -> list[Any]:
    """Scratch of the expert matmuls beside the ring; attention's small arrays fit the limbs."""
    scales, barriers, limbs, *others = scratch
    workers, blocks, rows, width = limbs.shape
    blocks = max(blocks, -(-SMALL_BYTES // (workers * rows * width)))
    return [scales, barriers, plgpu.SMEM((workers, blocks, rows, width), limbs.dtype), *others]


def _layer(
    layers: _Layers, phases: Phases, inputs: _Inputs, moe: Arguments, outputs: _Outputs,
    between: Between, shared: _Shared, scratch: list[Any], layer: Any, use: Any,
) -> Any:  # fmt: skip
    """One layer; takes and returns the uses of the ring's barriers."""
    moe = moe._replace(layer=layer, norm_layer=layer)
    sync = partial(sync_grid, moe.counter, layers.workers)
    _project_qkv(layers, inputs, moe, outputs, shared, layer)
    _attend(layers, inputs, moe, outputs, shared, layer)
    _project_output(layers, inputs, moe, outputs, shared, layer)
    sync()
    phases.write_logits(moe, between, scratch)
    sync()
    phases.choose_experts(moe, between, scratch)
    use = phases.multiply_gate_up(moe, between, scratch, lambda: None, use)
    use = phases.multiply_down(moe, between, scratch, sync, use)
    _fetch_qkv(layers, inputs, moe, shared, layer + 1)
    phases.add_up(moe, between, scratch)
    return use


def _clear(array: Any) -> None:
    """Zeros in a short array of words, by the first block."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SPLAT))
    def run(ctx: Any, array: Any, block: Any) -> None:
        del ctx
        (size,) = ir.MemRefType(array.type).shape
        thread = emit.block_thread()
        first = arith.cmpi(arith.CmpIPredicate.eq, emit.scalar(block), emit.const(0))
        where = emit.move(emit.pointer(array), emit.mul(thread, 4))
        wanted = arith.andi(first, emit.less(thread, size))
        when(wanted, lambda: emit.store_words(where, [emit.const(0)]))

    run(array, jnp.int32(lax.axis_index(BLOCK_AXIS)))


def _fetch_qkv(
    layers: _Layers, inputs: _Inputs, moe: Arguments, shared: _Shared, layer: Any
) -> None:
    """A barrier over the grid, and meanwhile the layer's first weights, if there is the layer."""
    refs = (moe.counter, shared.qkv_arrived, shared.ring, *_refs(inputs.weights.qkv))
    count = inputs.weights.attention_norm.shape[0]

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * len(refs), _SPLAT, _SPLAT, _SPLAT))
    def run(ctx: Any, *args: Any) -> None:
        del ctx
        counter, arrived, ring, *matrix, layer, block, group = args
        threads, layer = Threads.of(block, group), emit.scalar(layer)
        weight, target = _at_layer(layers.qkv, matrix, layer), emit.shared_address(ring)

        bring = partial(emit_fetch, layers.qkv, threads, weight, target, arrived, layer)
        wanted = arith.andi(_is_spare(threads), emit.less(layer, count))
        came = emit_arrive_grid(counter, threads.block, layers.workers)
        when(wanted, partial(bring, 0, _QKV_EARLY[0]))
        emit_await_grid(counter, came)

    run(*refs, *_who(layer))


def _project_qkv(
    layers: _Layers, inputs: _Inputs, moe: Arguments, outputs: _Outputs, shared: _Shared,
    layer: Any,
) -> None:  # fmt: skip
    """x -> queries, keys and values."""
    weights, plan = inputs.weights, layers.qkv
    refs = (
        weights.attention_norm, moe.x, outputs.qkv, shared.qkv_arrived, moe.counter, shared.ring,
        *_refs(weights.qkv),
    )  # fmt: skip

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * len(refs), _SPLAT, _SPLAT, _SPLAT))
    def run(ctx: Any, *args: Any) -> None:
        del ctx
        norm, x, qkv, arrived, counter, ring, *matrix, layer, block, group = args
        threads, layer = Threads.of(block, group), emit.scalar(layer)
        weight, target = _at_layer(plan, matrix, layer), emit.shared_address(ring)
        bring = partial(emit_fetch, plan, threads, weight, target, arrived, layer)
        came = emit_arrive_grid(counter, threads.block, layers.workers)
        when(_is_spare(threads), partial(bring, *_QKV_EARLY))

        def store(token: Any, row: Any, y: Any) -> None:
            where = emit.move64(emit.pointer(qkv), token, 2 * plan.outputs)
            emit.store_bf16(emit.move(where, emit.mul(row, 2)), y)

        def rest() -> None:
            when(_is_spare(threads), partial(bring, _QKV_EARLY[1], plan.pieces))

        emit_project(
            plan, threads, weight, emit.pointer(ring), partial(emit_fetched, plan, arrived, layer),
            partial(emit_await_grid, counter, came), emit.pointer(x),
            emit.move64(emit.pointer(norm), layer, 2 * plan.inputs), None, rest,
            store,
        )  # fmt: skip

    run(*refs, *_who(layer))


def _attend(
    layers: _Layers, inputs: _Inputs, moe: Arguments, outputs: _Outputs, shared: _Shared,
    layer: Any,
) -> None:  # fmt: skip
    """Queries, keys, values -> y; the new key and value go into the cache.

    Meanwhile the output projection's weights come to where the ring is.
    """
    weights, plan, output = inputs.weights, layers.attend, layers.output
    memory_refs = (
        inputs.positions, inputs.cos, inputs.sin, outputs.qkv, weights.q_norm, weights.k_norm,
        inputs.keys, inputs.values, outputs.parts, outputs.part_sums, outputs.arrivals, outputs.y,
        shared.ring, shared.small,
    )  # fmt: skip
    refs = (
        moe.counter, shared.output_arrived, shared.ring, weights.attention_norm, weights.mlp_norm,
        weights.router, *_refs(weights.o), *memory_refs,
    )  # fmt: skip

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * len(refs), _SPLAT, _SPLAT, _SPLAT))
    def run(ctx: Any, *args: Any) -> None:
        del ctx
        counter, arrived, ring, *soon, router = args[:6]
        *rest, layer, block, group = args[6:]
        matrix, rest = rest[: -len(memory_refs)], rest[-len(memory_refs) :]
        memory, layer = AttendMemory(*map(emit.pointer, rest)), emit.scalar(layer)
        of_layer = 2 * plan.slots * plan.context * plan.kv_heads * HEAD
        memory = memory._replace(
            work=emit.move(memory.work, output.shared_bytes),
            q_norm=emit.move64(memory.q_norm, layer, 2 * HEAD),
            k_norm=emit.move64(memory.k_norm, layer, 2 * HEAD),
            keys=emit.move64(memory.keys, layer, of_layer),
            values=emit.move64(memory.values, layer, of_layer),
        )
        threads = Threads.of(block, group)
        weight, target = _at_layer(output, matrix, layer), emit.shared_address(ring)
        bring = partial(emit_fetch, output, threads, weight, target, arrived, layer)
        came = emit_arrive_grid(counter, threads.block, layers.workers)
        when(_is_spare(threads), partial(bring, 0, _OUTPUT_UNDER_WAY))

        def rest_of_output() -> None:
            _prefetch(soon, router, layer, threads.block, layers)
            bring(_OUTPUT_UNDER_WAY, output.pieces, _OUTPUT_UNDER_WAY)

        wait = partial(emit_await_grid, counter, came)
        emit_attend(plan, threads, memory, wait, rest_of_output)

    run(*refs, *_who(layer))


def _prefetch(norms: list[Any], router: Any, layer: Any, block: Any, layers: _Layers) -> None:
    """Brings small weights of the next phases into the L2 cache, where they will be waited for."""
    count, experts, hidden = ir.MemRefType(router.type).shape
    total = 2 * experts * hidden
    share = -(-total // layers.workers.blocks // 16) * 16
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


def _project_output(
    layers: _Layers, inputs: _Inputs, moe: Arguments, outputs: _Outputs, shared: _Shared,
    layer: Any,
) -> None:  # fmt: skip
    """x + y's projection -> x, in place."""
    plan, weight = layers.output, inputs.weights.o
    refs = (moe.x, outputs.y, shared.output_arrived, moe.counter, shared.ring, *_refs(weight))

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * len(refs), _SPLAT, _SPLAT, _SPLAT))
    def run(ctx: Any, *args: Any) -> None:
        del ctx
        x, y, arrived, counter, ring, *matrix, layer, block, group = args
        threads, layer = Threads.of(block, group), emit.scalar(layer)
        came = emit_arrive_grid(counter, threads.block, layers.workers)

        def store(token: Any, row: Any, y: Any) -> None:
            where = emit.move64(emit.pointer(x), token, 2 * plan.outputs)
            emit.store_bf16(emit.move(where, emit.mul(row, 2)), y)

        emit_project(
            plan, threads, _at_layer(plan, matrix, layer), emit.pointer(ring),
            partial(emit_fetched, plan, arrived, layer), partial(emit_await_grid, counter, came),
            emit.pointer(y), None, emit.pointer(x), lambda: None, store,
        )  # fmt: skip

    run(*refs, *_who(layer))


def _is_spare(threads: Threads) -> Any:
    """Whether it is the warp that asks for weights."""
    return arith.cmpi(arith.CmpIPredicate.eq, threads.warp, emit.const(SPARE_WARP))


def _bits(weight: Any) -> int:
    return 8 if isinstance(weight, Int8Matrix) else 16


def _refs(weight: Any) -> tuple[Any, ...]:
    return tuple(weight) if isinstance(weight, Int8Matrix) else (weight,)


def _at_layer(plan: ProjectPlan, matrix: list[Any], layer: Any) -> Weight:
    """Pointers to a layer of a stack of matrices, given by ``_refs``."""
    pointers = [emit.pointer(ref) for ref in matrix]
    rows = emit.move64(pointers[0], layer, plan.outputs * plan.row_bytes)
    scale = emit.move64(pointers[1], layer, 4 * plan.outputs) if plan.bits == 8 else None
    return Weight(rows, scale)


def _who(layer: Any) -> tuple[Any, Any, Any]:
    """Layer, block and warpgroup."""
    block, group = lax.axis_index(BLOCK_AXIS), warpgroup()
    return jnp.int32(layer), jnp.int32(block), jnp.int32(group)


assert WARPS >= GROUP + 2  # a warp for each query head, the new key and the new value
