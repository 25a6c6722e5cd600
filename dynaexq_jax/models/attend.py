"""Attention of a chunk of tokens over a cache: by cuDNN where that can, elsewhere by plain XLA.

Axis letters as in ``cache`` (B batch rows, S positions of a slot, N key-value heads, D head size),
and T tokens of a row, M query heads.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Float32, Int32

from dynaexq_jax.models.cache import KVCache


class Chunk(NamedTuple):
    """What all layers need to know of the tokens they run; a pytree."""

    positions: Int32[jax.Array, "B T"]
    """-1 is padding."""
    begins: Bool[jax.Array, ""]
    """Whether every row begins its slot: positions from 0 on, then padding."""
    slots: Int32[jax.Array, " B"] | None
    """Of the cache; all, if None."""
    rotation: tuple[Float32[jax.Array, "B T 1 D2"], Float32[jax.Array, "B T 1 D2"]]
    """Of ``rope.rotation``."""

    @staticmethod
    def of(
        positions: Int32[jax.Array, "B T"],
        slots: Int32[jax.Array, " B"] | None,
        rotation: tuple[jax.Array, jax.Array],
    ) -> "Chunk":
        """With ``begins`` as the positions have it."""
        index = jnp.arange(positions.shape[1])
        length = jnp.sum(positions >= 0, axis=1, keepdims=True)
        begins = jnp.all(positions == jnp.where(index < length, index, -1))
        return Chunk(positions, begins, slots, rotation)


def attend(
    q: Float[jax.Array, "B T M D"],
    k: Float[jax.Array, "B T N D"],
    v: Float[jax.Array, "B T N D"],
    chunk: Chunk,
    cache: KVCache,
    layer: int | Int32[jax.Array, ""],
    implementation: str,
) -> Float[jax.Array, "B T M D"]:
    """Attention of a chunk over a layer of the cache, into which ``k`` and ``v`` are written.

    The output of padding is void, but finite where the cache is. ``implementation`` "xla" does
    without cuDNN.
    """
    whole = (q.shape[0], cache.context, *k.shape[2:])
    if implementation == "xla" or not _cudnn_takes(q, k, jax.ShapeDtypeStruct(whole, q.dtype)):
        return _over_slots(q, *cache.read(layer, chunk.slots), chunk.positions)
    # without a mask, over just the keys that count, cuDNN takes less than half the time
    return lax.cond(
        chunk.begins,
        lambda: _over_chunk(q, k, v),
        lambda: _over_slots(q, *cache.read(layer, chunk.slots), chunk.positions, "cudnn"),
    )


def _over_chunk(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Rows at positions from 0 on, over their own keys; padding comes last, so no other sees it."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _over_slots(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    implementation: Literal["xla", "cudnn"] = "xla",
) -> jax.Array:
    """Rows at any positions, over all that their slots hold."""
    # padding sees the first position: where a row saw none, its softmax might not be finite
    seen = jnp.arange(keys.shape[1]) <= jnp.maximum(positions, 0)[:, None, :, None]  # [B, 1, T, S]
    return jax.nn.dot_product_attention(
        q,
        keys.astype(q.dtype),
        values.astype(q.dtype),
        mask=seen,
        implementation=implementation,
    )


def _cudnn_takes(q: jax.Array, k: jax.Array, keys: jax.ShapeDtypeStruct) -> bool:
    """Whether cuDNN is here and attends to these shapes: three to four times as fast as XLA.

    It never does in float32. What else it refuses depends on its version, on the GPU and on the
    shapes, and part of that shows only when it compiles: so it is asked to.
    """
    if jax.default_backend() != "gpu" or q.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    queries, own = (jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (q, k))
    positions = jax.ShapeDtypeStruct(q.shape[:2], jnp.int32)
    over_slots = partial(_over_slots, implementation="cudnn")
    try:
        jax.jit(_over_chunk).lower(queries, own, own).compile()
        jax.jit(over_slots).lower(queries, keys, keys, positions).compile()
    except (RuntimeError, ValueError):
        return False
    return True
