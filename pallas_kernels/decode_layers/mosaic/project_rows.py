"""Where a block's rows of a projection's weights are in shared memory, and sums over its tiles."""

from collections.abc import Callable
from typing import Any

from jaxlib.mlir.dialects import arith

from pallas_kernels.decode_layers.mosaic.project_plan import (
    SHARE,
    TILE,
    WARPS,
    ProjectPlan,
    Threads,
    has_unit,
)
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.loops import loop


def unit_offsets(plan: ProjectPlan, threads: Threads) -> list[Any]:
    """Bytes from the start of a row to each of the warp's units, registers."""
    offsets = []
    for j in range(plan.units_of_warp):
        unit = emit.add(threads.warp, j * WARPS)
        if (wanted := has_unit(plan, threads, j)) is not None:
            unit = arith.select(wanted, unit, emit.const(0))  # times an input of zeros
        offsets.append(emit.mul(unit, plan.unit_bytes))
    return offsets


def row_offsets(plan: ProjectPlan, tile: Any) -> tuple[Any, Any]:
    """Bytes to a tile's first row, and from it to the ninth, registers."""
    first = emit.mul(tile, TILE * plan.row_stride)
    second = emit.less(emit.add(emit.mul(tile, TILE), SHARE), plan.rows_of_block)
    # where there are no such rows, the others stand for them: nobody reads their sums
    return first, arith.select(second, emit.const(SHARE * plan.row_stride), emit.const(0))


def over_tiles(
    plan: ProjectPlan, size: int, multiply: Callable[[Any], list[Any]]
) -> list[list[Any]]:
    """The ``size`` float32 that ``multiply(tile)`` gives, for each tile of the block's rows.

    A loop moves them up by one tile each time round.
    """
    tiles = plan.tiles_of_block
    if tiles == 1:
        return [multiply(emit.const(0))]
    none = [emit.const_f32(0.0)] * (tiles * size)
    values = loop(0, tiles, 1, lambda tile, *before: [*before[size:], *multiply(tile)], none)
    return [values[start : start + size] for start in range(0, len(values), size)]
