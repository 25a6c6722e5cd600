"""Projections of a decode step by ``mma``: a block owns rows of the weights, its warps share K.

A warp takes units of 64 columns. Lane (g, t) reads 16 consecutive bytes of rows g and g + 8, and
the same columns of token g of the input: any order of the columns is right if both have it, so
fragments of the matrix instruction need no shuffle. Weights at 8 bits become bfloat16 in registers,
exactly. They do not depend on the input: ``emit_fetch`` brings them to shared memory while phases
before run. Sums of the warps meet where the weights were.
"""

from collections.abc import Callable
from typing import Any

from jaxlib.mlir.dialects import arith

from pallas_kernels.decode_layers.mosaic.project_plan import (
    SHARE,
    TILE,
    TOKENS,
    UNIT,
    WARPS,
    ProjectPlan,
    Threads,
    Weight,
    Words,
    both,
    has_unit,
)
from pallas_kernels.decode_layers.mosaic.project_sums import finish, places_of
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.loops import loop


def emit_project(
    plan: ProjectPlan, threads: Threads, weight: Weight, shared: Any,
    wait_for_tile: Callable[[Any], None], wait: Callable[[], None], x: Any, norm: Any,
    residual: Any, store: Callable[[Any, Any, Any], None],
) -> None:  # fmt: skip
    """Projects with weights that ``emit_fetch`` brings to shared memory, a pointer.

    x, norm, residual: pointers to bfloat16 [T, K], [K] and [T, N], the last two or None. x is
    there after ``wait``.
    """
    places = places_of(plan, threads, weight, residual)
    of_norm = _load_norm(plan, threads, norm)
    wait()
    inputs, squares = _normed(plan, _load_input(plan, threads, x), of_norm)
    if plan.bits == 8:
        inputs = [[_every_other(words) for words in of_unit] for of_unit in inputs]
    mine = emit.move(shared, emit.mul(threads.row, plan.row_stride))
    mine = emit.move(mine, emit.mul(threads.column, 16))
    columns = []  # bytes to each unit
    for j in range(plan.units_of_warp):
        unit = emit.add(threads.warp, j * WARPS)
        if (wanted := has_unit(plan, threads, j)) is not None:
            unit = arith.select(wanted, unit, emit.const(0))  # times an input of zeros
        columns.append(emit.mul(unit, plan.unit_bytes))

    def multiply_tile(tile: Any) -> list[Any]:
        wait_for_tile(tile)
        first = emit.mul(tile, TILE * plan.row_stride)
        second = emit.mul(tile, TILE)
        second = emit.less(emit.add(second, SHARE), plan.rows_of_block)
        # where there are no such rows, the others stand for them: nobody reads their sums
        second = arith.select(second, emit.const(SHARE * plan.row_stride), emit.const(0))
        sums = _zeros(plan)
        for j, column in enumerate(columns):
            upper = emit.move(mine, arith.addi(first, column))
            words = [
                word
                for row in (upper, emit.move(upper, second))
                for start in range(0, 64 * plan.loads, 64)
                for word in emit.load_words(emit.move(row, start), 4)
            ]
            sums = _multiply(plan, sums, words, inputs[j])
        return [value for values in sums for value in values]

    finish(plan, threads, _over_tiles(plan, multiply_tile), squares, places, shared, store)


def _over_tiles(plan: ProjectPlan, multiply: Callable[[Any], list[Any]]) -> list[list[Words]]:
    """Sums by tile and tile of tokens. A loop moves them up by one tile each time round."""
    tiles, size = plan.tiles_of_block, 4 * plan.token_tiles
    if tiles == 1:
        values = multiply(emit.const(0))
    else:
        none = [emit.const_f32(0.0)] * (tiles * size)
        values = loop(0, tiles, 1, lambda tile, *before: [*before[size:], *multiply(tile)], none)
    parts = [values[start : start + 4] for start in range(0, len(values), 4)]
    return [parts[i * plan.token_tiles : (i + 1) * plan.token_tiles] for i in range(tiles)]


def _offset(threads: Threads, unit_bytes: int, lane_bytes: int) -> Any:
    """Bytes from the start of a row to what the lane reads of its warp's first unit."""
    of_unit = emit.mul(threads.warp, unit_bytes)
    return emit.add(of_unit, emit.mul(threads.column, lane_bytes))


def _columns(plan: ProjectPlan, threads: Threads) -> tuple[Any, int]:
    """Bytes of bfloat16 to the lane's columns of its warp's first unit, and to their second half.

    They are those of its weights: 8 t to 8 t + 7 of both halves of a unit in bfloat16, 16 t to
    16 t + 15 at 8 bits.
    """
    return _offset(threads, 2 * UNIT, 32 // plan.loads), UNIT if plan.loads == 2 else 16


def _load_norm(plan: ProjectPlan, threads: Threads, norm: Any) -> Words:
    """The norm's weight, eight words a unit; none without a norm."""
    if norm is None:
        return []
    offset, other = _columns(plan, threads)
    mine = emit.move(norm, offset)
    return [
        word
        for j in range(plan.units_of_warp)
        for start in (j * WARPS * 2 * UNIT, j * WARPS * 2 * UNIT + other)
        for word in emit.load_if(has_unit(plan, threads, j), emit.move(mine, start), 4, "stream")
    ]


def _load_input(plan: ProjectPlan, threads: Threads, x: Any) -> list[list[Words]]:
    """Words of x for each unit and tile of tokens."""
    row_bytes = 2 * plan.inputs
    offset, other = _columns(plan, threads)
    mine = emit.move(emit.move64(x, threads.row, row_bytes), offset)
    raw: list[list[Words]] = []
    for j in range(plan.units_of_warp):
        unit, start = has_unit(plan, threads, j), j * WARPS * 2 * UNIT
        raw.append([])
        for n in range(plan.token_tiles):
            wanted = unit
            if (n + 1) * TOKENS > plan.tokens:
                wanted = both(unit, emit.less(threads.row, plan.tokens - n * TOKENS))
            first = start + n * TOKENS * row_bytes
            raw[j].append(
                emit.load_if(wanted, emit.move(mine, first), 4, "shared")
                + emit.load_if(wanted, emit.move(mine, first + other), 4, "shared")
            )
    return raw


def _normed(
    plan: ProjectPlan, raw: list[list[Words]], of_norm: Words
) -> tuple[list[list[Words]], list[Any]]:
    """x times the norm's weight, if there is one, and the lane's sums of x^2."""
    squares = [emit.const_f32(0.0)] * plan.token_tiles
    if not of_norm:
        return raw, squares
    for j in range(plan.units_of_warp):
        for n in range(plan.token_tiles):
            for word in raw[j][n]:
                for half in emit.bf16_pair(word):
                    squares[n] = emit.fma(half, half, squares[n])
            raw[j][n] = [
                emit.mul_bf16_pair(word, weight)
                for word, weight in zip(raw[j][n], of_norm[8 * j : 8 * j + 8], strict=True)
            ]
    return raw, squares


def _zeros(plan: ProjectPlan) -> list[Words]:
    return [[emit.const_f32(0.0)] * 4 for _ in range(plan.token_tiles)]


def _multiply(plan: ProjectPlan, sums: list[Words], words: Words, inputs: list[Words]) -> Any:
    """A unit: four products of 16 columns for each tile of tokens."""
    half = 4 * plan.loads
    upper, lower = words[:half], words[half:]
    if plan.bits == 8:
        upper, lower = (
            [pair for word in row for pair in _pairs_of_codes(word)] for row in (upper, lower)
        )
    for k in range(0, 8, 2):
        a = [upper[k], lower[k], upper[k + 1], lower[k + 1]]
        sums = [
            emit.mma_bf16(part, a, words[k : k + 2])
            for part, words in zip(sums, inputs, strict=True)
        ]
    return sums


def _pairs_of_codes(word: Any) -> list[Any]:
    """Codes 0 and 2 of a word, then 1 and 3, as pairs of bfloat16, exactly.

    As in ``linear``: under a high byte 0x43 the low seven bits of a code are 128 + value, and its
    sign bit alone is 128 or 256. Neighbours would take an operation more.
    """
    pairs = []
    for codes in (word, emit.shift_right(word, 8)):
        magnitude = emit.and_or(codes, 0x007F007F, emit.const(0x43004300))
        sign = emit.and_or(codes, 0x00800080, emit.const(0x43004300))
        pairs.append(emit.sub_bf16_pair(magnitude, sign))
    return pairs


def _every_other(words: Words) -> Words:
    """Pairs of bfloat16 in the order of ``_pairs_of_codes``."""
    return [
        emit.permute_bytes(words[i], words[i + 1], selector)
        for i in range(0, len(words), 2)
        for selector in (0x5410, 0x7632)
    ]
