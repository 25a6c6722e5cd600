"""Groups (token, expert) assignments into tiles of rows that share one expert, on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Int32


class Tiles(NamedTuple):
    """Which rows each tile works on. Shapes are static; tiles past the last one in use are empty.

    Axis letters: I tiles, M rows of a tile, A = T * k assignments.
    """

    expert: Int32[jax.Array, " I"]
    """Expert of each tile, or -1 if the tile is empty."""
    token: Int32[jax.Array, "I M"]
    """Token of each row; 0 for rows that nothing is assigned to."""
    place: Int32[jax.Array, "T k"]
    """Where an assignment was put: ``tile * M + row``; 0 for tokens without an expert."""


def tile_count(assignments: int, experts: int, rows: int) -> int:
    """Tiles that are enough for any routing of ``assignments`` over ``experts``."""
    return min(assignments, min(experts, assignments) + assignments // rows)


def group_by_expert(expert_ids: Int32[jax.Array, "T k"], experts: int, rows: int) -> Tiles:
    """Tiles of ``rows`` rows; tokens of one expert keep their order, experts may be empty.

    An id of -1 means no expert (padding, an idle batch slot) and takes no row.
    """
    tokens, per_token = expert_ids.shape
    flat = jnp.where(expert_ids < 0, experts, expert_ids).reshape(-1)
    total = tile_count(flat.size, experts, rows)
    nowhere = total * rows  # scatters drop it

    count = jnp.zeros(experts + 1, jnp.int32).at[flat].add(1)
    order = jnp.argsort(flat, stable=True)
    sorted_ids = flat[order]
    within = jnp.arange(flat.size, dtype=jnp.int32) - (jnp.cumsum(count) - count)[sorted_ids]

    tiles_of_expert = -(-count // rows)
    end = jnp.cumsum(tiles_of_expert)
    tile = (end - tiles_of_expert)[sorted_ids] + within // rows
    place = jnp.where(sorted_ids < experts, tile * rows + within % rows, nowhere)

    token = jnp.zeros(nowhere, jnp.int32).at[place].set(order // per_token, mode="drop")
    place_of = jnp.zeros_like(flat).at[order].set(jnp.where(place < nowhere, place, 0))
    index = jnp.arange(total, dtype=jnp.int32)
    expert = jnp.searchsorted(end[:experts], index, side="right").astype(jnp.int32)
    return Tiles(
        expert=jnp.where(expert < experts, expert, -1),
        token=token.reshape(total, rows),
        place=place_of.reshape(tokens, per_token),
    )
