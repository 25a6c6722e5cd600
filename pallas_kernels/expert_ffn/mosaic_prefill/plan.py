"""Everything static about one matmul of the prefill kernels."""

import dataclasses
from typing import Final, Literal

from pallas_kernels.layout import CHUNK, LINE_WORDS, PLANES_PER_PAGE, ROW_TILE, chunks_side_by_side
from pallas_kernels.levels import PAGES_OF_BITS, Bits
from pallas_kernels.pages import ExpertFormat

Matmul = Literal["gate_up", "down"]

_SHARED_BYTES: Final = 226 * 1024  # of a block; barriers take some of the last KiB of 227
_MOST_STAGES: Final = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillConfig:
    """Tuning; hashable."""

    heights: tuple[int, ...] = (48, 80, 128, 144)
    """Rows that a tile may be multiplied as, ascending, multiples of 16; the last is the most."""
    slots: int = 4
    """Slots of a warpgroup's ring, each one page of one step; 8 bits need 4."""
    consumers: int = 3
    """Warpgroups of a block that multiply; one more brings what they need."""

    def __post_init__(self) -> None:
        if any(h % 16 or not 0 < h <= 256 for h in self.heights) or (
            list(self.heights) != sorted(set(self.heights))
        ):
            raise ValueError(f"heights must be ascending multiples of 16, got {self.heights}")
        if self.slots < PAGES_OF_BITS[8]:
            raise ValueError(f"slots must be at least {PAGES_OF_BITS[8]}, got {self.slots}")

    @property
    def most(self) -> int:
        """M: rows of the largest tile."""
        return self.heights[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulPlan:
    """Hashable. N and K are whole tiles of 64 rows and whole chunks of 128 columns."""

    matmul: Matmul
    rows: int
    """N."""
    columns: int
    """K."""
    format: ExpertFormat
    base_bits: Bits
    levels: tuple[Bits, ...]
    """That an expert can be at, ascending."""
    table_stride: int
    """L E: entries of a rung of the table."""
    config: PrefillConfig

    @property
    def chunks(self) -> int:
        """Chunks of a row."""
        return self.columns // CHUNK

    @property
    def v(self) -> int:
        """Chunks of a step."""
        return chunks_side_by_side(self.chunks)

    @property
    def steps(self) -> int:
        """Steps of a row."""
        return self.chunks // self.v

    @property
    def row_tiles(self) -> int:
        """B: tiles of 64 rows."""
        return self.rows // ROW_TILE

    @property
    def blocks(self) -> int:
        """Items of a tile of input rows: as many row tiles at a time as there are consumers."""
        return -(-self.row_tiles // self.config.consumers)

    @property
    def groups(self) -> int:
        """Groups of a step."""
        return self.v * CHUNK // self.format.group_size

    @property
    def scale_lines(self) -> int:
        """Lines of 64 scales that are copied for a step: of its groups, but 128 bytes at least.

        Two steps may share them: rows are whole chunks, so there is an even number of lines.
        """
        return max(self.groups, 2 if self.log8 else 1)

    @property
    def lines(self) -> int:
        """Lines of a slot: both planes of a page for one step."""
        return PLANES_PER_PAGE * self.v

    @property
    def log8(self) -> bool:
        """Whether scales are octaves below a base."""
        return self.format.scale_encoding == "log8"

    @property
    def stages(self) -> int:
        """Chunks of the input in shared memory."""
        scale_bytes = 1 if self.log8 else 2
        slot = self.lines * LINE_WORDS * 4 + self.scale_lines * ROW_TILE * scale_bytes
        room = _SHARED_BYTES - self.config.consumers * self.config.slots * slot
        return min(_MOST_STAGES, room // (self.config.most * CHUNK * 2))

    @property
    def outputs(self) -> int:
        """Columns of the result: gate and up make one."""
        return self.rows // 2 if self.matmul == "gate_up" else self.rows
