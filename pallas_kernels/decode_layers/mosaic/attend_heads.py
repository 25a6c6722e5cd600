"""Attention: norm and rotation of the new heads, and the new position's score."""

import math
from typing import Any, NamedTuple

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels.decode_layers.mosaic.attend_plan import (
    AT_K,
    AT_NEW,
    AT_V,
    GROUP,
    HEAD,
    Q_STRIDE,
    ROW_BYTES,
    SCALE,
    AttendMemory,
    AttendPlan,
    Item,
    cache_row,
)
from pallas_kernels.decode_layers.mosaic.project_plan import Threads
from pallas_kernels.mosaic import emit, shuffle


class Turn(NamedTuple):
    """What a lane needs to norm and rotate its four elements of a head; registers."""

    weights: list[Any]
    cos: list[Any]
    sin: list[Any]


def load_turn(threads: Threads, memory: AttendMemory, item: Item) -> Turn:
    """Loads what does not depend on the projection; for the warps that have a query or the key."""
    works, lane = emit.less(threads.warp, GROUP + 1), emit.lane()
    is_key = arith.cmpi(arith.CmpIPredicate.eq, threads.warp, emit.const(GROUP))
    weight = arith.select(is_key, memory.k_norm, memory.q_norm)
    weights = emit.load_if(works, emit.move(weight, emit.mul(lane, 8)), 2, "stream")
    at = emit.add(emit.mul(item.slot, 2 * HEAD), emit.mul(emit.and_(lane, 15), 16))
    cos, sin = (
        emit.load_if(works, emit.move(table, at), 4, "stream") for table in (memory.cos, memory.sin)
    )
    return Turn(weights, cos, sin)


def prepare_heads(
    plan: AttendPlan, threads: Threads, memory: AttendMemory, item: Item, turn: Turn
) -> None:
    """Queries and the new key, normed and rotated, and the new value: a warp each."""
    warp, lane = threads.warp, emit.lane()
    is_key = arith.cmpi(arith.CmpIPredicate.eq, warp, emit.const(GROUP))
    is_value = arith.cmpi(arith.CmpIPredicate.eq, warp, emit.const(GROUP + 1))
    head = emit.add(emit.mul(item.kv_head, plan.group), warp)
    head = arith.select(is_key, emit.add(item.kv_head, plan.q_heads), head)
    head = arith.select(is_value, emit.add(item.kv_head, plan.q_heads + plan.kv_heads), head)
    works = arith.ori(emit.less(warp, plan.group), arith.ori(is_key, is_value))
    row = arith.addi(emit.mul(item.slot, plan.q_heads + 2 * plan.kv_heads), head)
    at = emit.mul(lane, 8)
    words = emit.load_if(works, emit.move(emit.move64(memory.qkv, row, ROW_BYTES), at), 2, "shared")
    turned = _rotated(plan, words, turn)
    words = [arith.select(is_value, word, other) for word, other in zip(words, turned, strict=True)]
    offset = emit.mul(warp, Q_STRIDE)
    offset = arith.select(is_key, emit.const(AT_K), offset)
    offset = arith.select(is_value, emit.const(AT_V), offset)
    stored = scf.IfOp(emit.less(warp, GROUP + 2))
    with ir.InsertionPoint(stored.then_block):
        emit.store_words(emit.move(memory.small, arith.addi(offset, at)), words)
        scf.yield_([])
    cached = scf.IfOp(arith.andi(item.holds_new, arith.ori(is_key, is_value)))
    with ir.InsertionPoint(cached.then_block):
        base = arith.select(is_key, memory.keys, memory.values)
        row = cache_row(plan, base, item, item.position)
        emit.store_words(emit.move(row, at), words)
        scf.yield_([])


def _rotated(plan: AttendPlan, words: list[Any], turn: Turn) -> list[Any]:
    """A head in a warp, four elements a lane: normed, rounded, rotated, rounded."""
    values = [half for word in words for half in emit.bf16_pair(word)]
    square = emit.const_f32(0.0)
    for value in values:
        square = emit.fma(value, value, square)
    mean = arith.mulf(shuffle.sum_of_warp(square), emit.const_f32(1 / HEAD))
    scale = emit.rsqrt(arith.addf(mean, emit.const_f32(plan.eps)))
    weight = [half for word in turn.weights for half in emit.bf16_pair(word)]
    values = [
        arith.mulf(arith.mulf(value, scale), factor)
        for value, factor in zip(values, weight, strict=True)
    ]
    rounded = [emit.to_bf16_pair(*values[:2]), emit.to_bf16_pair(*values[2:])]
    values = [half for word in rounded for half in emit.bf16_pair(word)]
    second = arith.cmpi(arith.CmpIPredicate.uge, emit.lane(), emit.const(16))
    turned = []
    for value, cos, sin in zip(values, turn.cos, turn.sin, strict=True):
        c, s = emit.as_f32(cos), emit.as_f32(sin)
        other = shuffle.shuffle_xor(value, 16)  # half a head away
        signed = arith.select(second, other, arith.negf(other))
        turned.append(arith.addf(arith.mulf(value, c), arith.mulf(signed, s)))
    return [emit.to_bf16_pair(*turned[:2]), emit.to_bf16_pair(*turned[2:])]


def score_new(threads: Threads, memory: AttendMemory, item: Item) -> None:
    """The score of the new position with each query, by a warp each; -inf elsewhere."""
    branch = scf.IfOp(emit.less(threads.warp, GROUP))
    with ir.InsertionPoint(branch.then_block):
        at = emit.mul(emit.lane(), 8)
        query = emit.load_words(
            emit.move(memory.small, arith.addi(emit.mul(threads.warp, Q_STRIDE), at)), 2
        )
        key = emit.load_words(emit.move(memory.small, emit.add(at, AT_K)), 2)
        score = emit.const_f32(0.0)
        for q, k in zip(query, key, strict=True):
            for a, b in zip(emit.bf16_pair(q), emit.bf16_pair(k), strict=True):
                score = emit.fma(a, b, score)
        score = arith.mulf(shuffle.sum_of_warp(score), emit.const_f32(SCALE))
        score = arith.select(item.holds_new, score, emit.const_f32(-math.inf))
        where = emit.move(memory.small, emit.add(emit.mul(threads.warp, 4), AT_NEW))
        emit.store_words(where, [emit.bits_of(score)])  # every lane the same
        scf.yield_([])
