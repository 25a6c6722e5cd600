"""Projections with bfloat16 weights: a lane loads the input's columns that its fragments need.

Lane (g, t) has columns 8 t to 8 t + 7 of both halves of a unit, of rows g and g + 8 of the weights
and of token g: any order of the columns is right if both have it, so fragments of the matrix
instruction need no shuffle.
"""

from collections.abc import Callable
from typing import Any

from jaxlib.mlir.dialects import arith

from pallas_kernels.decode_layers.mosaic.project_plan import (
    UNIT,
    WARPS,
    ProjectPlan,
    Threads,
    Words,
    both,
    has_unit,
)
from pallas_kernels.decode_layers.mosaic.project_rows import over_tiles, row_offsets, unit_offsets
from pallas_kernels.decode_layers.mosaic.project_sums import over_lanes
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.mma import mma_bf16


def multiply_bf16(
    plan: ProjectPlan, threads: Threads, shared: Any, x: Any, norm: Any,
    wait_for_tile: Callable[[Any], None], wait: Callable[[], None],
) -> tuple[list[list[Words]], list[Any]]:  # fmt: skip
    """The lane's sums, by tile of rows and of tokens, and those of x^2, by tile of tokens.

    Pointers: shared to the rows in shared memory, x and norm to bfloat16 [T, K] and [K], the latter
    or None. A tile's rows are there after ``wait_for_tile``, x after ``wait``.
    """
    of_norm = _load_norm(plan, threads, norm)
    wait()
    inputs, squares = _normed(plan, _load_input(plan, threads, x), of_norm)
    mine = emit.move(shared, emit.mul(threads.row, plan.row_stride))
    mine = emit.move(mine, emit.mul(threads.column, 16))
    units = unit_offsets(plan, threads)

    def multiply_tile(tile: Any) -> list[Any]:
        wait_for_tile(tile)
        first, second = row_offsets(plan, tile)
        sums = [[emit.const_f32(0.0)] * 4 for _ in range(plan.token_tiles)]
        for unit, of_unit in zip(units, inputs, strict=True):
            upper = emit.move(mine, arith.addi(first, unit))
            sums = _multiply(sums, _load(upper), _load(emit.move(upper, second)), of_unit)
        return [value for values in sums for value in values]

    tiles = over_tiles(plan, 4 * plan.token_tiles, multiply_tile)
    return [[values[n : n + 4] for n in range(0, len(values), 4)] for values in tiles], squares


def _load(row: Any) -> Words:
    """The lane's part of a row of a unit."""
    return [word for start in (0, UNIT) for word in emit.load_words(emit.move(row, start), 4)]


def _offset(threads: Threads) -> Any:
    """Bytes of bfloat16 to the lane's columns of its warp's first unit."""
    of_unit = emit.mul(threads.warp, 2 * UNIT)
    return emit.add(of_unit, emit.mul(threads.column, 16))


def _load_norm(plan: ProjectPlan, threads: Threads, norm: Any) -> Words:
    """The norm's weight, eight words a unit; none without a norm."""
    if norm is None:
        return []
    mine = emit.move(norm, _offset(threads))
    return [
        word
        for j in range(plan.units_of_warp)
        for start in (j * WARPS * 2 * UNIT, j * WARPS * 2 * UNIT + UNIT)
        for word in emit.load_if(has_unit(plan, threads, j), emit.move(mine, start), 4, "stream")
    ]


def _load_input(plan: ProjectPlan, threads: Threads, x: Any) -> list[list[Words]]:
    """Words of x for each unit and tile of tokens."""
    row_bytes, tile = 2 * plan.inputs, plan.tokens_of_tile
    mine = emit.move(emit.move64(x, threads.row, row_bytes), _offset(threads))
    raw: list[list[Words]] = []
    for j in range(plan.units_of_warp):
        unit, start = has_unit(plan, threads, j), j * WARPS * 2 * UNIT
        raw.append([])
        for n in range(plan.token_tiles):
            wanted = unit
            if (n + 1) * tile > plan.tokens:
                wanted = both(unit, emit.less(threads.row, plan.tokens - n * tile))
            first = start + n * tile * row_bytes
            raw[j].append(
                emit.load_if(wanted, emit.move(mine, first), 4, "shared")
                + emit.load_if(wanted, emit.move(mine, first + UNIT), 4, "shared")
            )
    return raw


def _normed(
    plan: ProjectPlan, raw: list[list[Words]], of_norm: Words
) -> tuple[list[list[Words]], list[Any]]:
    """x times the norm's weight, if there is one, and the warp's sums of x^2."""
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
    return raw, [over_lanes(plan, square) for square in squares]


def _multiply(sums: list[Words], upper: Words, lower: Words, inputs: list[Words]) -> list[Words]:
    """A unit: four products of 16 columns for each tile of tokens."""
    for k in range(0, 8, 2):
        a = [upper[k], lower[k], upper[k + 1], lower[k + 1]]
        sums = [
            mma_bf16(part, a, words[k : k + 2]) for part, words in zip(sums, inputs, strict=True)
        ]
    return sums
