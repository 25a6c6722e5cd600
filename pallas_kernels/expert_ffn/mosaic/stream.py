"""Streams the pages of experts through a worker's shared memory and multiplies as they arrive.

A worker gets a stretch of row tiles of one expert. Its ring holds slots of both planes of a page
for one step of columns, so an expert takes one, two or four slots a step, and whatever the mix of
levels the same bytes are in flight, across the row tiles of the stretch too.
"""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.expert_ffn.mosaic.wgmma_step import ACCUMULATORS, BLOCK, StepConfig, step
from pallas_kernels.layout import (
    CHUNK,
    LINE_WORDS,
    PLANES_PER_PAGE,
    ROW_TILE,
    chunks_side_by_side,
    padded_columns,
)
from pallas_kernels.levels import LEVEL_BITS, PAGES_OF_BITS, Bits
from pallas_kernels.mosaic.bulk import BARRIERS, Copy, barriers_scratch, fetch, wait
from pallas_kernels.mosaic.loops import fori_loop
from pallas_kernels.mosaic.workers import quotient, sync_warpgroup
from pallas_kernels.pages import ExpertFormat

Matmul = Literal["gate_up", "down"]


class Ring(NamedTuple):
    """Shared memory of one worker."""

    lines: Any
    """uint32 [lines, 256]: slots of as many pages as a level has, 2v lines each."""
    scales: Any
    """[groups, 64]: the scales of each slot."""
    barriers: Any


class Weights(NamedTuple):
    """Arrays of one matmul in global memory, as lines."""

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
    """Everything static about one matmul; hashable."""

    rows: int
    columns: int
    format: ExpertFormat
    base_bits: Bits
    levels: tuple[Bits, ...]
    """That an expert can be at, ascending."""
    table_stride: int
    """L E: entries of a rung of the table."""
    input_rows: int
    """M: rows of a tile."""
    parts: int
    """Into which the columns are cut, each summed by itself."""
    ring_lines: int
    step_chunks: int
    """Of a step, at most; a run at least."""
    groups_in_flight: int

    def __post_init__(self) -> None:
        if self.runs_of(self.columns) % self.parts:
            raise ValueError(f"{self.runs_of(self.columns)} runs do not make {self.parts} parts")
        if not self.slots(self.levels[-1]):
            raise ValueError(
                f"a ring of {self.ring_lines} lines does not hold a step at {self.levels[-1]} "
                f"bits, {PAGES_OF_BITS[self.levels[-1]] * self.height} lines"
            )

    @property
    def chunks(self) -> int:
        """Chunks of a row."""
        return padded_columns(self.columns) // CHUNK

    @property
    def v(self) -> int:
        """Chunks of a step."""
        return chunks_side_by_side(self.chunks)

    @property
    def repeats(self) -> int:
        """Runs of v chunks in a step: as many as make it worth its barriers and copies."""
        runs = self.runs_of(self.columns) // self.parts
        most = max(self.step_chunks // self.v, 1)
        return max(n for n in range(1, most + 1) if runs % n == 0)

    @property
    def height(self) -> int:
        """Lines of a page for one step."""
        return PLANES_PER_PAGE * self.v * self.repeats

    @property
    def steps(self) -> int:
        """Steps of one part of the columns."""
        return self.runs_of(self.columns) // self.parts // self.repeats

    @staticmethod
    def runs_of(columns: int) -> int:
        """Runs of v chunks in a row of a matrix: what parts are made of."""
        chunks = padded_columns(columns) // CHUNK
        return chunks // chunks_side_by_side(chunks)

    @property
    def row_tiles(self) -> int:
        """B: tiles of 64 rows."""
        return self.format.scale_shape(self.rows, self.columns)[0]

    @property
    def groups(self) -> int:
        """Groups of a step."""
        return self.v * self.repeats * CHUNK // self.format.group_size

    def slots(self, bits: Bits) -> int:
        """Steps that the ring holds."""
        return min(self.ring_lines // (PAGES_OF_BITS[bits] * self.height), BARRIERS)

    @property
    def part_columns(self) -> int:
        """Columns of a part, with the padding."""
        return self.steps * self.repeats * self.v * CHUNK

    def step_config(self, bits: Bits) -> StepConfig:
        """What a step at some level needs to know."""
        return StepConfig(
            bits=bits,
            chunks=self.v,
            group_size=self.format.group_size,
            columns=2 * self.input_rows,
            table=self.format.table,
            log8=self.format.scale_encoding == "log8",
            groups_in_flight=self.groups_in_flight if bits < 8 else 2,  # two products a group
        )


class Stretch(NamedTuple):
    """Consecutive row tiles of one expert's matrix, and one part of its columns; all traced."""

    owner: Any
    """layer * E + expert."""
    part: Any
    first: Any
    """First row tile."""
    count: Any
    """Row tiles."""


def stream(
    plan: MatmulPlan,
    weights: Weights,
    ring: Ring,
    stretch: Stretch,
    limbs: Any,
    use: Any,
    *,
    before: Callable[[], None],
    between: Callable[[], None],
    finish: Callable[[jax.Array, Any, Any], None],
) -> Any:
    """Multiplies a stretch; every thread of the warpgroup calls it.

    Calls ``before``, starts to fetch, calls ``between``, which brings the input into ``limbs``
    [K/16, 2M, 16], then multiplies and calls ``finish(y [64, 2M], row tile, factor)`` for each row
    tile. Before and after, the ring is empty and all threads of the warpgroup are done with it and
    with the input: the next stretch can be asked for by whoever comes first. ``use``: uses of the
    ring's barriers so far; returned as it is after.
    """
    levels = _levels(plan, weights, stretch)
    before()
    for bits, chosen, sources in levels:
        chosen(partial(_start, plan, weights, ring, stretch, use, bits, sources))
    between()
    for bits, chosen, sources in levels:
        run = partial(_multiply, plan, weights, ring, stretch, limbs, use, finish, bits, sources)
        chosen(run)
    sync_warpgroup()
    return use + stretch.count * plan.steps


def _levels(plan: MatmulPlan, weights: Weights, stretch: Stretch) -> list[Any]:
    """(bits, runs its argument if the expert is at this level, sources of its pages)."""
    base = [(ref, stretch.owner) for ref in weights.base]
    if len(plan.levels) == 1:
        return [(plan.base_bits, lambda run: run(), base)]
    rungs = PAGES_OF_BITS[LEVEL_BITS[-1]] - len(base)
    ids = [weights.table[rung * plan.table_stride + stretch.owner] for rung in range(rungs)]
    held = [
        reduce(jnp.logical_and, [page >= 0 for page in ids[: PAGES_OF_BITS[bits] - len(base)]])
        for bits in plan.levels[1:]
    ]
    chosen = [~held[0], *(a & ~b for a, b in itertools.pairwise(held)), held[-1]]
    sources = [*base, *((weights.pool, page) for page in ids)]
    return [
        (bits, pl.when(mine), sources[: PAGES_OF_BITS[bits]])
        for bits, mine in zip(plan.levels, chosen, strict=True)
    ]


def _fetch(
    plan: MatmulPlan, weights: Weights, ring: Ring, stretch: Stretch, use: Any, sources: Any,
    at: Any, slot: Any,
) -> None:  # fmt: skip
    """Starts to fetch step ``at`` of the stretch: its pages and its scales."""
    tiles = quotient(at, plan.steps)
    tile = stretch.first + tiles
    step_index = stretch.part * plan.steps + at - tiles * plan.steps
    height = plan.height
    copies = []
    for index, (ref, owner) in enumerate(sources):
        line = (owner * plan.row_tiles + tile) * (plan.chunks * PLANES_PER_PAGE)
        place = (slot * len(sources) + index) * height
        target = ring.lines.at[pl.ds(place, height)]
        copies.append(Copy(ref, line + step_index * height, target))
    group = (stretch.owner * plan.row_tiles + tile) * (plan.steps * plan.parts) + step_index
    target = ring.scales.at[pl.ds(slot * plan.groups, plan.groups)]
    copies.append(Copy(weights.scales, group * plan.groups, target))
    fetch(copies, ring.barriers, use + at)


def _start(
    plan: MatmulPlan, weights: Weights, ring: Ring, stretch: Stretch, use: Any, bits: Bits,
    sources: Any,
) -> None:  # fmt: skip
    def one(at: Any) -> None:
        _fetch(plan, weights, ring, stretch, use, sources, at, at)

    fori_loop(0, jnp.minimum(plan.slots(bits), stretch.count * plan.steps), one)


def _multiply(
    plan: MatmulPlan, weights: Weights, ring: Ring, stretch: Stretch, limbs: Any, use: Any,
    finish: Callable[[jax.Array, Any, Any], None], bits: Bits, sources: Any,
) -> None:  # fmt: skip
    pages, config, slots = PAGES_OF_BITS[bits], plan.step_config(bits), plan.slots(bits)
    run_lines, blocks = PLANES_PER_PAGE * plan.v, plan.v * CHUNK // BLOCK
    run_groups = plan.v * CHUNK // plan.format.group_size
    total = stretch.count * plan.steps
    factor = jnp.float32(1) if weights.scale_base is None else weights.scale_base[stretch.owner]

    def do_step(index: Any, carry: tuple[jax.Array, Any, Any]) -> tuple[jax.Array, Any, Any]:
        y, at, slot = carry
        wait(ring.barriers, use + at)

        def do_run(run: Any, y: jax.Array) -> jax.Array:
            lines = [
                pl.ds((slot * pages + page) * plan.height + run * run_lines, run_lines)
                for page in range(pages)
            ]
            return step(
                config,
                y,
                [ring.lines.at[place] for place in lines],
                ring.scales.at[pl.ds(slot * plan.groups + run * run_groups, run_groups)],
                limbs.at[pl.ds((index * plan.repeats + run) * blocks, blocks)],
            )

        y = lax.fori_loop(0, plan.repeats, do_run, y) if plan.repeats > 1 else do_run(0, y)

        @pl.when(at + slots < total)
        def _() -> None:
            sync_warpgroup()  # all have read the slot, which may be filled again
            _fetch(plan, weights, ring, stretch, use, sources, at + slots, slot)

        return y, at + 1, jnp.where(slot == slots - 1, 0, slot + 1)

    def do_tile(tile: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        zeros = jnp.zeros((ROW_TILE, 2 * plan.input_rows), jnp.float32)
        y = plgpu.layout_cast(zeros, ACCUMULATORS)
        y, at, slot = lax.fori_loop(0, plan.steps, do_step, (y, *carry))
        finish(y, stretch.first + tile, factor)
        return at, slot

    lax.fori_loop(0, stretch.count, do_tile, (jnp.int32(0), jnp.int32(0)))


def ring_scratch(plans: list[MatmulPlan], workers: int) -> list[Any]:
    """Scratch types of the rings of all workers of a block, which serve all of ``plans``."""
    dtype = jnp.bfloat16 if plans[0].format.scale_encoding == "bf16" else jnp.uint8
    groups = max(plan.slots(plan.base_bits) * plan.groups for plan in plans)
    return [
        plgpu.SMEM((workers * plans[0].ring_lines, LINE_WORDS), jnp.uint32),
        plgpu.SMEM((workers, groups, ROW_TILE), dtype),
        barriers_scratch(workers),
    ]
