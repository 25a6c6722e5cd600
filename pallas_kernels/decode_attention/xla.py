"""Decode attention in plain JAX: the specification of the kernels, and what runs on a CPU."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Float32, Int32

from pallas_kernels.decode_attention.shapes import DecodeShapes
from pallas_kernels.rounding import round_to


def decode_attention_xla(
    qkv: Float[jax.Array, "B C"],
    q_norm: Float[jax.Array, "L D"],
    k_norm: Float[jax.Array, "L D"],
    eps: float,
    cos: Float32[jax.Array, "B D2"],
    sin: Float32[jax.Array, "B D2"],
    keys: Float[jax.Array, "L B S Nkv D"],
    values: Float[jax.Array, "L B S Nkv D"],
    positions: Int32[jax.Array, " B"],
    layer: Int32[jax.Array, ""],
    shapes: DecodeShapes,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``decode_attention`` of api.py, whose arguments are already checked."""
    group, head = shapes.group, shapes.head
    heads = qkv.reshape(shapes.batch, shapes.q_heads + 2 * shapes.kv_heads, head)
    q, k, v = jnp.split(heads, [shapes.q_heads, shapes.q_heads + shapes.kv_heads], axis=1)
    q = _rotate(_norm(q, q_norm[layer], eps), cos, sin)
    k = _rotate(_norm(k, k_norm[layer], eps), cos, sin)

    slots = jnp.arange(shapes.batch)
    row = jnp.where(positions < 0, shapes.context, positions)  # idle: out of range, dropped
    keys = keys.at[layer, slots, row].set(k.astype(keys.dtype), mode="drop")
    values = values.at[layer, slots, row].set(v.astype(values.dtype), mode="drop")

    q = q.reshape(shapes.batch, shapes.kv_heads, group, head)
    scores = jnp.einsum("bngd,bsnd->bngs", q, keys[layer], preferred_element_type=jnp.float32)
    visible = jnp.arange(shapes.context) <= jnp.maximum(positions, 0)[:, None]
    scores = jnp.where(visible[:, None, None], scores * head**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    y = jnp.einsum(
        "bngs,bsnd->bngd",
        weights,
        values[layer].astype(jnp.float32),
        precision=lax.Precision.HIGHEST,
    )
    return y.astype(qkv.dtype).reshape(shapes.batch, shapes.q_heads * head), keys, values


def _norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return round_to(x32 * scale * weight.astype(jnp.float32), x.dtype)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    cos, sin = cos[:, None], sin[:, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return round_to(rotated, x.dtype)
