"""Projections of a decode step: who does what."""

import dataclasses
from typing import Any

from jaxlib.mlir.dialects import arith

from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.bulk import BARRIERS
from pallas_kernels.mosaic.workers import WARPGROUPS

WARPS = 4 * WARPGROUPS
SHARE = 8
"""Rows that are dealt out to blocks together."""
TILE = 16
"""Rows of a tile, which are multiplied together."""
UNIT = 64
"""Columns of a unit."""
LIMBS = 2
"""Of a number that is multiplied with weights at 8 bits."""
_PIECE_BYTES = 16 * 1024  # at least, where there are so many
_MOST_PIECE_ROWS = 32  # a lane each

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
    def shares(self) -> int:
        """Of all blocks."""
        return self.outputs // SHARE

    @property
    def rows_of_block(self) -> int:
        """Of the weights, at most."""
        return SHARE * -(-self.shares // self.blocks)

    @property
    def tiles_of_block(self) -> int:
        return -(-self.rows_of_block // TILE)

    @property
    def units(self) -> int:
        return self.inputs // UNIT

    @property
    def units_of_warp(self) -> int:
        return -(-self.units // WARPS)

    @property
    def tokens_of_tile(self) -> int:
        """Of a tile of tokens: eight columns of a product, at 8 bits two for each token."""
        return self.bits // 2

    @property
    def token_tiles(self) -> int:
        return -(-self.tokens // self.tokens_of_tile)

    @property
    def padded_tokens(self) -> int:
        return self.token_tiles * self.tokens_of_tile

    @property
    def tokens_of_lane(self) -> int:
        """Tokens of a tile whose sums a lane has."""
        return self.tokens_of_tile // 4

    @property
    def token_stride(self) -> int:
        """Words between the sums of two tokens: no two lanes that store at once share a bank."""
        return 20 if self.tokens_of_lane == 2 else 24

    @property
    def tokens_at_once(self) -> int:
        """Tokens whose numbers a warp's lanes hold side by side: 1, 2 or 4 at 8 bits."""
        if self.bits == 16:
            return self.tokens_of_tile
        return min(1 << (self.tokens - 1).bit_length(), self.tokens_of_tile)

    @property
    def lanes_of_token(self) -> int:
        """Neighbouring lanes that hold a token's numbers."""
        return 32 // self.tokens_at_once

    @property
    def rounds(self) -> int:
        """Times eight numbers that a lane holds of each tile of tokens, at 8 bits."""
        return -(-self.units_of_warp // self.units_at_once)

    @property
    def units_at_once(self) -> int:
        """Units of a token that a warp's lanes hold side by side."""
        return 4 // self.tokens_at_once

    @property
    def limb_stride(self) -> int:
        """Bytes from a limb of a warp's numbers of a token to the next in shared memory.

        No two lanes that read eight of them at once share a bank.
        """
        return self.rounds * self.units_at_once * UNIT + 16

    @property
    def stage_bytes(self) -> int:
        """Of shared memory, for the limbs of all warps; at 8 bits."""
        if self.bits == 16:
            return 0
        return WARPS * self.tokens_at_once * LIMBS * self.limb_stride

    @property
    def row_bytes(self) -> int:
        """Of the weights."""
        return self.inputs * self.bits // 8

    @property
    def row_stride(self) -> int:
        """Bytes from a row of the weights to the next in shared memory.

        No two lanes that read at once share a bank: two rows at 16 bits, eight at 8 bits.
        """
        return self.row_bytes + (64 if self.bits == 16 else 16)

    @property
    def unit_bytes(self) -> int:
        """Of a row of the weights."""
        return UNIT * self.bits // 8

    @property
    def outputs_of_block(self) -> int:
        """Sums that a block makes."""
        return self.tiles_of_block * TILE * self.padded_tokens

    @property
    def piece_rows(self) -> int:
        """Rows whose copies share a barrier."""
        rows = 1
        while rows * self.row_bytes < _PIECE_BYTES or rows * BARRIERS < self.rows_of_block:
            rows *= 2
        return min(rows, _MOST_PIECE_ROWS)

    @property
    def pieces(self) -> int:
        """Of a block's rows."""
        return -(-self.rows_of_block // self.piece_rows)

    @property
    def shared_bytes(self) -> int:
        """Of shared memory: first for the weights, then for the sums of all warps."""
        sums = 4 * WARPS * self.padded_tokens * (self.tiles_of_block * self.token_stride + 1)
        return max(self.rows_of_block * self.row_stride, sums)


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


def rows_of(plan: ProjectPlan, block: Any) -> tuple[Any, Any]:
    """The block's first row and how many it has, a multiple of SHARE; registers."""
    first, end = (
        emit.mul(arith.divui(emit.mul(number, plan.shares), emit.const(plan.blocks)), SHARE)
        for number in (block, emit.add(block, 1))
    )
    return first, arith.subi(end, first)


def has_unit(plan: ProjectPlan, threads: Threads, j: int) -> Any:
    """Whether the warp has a j-th unit; None if every warp has."""
    if (j + 1) * WARPS <= plan.units:
        return None
    return emit.less(threads.warp, plan.units - j * WARPS)


def both(a: Any, b: Any) -> Any:
    if a is None or b is None:
        return a if b is None else b
    return arith.andi(a, b)
