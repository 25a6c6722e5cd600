"""Sorts the assignments of a chunk of tokens by expert, on the device, in few launches.

Rows of one expert are consecutive. Tiles start at a multiple of eight rows: they lie in shared
memory in eights, and a copy counts in eights of the source (from any other row on, it would bring
zeros for what is past an eight). A tile is an expert, its first row and how many rows it has.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Int32

from pallas_kernels.expert_ffn.grouping import tile_count

ROW_STEP = 8
"""Tiles start at a multiple of so many rows."""
_BLOCK = 128
"""Tokens that are counted by one product with a triangle of ones."""


class Rows(NamedTuple):
    """Where every assignment went. Axis letters: I tiles, M most rows of a tile, R rows.

    R is enough for what each expert leaves free before the next, and for M rows from any start.
    """

    expert: Int32[jax.Array, " I"]
    """Expert of each tile; of an unused one, anything."""
    first: Int32[jax.Array, " I"]
    """First row of each tile, a multiple of ROW_STEP."""
    height: Int32[jax.Array, " I"]
    """Rows of each tile, 1 to M; 0 for an unused one."""
    used: Int32[jax.Array, ""]
    """Tiles in use; they come first."""
    token: Int32[jax.Array, " R"]
    """Token of each row; rows that are not in use have any token."""
    place: Int32[jax.Array, "T k"]
    """Row of each assignment, or -1 for no expert."""


def group_rows(expert_ids: Int32[jax.Array, "T k"], experts: int, most: int) -> Rows:
    """Rows sorted by expert, then token; experts cut into tiles of at most ``most`` rows, evenly.

    An even cut costs least: two tiles of 72 rows take as long as one of 144, tiles of 128 and 16
    longer, because a tile of few rows waits for its weights to be decoded. ``most`` is a multiple
    of 8. An id of -1 means no expert.
    """
    tokens, top_k = expert_ids.shape
    every = jnp.arange(experts, dtype=jnp.int32)
    chosen = (expert_ids[:, :, None] == every).astype(jnp.int32).sum(1)  # [T, E]
    before, count = _count_before(chosen)

    earlier = jnp.tril(expert_ids[:, :, None] == expert_ids[:, None, :], -1).sum(2)
    missing = expert_ids < 0
    expert = jnp.maximum(expert_ids, 0)
    start = _sum_of_lower(_whole_steps(count))
    rank = jnp.take_along_axis(before, expert, axis=1) + earlier.astype(jnp.int32)
    place = jnp.where(missing, -1, start[expert] + rank)

    free = (ROW_STEP - 1) * min(experts, expert_ids.size)
    rows = _whole_steps(expert_ids.size + free + most)
    owner = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[:, None], (tokens, top_k))
    where = jnp.where(missing, rows, place)  # the scatter drops those outside
    token = jnp.zeros(rows, jnp.int32).at[where].set(owner, mode="drop", unique_indices=True)

    tiles = -(-count // most)
    height = _whole_steps(-(-count // jnp.maximum(tiles, 1)))  # of an expert's tiles
    first_tile = _sum_of_lower(tiles)
    index = jnp.arange(tile_count(expert_ids.size, experts, most), dtype=jnp.int32)
    of_tile = (first_tile + tiles <= index[:, None]).astype(jnp.int32).sum(1)
    is_used = of_tile < experts
    of_tile = jnp.minimum(of_tile, experts - 1)
    skipped = (index - first_tile[of_tile]) * height[of_tile]
    left = jnp.clip(count[of_tile] - skipped, 0, height[of_tile])
    return Rows(
        expert=of_tile,
        first=jnp.where(is_used, start[of_tile] + skipped, 0),
        height=jnp.where(is_used, left, 0),
        used=tiles.sum(dtype=jnp.int32),
        token=token,
        place=place,
    )


def _whole_steps(count: Any) -> Any:
    return -(-count // ROW_STEP) * ROW_STEP


def _count_before(chosen: Int32[jax.Array, "T E"]) -> tuple[jax.Array, jax.Array]:
    """How often each expert was chosen by the tokens before each: [T, E]; and by all: [E].

    Sums of a block are a product of small integers, exact in bfloat16, with float32 sums.
    """
    tokens, experts = chosen.shape
    blocks = -(-tokens // _BLOCK)
    padded = jnp.pad(chosen, ((0, blocks * _BLOCK - tokens), (0, 0)))
    padded = padded.reshape(blocks, _BLOCK, experts)
    lower = jnp.tril(jnp.ones((_BLOCK, _BLOCK), jnp.bfloat16), -1)
    within = jnp.einsum(
        "ij,bje->bie", lower, padded.astype(jnp.bfloat16), preferred_element_type=jnp.float32
    ).astype(jnp.int32)
    of_block = padded.sum(1)  # [blocks, E]
    before = within + _sum_of_lower(of_block)[:, None]
    return before.reshape(-1, experts)[:tokens], of_block.sum(0)


def _sum_of_lower(values: jax.Array) -> jax.Array:
    """Along axis 0, the sum of all before: one masked sum, which XLA makes one kernel of."""
    index = jnp.arange(values.shape[0])
    mask = (index[:, None] > index).reshape(*(index.size,) * 2, *(1,) * (values.ndim - 1))
    return jnp.where(mask, values[None], 0).sum(1, dtype=values.dtype)
