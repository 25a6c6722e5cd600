"""Projections of a decode step by ``mma``: a block owns tiles of 16 rows, its warps share K.

A warp takes units of 64 columns. Lane (g, t) reads 16 consecutive bytes of rows g and g + 8, and
the same columns of token g of the input: any order of the columns is right if both have it, so
fragments of the matrix instruction come straight from memory. Weights at 8 bits become bfloat16 in
registers, exactly. What a warp needs of the weights does not depend on the input: it is on its way
before the input is there, in registers (``emit_streamed``) or in shared memory
(``emit_resident``). Sums of the warps meet in shared memory.
"""

from collections.abc import Callable
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels.decode_layers.mosaic.project_plan import (
    ROW_PAD,
    TILE,
    TOKENS,
    UNIT,
    WARPS,
    ProjectPlan,
    Threads,
    Weight,
    Words,
    both,
    has_tile,
    has_unit,
)
from pallas_kernels.decode_layers.mosaic.project_sums import finish, places_of
from pallas_kernels.linear.mosaic_int8 import code_pairs
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.workers import LEAD_WARP


def emit_streamed(
    plan: ProjectPlan, threads: Threads, weight: Weight, sync: Callable[[], None], x: Any,
    norm: Any, work: Any, store: Any,
) -> None:  # fmt: skip
    """Projects with weights that go through registers; some of them are loaded before ``sync``.

    weight: pointers at this layer; norm: pointer to its [K]; x: pointer to [T, K], there after
    ``sync``; work: shared memory.
    """
    mine = emit.move64(weight.rows, threads.block, TILE * plan.row_bytes)
    mine = emit.move64(mine, threads.row, plan.row_bytes)
    mine = emit.move(mine, _offset(threads, plan.unit_bytes, 16))
    order = [(i, j) for i in range(plan.tiles_of_block) for j in range(plan.units_of_warp)]

    def load(i: int, j: int) -> Words:
        wanted = both(has_tile(plan, threads, i), has_unit(plan, threads, j))
        first = i * plan.blocks * TILE * plan.row_bytes + j * WARPS * plan.unit_bytes
        return [
            word
            for row in (first, first + 8 * plan.row_bytes)
            for start in range(row, row + 64 * plan.loads, 64)
            for word in emit.load_if(wanted, emit.move(mine, start), 4, "stream")
        ]

    def load_first() -> Words:
        words = [word for unit in order[: plan.in_flight] for word in load(*unit)]
        return words + _load_norm(plan, threads, norm)

    places = places_of(plan, threads, weight, None)
    size = plan.unit_words
    early = plan.in_flight * size
    of_norm = 0 if norm is None else 8 * plan.units_of_warp
    words = load_before(threads, load_first, early + of_norm, sync)
    loaded = [words[start : start + size] for start in range(0, early, size)]
    raw = _load_input(plan, threads, x)
    inputs, squares = _normed(plan, raw, words[early:])
    sums = [_zeros(plan) for _ in range(plan.tiles_of_block)]
    for index, (i, j) in enumerate(order):
        sums[i] = _multiply(plan, sums[i], loaded[index], inputs[j])
        if len(loaded) < len(order):
            loaded.append(load(*order[len(loaded)]))
    finish(plan, threads, sums, squares, places, work, store)


def emit_resident(
    plan: ProjectPlan, threads: Threads, weight: Weight, tile: Any, wait: Callable[[], None],
    x: Any, residual: Any, work: Any, store: Any,
) -> None:  # fmt: skip
    """Projects with a tile of weights that ``emit_fetch`` has brought to shared memory.

    residual: pointer to bfloat16 [T, N], which is added.
    """
    places = places_of(plan, threads, weight, residual)
    inputs, squares = _normed(plan, _load_input(plan, threads, x), [])
    wait()
    stride = plan.row_bytes + ROW_PAD
    mine = emit.move(tile, emit.mul(threads.row, stride))
    sums = _zeros(plan)
    for j in range(plan.units_of_warp):
        unit = emit.add(threads.warp, j * WARPS)
        if (wanted := has_unit(plan, threads, j)) is not None:
            unit = arith.select(wanted, unit, emit.const(0))  # times an input of zeros
        column = emit.add(emit.mul(unit, plan.unit_bytes), emit.mul(threads.column, 16))
        where = emit.move(mine, column)
        words = [
            word
            for row in (0, 8 * stride)
            for start in range(row, row + 64 * plan.loads, 64)
            for word in emit.load_words(emit.move(where, start), 4)
        ]
        sums = _multiply(plan, sums, words, inputs[j])
    finish(plan, threads, [sums], squares, places, work, store)


def load_before(
    threads: Threads, load: Callable[[], Words], count: int, sync: Callable[[], None]
) -> Words:
    """``load()``, ``count`` words, started before ``sync``; by the warp that leads it, behind."""
    leads = arith.cmpi(arith.CmpIPredicate.eq, threads.warp, emit.const(LEAD_WARP))
    kinds = [emit.i32_type()] * count
    early = scf.IfOp(leads, kinds, has_else=True)
    with ir.InsertionPoint(early.then_block):
        scf.yield_([emit.const(0)] * count)
    with ir.InsertionPoint(early.else_block):
        scf.yield_(load())
    sync()
    late = scf.IfOp(leads, kinds, has_else=True)
    with ir.InsertionPoint(late.then_block):
        scf.yield_(load())
    with ir.InsertionPoint(late.else_block):
        scf.yield_(list(early.results))
    return list(late.results)


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
    half = plan.unit_words // 2
    upper, lower = words[:half], words[half:]
    if plan.bits == 8:
        upper, lower = (
            [pair for word in row for pair in code_pairs(word)] for row in (upper, lower)
        )
    for k in range(0, 8, 2):
        a = [upper[k], lower[k], upper[k + 1], lower[k + 1]]
        sums = [
            emit.mma_bf16(part, a, words[k : k + 2])
            for part, words in zip(sums, inputs, strict=True)
        ]
    return sums
