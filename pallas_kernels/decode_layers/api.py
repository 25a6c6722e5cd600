"""Checks the arguments of the layers of a decode step and runs them as one kernel."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int32

from pallas_kernels.decode_layers.shapes import DecodeShapes, LayerWeights
from pallas_kernels.implementations import target_obstacle
from pallas_kernels.linear import Int8Matrix
from pallas_kernels.moe_layer import experts_obstacle
from pallas_kernels.pages import PagedExperts, PlainExperts

_GROUP_OF_BF16 = 64
"""Columns of a group at least, where pages of 2 bits leave room for many of them in a ring."""


def decode_layers(
    x: Float[jax.Array, "B H"],
    weights: LayerWeights,
    experts: PagedExperts,
    cos: Float32[jax.Array, "B D2"],
    sin: Float32[jax.Array, "B D2"],
    keys: Float[jax.Array, "L B S Nkv D"],
    values: Float[jax.Array, "L B S Nkv D"],
    positions: Int32[jax.Array, " B"],
    mass: Float32[jax.Array, "L E"],
    counter: Int32[jax.Array, " 1"],
    *,
    eps: float,
    top_k: int,
    normalize: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """One token of every cache slot through all layers: (x, keys, values, mass, counter).

    A layer is what ``linear``, ``decode_attention``, ``linear`` and ``moe_layer`` do one after the
    other, and their plain JAX is its specification. Slot b's token is at ``positions[b]``, where
    the cache gets its key and value; -1 is an idle slot, whose x is void but finite. cos and sin
    are those of the positions. mass and counter are as in ``moe_layer``. Donate x, cache, mass and
    counter: they are updated in place.

    Raises ValueError where ``obstacle`` is not None.
    """
    if reason := obstacle(x, weights, experts, keys):
        raise ValueError(f"decode_layers cannot run: {reason}; run layer by layer")
    from pallas_kernels.decode_layers.mosaic import decode_layers_kernel

    return decode_layers_kernel(
        x, weights, experts, cos, sin, keys, values, positions, mass, counter,
        shapes=_shapes(x, weights, keys), eps=eps, top_k=top_k, normalize=normalize,
    )  # fmt: skip


def obstacle(
    x: jax.Array,
    weights: LayerWeights,
    experts: PagedExperts | PlainExperts,
    keys: jax.Array,
) -> str | None:
    """Why the kernel cannot run on these arguments here, if it cannot.

    It runs on compute capability 9.x, for up to 16 tokens in bfloat16, where every layer has
    experts in pages.
    """
    if reason := target_obstacle():
        return reason
    from pallas_kernels.mosaic.target import interpreting
    from pallas_kernels.mosaic.workers import multiprocessors

    if interpreting():
        return "interpret mode has no barrier over the grid"
    if reason := experts_obstacle(experts):
        return reason
    assert isinstance(experts, PagedExperts)
    fmt = experts.format
    if experts.base_bits == 2 and fmt.scale_encoding == "bf16" and fmt.group_size < _GROUP_OF_BF16:
        return (
            f"bf16 scales of {fmt.group_size} columns at 2 bits do not fit shared memory; "
            f"{_GROUP_OF_BF16} do, or log8"
        )
    arrays = {"x": x, "the cache": keys, **weights._asdict()}
    for name, array in arrays.items():
        if not isinstance(array, Int8Matrix) and array.dtype != jnp.bfloat16:
            return f"{name} must be bfloat16, not {array.dtype}"
    if experts.layers != keys.shape[0]:
        return f"every layer must have experts: {experts.layers} of {keys.shape[0]} have"
    return _shapes(x, weights, keys).obstacle(multiprocessors())


def _shapes(x: jax.Array, weights: LayerWeights, keys: jax.Array) -> DecodeShapes:
    layers, tokens, context, kv_heads, head = keys.shape
    if x.shape[0] != tokens:
        raise ValueError(f"x must have a row a cache slot, {tokens}, got {x.shape}")
    return DecodeShapes(
        layers=layers,
        tokens=tokens,
        hidden=x.shape[1],
        context=context,
        q_heads=weights.qkv.shape[1] // head - 2 * kv_heads,
        kv_heads=kv_heads,
        head=head,
    )
