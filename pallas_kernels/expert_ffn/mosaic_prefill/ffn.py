"""The expert feed-forward of a chunk of tokens: sort, gate and up, down, weighted sum."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.expert_ffn.mosaic_prefill.chunk import in_pair_order
from pallas_kernels.expert_ffn.mosaic_prefill.kernel import page_matmul
from pallas_kernels.expert_ffn.mosaic_prefill.plan import Matmul, MatmulPlan, PrefillConfig
from pallas_kernels.expert_ffn.mosaic_prefill.rows import group_rows
from pallas_kernels.levels import LEVEL_BITS
from pallas_kernels.mosaic.target import interpreting
from pallas_kernels.pages import PagedExperts


def expert_ffn_mosaic(
    x: jax.Array,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    experts: PagedExperts,
    layer: jax.Array,
    config: PrefillConfig | None = None,
) -> jax.Array:
    """Weighted sum over each token's experts, bfloat16 [T, H]; x bfloat16 [T, H], layer int32 [].

    Weights, hidden rows and every expert's output are rounded to bfloat16; sums are float32.
    """
    return _ffn(x, expert_ids, expert_weights, experts, layer, config or default_config())


def default_config() -> PrefillConfig:
    """What suits a GPU; interpreted, each warpgroup takes a thread of a CPU that may have two."""
    return PrefillConfig(consumers=1) if interpreting() else PrefillConfig()


@partial(jax.jit, static_argnames="config")
def _ffn(
    x: jax.Array,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    experts: PagedExperts,
    layer: jax.Array,
    config: PrefillConfig,
) -> jax.Array:
    rows = group_rows(expert_ids, experts.experts, config.most)
    inputs = in_pair_order(x)[rows.token]
    hidden = page_matmul(matmul_plan("gate_up", experts, config), inputs, rows, experts, layer)
    outputs = page_matmul(matmul_plan("down", experts, config), hidden, rows, experts, layer)
    return _combine(outputs, rows.place, expert_weights).astype(x.dtype)


def matmul_plan(matmul: Matmul, experts: PagedExperts, config: PrefillConfig) -> MatmulPlan:
    """Plan of one matmul."""
    above = [bits for bits in LEVEL_BITS if bits > experts.base_bits and experts.pool_pages]
    rows, columns = experts.format.matrix_shapes[matmul]
    return MatmulPlan(
        matmul=matmul,
        rows=rows,
        columns=columns,
        format=experts.format,
        base_bits=experts.base_bits,
        levels=(experts.base_bits, *above),
        table_stride=experts.layers * experts.experts,
        config=config,
    )


def _combine(outputs: jax.Array, place: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum over a token's rows, float32 [T, H]: gathers and sum are one fusion."""
    y = outputs[jnp.maximum(place, 0)].astype(jnp.float32)  # [T, k, H]
    # what a row of no tile holds may be anything, so it must not be multiplied
    return (weights[:, :, None] * jnp.where(place[:, :, None] < 0, 0, y)).sum(1)
