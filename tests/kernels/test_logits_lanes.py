"""Router's logits and the choice of experts, lane by lane on a CPU: readers wait for each logit.

Layers come one after another in one memory, and which warps go ahead is drawn. A token's numbers
have one magnitude, so its norm is a sign, whatever rounds it, and h is exact; 32-bit sums of its
products are off by less than the gaps between logits. Memory is in order here: what a logit tells
about h, it need not on a GPU.
"""

import math

import ml_dtypes
import numpy as np
import pytest

jax = pytest.importorskip("jax", minversion="0.11", reason="Mosaic GPU kernels need jax 0.11")
from kernels.warps import POINTER, WORD, Kernel, Memory, shared_refs, sync_grid  # noqa: E402

from pallas_kernels.moe_layer.mosaic.choose import emit_top  # noqa: E402
from pallas_kernels.moe_layer.mosaic.logits import LogitsPlan, emit_logits  # noqa: E402
from pallas_kernels.moe_layer.mosaic.routed import ChoosePlan, Routed, routed_scratch  # noqa: E402
from pallas_kernels.mosaic import emit  # noqa: E402
from pallas_kernels.mosaic.counts import emit_fill, emit_wait_one  # noqa: E402
from pallas_kernels.mosaic.loops import loop, when  # noqa: E402
from pallas_kernels.mosaic.presence import MISSING  # noqa: E402
from pallas_kernels.mosaic.workers import WARPGROUPS, WARPS  # noqa: E402

BF16 = ml_dtypes.bfloat16
EPS, LAYERS, GAP = 1e-6, 2, 1e-5


def define(x, norm, router):
    """h, rounded, and logits of a layer in float64."""
    wide = x.astype(np.float64)
    wide = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS) * norm.astype(np.float64)
    h = wide.astype(BF16)
    return h, h.astype(np.float64) @ router.astype(np.float64).T


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "blocks", "hidden", "sharing"),
    [
        pytest.param(1, 40, 4, 2, 256, 1, id="one-token"),
        pytest.param(5, 4, 2, 4, 1280, 3, id="shared-experts"),
        pytest.param(14, 33, 3, 2, 256, 1, id="more-tokens-than-warps"),
    ],
)
def test_choice_waits_for_its_logits(tokens, experts, top_k, blocks, hidden, sharing, seed):
    plan = LogitsPlan(tokens=tokens, hidden=hidden, experts=experts, eps=EPS)
    chooses = ChoosePlan(
        tokens=tokens, experts=experts, top_k=top_k, normalize=True, tiles=tokens * top_k, rows=4
    )
    workers = blocks * WARPGROUPS
    assert plan.sharing(workers) == sharing
    rng = np.random.default_rng(tokens)
    x = rng.choice([-1, 1], (tokens, hidden)) * 2.0 ** rng.integers(-3, 4, (tokens, 1))
    x = x.astype(BF16)
    norm = rng.uniform(0.5, 1.5, (LAYERS, hidden)).astype(BF16)
    router = (rng.normal(size=(LAYERS, experts, hidden)) / np.sqrt(hidden)).astype(BF16)
    memory = Memory()
    x_at, norm_at, router_at, valid_at = (
        memory.place(a)[0] for a in (x, norm, router, np.ones(tokens, np.int32))
    )
    h_at = memory.reserve(2 * tokens * hidden)[0]
    logits_at = memory.reserve(4 * tokens * experts)[0]
    count_at = memory.reserve(4)[0]
    ids_at, ids = memory.place(np.full((LAYERS, blocks, tokens * top_k), -2, np.int32))
    seen_at, seen = memory.place(np.full((LAYERS, blocks, tokens * hidden), np.nan, BF16))

    def body(block, group, x, norm, router, valid, h, logits, count, ids, seen, scratch, *routed):
        worker = emit.add(emit.mul(group, blocks), block)
        own = emit.move(scratch, emit.mul(group, 32))
        thread = emit.block_thread()

        def copy(source, target, words):
            """Words of ``source(offset)``, by all threads of the block."""

            def one(first):
                at = emit.mul(emit.add(first, thread), 4)

                def move():
                    emit.store_words(emit.move(target, at), emit.load_words(source(at), 1))

                when(emit.less(emit.add(first, thread), words), move)

            loop(0, words, 32 * WARPS, one)

        for layer in range(LAYERS):
            emit_fill(logits, tokens * experts, MISSING, block, blocks)
            emit_fill(count, 1, 0, block, blocks)
            sync_grid()
            emit_logits(
                plan, worker, workers, x, emit.move(norm, 2 * hidden * layer),
                emit.move(router, 2 * experts * hidden * layer), h, count, logits, own,
            )  # fmt: skip
            emit_top(chooses, logits, valid, Routed(*routed), group)
            emit_wait_one(count, sharing)
            emit.asm("bar.sync 0;", "", [], effects=True)
            target = emit.move(ids, 4 * layer * blocks * tokens * top_k)
            target = emit.move(target, emit.mul(block, 4 * tokens * top_k))
            chosen = Routed(*routed).ids
            copy(lambda at, chosen=chosen: emit.pointer(chosen, at), target, tokens * top_k)
            target = emit.move(seen, 2 * layer * blocks * tokens * hidden)
            target = emit.move(target, emit.mul(block, 2 * tokens * hidden))
            copy(lambda at: emit.move(h, at), target, tokens * hidden // 2)
            sync_grid()

    shared = routed_scratch(chooses)

    def block(number):
        group = np.repeat(np.arange(WARPGROUPS), emit.WARPGROUP)
        given = x_at, norm_at, router_at, valid_at, h_at, logits_at, count_at, ids_at, seen_at
        scratch = memory.reserve(32 * WARPGROUPS)[0]
        routed = (memory.reserve(4 * math.prod(kind.shape))[0] for kind in shared)
        return number, group, *given, scratch, *routed

    Kernel(body, WORD, WORD, *[POINTER] * 10, *shared_refs(shared)).run(
        memory, *map(block, range(blocks)), seed=seed
    )
    for layer in range(LAYERS):
        h, scores = define(x, norm[layer], router[layer])
        ranked = np.sort(scores, axis=1)[:, ::-1]
        assert (ranked[:, :top_k] - ranked[:, 1 : top_k + 1]).min() > GAP
        expected = np.argsort(-scores, axis=1)[:, :top_k]
        for of_block, h_of_block in zip(ids[layer], seen[layer], strict=True):
            np.testing.assert_array_equal(of_block.reshape(tokens, top_k), expected)
            np.testing.assert_array_equal(
                h_of_block.reshape(tokens, hidden).astype(np.float32), h.astype(np.float32)
            )
