"""One decode step of Qwen3-MoE: a token for every cache slot, in few operations.

A layer is four operations of ``pallas_kernels`` that take whole stacked arrays and the number of
the layer, so nothing is cut out or copied for them, and the cache is updated where it lies. The
number is traced: all layers of a kind share one trace.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32

from dynaexq_jax.config import ModelConfig
from dynaexq_jax.models.cache import KVCache
from dynaexq_jax.models.layers import dense_mlp, rms_norm
from dynaexq_jax.models.rope import rotation
from dynaexq_jax.models.weights import DenseWeights
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_layers import LayerWeights, decode_layers, obstacle
from pallas_kernels.linear import as_stack, linear
from pallas_kernels.moe_layer import moe_layer
from pallas_kernels.pages import PagedExperts, PlainExperts

_layer_kind = partial(jax.jit, static_argnames=("config", "implementation"))


class DecodeState(NamedTuple):
    """What a decode step updates in place, if it is donated; a pytree."""

    cache: KVCache
    router_mass: Float32[jax.Array, "L E"]
    """Grows by the expert weights of the active slots, by layer with experts and expert."""
    counter: Int32[jax.Array, " 1"]
    """Belongs to ``moe_layer``: zero at first."""


def decode(
    weights: DenseWeights,
    experts: PagedExperts | PlainExperts,
    tokens: Int32[jax.Array, " B"],
    positions: Int32[jax.Array, " B"],
    state: DecodeState,
    *,
    config: ModelConfig,
    dtype: jnp.dtype,
    implementation: str,
) -> tuple[Float32[jax.Array, "B V"], DecodeState]:
    """Runs one token of every slot of the cache; see ``Qwen3Moe.decode``."""
    x = weights.embedding[tokens].astype(dtype)
    cos, sin = rotation(config.rope, config.head_dim, positions[:, None])
    turn = (cos[:, 0, 0], sin[:, 0, 0])
    layers = _layers_of_one_kernel(x, weights, experts, state, implementation)
    if layers is not None and isinstance(experts, PagedExperts):
        x, state = _all_layers(x, layers, experts, turn, positions, state, config)
    else:
        x, state = _layer_by_layer(
            x, weights, experts, turn, positions, state, config, implementation
        )
    head = weights.embedding if weights.head is None else weights.head
    logits = linear(
        x,
        as_stack(head),
        0,
        norm=(weights.final_norm[None], config.rms_norm_eps),
        out_dtype=jnp.float32,
        implementation=implementation,
    )
    return logits, state


def _layers_of_one_kernel(
    x: Float[jax.Array, "B H"],
    weights: DenseWeights,
    experts: PagedExperts | PlainExperts,
    state: DecodeState,
    implementation: str,
) -> LayerWeights | None:
    """What the kernel of all layers takes; None where it must be layer by layer."""
    if implementation == "xla":
        return None
    if weights.qkv_bias is not None or weights.o_bias is not None or weights.gate_up is not None:
        return None
    layers = LayerWeights(*(getattr(weights, name) for name in LayerWeights._fields))
    return layers if obstacle(x, layers, experts, state.cache.keys) is None else None


def _all_layers(
    x: Float[jax.Array, "B H"],
    weights: LayerWeights,
    experts: PagedExperts,
    turn: tuple[Float32[jax.Array, "B D2"], Float32[jax.Array, "B D2"]],
    positions: Int32[jax.Array, " B"],
    state: DecodeState,
    config: ModelConfig,
) -> tuple[Float[jax.Array, "B H"], DecodeState]:
    """As one kernel."""
    x, keys, values, mass, counter = decode_layers(
        x,
        weights,
        experts,
        *turn,
        *state.cache,
        positions,
        state.router_mass,
        state.counter,
        eps=config.rms_norm_eps,
        top_k=config.num_experts_per_tok,
        normalize=config.norm_topk_prob,
    )
    return x, DecodeState(KVCache(keys, values), mass, counter)


def _layer_by_layer(
    x: Float[jax.Array, "B H"],
    weights: DenseWeights,
    experts: PagedExperts | PlainExperts,
    turn: tuple[Float32[jax.Array, "B D2"], Float32[jax.Array, "B D2"]],
    positions: Int32[jax.Array, " B"],
    state: DecodeState,
    config: ModelConfig,
    implementation: str,
) -> tuple[Float[jax.Array, "B H"], DecodeState]:
    valid = positions >= 0
    static = {"config": config, "implementation": implementation}
    count = {True: 0, False: 0}  # layers so far, with experts and without
    for number in range(config.num_hidden_layers):
        sparse = config.is_sparse(number)
        layer, index = np.int32(number), np.int32(count[sparse])
        x, cache = _attention(x, weights, state.cache, turn, positions, layer, **static)
        state = state._replace(cache=cache)
        if sparse:
            x, state = _sparse_mlp(x, weights, experts, valid, state, layer, index, **static)
        else:
            x = _dense_mlp(x, weights, layer, index, **static)
        count[sparse] += 1
    return x, state


@_layer_kind
def _attention(
    x: Float[jax.Array, "B H"],
    weights: DenseWeights,
    cache: KVCache,
    turn: tuple[Float32[jax.Array, "B D2"], Float32[jax.Array, "B D2"]],
    positions: Int32[jax.Array, " B"],
    layer: Int32[jax.Array, ""],
    *,
    config: ModelConfig,
    implementation: str,
) -> tuple[Float[jax.Array, "B H"], KVCache]:
    eps = config.rms_norm_eps
    norm = (weights.attention_norm, eps)
    qkv = linear(x, weights.qkv, layer, norm=norm, implementation=implementation)
    y, keys, values = decode_attention(
        _with_bias(qkv, weights.qkv_bias, layer),
        weights.q_norm,
        weights.k_norm,
        eps,
        *turn,
        cache.keys,
        cache.values,
        positions,
        layer,
        implementation=implementation,
    )
    x = linear(y, weights.o, layer, residual=x, implementation=implementation)
    return _with_bias(x, weights.o_bias, layer), KVCache(keys, values)


@_layer_kind
def _sparse_mlp(
    x: Float[jax.Array, "B H"],
    weights: DenseWeights,
    experts: PagedExperts | PlainExperts,
    valid: Bool[jax.Array, " B"],
    state: DecodeState,
    layer: Int32[jax.Array, ""],
    index: Int32[jax.Array, ""],
    *,
    config: ModelConfig,
    implementation: str,
) -> tuple[Float[jax.Array, "B H"], DecodeState]:
    """``index`` counts the layers with experts."""
    x, mass, counter = moe_layer(
        x,
        (weights.mlp_norm, layer, config.rms_norm_eps),
        weights.router,
        experts,
        index,
        valid,
        state.router_mass,
        state.counter,
        top_k=config.num_experts_per_tok,
        normalize=config.norm_topk_prob,
        implementation=implementation,
    )
    return x, state._replace(router_mass=mass, counter=counter)


@_layer_kind
def _dense_mlp(
    x: Float[jax.Array, "B H"],
    weights: DenseWeights,
    layer: Int32[jax.Array, ""],
    index: Int32[jax.Array, ""],
    *,
    config: ModelConfig,
    implementation: str,
) -> Float[jax.Array, "B H"]:
    """``index`` counts the layers without experts; plain JAX in every implementation."""
    del implementation
    return x + dense_mlp(weights, index, rms_norm(x, weights.mlp_norm[layer], config.rms_norm_eps))


def _with_bias(
    x: Float[jax.Array, "B N"],
    bias: Float[jax.Array, "layers N"] | None,
    layer: Int32[jax.Array, ""],
) -> Float[jax.Array, "B N"]:
    if bias is None:
        return x
    return (x.astype(jnp.float32) + bias[layer].astype(jnp.float32)).astype(x.dtype)
