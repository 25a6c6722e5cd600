"""Projections: adds up what the warps of a block have summed over their columns."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels.decode_layers.mosaic.project_plan import (
    TILE,
    WARPS,
    ProjectPlan,
    Threads,
    Weight,
    Words,
    rows_of,
)
from pallas_kernels.mosaic import emit, shuffle


class Place(NamedTuple):
    """A sum of the block that a thread finishes; registers."""

    exists: Any
    at: Any
    """Bytes from the start of the sums."""
    token: Any
    row: Any
    scale: Any
    """Of the row's weights, or None."""
    residual: Any
    """What is added at the end, or None."""


def places_of(plan: ProjectPlan, threads: Threads, weight: Weight, residual: Any) -> list[Place]:
    """The thread's sums; loads the scales of their rows and the residual, a pointer or None."""
    result = []
    first, count = rows_of(plan, threads.block)
    for start in range(0, plan.outputs_of_block, 32 * WARPS):
        number = emit.add(emit.block_thread(), start)
        row = emit.and_(number, TILE - 1)
        token = arith.remui(emit.shift_right(number, 4), emit.const(plan.padded_tokens))
        i = arith.divui(number, emit.const(TILE * plan.padded_tokens))
        at = emit.add(emit.mul(i, WARPS * _of_warp(plan)), emit.mul(token, 4 * plan.token_stride))
        at, row = arith.addi(at, emit.mul(row, 4)), arith.addi(emit.mul(i, TILE), row)
        exists = arith.andi(emit.less(token, plan.tokens), emit.less(row, count))
        row = arith.addi(first, row)
        scale = None
        if plan.bits == 8:
            where = emit.move(weight.scale, emit.mul(row, 4))
            scale = emit.as_f32(emit.load_if(exists, where, 1, "stream")[0])
        before = None
        if residual is not None:
            where = emit.move64(residual, token, 2 * plan.outputs)
            half = emit.load_half_if(exists, emit.move(where, emit.mul(row, 2)))
            before = emit.as_f32(emit.shift_right(half, -16))
        result.append(Place(exists, at, token, row, scale, before))
    return result


def _of_warp(plan: ProjectPlan) -> int:
    """Bytes of a warp's sums of a tile."""
    return plan.padded_tokens * 4 * plan.token_stride


def over_lanes(plan: ProjectPlan, value: Any) -> Any:
    """Sum of a float32 over a token's lanes, the same in each."""
    distance = plan.lanes_of_token
    while distance > 1:
        distance //= 2
        value = arith.addf(value, shuffle.shuffle_xor(value, distance))
    return value


def finish(
    plan: ProjectPlan, threads: Threads, sums: list[list[Words]], squares: list[Any],
    places: list[Place], work: Any, store: Callable[[Any, Any, Any], None],
) -> None:  # fmt: skip
    """Adds up the warps' sums and calls ``store(token, row, y)`` in a thread for each.

    sums: by tile of rows and tile of tokens, the lane's of rows g and g + 8, each for
    ``plan.tokens_of_lane`` tokens; squares: by tile of tokens, the warp's. work: pointer to where
    the weights were.
    """
    emit.asm("bar.sync 0;", "", [], effects=True)
    of_token, of_warp = 4 * plan.token_stride, _of_warp(plan)
    of_tile, of_lane = WARPS * of_warp, plan.tokens_of_lane
    places_of_lane = [half + k * of_token for half in (0, 32) for k in range(of_lane)]
    mine = emit.add(emit.mul(threads.row, 4), emit.mul(threads.column, of_lane * of_token))
    mine = emit.move(work, emit.add(mine, emit.mul(threads.warp, of_warp)))
    for i, of_tokens in enumerate(sums):
        for n, values in enumerate(of_tokens):
            start = i * of_tile + n * plan.tokens_of_tile * of_token
            for value, offset in zip(values, places_of_lane, strict=True):
                emit.store_words(emit.move(mine, start + offset), [emit.bits_of(value)])
    all_squares = emit.move(work, plan.tiles_of_block * of_tile)
    if plan.eps is not None:
        token = emit.shift_right(emit.lane(), plan.lanes_of_token.bit_length() - 1)
        for n, value in enumerate(squares):
            start = 4 * n * plan.tokens_of_tile
            at = emit.add(emit.mul(threads.warp, 4 * plan.padded_tokens), start)
            where = emit.move(all_squares, emit.add(at, emit.mul(token, 4)))
            emit.store_words(where, [emit.bits_of(value)])  # a token's lanes the same
    emit.asm("bar.sync 0;", "", [], effects=True)

    def total(start: Any, stride: int) -> Any:
        result = emit.const_f32(0.0)
        for warp in range(WARPS):
            (value,) = emit.load_words(emit.move(start, warp * stride), 1)
            result = arith.addf(result, emit.as_f32(value))
        return result

    for place in places:
        branch = scf.IfOp(place.exists)
        with ir.InsertionPoint(branch.then_block):
            y = total(emit.move(work, place.at), of_warp)
            if plan.eps is not None:
                of = emit.move(all_squares, emit.mul(place.token, 4))
                square = total(of, 4 * plan.padded_tokens)
                mean = arith.mulf(square, emit.const_f32(1 / plan.inputs))
                y = arith.mulf(y, emit.rsqrt(arith.addf(mean, emit.const_f32(plan.eps))))
            if place.scale is not None:
                y = arith.mulf(y, place.scale)
            if place.residual is not None:
                y = arith.addf(y, place.residual)
            store(place.token, place.row, y)
            scf.yield_([])
