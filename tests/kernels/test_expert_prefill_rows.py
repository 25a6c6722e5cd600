"""The order of the rows of prompts, by expert, and the tiles of the prefill kernels."""

import jax
import numpy as np
import pytest
from kernels.targets import needs_mosaic

from pallas_kernels.expert_ffn.grouping import tile_count

pytestmark = needs_mosaic


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("most", [8, 16, 48])
def test_rows_are_sorted_and_tiles_cover_them(seed, most):
    from pallas_kernels.expert_ffn.mosaic_prefill.rows import group_rows

    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, 5, (rng.integers(1, 300), 3)).astype(np.int32)
    rows = jax.tree.map(np.asarray, jax.jit(group_rows, static_argnums=(1, 2))(ids, 5, most))
    valid = ids >= 0
    assert (rows.place[~valid] == -1).all()
    expert_of_row = np.full(rows.token.size, -1)
    expert_of_row[rows.place[valid]] = ids[valid]
    in_use = np.flatnonzero(expert_of_row >= 0)
    assert in_use.size == valid.sum()  # no row is given twice
    assert (np.diff(expert_of_row[in_use]) >= 0).all()
    token = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)
    assert (rows.token[rows.place[valid]] == token[valid]).all()

    assert rows.expert.size == tile_count(ids.size, 5, most)
    assert (rows.height[rows.used :] == 0).all()
    covered = [
        row
        for expert, first, count in zip(rows.expert, rows.first, rows.height, strict=True)
        for row in range(first, first + count)
        if expert_of_row[row] == expert
    ]
    assert covered == in_use.tolist()
    assert rows.height.max(initial=0) <= most
    # what a copy from shared memory's eights to the tile wants, which interpret mode does without
    assert (rows.first % 8 == 0).all()
    assert rows.token.size % 8 == 0
    assert rows.first.max(initial=0) + most <= rows.token.size
