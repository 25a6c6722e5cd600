"""Sizes of one call of decode attention, and into how many splits it cuts the context."""

import dataclasses
import math
from typing import Final

TILE: Final = 64
"""Positions that are scored at once."""

_MULTIPROCESSORS: Final = 132
_MOST_BLOCKS: Final = 2 * _MULTIPROCESSORS
_STAGE_BYTES: Final = 96 * 1024  # so that two blocks fit a multiprocessor
_COMBINE_COST: Final = 0.05
"""What one more split costs the combine, in the time of a tile."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeShapes:
    """Sizes of qkv [B, (Nq + 2 Nkv) D] and of the cache [L, B, S, Nkv, D]."""

    layers: int  # L
    batch: int  # B
    context: int  # S
    q_heads: int  # Nq
    kv_heads: int  # Nkv
    head: int  # D

    @property
    def group(self) -> int:
        """Query heads that share one kv head."""
        return self.q_heads // self.kv_heads

    @property
    def padded_group(self) -> int:
        """The same, padded to what a matrix instruction takes."""
        return -(-self.group // 8) * 8

    @property
    def tile_bytes(self) -> int:
        """Of one tile of bfloat16 keys and its values."""
        return 2 * TILE * self.head * 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Tuning of the kernels.

    ``splits``: blocks that share the context of one slot and kv head; with one there is no combine.
    ``stages``: tiles of keys and values that a block has in shared memory at once.
    """

    splits: int
    stages: int

    def __post_init__(self) -> None:
        if self.splits < 1 or self.stages < 1:
            raise ValueError(f"splits and stages must be at least 1, got {self}")


def default_config(shapes: DecodeShapes) -> DecodeConfig:
    """The split with the fewest tiles one after the other on the busiest multiprocessor."""
    tiles = shapes.context // TILE
    pairs = shapes.batch * shapes.kv_heads

    def cost(splits: int) -> float:
        rounds = math.ceil(pairs * splits / _MULTIPROCESSORS)
        return rounds * math.ceil(tiles / splits) + _COMBINE_COST * splits

    most = max(1, min(tiles, _MOST_BLOCKS // pairs))
    splits = min(range(1, most + 1), key=cost)
    stages = max(2, _STAGE_BYTES // shapes.tile_bytes)
    return DecodeConfig(splits=splits, stages=min(stages, math.ceil(tiles / splits)))
