"""Qwen3-MoE as a Flax NNX model whose expert weights are page buffers.

The model reads weights, experts and cache and returns hidden states, the new cache and the router
mass; it decides nothing. Split it once, jit a pure function of its state, merge inside:

    graph, params, experts = nnx.split(model, nnx.Param, ExpertState)
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Float32, Int32

from dynaexq_jax.config import ModelConfig
from dynaexq_jax.models.cache import KVCache
from dynaexq_jax.models.layers import (
    Attention,
    DenseMlp,
    RMSNorm,
    SparseMlp,
    Weights,
    project,
)
from dynaexq_jax.models.names import EMBEDDING, FINAL_NORM, HEAD, dense_shapes, layer_prefix
from dynaexq_jax.models.rope import rotation
from pallas_kernels.pages import PagedExperts, PlainExperts


class ExpertState(nnx.Variable):
    """Holds the experts (``PagedExperts`` or ``PlainExperts``), apart from ``nnx.Param``."""


class ModelOutput(NamedTuple):
    """What one forward pass returns; a pytree."""

    hidden: Float[jax.Array, "B T H"]
    """After the final norm; ``Qwen3Moe.logits`` turns what is needed of it into logits."""
    cache: KVCache
    router_mass: Float32[jax.Array, "L E"]
    """Expert weights summed over the valid tokens, by layer with experts and expert."""


class DecoderLayer(nnx.Module):
    """Attention and MLP, each behind a norm and a residual connection."""

    def __init__(self, config: ModelConfig, weights: Weights, layer: int) -> None:
        self.attention_norm = RMSNorm(weights["input_layernorm.weight"], config.rms_norm_eps)
        self.attention = Attention(config, weights)
        self.mlp_norm = RMSNorm(weights["post_attention_layernorm.weight"], config.rms_norm_eps)
        self.mlp: SparseMlp | DenseMlp
        if config.is_sparse(layer):
            self.mlp = SparseMlp(config, weights, config.sparse_layers.index(layer))
        else:
            self.mlp = DenseMlp(weights)


class Qwen3Moe(nnx.Module):
    """The whole model.

    ``dense`` maps the names of ``models.names.dense_shapes`` to arrays (abstract ones to plan
    without allocating). Activations have ``dtype``. Raises ValueError if a tensor is missing,
    unknown or of another shape.
    """

    def __init__(
        self,
        config: ModelConfig,
        dense: Mapping[str, jax.Array],
        experts: PagedExperts | PlainExperts,
        *,
        dtype: jnp.dtype,
        implementation: str = "auto",
    ) -> None:
        _check(config, dense, experts)
        self.config = config
        self.dtype = dtype
        self.implementation = implementation
        self.embedding = nnx.Param(dense[EMBEDDING])
        self.layers = nnx.List(
            DecoderLayer(config, _of_layer(dense, layer), layer)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(dense[FINAL_NORM], config.rms_norm_eps)
        self.head = None if config.tie_word_embeddings else nnx.Param(dense[HEAD])
        self.experts = ExpertState(experts)

    def __call__(
        self,
        tokens: Int32[jax.Array, "B T"],
        positions: Int32[jax.Array, "B T"],
        cache: KVCache,
        slots: Int32[jax.Array, " B"] | None = None,
    ) -> ModelOutput:
        """Runs ``tokens`` at ``positions`` of their cache slots (all slots, if None).

        A position of -1 is padding: it writes nothing, routes nowhere and its output is void.
        """
        experts = self.experts.get_value()
        x = self.embedding[...][tokens].astype(self.dtype)
        turn = rotation(self.config.rope, self.config.head_dim, positions)
        mass = []
        for number, layer in enumerate(self.layers):
            attended, cache = layer.attention(
                layer.attention_norm(x), positions, turn, cache, number, slots
            )
            x = x + attended
            y = layer.mlp_norm(x)
            if isinstance(layer.mlp, SparseMlp):
                y, layer_mass = layer.mlp(y, positions >= 0, experts, self.implementation)
                mass.append(layer_mass)
            else:
                y = layer.mlp(y)
            x = x + y
        return ModelOutput(self.norm(x), cache, jnp.stack(mass))

    def logits(self, hidden: Float[jax.Array, "... H"]) -> Float32[jax.Array, "... V"]:
        """Next-token logits, in float32."""
        head = self.embedding if self.head is None else self.head
        return project(hidden, head[...])


def _of_layer(dense: Mapping[str, jax.Array], layer: int) -> dict[str, jax.Array]:
    prefix = layer_prefix(layer)
    return {
        name.removeprefix(prefix): array for name, array in dense.items() if name.startswith(prefix)
    }


def _check(
    config: ModelConfig, dense: Mapping[str, jax.Array], experts: PagedExperts | PlainExperts
) -> None:
    shapes = dense_shapes(config)
    if missing := sorted(shapes.keys() - dense.keys()):
        raise ValueError(f"dense weights lack {len(missing)} tensors, the first is {missing[0]}")
    if extra := sorted(dense.keys() - shapes.keys()):
        raise ValueError(f"dense weights hold {len(extra)} unknown tensors, e.g. {extra[0]}")
    for name, shape in shapes.items():
        if np.shape(dense[name]) != shape:
            raise ValueError(f"{name} must be {shape}, got {np.shape(dense[name])}")
    wanted = (len(config.sparse_layers), config.num_experts, config.hidden_size)
    given = (experts.layers, experts.experts, experts.hidden)
    if given != wanted:
        raise ValueError(f"experts (layers, experts, hidden) must be {wanted}, got {given}")
