"""What the decoding of a chunk computes, in arithmetic that interpret mode knows.

A kernel may hold no array constants, so this is reckoned from indices where ``layout`` has tables.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.layout import PLANES_PER_PAGE, ROW_TILE, SIGN_PLANES
from pallas_kernels.levels import LevelTable


def decode_chunk_twin(
    table: LevelTable, parts: str, pages: list[jax.Array], chunk: int, chunks: int
) -> jax.Array:
    """Weights float32 [64, 128] of a chunk in units of their scales; arguments as in ``chunk``."""
    bits: list[jax.Array] = []
    for page in pages:
        words = page.reshape(PLANES_PER_PAGE, 2, 4, 8, 4, chunks)[..., chunk]
        bits += [_bits(words[plane], len(bits) + plane) for plane in range(PLANES_PER_PAGE)]
    weights = jnp.zeros(bits[0].shape, jnp.float32)
    if parts != "residual":
        if len(bits) == 2:
            magnitude = _choose(table.base, bits[1])
        else:
            child = 4 * bits[1] + 2 * bits[2] + bits[3]
            magnitude = _choose([*table.children[0], *table.children[1]], child)
        weights += _sign(bits[0]) * magnitude
    if parts != "main":
        steps = (4 * bits[5] + 2 * bits[6] + bits[7]).astype(jnp.float32) + 0.5
        weights += _sign(bits[4]) * steps * _choose(table.residual_step, bits[1])
    return weights


def _bits(words: jax.Array, plane: int) -> jax.Array:
    """Words [half, warp, g, t] of one plane to its bits [64, 128]."""
    register = lax.broadcasted_iota(jnp.uint32, (8, 4), 0)
    byte = lax.broadcasted_iota(jnp.uint32, (8, 4), 1)
    magnitude_bit = 16 * (register % 2) + 4 * byte + register // 2
    shift = 8 * byte + register if plane in SIGN_PLANES else magnitude_bit
    bit = (words[..., None, None] >> shift) & 1  # half warp g t R i
    return bit.transpose(1, 0, 2, 4, 3, 5).reshape(ROW_TILE, -1)


def _choose(values: Any, choice: jax.Array) -> jax.Array:
    chosen = jnp.full(choice.shape, float(values[0]), jnp.float32)
    for index, value in enumerate(values):
        chosen = jnp.where(choice == index, float(value), chosen)
    return chosen


def _sign(bit: jax.Array) -> jax.Array:
    return 1 - 2 * bit.astype(jnp.float32)
