"""The linear layer in plain JAX: the specification of every other implementation."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int32

from pallas_kernels.linear.weights import Weight, layer_of, product


def linear_xla(
    x: Float[jax.Array, "T K"],
    weight: Weight,  # [L, N, K]
    layer: Int32[jax.Array, ""] | int,
    norm_weight: Float[jax.Array, "L K"] | None,
    residual: Float[jax.Array, "T N"] | None,
    *,
    eps: float,
    out_dtype: jnp.dtype,
) -> Float[jax.Array, "T N"]:
    """``norm(x) @ weight[layer].T + residual``, summed in float32; the weight is read as x is."""
    if norm_weight is not None:
        wide = x.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
        x = (wide * norm_weight[layer].astype(jnp.float32)).astype(x.dtype)
    y = product(x, layer_of(weight, layer), lax.Precision.HIGHEST)
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(out_dtype)
