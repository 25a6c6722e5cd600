"""Attention: a warp's tiles of old positions, by ``mma``."""

import math
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels.decode_layers.mosaic.attend_plan import (
    AT_TOP,
    AT_TOTAL,
    GROUP,
    HEAD,
    KEY_WORDS,
    Q_STRIDE,
    ROW_BYTES,
    ROWS_OF_VALUES,
    SCALE,
    TILE,
    WARP_BYTES,
    WARPS,
    AttendMemory,
    AttendPlan,
    Item,
    cache_row,
)
from pallas_kernels.decode_layers.mosaic.project_plan import Threads
from pallas_kernels.mosaic import emit, shuffle
from pallas_kernels.mosaic.loops import loop_from_first
from pallas_kernels.mosaic.mma import mma_bf16

_SUMS = GROUP * HEAD // 32  # of a lane


def load_tile(plan: AttendPlan, memory: AttendMemory, item: Item, tile: Any) -> list[Any]:
    """Keys of a tile as fragments of ``mma``; of its values, 16 columns of 4 rows a lane.

    Zeros where the split has no such tile.
    """
    return _load_tile(plan, memory, item, tile, emit.less(tile, item.end))


def _load_tile(
    plan: AttendPlan, memory: AttendMemory, item: Item, tile: Any, exists: Any
) -> list[Any]:
    start = emit.mul(tile, TILE)
    if exists is not None:
        start = arith.select(exists, start, emit.const(0))
    lane = emit.lane()
    position = arith.addi(start, emit.shift_right(lane, 2))
    mine = cache_row(plan, memory.keys, item, position)
    mine = emit.move(mine, emit.mul(emit.and_(lane, 3), 16))
    below = 8 * plan.kv_heads * ROW_BYTES
    words = [
        word
        for chunk in range(HEAD // 32)
        for half in (0, below)
        for word in emit.load_if(exists, emit.move(mine, half + 64 * chunk), 4, "stream")
    ]
    row = arith.addi(start, emit.mul(emit.and_(lane, 3), 2))
    across = emit.mul(emit.shift_right(lane, 2), 32)
    first = emit.move(cache_row(plan, memory.values, item, row), across)
    for offset in ROWS_OF_VALUES:
        # what lies behind the position may be anything, and 0 times that is not 0
        wanted = emit.less(emit.add(row, offset), item.position)
        if exists is not None:
            wanted = arith.andi(exists, wanted)
        mine = emit.move(first, offset * plan.kv_heads * ROW_BYTES)
        words += emit.load_if(wanted, mine, 4, "stream")
        words += emit.load_if(wanted, emit.move(mine, 16), 4, "stream")
    return words


def sum_tiles(
    plan: AttendPlan, threads: Threads, memory: AttendMemory, item: Item, first: Any,
    words: list[Any],
) -> None:  # fmt: skip
    """The warp's tiles; leaves its maximum, its sum of weights and its sums of values.

    Scores are queries times keys, so lane (g, t) has head g at positions 2t, 2t + 1, 2t + 8 and
    2t + 9: just what it must hold of the weights where they multiply values. Sums are values times
    weights: columns 16 g to 16 g + 15 of heads 2t and 2t + 1.
    """
    lane = emit.lane()
    row, column = emit.shift_right(lane, 2), emit.and_(lane, 3)
    mine = emit.add(emit.mul(row, Q_STRIDE), emit.mul(column, 16))
    queries = [
        word
        for chunk in range(HEAD // 32)
        for word in emit.load_words(emit.move(memory.small, emit.add(mine, 64 * chunk)), 4)
    ]
    lowest, zero, nothing = emit.const_f32(-math.inf), emit.const_f32(0.0), emit.const(0)
    none = [lowest, zero] + [zero] * _SUMS

    def body(tile: Any, carry: list[Any], words: list[Any]) -> list[Any]:
        top, total, *sums = carry
        keys, values = words[:KEY_WORDS], words[KEY_WORDS:]
        halves = [[zero] * 4, [zero] * 4]
        for at in range(0, len(queries), 2):
            a = [queries[at], nothing, queries[at + 1], nothing]  # 8 of 16 rows
            chunk, k = divmod(at, 4)
            for half in range(2):
                start = 8 * chunk + 4 * half + k
                halves[half] = mma_bf16(halves[half], a, keys[start : start + 2])
        position = arith.addi(emit.mul(tile, TILE), emit.mul(column, 2))
        scores = []
        for score, offset in zip(halves[0][:2] + halves[1][:2], ROWS_OF_VALUES, strict=True):
            seen = emit.less(emit.add(position, offset), item.position)
            score = arith.mulf(score, emit.const_f32(SCALE))
            scores.append(arith.select(seen, score, lowest))
        new_top = top
        for score in scores:
            new_top = emit.max_f32(new_top, score)
        for distance in (1, 2):
            new_top = emit.max_f32(new_top, shuffle.shuffle_xor(new_top, distance))
        shrink = emit.exp2(arith.subf(top, new_top))
        weights = [emit.exp2(arith.subf(score, new_top)) for score in scores]
        total = arith.mulf(total, shrink)
        for weight in weights:
            total = arith.addf(total, weight)
        b = [emit.to_bf16_pair(*weights[:2]), emit.to_bf16_pair(*weights[2:])]
        of_head = emit.mul(column, 8)  # a lane that has head 2t
        factors = [shuffle.from_lane(shrink, emit.add(of_head, 4 * head)) for head in range(2)]
        sums = [arith.mulf(value, factors[at % 2]) for at, value in enumerate(sums)]
        for index in range(8):
            rows = values[index::8]
            a = [
                emit.permute_bytes(rows[pair], rows[pair + 1], selector)
                for pair in (0, 2)
                for selector in (0x5410, 0x7632)  # the even column, the odd one
            ]
            sums[4 * index : 4 * index + 4] = mma_bf16(sums[4 * index : 4 * index + 4], a, b)
        return [new_top, total, *sums]

    def load(tile: Any) -> list[Any]:
        return _load_tile(plan, memory, item, tile, None)

    some = scf.IfOp(emit.less(first, item.end), [value.type for value in none], has_else=True)
    with ir.InsertionPoint(some.then_block):
        scf.yield_(loop_from_first(first, item.end, WARPS, body, load, none, words))
    with ir.InsertionPoint(some.else_block):
        scf.yield_(none)
    top, total, *sums = list(some.results)
    for distance in (1, 2):
        total = arith.addf(total, shuffle.shuffle_xor(total, distance))
    own = emit.move(memory.work, emit.mul(threads.warp, WARP_BYTES))
    own = emit.move(own, emit.add(emit.mul(column, 8 * HEAD), emit.mul(row, 64)))
    for head in range(2):
        words = [emit.bits_of(value) for value in sums[head::2]]
        for start in range(0, 16, 4):
            where = emit.move(own, 4 * HEAD * head + 4 * start)
            emit.store_words(where, words[start : start + 4])
    where = emit.move(memory.small, emit.add(emit.mul(threads.warp, 4 * GROUP), emit.mul(row, 4)))
    emit.store_words(emit.move(where, AT_TOP), [emit.bits_of(top)])  # four lanes the same
    emit.store_words(emit.move(where, AT_TOTAL), [emit.bits_of(total)])
