"""Projections with weights at 8 bits: codes are multiplied as they lie, by limbs of the input.

``ldmatrix`` brings fragments from shared memory, of codes and limbs. Limbs of a token are
neighbouring columns of the product, so their sums meet in a lane.
"""

from collections.abc import Callable
from typing import Any

from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.decode_layers.mosaic.project_limbs import Limbs
from pallas_kernels.decode_layers.mosaic.project_plan import ProjectPlan, Threads, Words
from pallas_kernels.decode_layers.mosaic.project_rows import (
    over_tiles,
    row_offsets,
    unit_offsets,
)
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.loops import loop


def multiply_int8(
    plan: ProjectPlan, threads: Threads, shared: Any, stage: Any, x: Any, norm: Any,
    wait_for_tile: Callable[[Any], None], wait: Callable[[], None],
) -> tuple[list[list[Words]], list[Any]]:  # fmt: skip
    """As ``multiply_bf16``; a loop goes over tiles of tokens. stage: as for ``Limbs``."""
    limbs = Limbs(plan, threads, stage)
    of_norm = limbs.load_norm(norm)
    wait()
    loaded = limbs.load(x, emit.const(0))
    # a lane's row of the four matrices of a fragment: rows and rows + 8, then 16 bytes further
    lower = emit.and_(emit.shift_right(emit.lane(), 3), 1)
    mine = emit.mul(emit.and_(emit.lane(), 7), plan.row_stride)
    mine = emit.add(mine, emit.mul(emit.shift_right(emit.lane(), 4), 16))
    mine = arith.addi(llvm.ptrtoint(emit.i32_type(), shared), mine)
    codes = [arith.addi(mine, offset) for offset in unit_offsets(plan, threads)]

    def multiply_tokens(words: Words) -> list[Any]:
        """Sums of each tile of rows, then the lane's sum of x^2."""
        words, square = _normed(words, of_norm)
        fragments, scale = limbs.share(words)

        def multiply_tile(tile: Any) -> list[Any]:
            wait_for_tile(tile)
            first, second = row_offsets(plan, tile)
            offset = arith.addi(first, arith.muli(second, lower))
            return _multiply([arith.addi(unit, offset) for unit in codes], fragments, scale)

        tiles = over_tiles(plan, 2, multiply_tile)
        return [*(value for values in tiles for value in values), square]

    count, size = plan.token_tiles, 2 * plan.tiles_of_block + 1
    if count == 1:
        results = multiply_tokens(loaded)
    else:

        def step(tile: Any, *carry: Any) -> list[Any]:
            before, words = carry[size : count * size], list(carry[count * size :])
            following = limbs.load(x, emit.add(tile, 1))
            return [*before, *multiply_tokens(words), *following]

        none = [emit.const_f32(0.0)] * (count * size)
        results = loop(0, count, 1, step, [*none, *loaded])
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


def _multiply(codes: list[Any], fragments: list[Words], scale: Any) -> list[Any]:
    """Sums of rows g and g + 8 of a tile and token t, float32.

    Two sums of int32 by turns, for a product waits for the one before.
    """
    parts = [[emit.const(0)] * 4] * 2
    for address, b in zip(codes, fragments, strict=True):
        for half in range(2):
            a = emit.load_matrices(emit.add(address, 32 * half))
            parts[half] = emit.mma_int8(parts[half], a, b[2 * half : 2 * half + 2])
    sums = [emit.int_to_f32(arith.addi(*pair)) for pair in zip(*parts, strict=True)]
    return [
        arith.mulf(emit.fma(high, emit.const_f32(256.0), low), scale)
        for high, low in (sums[:2], sums[2:])
    ]
