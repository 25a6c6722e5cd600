"""Second phase: every block chooses the experts of all tokens and groups them into tiles.

Each block does all of it for itself, in shared memory, which costs less than telling the others.
A warp finds the top k of a token: it waits for the logits, its lanes hold them as integers of the
same order and find the largest k times. Then a thread an expert counts its tokens and deals them
out to tiles (``tiles.py``), and where there are levels tiles to workers (``deal.py``).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels.expert_ffn.grouping import group_by_expert
from pallas_kernels.moe_layer.mosaic.deal import deal_twin, fetch_pages
from pallas_kernels.moe_layer.mosaic.routed import USED_WORDS, ChoosePlan, Routed
from pallas_kernels.moe_layer.mosaic.tiles import emit_places, emit_tiles
from pallas_kernels.mosaic import emit, shuffle
from pallas_kernels.mosaic.counts import emit_wait_one
from pallas_kernels.mosaic.loops import loop, when
from pallas_kernels.mosaic.presence import emit_await
from pallas_kernels.mosaic.target import interpreting
from pallas_kernels.mosaic.workers import BLOCK_AXIS, WARPS, sync_block, warpgroup

_LOG2_E = 1.4426950408889634


def choose(
    plan: ChoosePlan, logits: Any, valid: Any, count: Any, whole: int, table: Any, layer: Any,
    routed: Routed,
) -> None:  # fmt: skip
    """Fills ``routed`` from logits [T, E]; all threads of the block call it.

    valid int32 [T]: tokens with 0 choose nobody. Meanwhile ``count`` is waited for to be ``whole``:
    what it counts is there for the whole block in the end. table: int32 [R L E], or None if all
    experts are at one level.
    """
    if interpreting():
        _twin(plan, logits, valid, table, layer, routed)
        return
    splat = plgpu.Layout.WG_SPLAT
    shared = [ref for ref in routed if ref is not None]
    refs = (plgpu.RefType(),) * len(shared)
    block = jnp.int32(lax.axis_index(BLOCK_AXIS))

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 3, *refs, splat))
    def top(ctx: Any, logits: Any, valid: Any, count: Any, *args: Any) -> None:
        del ctx
        *shared, group = args
        logits, valid, count = map(emit.pointer, (logits, valid, count))
        emit_top(plan, logits, valid, Routed(*shared), emit.scalar(group))
        emit_wait_one(count, whole)
        if plan.deal is not None:
            emit.wait_for_copies()

    @plgpu.inline_mgpu(arg_types=(*refs, splat))
    def tiles(ctx: Any, *args: Any) -> None:
        del ctx
        *shared, block = args
        emit_tiles(plan, Routed(*shared), emit.scalar(block))

    @plgpu.inline_mgpu(arg_types=refs)
    def places(ctx: Any, *shared: Any) -> None:
        del ctx
        emit_places(plan, Routed(*shared), emit.block_thread())

    if plan.deal is not None:
        fetch_pages(plan.deal, table, layer, routed.dealt)
    top(logits, valid, count, *shared, jnp.int32(warpgroup()))
    sync_block()
    if plan.tokens == 1:
        return  # each of its experts has a tile
    pl.when(warpgroup() == 0)(lambda: tiles(*shared, block))
    sync_block()
    places(*shared)
    sync_block()


def _twin(
    plan: ChoosePlan, logits: Any, valid: Any, table: Any, layer: Any, routed: Routed
) -> None:
    scores = logits[...]
    if plan.normalize:
        best, ids = lax.top_k(scores, plan.top_k)
        weights = jax.nn.softmax(best, axis=1)
    else:
        weights, ids = lax.top_k(jax.nn.softmax(scores, axis=1), plan.top_k)
    alive = valid[...][:, None] != 0
    ids = jnp.where(alive, ids, -1).astype(jnp.int32)
    tiles = group_by_expert(ids, plan.experts, plan.rows)
    flat = tiles.assignment.reshape(-1)
    count = plan.tokens * plan.top_k
    index = lax.iota(jnp.int32, flat.size)
    place = jnp.full(count, -1, jnp.int32)
    place = place.at[jnp.where(flat < 0, count, flat)].set(index, mode="drop")
    routed.used[...] = jnp.full(USED_WORDS, jnp.sum(tiles.expert >= 0, dtype=jnp.int32))
    routed.ids[...] = ids
    routed.expert[...] = tiles.expert
    routed.assignment[...] = tiles.assignment
    routed.place[...] = place.reshape(plan.tokens, plan.top_k)
    routed.weights[...] = jnp.where(alive, weights, 0.0)
    if plan.deal is not None:
        deal_twin(plan.deal, table, layer, tiles.expert, routed.dealt)


def emit_top(plan: ChoosePlan, logits: Any, valid: Any, routed: Routed, group: Any) -> None:
    """Every token's experts, inside ``plgpu.inline_mgpu``; logits and valid are pointers.

    group: the number of the warpgroup.
    """
    warp = emit.add(emit.mul(group, 4), emit.warp())
    lane = emit.lane()
    thread = emit.add(emit.mul(group, emit.WARPGROUP), emit.thread())
    if plan.tokens > 1:
        _fill(emit.pointer(routed.assignment), plan.tiles * plan.rows, thread, -1)
        _fill(emit.pointer(routed.place), plan.tokens * plan.top_k, thread, -1)
        if plan.deal is not None:
            bounds = emit.pointer(routed.dealt, 4 * plan.deal.pages)
            _fill(bounds, plan.deal.bounds, thread, 0)
    loop(
        warp, plan.tokens, WARPS,
        lambda token: _emit_token(plan, logits, valid, routed, token, lane),
    )  # fmt: skip


def _fill(start: Any, count: int, thread: Any, value: int) -> None:
    """``value`` in so many words, by all threads of the block."""

    def store(index: Any) -> None:
        emit.store_words(emit.move(start, emit.mul(index, 4)), [emit.const(value)])

    loop(thread, count, 32 * WARPS, store)


def _emit_token(
    plan: ChoosePlan, logits: Any, valid: Any, routed: Routed, token: Any, lane: Any
) -> None:
    i32 = emit.i32_type()
    zero = emit.const(0)
    line = emit.move(logits, emit.mul(token, 4 * plan.experts))
    (alive,) = emit.load_words(emit.move(valid, emit.mul(token, 4)), 1)
    alive = arith.cmpi(arith.CmpIPredicate.ne, alive, zero)
    keys, places, exists = [], [], []
    for word in range(plan.words):
        expert = emit.add(lane, 32 * word)
        within = arith.cmpi(arith.CmpIPredicate.ult, expert, emit.const(plan.experts))
        places.append(emit.move(line, emit.mul(arith.select(within, expert, zero), 4)))
        exists.append(within)
    for bits, within in zip(emit_await(places), exists, strict=True):
        # the order of floats as unsigned integers; 0 is below every finite one
        flip = arith.ori(arith.shrsi(bits, emit.const(31)), emit.const(0x80000000))
        keys.append(arith.select(within, arith.xori(bits, flip), zero))

    def take(j: Any, winner: Any, best: Any, *left: Any) -> list[Any]:
        """The largest that is left goes to lane j."""
        largest = left[0]
        for key in left[1:]:
            largest = arith.maxui(largest, key)
        largest = shuffle.reduce_of_warp("max", largest)
        candidate = emit.const(-1)
        for word in reversed(range(plan.words)):
            mine = arith.cmpi(arith.CmpIPredicate.eq, left[word], largest)
            candidate = arith.select(mine, emit.add(lane, 32 * word), candidate)
        expert = shuffle.reduce_of_warp("min", candidate)
        rest = []
        for word in range(plan.words):
            mine = arith.cmpi(arith.CmpIPredicate.eq, emit.add(lane, 32 * word), expert)
            rest.append(arith.select(mine, zero, left[word]))
        of_lane = arith.cmpi(arith.CmpIPredicate.eq, lane, j)
        winner = arith.select(of_lane, expert, winner)
        return [winner, arith.select(of_lane, largest, best), *rest]

    mine, best, *left = loop(0, plan.top_k, 1, take, [emit.const(-1), zero, *keys])
    top = shuffle.from_lane(_logit(best), 0)
    has_one = emit.less(lane, plan.top_k)
    weight = _exp_of_difference(_logit(best), top)
    weight = arith.select(has_one, weight, emit.const_f32(0.0))
    if plan.normalize:
        total = shuffle.sum_of_warp(weight)
    else:
        total = emit.const_f32(0.0)
        for word, key in enumerate(keys):
            power = _exp_of_difference(_logit(key), top)
            within = arith.cmpi(
                arith.CmpIPredicate.ult, emit.add(lane, 32 * word), emit.const(plan.experts)
            )
            total = arith.addf(total, arith.select(within, power, emit.const_f32(0.0)))
        total = shuffle.sum_of_warp(total)

    mine = arith.select(alive, mine, emit.const(-1))
    weight = arith.select(alive, arith.divf(weight, total), emit.const_f32(0.0))

    def store() -> None:
        at = emit.mul(emit.add(emit.mul(token, plan.top_k), lane), 4)
        emit.store_words(emit.pointer(routed.ids, at), [mine])
        emit.store_words(emit.pointer(routed.weights, at), [emit.bits_of(weight)])
        if plan.tokens == 1:
            _emit_only_tile(plan, routed, lane, mine)

    when(has_one, store)
    for word in range(plan.words):
        taken = arith.cmpi(arith.CmpIPredicate.ne, left[word], keys[word])
        taken = arith.extui(i32, arith.andi(taken, alive))
        mask = emit.asm(
            "{ .reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }",
            "=r,r",
            [taken],
            i32,
            effects=True,
        )
        at = emit.add(emit.mul(token, 4 * plan.words), 4 * word)
        emit.store_words(emit.pointer(routed.masks, at), [mask])  # every lane the same


def _emit_only_tile(plan: ChoosePlan, routed: Routed, lane: Any, expert: Any) -> None:
    """The tile of the lane's expert, where there is one token; -1 is no expert, for all lanes."""
    at, none = emit.mul(lane, 4), emit.const(-1)
    chose = emit.less(none, expert)
    used = arith.select(chose, emit.const(plan.top_k), emit.const(0))
    emit.store_words(emit.pointer(routed.used), [used])  # every lane the same
    emit.store_words(emit.pointer(routed.expert, at), [expert])
    place = arith.select(chose, emit.mul(lane, plan.rows), none)
    emit.store_words(emit.pointer(routed.place, at), [place])
    for row in range(plan.rows):
        number = none if row else lane
        where = emit.pointer(routed.assignment, emit.mul(lane, 4 * plan.rows))
        emit.store_words(emit.move(where, 4 * row), [number])


def _logit(key: Any) -> Any:
    """The float whose ordered integer this is."""
    negative = arith.cmpi(arith.CmpIPredicate.sge, key, emit.const(0))
    flip = arith.select(negative, emit.const(-1), emit.const(0x80000000))
    return emit.as_f32(arith.xori(key, flip))


def _exp_of_difference(value: Any, top: Any) -> Any:
    scaled = arith.mulf(arith.subf(value, top), emit.const_f32(_LOG2_E))
    return emit.asm("ex2.approx.ftz.f32 $0, $1;", "=f,f", [scaled], emit.f32_type())
