"""The MoE block in plain JAX: the specification of every other implementation."""

from typing import cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Float32, Int32

from pallas_kernels.expert_ffn.xla import expert_ffn_pages, expert_ffn_plain
from pallas_kernels.pages import PagedExperts, PlainExperts
from pallas_kernels.rounding import round_to


def moe_layer_xla(
    x: Float[jax.Array, "T H"],
    norm: tuple[Float[jax.Array, "Ln H"], Int32[jax.Array, ""], float],
    router: Float[jax.Array, "L E H"],
    experts: PagedExperts | PlainExperts,
    layer: Int32[jax.Array, ""],
    valid: Bool[jax.Array, " T"],
    mass: Float32[jax.Array, "L E"],
    *,
    top_k: int,
    normalize: bool,
) -> tuple[Float[jax.Array, "T H"], Float32[jax.Array, "L E"]]:
    """``moe_layer`` of api.py, whose arguments are already checked."""
    weight, norm_layer, eps = norm
    h = _rms_norm(x, weight[norm_layer], eps)
    ids, weights = _route(h, router[layer], valid, top_k, normalize)
    index = cast(int, layer)  # traced; it only indexes arrays
    if isinstance(experts, PlainExperts):
        y = expert_ffn_plain(h, ids, weights, experts, index)
    else:
        y = expert_ffn_pages(h, ids, weights, experts, index)
    out = (x.astype(jnp.float32) + y).astype(x.dtype)
    chosen = jnp.where(ids < 0, experts.experts, ids)  # out of range where there is none: dropped
    return out, mass.at[layer, chosen].add(weights, mode="drop")


def _rms_norm(
    x: Float[jax.Array, "T H"], weight: Float[jax.Array, " H"], eps: float
) -> Float[jax.Array, "T H"]:
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return round_to(wide * weight.astype(jnp.float32), x.dtype)


def _route(
    h: Float[jax.Array, "T H"],
    router: Float[jax.Array, "E H"],
    valid: Bool[jax.Array, " T"],
    top_k: int,
    normalize: bool,
) -> tuple[Int32[jax.Array, "T k"], Float32[jax.Array, "T k"]]:
    """Experts, -1 where a token is not valid, and their weights.

    Ranked by logit, which is by probability without the ties that its rounding makes.
    """
    logits = lax.dot_general(
        h.astype(jnp.float32),
        router.astype(jnp.float32),
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
    )
    _, ids = lax.top_k(logits, top_k)
    weights = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), ids, axis=1)
    if normalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.where(valid[:, None], ids, -1), weights
