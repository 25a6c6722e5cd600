"""Projections with weights at 8 bits: codes are multiplied as they lie, by limbs of the input.

``ldmatrix`` brings fragments from shared memory, of codes and limbs. Limbs of a token are
neighbouring columns of the product, so their sums meet in a lane.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.decode_layers.mosaic.project_limbs import Limbs
from pallas_kernels.decode_layers.mosaic.project_plan import ProjectPlan, Threads, Words
from pallas_kernels.decode_layers.mosaic.project_rows import (
    over_tiles,
    row_offsets,
    unit_offsets,
)
from pallas_kernels.decode_layers.mosaic.project_sums import over_lanes
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.loops import loop, when
from pallas_kernels.mosaic.mma import load_matrices, mma_int8


def multiply_int8(
    plan: ProjectPlan, threads: Threads, shared: Any, stage: Any, x: Any, norm: Any,
    wait_for_tile: Callable[[Any], None], wait: Callable[[], None],
) -> tuple[list[list[Words]], list[Any]]:  # fmt: skip
    """As ``multiply_bf16``; a loop goes over tiles of tokens. stage: as for ``Limbs``."""
    limbs = Limbs(plan, threads, stage)
    multiply = _tile_multiplier(plan, threads, shared)
    of_norm = limbs.load_norm(norm)
    wait()
    loaded = limbs.load(x, emit.const(0))
    count, size = plan.token_tiles, 2 * plan.tiles_of_block + 1

    def step(number: Any, *carry: Any) -> list[Any]:
        """A tile of tokens: sums of each tile of rows, and of x^2; loads the next one's words."""
        before, words = carry[size : count * size], list(carry[count * size :])
        words, square = _normed(words, of_norm)
        factor, scale = limbs.scales(words)
        square = over_lanes(plan, square) if of_norm else square
        fragments = limbs.share(words, factor)
        following = limbs.load(x, emit.add(number, 1)) if count > 1 else []
        is_first = arith.cmpi(arith.CmpIPredicate.eq, number, emit.const(0))

        def multiply_tile(tile: Any) -> list[Any]:
            when(is_first if count > 1 else None, partial(wait_for_tile, tile))
            return multiply(tile, fragments, scale)

        tiles = over_tiles(plan, 2, multiply_tile)
        return [*before, *(value for values in tiles for value in values), square, *following]

    if count == 1:
        results = step(emit.const(0), *[None] * size, *loaded)
    else:
        results = loop(0, count, 1, step, [*[emit.const_f32(0.0)] * (count * size), *loaded])
    by_tokens = [results[n * size : (n + 1) * size] for n in range(count)]
    sums = [[of[2 * i : 2 * i + 2] for of in by_tokens] for i in range(plan.tiles_of_block)]
    return sums, [of[-1] for of in by_tokens]


def _normed(words: Words, of_norm: Words) -> tuple[Words, Any]:
    """x times the norm's weight, if there is one, and the lane's sum of x^2."""
    square = emit.const_f32(0.0)
    if not of_norm:
        return words, square
    for word in words:
        for half in emit.bf16_pair(word):
            square = emit.fma(half, half, square)
    pairs = zip(words, of_norm, strict=True)
    return [emit.mul_bf16_pair(word, weight) for word, weight in pairs], square


def _tile_multiplier(plan: ProjectPlan, threads: Threads, shared: Any) -> Callable[..., list[Any]]:
    """A function of a tile of rows, fragments of the limbs and the scale of their sums.

    It gives those of rows g and g + 8 and token t, float32.
    """
    # a lane's row of the four matrices of a fragment: rows and rows + 8, then 16 bytes further
    row, lower = emit.and_(emit.lane(), 7), emit.and_(emit.shift_right(emit.lane(), 3), 1)
    mine = emit.mul(emit.shift_right(emit.lane(), 4), 16)
    mine = emit.add(mine, emit.mul(row, plan.row_stride))
    mine = arith.addi(llvm.ptrtoint(emit.i32_type(), shared), mine)
    units = [arith.addi(mine, offset) for offset in unit_offsets(plan, threads)]

    def multiply(tile: Any, fragments: list[Words], scale: Any) -> list[Any]:
        first, second = row_offsets(plan, tile)
        offset = arith.addi(first, arith.muli(second, lower))
        # two sums of int32 by turns, for a product waits for the one before
        parts = [[emit.const(0)] * 4] * 2
        for unit, b in zip(units, fragments, strict=True):
            address = arith.addi(unit, offset)
            for half in range(2):
                a = load_matrices(emit.add(address, 32 * half))
                parts[half] = mma_int8(parts[half], a, b[2 * half : 2 * half + 2])
        sums = [emit.int_to_f32(arith.addi(*pair)) for pair in zip(*parts, strict=True)]
        return [
            arith.mulf(emit.fma(high, emit.const_f32(256.0), low), scale)
            for high, low in (sums[:2], sums[2:])
        ]

    return multiply
