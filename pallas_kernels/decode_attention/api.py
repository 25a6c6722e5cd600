"""Chooses the implementation of decode attention and checks its arguments."""

from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int32

from pallas_kernels.decode_attention.shapes import (
    TILE,
    DecodeConfig,
    DecodeShapes,
    default_config,
)
from pallas_kernels.decode_attention.xla import decode_attention_xla
from pallas_kernels.implementations import resolve, target_obstacle

_HEADS: Final = (64, 128, 256)
_MOST_GROUP: Final = 16
_MOST_SPLITS: Final = 64
_SHARED_BYTES: Final = 192 * 1024


def decode_attention(
    qkv: Float[jax.Array, "B C"],
    q_norm: Float[jax.Array, "L D"],
    k_norm: Float[jax.Array, "L D"],
    eps: float,
    cos: Float32[jax.Array, "B D2"],
    sin: Float32[jax.Array, "B D2"],
    keys: Float[jax.Array, "L B S Nkv D"],
    values: Float[jax.Array, "L B S Nkv D"],
    positions: Int32[jax.Array, " B"],
    layer: Int32[jax.Array, ""] | int,
    *,
    config: DecodeConfig | None = None,
    implementation: str = "auto",
) -> tuple[Float[jax.Array, "B Nq*D"], jax.Array, jax.Array]:
    """Attention of one new token per slot of the cache; ``(y, keys, values)``.

    Each row of ``qkv`` holds Nq query, Nkv key and Nkv value heads of D elements; query head n
    reads kv head ``n // (Nq / Nkv)``. Queries and keys get an RMS norm (``q_norm``, ``k_norm``,
    ``eps``) and a rotation (pairs i, i + D/2 by ``cos`` and ``sin`` at the slot's position) in
    float32, rounded after each to the dtype of ``qkv``. The new key and value are written at
    ``[layer, b, positions[b]]``; then the queries attend to positions 0..positions[b] of slot b:
    scores times D**-0.5, softmax in float32.

    ``positions`` are -1..S-1 (unchecked); -1 is an idle slot: nothing is written and its y is void
    but finite. Donate ``keys`` and ``values``: the kernel updates them in place, and a caller that
    keeps the old ones pays for copies.

    "auto" is "mosaic" where that can run: on compute capability 9.0, in bfloat16. It reads
    ``positions``, norm weights and old positions of the cache before its predecessor in the stream
    has finished: all must have been written at least two kernels earlier.

    Raises ValueError if shapes contradict each other or the implementation cannot run.
    """
    shapes = _shapes(qkv, keys)
    _check(qkv, q_norm, k_norm, cos, sin, keys, values, positions, shapes)
    layer = jnp.asarray(layer, jnp.int32)
    arguments = (qkv, q_norm, k_norm, eps, cos, sin, keys, values, positions, layer)
    if resolve(implementation, lambda: _obstacle(shapes, qkv, keys)) == "xla":
        if config is not None:
            raise ValueError("config tunes the kernel: leave it out with implementation='xla'")
        return decode_attention_xla(*arguments, shapes)
    from pallas_kernels.decode_attention.mosaic import decode_attention_mosaic

    config = config or default_config(shapes)
    _check_config(config, shapes)
    return decode_attention_mosaic(*arguments, shapes=shapes, config=config)


def _shapes(qkv: jax.Array, keys: jax.Array) -> DecodeShapes:
    if qkv.ndim != 2 or keys.ndim != 5:
        raise ValueError(f"qkv must be [B, C], keys [L, B, S, Nkv, D]: {qkv.shape}, {keys.shape}")
    layers, batch, context, kv_heads, head = keys.shape
    q_heads, rest = divmod(qkv.shape[1] - 2 * kv_heads * head, head)
    if rest or q_heads < 1 or q_heads % kv_heads:
        raise ValueError(
            f"qkv {qkv.shape} must hold (Nq + 2 * {kv_heads}) * {head} elements a row for keys "
            f"{keys.shape}, where Nq is a multiple of {kv_heads}"
        )
    return DecodeShapes(
        layers=layers,
        batch=batch,
        context=context,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head=head,
    )


def _check(
    qkv: jax.Array,
    q_norm: jax.Array,
    k_norm: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    shapes: DecodeShapes,
) -> None:
    batch, half = shapes.batch, shapes.head // 2
    wanted = {
        "qkv": (qkv, (batch, qkv.shape[1])),
        "q_norm": (q_norm, (shapes.layers, shapes.head)),
        "k_norm": (k_norm, (shapes.layers, shapes.head)),
        "cos": (cos, (batch, half)),
        "sin": (sin, (batch, half)),
        "values": (values, keys.shape),
        "positions": (positions, (batch,)),
    }
    for name, (array, shape) in wanted.items():
        if array.shape != shape:
            raise ValueError(f"{name} must be {shape} for keys {keys.shape}, got {array.shape}")
    if positions.dtype != jnp.int32:
        raise ValueError(f"positions must be int32, got {positions.dtype}")
    if values.dtype != keys.dtype:
        raise ValueError(f"keys and values must have one dtype: {keys.dtype}, {values.dtype}")


def _check_config(config: DecodeConfig, shapes: DecodeShapes) -> None:
    if config.splits > _MOST_SPLITS:
        raise ValueError(f"at most {_MOST_SPLITS} splits, got {config.splits}")
    if config.stages * shapes.tile_bytes > _SHARED_BYTES:
        raise ValueError(
            f"{config.stages} stages of {shapes.tile_bytes} bytes exceed the {_SHARED_BYTES} bytes "
            f"of shared memory: use {_SHARED_BYTES // shapes.tile_bytes}"
        )


def _obstacle(shapes: DecodeShapes, qkv: jax.Array, keys: jax.Array) -> str | None:
    """Why the kernel cannot run on these arguments here, if it cannot."""
    if reason := target_obstacle():
        return reason
    if qkv.dtype != jnp.bfloat16 or keys.dtype != jnp.bfloat16:
        return f"qkv and cache must be bfloat16, not {qkv.dtype} and {keys.dtype}"
    if shapes.head not in _HEADS:
        return f"heads must have one of {_HEADS} elements, not {shapes.head}"
    if shapes.context % TILE:
        return f"the cache must hold a multiple of {TILE} positions, not {shapes.context}"
    if shapes.group > _MOST_GROUP:
        return f"at most {_MOST_GROUP} query heads may share a kv head, not {shapes.group}"
    return None
