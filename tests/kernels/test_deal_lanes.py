"""How items are dealt out by cost, lane by lane on a CPU, against fractions."""

import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

jax = pytest.importorskip("jax", minversion="0.11", reason="Mosaic GPU kernels need jax 0.11")
from kernels.warps import POINTER, WORD, Kernel, Memory, shared_refs  # noqa: E402

from pallas_kernels.moe_layer.mosaic.choose import emit_top  # noqa: E402
from pallas_kernels.moe_layer.mosaic.deal import (  # noqa: E402
    BEGIN,
    BOUNDS,
    COST_OF_BITS,
    ITEM,
    DealPlan,
    Line,
    emit_fetch_pages,
)
from pallas_kernels.moe_layer.mosaic.routed import (  # noqa: E402
    ChoosePlan,
    Routed,
    routed_scratch,
)
from pallas_kernels.moe_layer.mosaic.tiles import emit_tiles  # noqa: E402
from pallas_kernels.mosaic import emit  # noqa: E402
from pallas_kernels.mosaic.workers import WARPGROUPS  # noqa: E402

LAYERS, LAYER = 3, 1
LINES = Line(row_tiles=24, parts=2), Line(row_tiles=5, parts=1)
LEVELS = {2: (2, 4, 8), 4: (4, 8)}


def plan_of(experts, base_bits, blocks):
    return DealPlan(
        experts=experts, base_bits=base_bits, levels=LEVELS[base_bits],
        table_stride=LAYERS * experts, lines=LINES, workers=blocks * WARPGROUPS,
    )  # fmt: skip


def bounds_in(deal, dealt):
    """[lines, BOUNDS] of the bytes of a block's memory."""
    return dealt.view(np.int32)[deal.pages :].reshape(len(LINES), BOUNDS)


def bounds_by_fractions(costs, workers):
    """[lines, workers + 1]: places on lines at which workers begin.

    costs: of an item of each tile.
    """
    before = np.cumsum([0, *costs]).tolist()
    rows = []
    for line in LINES:
        row = []
        for worker in range(workers + 1):
            share = Fraction(before[-1] * worker, workers)
            tile = sum(end < share for end in before[1:])
            part = (share - before[tile]) / int(costs[tile]) if share else 0
            row.append(tile * line.tile + math.floor(part * line.tile))
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize(("row_tiles", "parts"), [(24, 2), (5, 1), (1, 3)])
def test_items_are_of_who_has_their_start(row_tiles, parts):
    line = Line(row_tiles=row_tiles, parts=parts)
    starts = [
        stretch * line.stretch + BEGIN + ITEM * item
        for stretch in range(2 * parts)
        for item in range(row_tiles)
    ]
    for place in range(2 * line.tile + 1):
        assert line.items_before(jnp.int32(place)) == sum(start < place for start in starts)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "base_bits", "blocks", "dropped"),
    [
        pytest.param(8, 128, 8, 2, 5, (), id="qwen"),
        pytest.param(9, 40, 3, 4, 4, (0, 8), id="base-4"),
        pytest.param(6, 200, 2, 2, 3, (), id="experts-of-a-thread"),
        pytest.param(14, 4, 2, 2, 2, (3,), id="tiles-of-an-expert"),
        pytest.param(2, 8, 1, 2, 3, (0, 1), id="nobody"),
    ],
)
def test_workers_begin_where_costs_are_shared(
    tokens, experts, top_k, base_bits, blocks, dropped, seed
):
    rng = np.random.default_rng(seed)
    deal = plan_of(experts, base_bits, blocks)
    plan = ChoosePlan(
        tokens=tokens, experts=experts, top_k=top_k, normalize=True, tiles=tokens * top_k,
        rows=4, deal=deal,
    )  # fmt: skip
    table = rng.integers(-1, 2, (deal.rungs, LAYERS, experts))
    table = np.minimum.accumulate(table, axis=0).astype(np.int32)
    logits = rng.normal(size=(tokens, experts)).astype(np.float32)
    valid = (~np.isin(np.arange(tokens), dropped)).astype(np.int32)
    memory = Memory()
    arrays = [memory.place(array)[0] for array in (table, logits, valid)]

    def body(block, group, table, logits, valid, *routed):
        routed = Routed(*routed)
        emit_fetch_pages(deal, table, emit.const(LAYER), routed.dealt)
        emit_top(plan, logits, valid, routed, group)
        emit.wait_for_copies()
        emit.asm("bar.sync 0;", "", [], effects=True)
        emit_tiles(plan, routed, block)  # every warpgroup the same, here

    shared = routed_scratch(plan)
    blocks_given, views = [], []
    for block in range(blocks):
        places = [memory.reserve(4 * math.prod(kind.shape)) for kind in shared]
        views.append(Routed(*(view for _, view in places)))
        groups = np.repeat(np.arange(WARPGROUPS), emit.WARPGROUP)
        blocks_given.append((block, groups, *arrays, *(at for at, _ in places)))
    kernel = Kernel(body, WORD, WORD, *[POINTER] * 3, *shared_refs(shared))
    kernel.run(memory, *blocks_given, seed=seed)

    chosen = np.argsort(-logits, axis=1)[valid != 0, :top_k]
    tiles = -(-np.bincount(chosen.reshape(-1), minlength=experts) // plan.rows)
    held = (table[:, LAYER] >= 0).sum(axis=0)  # pages above the base, without a gap
    above = {2: {0: 2, 1: 4, 2: 4, 3: 8}, 4: {0: 4, 1: 4, 2: 8}}[base_bits]
    costs = np.repeat([COST_OF_BITS[above[pages]] for pages in held.tolist()], tiles)
    expected = bounds_by_fractions(costs, deal.workers)
    for block, routed in enumerate(views):
        used = routed.used.view(np.int32)[0]
        assert used == tiles.sum()
        experts_of_tiles = routed.expert.view(np.int32)[:used]
        np.testing.assert_array_equal(experts_of_tiles, np.repeat(np.arange(experts), tiles))
        first = WARPGROUPS * block
        ours = bounds_in(deal, routed.dealt)
        np.testing.assert_array_equal(ours, expected[:, first : first + BOUNDS])
