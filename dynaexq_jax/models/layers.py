"""Building blocks of a Qwen3-MoE decoder layer, as Flax NNX modules.

Parameters keep the orientation of the hub, [outputs, inputs], and the dtype of the checkpoint;
activations have the dtype of the input. Axis letters as in ``cache`` and ``pallas_kernels.layout``
(B batch rows, T tokens of a row, H hidden).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Float, Float32, Int32

from dynaexq_jax.config import ModelConfig
from dynaexq_jax.models.cache import KVCache
from dynaexq_jax.models.rope import rotate
from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.pages import PagedExperts, PlainExperts

Weights = Mapping[str, jax.Array]
"""Dense tensors by name; abstract arrays do as well."""


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, computed in float32."""

    def __init__(self, weight: jax.Array, eps: float) -> None:
        self.weight = nnx.Param(weight)
        self.eps = eps

    def __call__(self, x: Float[jax.Array, "... C"]) -> Float[jax.Array, "... C"]:
        x32 = x.astype(jnp.float32)
        scale = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * scale * self.weight[...].astype(jnp.float32)).astype(x.dtype)


class Linear(nnx.Module):
    """``x @ weight.T + bias``, accumulated in float32."""

    def __init__(self, weight: jax.Array, bias: jax.Array | None = None) -> None:
        self.weight = nnx.Param(weight)
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x: Float[jax.Array, "... K"]) -> Float[jax.Array, "... N"]:
        y = project(x, self.weight[...])
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


def project(x: Float[jax.Array, "... K"], weight: Float[jax.Array, "N K"]) -> jax.Array:
    """``x @ weight.T`` as float32 [..., N]; the weight is read in the dtype of ``x``."""
    # transposed before it is converted: written so, XLA on a CPU reads a bfloat16 weight as it
    # lies; the other way round it first makes a float32 copy of the whole head
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(
        x, weight.T.astype(x.dtype), contract, preferred_element_type=jnp.float32
    )


class Attention(nnx.Module):
    """Grouped-query attention over the cache, with normed queries and keys."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        def linear(name: str) -> Linear:
            bias = weights[f"self_attn.{name}.bias"] if config.attention_bias else None
            return Linear(weights[f"self_attn.{name}.weight"], bias)

        self.q, self.k, self.v, self.o = map(linear, ("q_proj", "k_proj", "v_proj", "o_proj"))
        self.q_norm = RMSNorm(weights["self_attn.q_norm.weight"], config.rms_norm_eps)
        self.k_norm = RMSNorm(weights["self_attn.k_norm.weight"], config.rms_norm_eps)
        self.head_dim = config.head_dim

    def __call__(
        self,
        x: Float[jax.Array, "B T H"],
        positions: Int32[jax.Array, "B T"],
        rotation: tuple[jax.Array, jax.Array],
        cache: KVCache,
        layer: int,
        slots: Int32[jax.Array, " B"] | None,
    ) -> tuple[Float[jax.Array, "B T H"], KVCache]:
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_norm(self.q(x).reshape(heads)), *rotation)
        k = rotate(self.k_norm(self.k(x).reshape(heads)), *rotation)
        v = self.v(x).reshape(heads)
        rows = jnp.arange(x.shape[0]) if slots is None else slots
        cache = cache.write(layer, rows, positions, k, v)
        keys, values = cache.keys[layer], cache.values[layer]
        if slots is not None:
            keys, values = keys[slots], values[slots]
        seen = jnp.arange(cache.context) <= positions[:, None, :, None]  # [B, 1, T, S]
        y = jax.nn.dot_product_attention(q, keys.astype(q.dtype), values.astype(q.dtype), mask=seen)
        return self.o(y.reshape(*x.shape[:2], -1)), cache


class DenseMlp(nnx.Module):
    """The MLP of a layer without experts."""

    def __init__(self, weights: Weights) -> None:
        self.gate, self.up, self.down = (
            Linear(weights[f"mlp.{name}_proj.weight"]) for name in ("gate", "up", "down")
        )

    def __call__(self, x: Float[jax.Array, "B T H"]) -> Float[jax.Array, "B T H"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Router(nnx.Module):
    """Chooses each token's experts and their weights."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.weight = nnx.Param(weights["mlp.gate.weight"])
        self.top_k = config.num_experts_per_tok
        self.normalize = config.norm_topk_prob

    def __call__(
        self, x: Float[jax.Array, "T H"]
    ) -> tuple[Int32[jax.Array, "T k"], Float32[jax.Array, "T k"]]:
        probabilities = jax.nn.softmax(project(x, self.weight[...]), axis=-1)
        weights, ids = lax.top_k(probabilities, self.top_k)
        if self.normalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return ids, weights


class SparseMlp(nnx.Module):
    """The MLP of a layer with experts; the experts themselves are the model's, not the layer's."""

    def __init__(self, config: ModelConfig, weights: Weights, index: int) -> None:
        self.router = Router(config, weights)
        self.index = index

    def __call__(
        self,
        x: Float[jax.Array, "B T H"],
        valid: Int32[jax.Array, "B T"],
        experts: PagedExperts | PlainExperts,
        implementation: str,
    ) -> tuple[Float[jax.Array, "B T H"], Float32[jax.Array, " E"]]:
        """Output and router mass: the expert weights of the valid tokens, summed by expert."""
        flat = x.reshape(-1, x.shape[-1])
        ids, weights = self.router(flat)
        ids = jnp.where(valid.reshape(-1, 1), ids, -1)
        y = expert_ffn(flat, ids, weights, experts, self.index, implementation)
        mass = jnp.zeros(experts.experts + 1, jnp.float32).at[ids].add(weights)[:-1]
        return y.reshape(x.shape), mass
