"""Projections of a decode step: who does what."""

import dataclasses
from typing import Any

from jaxlib.mlir.dialects import arith

from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.workers import WARPGROUPS

WARPS = 4 * WARPGROUPS
TILE = 16
"""Rows of a tile."""
UNIT = 64
"""Columns of a unit."""
TOKENS = 8  # of a tile of tokens
STRIDE = 20  # words between the sums of two tokens: no two lanes share a bank
ROW_PAD = 64
"""Bytes between rows in shared memory, for the same reason."""

Words = list[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectPlan:
    """Shapes of one projection; hashable."""

    tokens: int
    outputs: int
    inputs: int
    blocks: int
    bits: int
    """Of a weight: 16 is bfloat16, 8 is ``Int8Matrix``."""
    eps: float | None
    """Of the norm of the input; None without."""

    @property
    def tiles(self) -> int:
        return self.outputs // TILE

    @property
    def tiles_of_block(self) -> int:
        return -(-self.tiles // self.blocks)

    @property
    def units(self) -> int:
        return self.inputs // UNIT

    @property
    def units_of_warp(self) -> int:
        return -(-self.units // WARPS)

    @property
    def token_tiles(self) -> int:
        return -(-self.tokens // TOKENS)

    @property
    def padded_tokens(self) -> int:
        return self.token_tiles * TOKENS

    @property
    def row_bytes(self) -> int:
        """Of the weights."""
        return self.inputs * self.bits // 8

    @property
    def unit_bytes(self) -> int:
        """Of a row of the weights."""
        return UNIT * self.bits // 8

    @property
    def loads(self) -> int:
        """Accesses of a lane to its part of a unit's row, 16 bytes each."""
        return self.bits // 8

    @property
    def unit_words(self) -> int:
        """Registers of a lane for a unit: of rows g and g + 8."""
        return 2 * 4 * self.loads

    @property
    def outputs_of_block(self) -> int:
        """Sums that a block makes."""
        return self.tiles_of_block * TILE * self.padded_tokens

    @property
    def tile_bytes(self) -> int:
        """Of shared memory, where a tile is resident."""
        return TILE * (self.row_bytes + ROW_PAD)

    @property
    def in_flight(self) -> int:
        """Units of weights that are on their way or in registers at once."""
        words = 96 if self.token_tiles == 1 else 64
        return min(words // self.unit_words, self.tiles_of_block * self.units_of_warp)

    @property
    def sums_bytes(self) -> int:
        """Of shared memory for the sums of all warps, and of squares."""
        return 4 * WARPS * self.padded_tokens * (self.tiles_of_block * STRIDE + 1)


@dataclasses.dataclass(frozen=True)
class Weight:
    """Pointers to a matrix of one layer."""

    rows: Any
    """[N, K] bfloat16 or int8"""
    scale: Any
    """float32 [N], or None"""


@dataclasses.dataclass(frozen=True)
class Threads:
    """Who a thread is, as registers."""

    block: Any
    warp: Any
    """In the block."""

    @staticmethod
    def of(block: Any, warpgroup: Any) -> "Threads":
        warp = emit.add(emit.mul(emit.scalar(warpgroup), 4), emit.warp())
        return Threads(emit.scalar(block), warp)

    @property
    def row(self) -> Any:
        """g"""
        return emit.shift_right(emit.lane(), 2)

    @property
    def column(self) -> Any:
        """t"""
        return emit.and_(emit.lane(), 3)


def has_tile(plan: ProjectPlan, threads: Threads, i: int) -> Any:
    """Whether the block has an i-th tile; None if every block has."""
    if (i + 1) * plan.blocks <= plan.tiles:
        return None
    return emit.less(threads.block, plan.tiles - i * plan.blocks)


def has_unit(plan: ProjectPlan, threads: Threads, j: int) -> Any:
    """Whether the warp has a j-th unit; None if every warp has."""
    if (j + 1) * WARPS <= plan.units:
        return None
    return emit.less(threads.warp, plan.units - j * WARPS)


def both(a: Any, b: Any) -> Any:
    if a is None or b is None:
        return a if b is None else b
    return arith.andi(a, b)
