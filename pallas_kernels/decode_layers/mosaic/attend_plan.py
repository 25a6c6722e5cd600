"""Attention of a decode step: who does what, and where it lies."""

import dataclasses
import math
from typing import Any, NamedTuple

from jaxlib.mlir.dialects import arith

from pallas_kernels.decode_layers.mosaic.project_plan import WARPS as ALL_WARPS
from pallas_kernels.decode_layers.mosaic.project_plan import Threads
from pallas_kernels.mosaic import emit

WARPS = ALL_WARPS - 2
"""Of a block, that attend: one for each query head, the new key and the new value."""
HEAD = 128
"""Size of a head."""
GROUP = 8
"""Query heads of a key-value head, at most."""
TILE = 16
"""Positions that a warp scores at once."""
ROW_BYTES = 2 * HEAD  # bytes of a head in bfloat16
Q_STRIDE = ROW_BYTES + 64  # of queries in shared memory: no two lanes share a bank
OUTPUTS = GROUP * HEAD
WARP_BYTES = 4 * OUTPUTS
WORK_BYTES = WARPS * WARP_BYTES
"""Of shared memory for the sums of all warps."""
KEY_WORDS = TILE * HEAD // 64  # of a lane, for a tile
ROWS_OF_VALUES = (0, 1, 8, 9)  # of lane (g, t), from position 2t of a tile
MOST_SPLITS = 32  # a lane each
SCALE = HEAD**-0.5 * math.log2(math.e)
"""Of scores, in powers of two."""


# of the small shared memory, in bytes
AT_K = GROUP * Q_STRIDE  # behind the queries
AT_V = AT_K + ROW_BYTES
AT_NEW = AT_V + ROW_BYTES
AT_TOP = AT_NEW + 4 * GROUP
AT_TOTAL = AT_TOP + 4 * GROUP * WARPS
AT_LAST = AT_TOTAL + 4 * GROUP * WARPS
SMALL_BYTES = AT_LAST + 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttendPlan:
    """Shapes; hashable. Axis letters as in ``decode_attention``."""

    slots: int  # B
    context: int  # S
    q_heads: int  # Nq
    kv_heads: int  # Nkv
    blocks: int
    eps: float

    @property
    def group(self) -> int:
        return self.q_heads // self.kv_heads

    @property
    def pairs(self) -> int:
        """Slots times key-value heads."""
        return self.slots * self.kv_heads

    @property
    def splits(self) -> int:
        """Blocks that share a pair's context: no less than a tile for most of their warps."""
        wanted = -(-self.context // (8 * TILE))
        return max(1, min(self.blocks // self.pairs, wanted, MOST_SPLITS))


class AttendMemory(NamedTuple):
    """Pointers; those of weights at this layer."""

    positions: Any
    """int32 [B]"""
    cos: Any
    """float32 [B, D / 2], like sin"""
    sin: Any
    qkv: Any
    """bfloat16 [B, Nq + 2 Nkv, D]"""
    q_norm: Any
    """bfloat16 [D], like k_norm"""
    k_norm: Any
    keys: Any
    """bfloat16 [B, S, Nkv, D], like values"""
    values: Any
    parts: Any
    """float32 [B Nkv, splits, GROUP, D]"""
    part_sums: Any
    """float32 [B Nkv, splits, 2, GROUP]: maximum and sum of the weights"""
    arrivals: Any
    """int32 [B Nkv], zero before and after"""
    y: Any
    """bfloat16 [B, Nq, D]"""
    work: Any
    """Shared, WORK_BYTES"""
    small: Any
    """Shared, SMALL_BYTES"""


class Item(NamedTuple):
    """What a block does; registers."""

    pair: Any
    split: Any
    slot: Any
    kv_head: Any
    position: Any
    end: Any
    """Tile behind the split's last."""
    holds_new: Any
    cache: Any
    """Bytes from the start of keys and values to the slot's first row of the head."""


def find_item(
    plan: AttendPlan, threads: Threads, memory: AttendMemory, exists: Any
) -> tuple[Item, Any]:
    """The block's item, and its warp's first tile. A block without one has no tiles."""
    zero = emit.const(0)
    number = arith.select(exists, threads.block, zero)
    pair = arith.divui(number, emit.const(plan.splits))
    split = arith.remui(number, emit.const(plan.splits))
    slot = arith.divui(pair, emit.const(plan.kv_heads))
    kv_head = arith.remui(pair, emit.const(plan.kv_heads))
    (position,) = emit.load_words(emit.move(memory.positions, emit.mul(slot, 4)), 1)
    old = arith.maxsi(position, zero)
    tiles = emit.shift_right(emit.add(old, TILE - 1), 4)
    span = arith.divui(emit.add(tiles, plan.splits - 1), emit.const(plan.splits))
    start = arith.muli(split, span)
    end = arith.minsi(arith.addi(start, span), tiles)
    end = arith.select(exists, end, zero)
    # the last split that has tiles holds the new position; the first, if none has
    is_last = arith.andi(emit.less(start, tiles), arith.cmpi(arith.CmpIPredicate.eq, end, tiles))
    is_first = arith.cmpi(arith.CmpIPredicate.eq, split, zero)
    mine = arith.select(emit.less(zero, tiles), is_last, is_first)
    holds_new = arith.andi(mine, arith.cmpi(arith.CmpIPredicate.sge, position, zero))
    return Item(
        pair, split, slot, kv_head, position, end, holds_new, emit.mul(kv_head, ROW_BYTES)
    ), arith.addi(start, threads.warp)


def cache_row(plan: AttendPlan, base: Any, item: Item, position: Any) -> Any:
    row = arith.addi(emit.mul(item.slot, plan.context), position)
    return emit.move(emit.move64(base, row, plan.kv_heads * ROW_BYTES), item.cache)


def sync_attending() -> None:
    """All threads of the warps that attend."""
    emit.asm(f"bar.sync 1, {32 * WARPS};", "", [], effects=True)
