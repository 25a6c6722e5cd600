"""One chunk of a page matmul, but for the scales, on tensor cores that take float16: mma m16n8k16.

A warpgroup owns a tile of 64 rows of the weights, a warp 16 of them. A lane makes the fragments of
the weights from its own words, and reads those of the input from shared memory: position k of a
block of 16 columns may be any column, as long as both sides agree, so a lane's positions 2 t,
2 t + 1, 2 t + 8 and 2 t + 9 are columns 4 t to 4 t + 3, which lie side by side.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Final, Literal

import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import nvvm, vector

from pallas_kernels.expert_ffn.mosaic_mma.halves import HalfTables, decode_main, decode_residual
from pallas_kernels.expert_ffn.mosaic_mma.words import LANES_OF_ROW
from pallas_kernels.layout import CHUNK, PLANES_PER_PAGE
from pallas_kernels.levels import LevelTable
from pallas_kernels.mosaic import emit

ACCUMULATORS: Final = plgpu.Layout.WGMMA
"""A thread (warp, g, t) holds rows 16 warp + g and 16 warp + 8 + g at columns 8 j + 2 t and + 1."""
BLOCK: Final = 16
"""Columns of one mma instruction on float16."""
SPARE_COLUMNS: Final = 16
"""Of a row of the input in shared memory: eight rows then start on different banks."""

Parts = Literal["main", "residual", "both"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkConfig:
    """What a chunk's code depends on; hashable."""

    parts: Parts
    """Of the weights: the value at 2 or 4 bits, what 8 bits add to it, or both."""
    chunks: int
    """v: chunks whose words a page brings."""
    scaled_chunks: int
    """Chunks whose scales are at hand: v or, where they come chunk by chunk, 1."""
    group_size: int
    input_rows: int
    """M."""
    table: LevelTable

    @property
    def groups(self) -> int:
        """Groups of a row in a chunk."""
        return CHUNK // self.group_size


class Products:
    """Emits the products of one chunk, group by group."""

    def __init__(self, config: ChunkConfig, pages: Any, x: Any, column: Any, chunk: int):
        tables = HalfTables.of(config.table)
        words = [
            [vector.extract(register, [], [chunk]) for register in page.registers.flat]
            for page in pages
        ]  # [page][plane * 2 + half]
        self._config = config
        self._weights = []  # [half][main, residual or both]
        for half in range(2):
            planes = [page[2 * plane + half] for page in words for plane in range(PLANES_PER_PAGE)]
            kinds = []
            if config.parts != "residual":
                kinds.append(decode_main(tables, planes[:4]))
            if config.parts != "main":
                kinds.append(decode_residual(tables, planes[1], planes[4:8]))
            self._weights.append(kinds)
        self._stride = 2 * ir.MemRefType(x.type).shape[-1]
        lane = emit.lane()
        place = emit.mul(emit.shift_right(lane, 2), self._stride)
        place = emit.add(place, emit.mul(emit.and_(lane, 3), 8))
        self._input = emit.pointer(x, emit.add(place, emit.mul(column, 2)))

    def add(self, group: int, sums: list[list[Any]]) -> list[list[Any]]:
        """``sums`` and the products of a group, for each tile of eight rows of the input.

        Four numbers a tile: of the first half's row at two columns, then of the second half's.
        """
        for block in self._blocks(group):
            b = [
                emit.load_words(
                    emit.move(self._input, 8 * tile * self._stride + 2 * BLOCK * block), 2
                )
                for tile in range(len(sums))
            ]
            for first_half, second_half in zip(*self._weights, strict=True):
                halves = (first_half(block), second_half(block))
                a = [half[k] for k in range(2) for half in halves]
                sums = [_mma(a, b[tile], sums[tile]) for tile in range(len(sums))]
        return sums

    def _blocks(self, group: int) -> Iterator[int]:
        count = self._config.group_size // BLOCK
        yield from range(group * count, (group + 1) * count)


def scale_of(scales: Any, group: int, half: int) -> Any:
    """Of a group and this lane's row: lane t of the row holds every fourth group."""
    register = scales.registers.flat[group // LANES_OF_ROW * 2 + half]
    found = nvvm.shfl_sync(
        emit.const(0xFFFFFFFF),
        emit.bits_of(vector.extract(register, [], [0])),
        emit.const(group % LANES_OF_ROW),
        emit.const(0x1C1F),  # lanes stay among the four of their row
        nvvm.ShflKind.idx,
    )
    return emit.as_f32(found)


def sums_of(y: Any) -> list[list[Any]]:
    """Accumulators as four numbers for each tile of eight rows of the input."""
    flat = [vector.extract(register, [], [c]) for register in y.registers.flat for c in range(2)]
    return [flat[start : start + 4] for start in range(0, len(flat), 4)]


def as_accumulators(sums: list[list[Any]], like: Any) -> Any:
    """The inverse of ``sums_of``."""
    kind = ir.VectorType.get((2,), emit.f32_type())
    registers = [vector.from_elements(kind, four[i : i + 2]) for four in sums for i in (0, 2)]
    return fa.FragmentedArray(
        _registers=np.array(registers, dtype=object).reshape(like.registers.shape),
        _layout=like.layout,
        _is_signed=None,
    )


def _mma(a: list[Any], b: list[Any], c: list[Any]) -> list[Any]:
    text = (
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )
    constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
    return emit.asm_many(text, constraints, [*a, *b, *c], [emit.f32_type()] * 4)
