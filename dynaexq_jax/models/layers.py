"""Building blocks of a Qwen3-MoE decoder layer: pure functions of weights and a layer's number.

A layer's number may be traced, as in a loop over layers. XLA then cuts its part out of a stacked
weight: a copy of one layer at a time, on a CPU in the dtype of the activations. (Before jax 0.11 a
CPU converts the stack, all layers at once, unless it has that dtype already.) Activations have the
dtype of the input. Axis letters as in ``cache``, ``weights`` and ``pallas_kernels.layout`` (B batch
rows, T tokens of a row, H hidden).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Float32, Int32

from dynaexq_jax.config import ModelConfig
from dynaexq_jax.models.attend import Chunk, attend
from dynaexq_jax.models.cache import KVCache
from dynaexq_jax.models.rope import rotate
from dynaexq_jax.models.weights import DenseWeights
from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.linear import Weight, layer_of, product
from pallas_kernels.pages import PagedExperts, PlainExperts


def rms_norm(
    x: Float[jax.Array, "... C"], weight: Float[jax.Array, " C"], eps: float
) -> Float[jax.Array, "... C"]:
    """Root-mean-square norm over the last axis, computed in float32."""
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale * weight.astype(jnp.float32)).astype(x.dtype)


def linear(
    x: Float[jax.Array, "... K"],
    weight: Weight,  # [layers, N, K]
    layer: int | Int32[jax.Array, ""],
    bias: Float[jax.Array, "layers N"] | None = None,
) -> Float[jax.Array, "... N"]:
    """``x @ weight[layer].T + bias[layer]``, accumulated in float32."""
    y = product(x, layer_of(weight, layer))
    if bias is not None:
        y = y + bias[layer].astype(jnp.float32)
    return y.astype(x.dtype)


def attention(
    weights: DenseWeights,
    layer: int | Int32[jax.Array, ""],
    config: ModelConfig,
    x: Float[jax.Array, "B T H"],
    chunk: Chunk,
    cache: KVCache,
    implementation: str,
) -> tuple[Float[jax.Array, "B T H"], KVCache]:
    """Grouped-query attention over the cache, with normed queries and keys."""
    eps, head = config.rms_norm_eps, config.head_dim
    q_rows, kv_rows = config.num_attention_heads * head, config.num_key_value_heads * head
    qkv = linear(x, weights.qkv, layer, weights.qkv_bias)
    q, k, v = (
        part.reshape(*x.shape[:2], -1, head)
        for part in jnp.split(qkv, (q_rows, q_rows + kv_rows), axis=-1)
    )
    q = rotate(rms_norm(q, weights.q_norm[layer], eps), *chunk.rotation)
    k = rotate(rms_norm(k, weights.k_norm[layer], eps), *chunk.rotation)
    rows = jnp.arange(x.shape[0]) if chunk.slots is None else chunk.slots
    cache = cache.write(layer, rows, chunk.positions, k, v)
    y = attend(q, k, v, chunk, cache, layer, implementation)
    return linear(y.reshape(*x.shape[:2], -1), weights.o, layer, weights.o_bias), cache


def dense_mlp(
    weights: DenseWeights, index: int | Int32[jax.Array, ""], x: Float[jax.Array, "... H"]
) -> Float[jax.Array, "... H"]:
    """The MLP of the layer that is number ``index`` of those without experts."""
    assert weights.gate_up is not None
    assert weights.down is not None
    gate, up = jnp.split(linear(x, weights.gate_up, index), 2, axis=-1)
    return linear(jax.nn.silu(gate) * up, weights.down, index)


def route(
    weights: DenseWeights,
    index: int | Int32[jax.Array, ""],
    config: ModelConfig,
    x: Float[jax.Array, "T H"],
) -> tuple[Int32[jax.Array, "T k"], Float32[jax.Array, "T k"]]:
    """Each token's experts and their weights, likeliest first."""
    probabilities = jax.nn.softmax(product(x, weights.router[index]), axis=-1)
    chosen, ids = lax.top_k(probabilities, config.num_experts_per_tok)
    if config.norm_topk_prob:
        chosen = chosen / jnp.sum(chosen, axis=-1, keepdims=True)
    return ids, chosen


def sparse_mlp(
    weights: DenseWeights,
    index: int | Int32[jax.Array, ""],
    config: ModelConfig,
    x: Float[jax.Array, "B T H"],
    valid: Bool[jax.Array, "B T"],
    experts: PagedExperts | PlainExperts,
    implementation: str,
) -> tuple[Float[jax.Array, "B T H"], Float32[jax.Array, " E"]]:
    """The MLP of the layer that is number ``index`` of those with experts.

    Returns output and router mass: the expert weights of the valid tokens, summed by expert.
    """
    flat = x.reshape(-1, x.shape[-1])
    ids, chosen = route(weights, index, config, flat)
    ids = jnp.where(valid.reshape(-1, 1), ids, -1)
    y = expert_ffn(flat, ids, chosen, experts, index, implementation)
    mass = jnp.zeros(experts.experts + 1, jnp.float32).at[ids].add(chosen)[:-1]
    return y.reshape(x.shape), mass
