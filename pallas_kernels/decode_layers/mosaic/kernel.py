"""All layers of a decode step as one kernel on Hopper, for few tokens.

A layer is seven phases over one grid of workers, with a barrier over the grid before each but
``gate_up`` and ``down``, which wait for what they read:

    qkv       norm, and the projection to queries, keys and values
    attend    attention over the old positions and the new one
    output    the output projection and the residual
    (then the phases of ``moe_layer``: logits, gate_up, down, combine)

The weights of a projection do not depend on what comes before it, so they are under way while
earlier phases run: they come to where the rings of the expert matmuls are, or beside (``dense``).

Code that runs once a layer is bound by the fetch of its instructions, more so if the loop outgrows
the instruction cache: phases are worth their instructions.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_layers.mosaic.attend_plan import GROUP, HEAD, SMALL_BYTES, AttendPlan
from pallas_kernels.decode_layers.mosaic.dense import (
    DensePhases,
    Inputs,
    Outputs,
    References,
    Shared,
)
from pallas_kernels.decode_layers.mosaic.project_plan import ProjectPlan
from pallas_kernels.decode_layers.shapes import RING_BYTES, DecodeShapes, LayerWeights
from pallas_kernels.layout import LINE_WORDS
from pallas_kernels.linear.weights import Int8Matrix
from pallas_kernels.moe_layer.mosaic.kernel import (
    MoeConfig,
    default_config,
    matmul_plan,
    moe_phases,
)
from pallas_kernels.moe_layer.mosaic.phases import Arguments, Between, Phases
from pallas_kernels.mosaic.bulk import barriers_scratch, initialize
from pallas_kernels.mosaic.counts import fill
from pallas_kernels.mosaic.workers import (
    WARPGROUPS,
    counter_ref,
    freeze_counter,
    sync_grid,
)
from pallas_kernels.pages import PagedExperts

_LINE_BYTES = 4 * LINE_WORDS
_RING_LINES = 32
"""Of a worker's ring of pages: few, so that other weights have room beside it."""


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
        config=_config(tokens, experts),
    )  # fmt: skip
    workers = phases.workers
    dense = DensePhases(
        workers=workers,
        qkv=ProjectPlan(
            tokens=tokens, outputs=shapes.qkv_rows, inputs=hidden, blocks=workers.blocks,
            bits=_bits(weights.qkv), eps=eps,
        ),
        attend=AttendPlan(
            slots=tokens, context=shapes.context, q_heads=shapes.q_heads,
            kv_heads=shapes.kv_heads, blocks=workers.blocks, eps=eps,
        ),
        output=ProjectPlan(
            tokens=tokens, outputs=hidden, inputs=shapes.q_heads * HEAD, blocks=workers.blocks,
            bits=_bits(weights.o), eps=None,
        ),
        expert_bytes=WARPGROUPS * phases.down.ring_lines * _LINE_BYTES,
    )  # fmt: skip
    x_ref, keys_ref, values_ref, mass_ref = (
        jax.new_ref(array) for array in (x, keys, values, mass)
    )
    grid_counter = counter_ref(counter)
    pairs, splits = dense.attend.pairs, dense.attend.splits
    inputs = Inputs(weights, cos, sin, positions, keys_ref, values_ref)
    moe = Arguments(
        x_ref, weights.mlp_norm, None, weights.router, None, (positions >= 0).astype(jnp.int32),
        *matrices, mass_ref, grid_counter,
    )  # fmt: skip
    outputs = Outputs(
        jax.ShapeDtypeStruct((tokens, shapes.qkv_rows), jnp.bfloat16),
        jax.ShapeDtypeStruct((pairs, splits, GROUP, HEAD), jnp.float32),
        jax.ShapeDtypeStruct((pairs, splits, 2, GROUP), jnp.float32),
        jax.ShapeDtypeStruct((pairs,), jnp.int32),
        jax.ShapeDtypeStruct((tokens, shapes.q_heads * HEAD), jnp.bfloat16),
    )
    flat, tree = jax.tree.flatten((inputs, moe))
    left, left_tree = jax.tree.flatten((outputs, between._replace(out=None)))

    def kernel(*args: Any) -> None:
        inputs, moe = jax.tree.unflatten(tree, args[: len(flat)])
        outputs, between = jax.tree.unflatten(left_tree, args[len(flat) :][: len(left)])
        scratch = list(args[len(flat) + len(left) :])
        arrived, *scratch = scratch
        shared = Shared(scratch[0], arrived.at[0], arrived.at[1], scratch[3])
        refs = References(inputs, outputs, shared, moe)
        for barriers in (scratch[2], arrived):
            initialize(barriers)
        fill(outputs.arrivals, 0, workers)
        dense.sync(refs, jnp.int32(0), dense.apart_of_layer(), dense.first_of_layer())
        run = partial(_layer, dense, phases, refs, between._replace(out=moe.x), scratch)
        lax.fori_loop(0, shapes.layers, run, jnp.int32(0))

    call = workers.kernel(
        kernel, name="decode_layers", out_type=tuple(left),
        scratch_types=[
            barriers_scratch(2),
            plgpu.SMEM((RING_BYTES // _LINE_BYTES, LINE_WORDS), jnp.uint32),
            *_with_small(phases.scratch()[1:]),
        ],
    )  # fmt: skip
    call(*flat)
    x, keys, values = (jax.freeze(ref) for ref in (x_ref, keys_ref, values_ref))
    return x, keys, values, jax.freeze(mass_ref), freeze_counter(grid_counter)


def _config(tokens: int, experts: PagedExperts) -> MoeConfig:
    config = default_config(tokens, experts)
    plans = [matmul_plan(name, experts, config) for name in ("gate_up", "down")]
    step = max(plan.lines(bits) for plan in plans for bits in plan.levels)
    return dataclasses.replace(config, ring_lines=max(step, _RING_LINES))


def _with_small(scratch: list[Any]) -> list[Any]:
    """Scratch of the expert matmuls beside the ring; attention's small arrays fit the limbs."""
    scales, barriers, limbs, *others = scratch
    workers, blocks, rows, width = limbs.shape
    blocks = max(blocks, -(-SMALL_BYTES // (workers * rows * width)))
    return [scales, barriers, plgpu.SMEM((workers, blocks, rows, width), limbs.dtype), *others]


def _layer(
    dense: DensePhases, phases: Phases, refs: References, between: Between, scratch: list[Any],
    layer: Any, use: Any,
) -> Any:  # fmt: skip
    """One layer; takes and returns the uses of the ring's barriers."""
    moe = refs.moe._replace(layer=layer, norm_layer=layer)
    dense.project_qkv(refs, layer)
    dense.attend_heads(refs, layer)
    dense.project_output(refs, layer)
    phases.prepare(between)
    sync_grid(moe.counter, phases.workers)
    phases.write_logits(moe, between, scratch)
    phases.choose_experts(moe, between, scratch)
    use = phases.multiply_gate_up(moe, between, scratch, use)
    # their place is apart from the rings, so all of the block left it before ``choose_experts``
    ask = partial(dense.ask, refs, layer + 1, dense.apart_of_layer())
    use = phases.multiply_down(moe, between, scratch, ask, use)
    dense.sync(refs, layer + 1, dense.first_of_layer())
    phases.add_up(moe, between, scratch)
    return use


def _bits(weight: Any) -> int:
    return 8 if isinstance(weight, Int8Matrix) else 16
