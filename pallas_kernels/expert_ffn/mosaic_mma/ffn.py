"""The expert feed-forward as two matmuls over pages and a weighted sum.

A few rows a tile (decoding) are made float16 by each block for itself, so that nothing comes
before gate_up or between it and down. Many rows (prefill) are made float16 once, in plain JAX, and
streamed.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import BFloat16, Float32, Int32

from pallas_kernels.expert_ffn.grouping import Tiles, group_by_expert, tile_count
from pallas_kernels.expert_ffn.mosaic_mma.matmul import matmul
from pallas_kernels.expert_ffn.mosaic_mma.plan import (
    Matmul,
    MatmulPlan,
    Weights,
    fits_resident,
    shared_rows,
)
from pallas_kernels.expert_ffn.mosaic_mma.rows import RowSource
from pallas_kernels.expert_ffn.mosaic_mma.scaled import to_halves
from pallas_kernels.layout import LINE_WORDS, ROW_TILE, padded_columns, row_tiles
from pallas_kernels.levels import LEVEL_BITS
from pallas_kernels.pages import PagedExperts

_FEW_ROWS = 8
_ROWS = (8, 16, 32, 48, 64)
_MANY_TILES = 1024
"""Tiles of rows of the weights, from which on two of them share a block."""
_ALIGNED = 8
"""Columns that are read together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MmaConfig:
    """Tuning; hashable."""

    rows: int
    """M: rows of a tile, a multiple of 8."""
    warpgroups: int
    """Of a block; where they do not divide the tiles of a matrix, one."""


def default_config(assignments: int, experts: PagedExperts) -> MmaConfig:
    """For ``assignments`` of tokens to experts that choose at random."""
    mean = -(-assignments // experts.experts)
    rows = next(rows for rows in _ROWS if rows >= min(mean, _ROWS[-1]))
    tiles = tile_count(assignments, experts.experts, rows)
    weight_tiles = tiles * row_tiles(2 * experts.format.width)
    return MmaConfig(rows=rows, warpgroups=2 if weight_tiles >= _MANY_TILES else 1)


def expert_ffn_mma(
    x: BFloat16[jax.Array, "T H"],
    expert_ids: Int32[jax.Array, "T k"],
    expert_weights: Float32[jax.Array, "T k"],
    experts: PagedExperts,
    layer: Int32[jax.Array, ""] | int,
    config: MmaConfig | None = None,
) -> Float32[jax.Array, "T H"]:
    """Sum over a token's experts e of ``weight_e * down_e(silu(gate_e(x)) * up_e(x))``.

    As ``expert_ffn``; the sum runs over the experts in the order of ``expert_ids``. An id of -1 is
    no expert. ``layer`` may be traced. Input and hidden rows are float16 with a power of two a row.

    Raises ValueError unless x is bfloat16 and H a multiple of 8.
    """
    if x.dtype != jnp.bfloat16:
        raise ValueError(f"the mma kernel takes bfloat16 inputs, got {x.dtype}: cast x")
    if x.shape[1] % _ALIGNED:
        raise ValueError(f"the mma kernel needs H to be a multiple of {_ALIGNED}, got {x.shape[1]}")
    config = config or default_config(expert_ids.size, experts)
    return _ffn(
        x, expert_ids, expert_weights, experts, jnp.asarray(layer, jnp.int32), config=config
    )


@partial(jax.jit, static_argnames="config")
def _ffn(
    x: jax.Array,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    experts: PagedExperts,
    layer: jax.Array,
    config: MmaConfig,
) -> jax.Array:
    fmt = experts.format
    top_k = expert_ids.shape[1]
    tiles = _tiles(expert_ids, experts.experts, config.rows)
    streamed = config.rows > _FEW_ROWS or not all(
        fits_resident(columns, config.rows) for _, columns in fmt.matrix_shapes.values()
    )

    def run(name: Matmul, rows: jax.Array) -> jax.Array:
        divisor = top_k if name == "gate_up" else None
        plan = _plan(name, experts, config, streamed, RowSource(divisor=divisor))
        scale = None
        if streamed:
            rows, scale = to_halves(rows[:, : plan.columns])
            padding = padded_columns(plan.columns) - plan.columns
            rows = jnp.pad(rows, ((0, 0), (0, padding)))
        return matmul(plan, rows, scale, tiles, _weights(name, experts, plan), layer)

    hidden = run("gate_up", x)
    y = run("down", hidden.reshape(-1, hidden.shape[-1]))
    return _combine(y.reshape(-1, y.shape[-1])[:, : fmt.hidden], tiles, expert_weights)


def _tiles(expert_ids: jax.Array, experts: int, rows: int) -> Tiles:
    if expert_ids.shape[0] > 1:
        return group_by_expert(expert_ids, experts, rows)
    # the experts of a single token need no sorting
    first = jnp.where(expert_ids[0] < 0, -1, jnp.arange(expert_ids.size, dtype=jnp.int32))
    return Tiles(
        expert=expert_ids[0],
        assignment=jnp.pad(first[:, None], ((0, 0), (0, rows - 1)), constant_values=-1),
    )


def _plan(
    name: Matmul, experts: PagedExperts, config: MmaConfig, streamed: bool, source: RowSource
) -> MatmulPlan:
    above = [bits for bits in LEVEL_BITS if bits > experts.base_bits and experts.pool_pages]
    weight_tiles = row_tiles(experts.format.matrix_shapes[name][0])
    suits = weight_tiles % config.warpgroups == 0 and (
        config.rows % (config.warpgroups * shared_rows(streamed)) == 0
    )
    return MatmulPlan(
        matmul=name,
        format=experts.format,
        base_bits=experts.base_bits,
        levels=(experts.base_bits, *above),
        layers=experts.layers,
        experts=experts.experts,
        input_rows=config.rows,
        warpgroups=config.warpgroups if suits else 1,
        streamed=streamed,
        source=source,
    )


def _weights(name: Matmul, experts: PagedExperts, plan: MatmulPlan) -> Weights:
    levelled = len(plan.levels) > 1
    scales = getattr(experts.scales, name)
    return Weights(
        base=tuple(getattr(page, name).reshape(-1, LINE_WORDS) for page in experts.base),
        pool=getattr(experts.pool, name).reshape(-1, LINE_WORDS) if levelled else None,
        scales=scales.codes.reshape(-1, ROW_TILE),
        scale_base=None if scales.base is None else scales.base.reshape(-1),
        table=experts.table.reshape(-1) if levelled else None,
    )


def _combine(y: jax.Array, tiles: Tiles, weights: jax.Array) -> jax.Array:
    """Each token's weighted sum, in the order of its experts; y [I M, H], weights [T, k]."""
    rows = tiles.assignment.reshape(-1)
    nowhere = weights.size  # scatters drop it
    place = jnp.full(nowhere, -1, jnp.int32)
    place = place.at[jnp.where(rows < 0, nowhere, rows)].set(
        jnp.arange(rows.size, dtype=jnp.int32), mode="drop"
    )
    place = place.reshape(weights.shape)
    total = jnp.zeros((weights.shape[0], y.shape[1]), jnp.float32)
    for j in range(weights.shape[1]):
        mine = place[:, j, None]
        # what a tile without an expert holds may be anything, so it must not be multiplied
        row = jnp.where(mine < 0, 0, y[jnp.maximum(place[:, j], 0)])
        total = total + weights[:, j, None] * row
    return total
