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
    assignment: Int32[jax.Array, "I M"]
    """Assignment of each row, an index into the flattened [T, k], or -1."""


def tile_count(assignments: int, experts: int, rows: int) -> int:
    """Tiles that are enough for any routing of ``assignments`` over ``experts``."""
    return min(assignments, min(experts, assignments) + assignments // rows)


def group_by_expert(expert_ids: Int32[jax.Array, "T k"], experts: int, rows: int) -> Tiles:
    """Tiles of ``rows`` rows, experts ascending; tokens of one expert keep their order.

    An id of -1 means no expert (padding, an idle batch slot) and takes no row.
    """
    flat = jnp.where(expert_ids < 0, experts, expert_ids).reshape(-1)
    total = tile_count(flat.size, experts, rows)
    nowhere = total * rows  # scatters drop it

    count = jnp.zeros(experts + 1, jnp.int32).at[flat].add(1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    sorted_ids = flat[order]
    within = jnp.arange(flat.size, dtype=jnp.int32) - (jnp.cumsum(count) - count)[sorted_ids]

    tiles_of_expert = -(-count // rows)
    end = jnp.cumsum(tiles_of_expert)
    tile = (end - tiles_of_expert)[sorted_ids] + within // rows
    place = jnp.where(sorted_ids < experts, tile * rows + within % rows, nowhere)

    assignment = jnp.full(nowhere, -1, jnp.int32).at[place].set(order, mode="drop")
    index = jnp.arange(total, dtype=jnp.int32)
    expert = jnp.searchsorted(end[:experts], index, side="right").astype(jnp.int32)
    return Tiles(
        expert=jnp.where(expert < experts, expert, -1),
        assignment=assignment.reshape(total, rows),
    )
