"""Everything static about one matmul over pages."""

import dataclasses
from typing import Any, Final, Literal, NamedTuple

from pallas_kernels.expert_ffn.mosaic_mma.fragments import SPARE_COLUMNS, ChunkConfig, Parts
from pallas_kernels.expert_ffn.mosaic_mma.rows import RowSource
from pallas_kernels.layout import CHUNK, PLANES_PER_PAGE, chunks_side_by_side, padded_columns
from pallas_kernels.levels import Bits
from pallas_kernels.pages import ExpertFormat

SHARED_BYTES: Final = 99 * 1024
"""That a block may use on compute capability 8.6, 8.9 and 12.x."""
SLOTS: Final = 4
"""Chunks of a streamed input in shared memory."""
_KEPT_BYTES: Final = 2048
"""For the row numbers, the scales, and what the compiler takes."""

Matmul = Literal["gate_up", "down"]


class Weights(NamedTuple):
    """Arrays of one matmul in global memory, as lines; a pytree."""

    base: tuple[Any, ...]
    """uint32 [L E B 2C, 256] for each base page."""
    pool: Any
    """uint32 [P B 2C, 256], or None."""
    scales: Any
    """[L E B G, 64]."""
    scale_base: Any
    """float32 [L E], or None."""
    table: Any
    """int32 [R L E], or None: everyone is at the base."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulPlan:
    """One matmul for tiles of ``input_rows`` rows; hashable."""

    matmul: Matmul
    format: ExpertFormat
    base_bits: Bits
    levels: tuple[Bits, ...]
    """That an expert can be at, ascending."""
    layers: int
    experts: int
    input_rows: int
    """M: rows of a tile."""
    warpgroups: int
    """Of a block: each has its own tile of 64 rows of the weights, all have one input."""
    streamed: bool
    """Whether the input comes as float16 in chunks; else it is made so by the block, whole."""
    source: RowSource

    def __post_init__(self) -> None:
        if self.row_tiles % self.warpgroups:
            raise ValueError(
                f"{self.warpgroups} warpgroups a block do not divide {self.row_tiles} tiles of rows"
            )
        if self.input_rows % (self.warpgroups * shared_rows(self.streamed)):
            raise ValueError(
                f"tiles of {self.input_rows} rows are not shared evenly by {self.warpgroups} "
                f"warpgroups: they need multiples of {shared_rows(self.streamed)} rows each"
            )
        if self.input_bytes > SHARED_BYTES - _KEPT_BYTES:
            raise ValueError(
                f"{self.input_rows} rows of input take {self.input_bytes} bytes of shared memory, "
                f"more than the {SHARED_BYTES - _KEPT_BYTES} there are"
            )

    @property
    def columns(self) -> int:
        """K, without the padding."""
        return self.format.matrix_shapes[self.matmul][1]

    @property
    def chunks(self) -> int:
        """Chunks of a row."""
        return padded_columns(self.columns) // CHUNK

    @property
    def v(self) -> int:
        """Chunks of a step."""
        return chunks_side_by_side(self.chunks)

    @property
    def steps(self) -> int:
        """Steps of a row."""
        return self.chunks // self.v

    @property
    def step_lines(self) -> int:
        """Lines of a page that a step takes."""
        return PLANES_PER_PAGE * self.v

    @property
    def row_tiles(self) -> int:
        """B: tiles of 64 rows."""
        return self.format.scale_shape(*self.format.matrix_shapes[self.matmul])[0]

    @property
    def groups(self) -> int:
        """Groups of a chunk."""
        return CHUNK // self.format.group_size

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """[slots, M, columns] of the input in shared memory."""
        slots, columns = (SLOTS, CHUNK) if self.streamed else (1, self.chunks * CHUNK)
        return slots, self.input_rows, columns + SPARE_COLUMNS

    @property
    def input_bytes(self) -> int:
        """Of the input in shared memory."""
        slots, rows, columns = self.input_shape
        return 2 * slots * rows * columns

    def chunk_config(self, parts: Parts) -> ChunkConfig:
        """What the code of a chunk needs to know."""
        return ChunkConfig(
            parts=parts,
            chunks=self.v,
            scaled_chunks=1 if self.streamed else self.v,
            group_size=self.format.group_size,
            input_rows=self.input_rows,
            table=self.format.table,
        )


def shared_rows(streamed: bool) -> int:
    """Rows of the input that a warpgroup brings into shared memory at a time."""
    return 8 if streamed else 4


def fits_resident(columns: int, rows: int) -> bool:
    """Whether ``rows`` rows of the whole input fit in shared memory."""
    bytes_of_row = 2 * (padded_columns(columns) + SPARE_COLUMNS)
    return rows * bytes_of_row <= SHARED_BYTES - _KEPT_BYTES
