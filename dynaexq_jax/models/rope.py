"""Rotary position embedding, with the variants that stretch the context."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int32

from dynaexq_jax.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Float32[np.ndarray, " D2"]:
    """Angle per position of each of the head_dim / 2 rotated pairs, in radians."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = 1.0 / np.power(np.float32(rope.theta), exponent, dtype=np.float32)
    match rope.rope_type:
        case "default":
            return plain
        case "linear":
            return plain / np.float32(rope.factor)
        case "yarn":
            keep = _yarn_share_kept(rope, head_dim)
        case "llama3":
            keep = _llama3_share_kept(rope, plain)
        case other:
            raise AssertionError(other)
    return (plain * keep + plain / np.float32(rope.factor) * (1 - keep)).astype(np.float32)


def _yarn_share_kept(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """1 where a pair keeps its frequency, 0 where it is stretched (arXiv 2309.00071, eq. 17-18)."""

    def pair_with_turns(turns: float) -> float:
        context = rope.original_max_position_embeddings
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with_turns(rope.beta_fast), pair_with_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    pair = np.arange(head_dim // 2, dtype=np.float32)
    return 1 - np.clip((pair - low) / np.float32(high - low), 0, 1).astype(np.float32)


def _llama3_share_kept(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """The same for Llama 3.1's rule, which blends by turns within the original context."""
    turns = rope.original_max_position_embeddings * plain / np.float32(2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return np.clip(blend, 0, 1).astype(np.float32)


def rotation(
    rope: RopeConfig, head_dim: int, positions: Int32[jax.Array, "B T"]
) -> tuple[Float32[jax.Array, "B T 1 D2"], Float32[jax.Array, "B T 1 D2"]]:
    """Cosines and sines at each position, scaled by YaRN's attention factor."""
    angles = positions[..., None, None].astype(jnp.float32) * inverse_frequencies(rope, head_dim)
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(
    x: Float[jax.Array, "B T N D"],
    cos: Float32[jax.Array, "B T 1 D2"],
    sin: Float32[jax.Array, "B T 1 D2"],
) -> Float[jax.Array, "B T N D"]:
    """Rotates each head; pair i is made of elements i and i + D/2."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
