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

from pallas_kernels.expert_ffn.mosaic.wgmma_step import (
    ACCUMULATORS,
    BLOCK,
    StepConfig,
    hold_table,
    step,
)
from pallas_kernels.layout import (
    CHUNK,
    LINE_WORDS,
    PLANES_PER_PAGE,
    ROW_TILE,
    chunks_side_by_side,
    padded_columns,
)
from pallas_kernels.levels import PAGES_OF_BITS, Bits
from pallas_kernels.mosaic.bulk import BARRIERS, Copy, barriers_scratch, fetch, wait
from pallas_kernels.mosaic.loops import fori_loop, opaque
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulPlan:
    """Everything static about one matmul; hashable."""

    rows: int
    columns: int
    format: ExpertFormat
    base_bits: Bits
    levels: tuple[Bits, ...]
    """That an expert can be at, ascending."""
    input_rows: int
    """M: rows of a tile."""
    parts: int
    """Into which the columns are cut, each summed by itself."""
    ring_lines: int
    step_lines: int
    """Of a step, at most; a run of chunks at least. A step has about the same bytes at all levels,
    so that a low level does not wait for twice as many."""
    groups_in_flight: int

    def __post_init__(self) -> None:
        if self.runs % self.parts:
            raise ValueError(f"{self.runs} runs do not make {self.parts} parts")
        for bits in self.levels:
            if not self.slots(bits):
                raise ValueError(
                    f"a ring of {self.ring_lines} lines does not hold a step at {bits} bits, "
                    f"{self.lines(bits)} lines"
                )

    @property
    def chunks(self) -> int:
        """Chunks of a row."""
        return padded_columns(self.columns) // CHUNK

    @property
    def v(self) -> int:
        """Chunks of a run, whose words of one thread lie side by side."""
        return chunks_side_by_side(self.chunks)

    @property
    def runs(self) -> int:
        """Runs in a row."""
        return self.runs_of(self.columns)

    @staticmethod
    def runs_of(columns: int) -> int:
        """Runs in a row of a matrix with so many columns: what parts are made of."""
        chunks = padded_columns(columns) // CHUNK
        return chunks // chunks_side_by_side(chunks)

    @property
    def row_tiles(self) -> int:
        """B: tiles of 64 rows."""
        return self.format.scale_shape(self.rows, self.columns)[0]

    @property
    def items(self) -> int:
        """Of a tile: parts of row tiles."""
        return self.parts * self.row_tiles

    @property
    def part_columns(self) -> int:
        """Columns of a part, with the padding."""
        return self.runs // self.parts * self.v * CHUNK

    def repeats(self, bits: Bits) -> int:
        """Runs in a step."""
        runs = self.runs // self.parts
        most = self.step_lines // (PAGES_OF_BITS[bits] * PLANES_PER_PAGE * self.v)
        return max(n for n in range(1, max(most, 1) + 1) if runs % n == 0)

    def together(self, bits: Bits) -> int:
        """Chunks of a run that are multiplied together: a thread holds at most 32 words of them.

        With more registers it would have to spill, at whatever level its expert is. With fewer its
        loads leave out more of the words side by side, and take as long as for all of them.
        """
        return min(self.v, max(2, 4 // PAGES_OF_BITS[bits]))

    def passes(self, bits: Bits) -> int:
        """Of a step: as often some of its chunks are multiplied."""
        return self.repeats(bits) * self.v // self.together(bits)

    def steps(self, bits: Bits) -> int:
        """Steps of one part of the columns."""
        return self.runs // self.parts // self.repeats(bits)

    def height(self, bits: Bits) -> int:
        """Lines of a page for one step."""
        return PLANES_PER_PAGE * self.v * self.repeats(bits)

    def lines(self, bits: Bits) -> int:
        """Lines of a step."""
        return PAGES_OF_BITS[bits] * self.height(bits)

    def groups(self, bits: Bits) -> int:
        """Groups of a step."""
        return self.v * self.repeats(bits) * CHUNK // self.format.group_size

    def slots(self, bits: Bits) -> int:
        """Steps that the ring holds."""
        return min(self.ring_lines // self.lines(bits), BARRIERS)

    def step_config(self, bits: Bits) -> StepConfig:
        """What a pass at some level needs to know."""
        return StepConfig(
            bits=bits,
            side_by_side=self.v,
            chunks=self.together(bits),
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
    pages: tuple[Any, ...]
    """Of each rung above the base the pool page, or -1; of none if everyone is at the base."""


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
    for level in levels:
        level.chosen(partial(_start, plan, weights, ring, stretch, use, level))
    between()
    for level in levels:
        run = partial(_multiply, plan, weights, ring, stretch, limbs, use, finish, level)
        level.chosen(run)
    sync_warpgroup()
    return use + stretch.count * reduce(jnp.add, [level.steps for level in levels])


class _Level(NamedTuple):
    """One that an expert can be at."""

    bits: Bits
    chosen: Callable[[Callable[[], None]], None]
    """Runs its argument if the expert is at this level."""
    steps: Any
    """Of a part of the columns, or zero if it is at another."""
    sources: list[tuple[Any, Any]]
    """(array of pages as lines, which of them) for each page."""


def _levels(plan: MatmulPlan, weights: Weights, stretch: Stretch) -> list[_Level]:
    base = [(ref, stretch.owner) for ref in weights.base]
    if len(plan.levels) == 1:
        bits = plan.base_bits
        return [_Level(bits, lambda run: run(), plan.steps(bits), base)]
    pages = stretch.pages
    held = [
        reduce(jnp.logical_and, [page >= 0 for page in pages[: PAGES_OF_BITS[bits] - len(base)]])
        for bits in plan.levels[1:]
    ]
    chosen = [~held[0], *(a & ~b for a, b in itertools.pairwise(held)), held[-1]]
    sources = [*base, *((weights.pool, page) for page in pages)]
    return [
        _Level(
            bits,
            pl.when(mine),
            jnp.where(mine, plan.steps(bits), 0),
            sources[: PAGES_OF_BITS[bits]],
        )
        for bits, mine in zip(plan.levels, chosen, strict=True)
    ]


def _fetch(
    plan: MatmulPlan, weights: Weights, ring: Ring, stretch: Stretch, use: Any, level: _Level,
    at: Any, slot: Any,
) -> None:  # fmt: skip
    """Starts to fetch step ``at`` of the stretch: its pages and its scales."""
    steps, height = plan.steps(level.bits), plan.height(level.bits)
    groups = plan.groups(level.bits)
    tiles = quotient(at, steps)
    tile = stretch.first + tiles
    step_index = stretch.part * steps + at - tiles * steps
    copies = []
    for index, (ref, owner) in enumerate(level.sources):
        line = (owner * plan.row_tiles + tile) * (plan.chunks * PLANES_PER_PAGE)
        place = (slot * len(level.sources) + index) * height
        target = ring.lines.at[pl.ds(place, height)]
        copies.append(Copy(ref, line + step_index * height, target))
    group = (stretch.owner * plan.row_tiles + tile) * (steps * plan.parts) + step_index
    target = ring.scales.at[pl.ds(slot * groups, groups)]
    copies.append(Copy(weights.scales, group * groups, target))
    fetch(copies, ring.barriers, use + at)


def _start(
    plan: MatmulPlan, weights: Weights, ring: Ring, stretch: Stretch, use: Any, level: _Level
) -> None:
    def one(at: Any) -> None:
        _fetch(plan, weights, ring, stretch, use, level, at, at)

    total = stretch.count * plan.steps(level.bits)
    fori_loop(0, jnp.minimum(plan.slots(level.bits), total), one)


def _multiply(
    plan: MatmulPlan, weights: Weights, ring: Ring, stretch: Stretch, limbs: Any, use: Any,
    finish: Callable[[jax.Array, Any, Any], None], level: _Level,
) -> None:  # fmt: skip
    bits = level.bits
    pages, config, slots = PAGES_OF_BITS[bits], plan.step_config(bits), plan.slots(bits)
    steps, passes, of_run = plan.steps(bits), plan.passes(bits), plan.v // plan.together(bits)
    height, groups = plan.height(bits), plan.groups(bits)
    run_lines, blocks = PLANES_PER_PAGE * plan.v, config.chunks * CHUNK // BLOCK
    total = stretch.count * steps
    held = hold_table(config)
    factor = jnp.float32(1) if weights.scale_base is None else weights.scale_base[stretch.owner]

    def do_step(index: Any, carry: tuple[jax.Array, Any, Any]) -> tuple[jax.Array, Any, Any]:
        y, *numbers = carry
        at, slot = (opaque(number) for number in numbers)  # no address is held for the next step
        wait(ring.barriers, use + at)

        def do_pass(number: Any, y: jax.Array) -> jax.Array:
            run = quotient(number, of_run)
            lines = [
                pl.ds((slot * pages + page) * height + run * run_lines, run_lines)
                for page in range(pages)
            ]
            return step(
                config,
                y,
                [ring.lines.at[place] for place in lines],
                ring.scales.at[pl.ds(slot * groups + number * config.groups, config.groups)],
                limbs.at[pl.ds((index * passes + number) * blocks, blocks)],
                (number - run * of_run) * config.chunks,
                held,
            )

        y = lax.fori_loop(0, passes, do_pass, y) if passes > 1 else do_pass(jnp.int32(0), y)

        @pl.when(at + slots < total)
        def _() -> None:
            sync_warpgroup()  # all have read the slot, which may be filled again
            _fetch(plan, weights, ring, stretch, use, level, at + slots, slot)

        return y, at + 1, jnp.where(slot == slots - 1, 0, slot + 1)

    def do_tile(tile: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        zeros = jnp.zeros((ROW_TILE, 2 * plan.input_rows), jnp.float32)
        y = plgpu.layout_cast(zeros, ACCUMULATORS)
        y, at, slot = lax.fori_loop(0, steps, do_step, (y, *carry))
        finish(y, stretch.first + tile, factor)
        return at, slot

    lax.fori_loop(0, stretch.count, do_tile, (jnp.int32(0), jnp.int32(0)))


def ring_scratch(plans: list[MatmulPlan], workers: int) -> list[Any]:
    """Scratch types of the rings of all workers of a block, which serve all of ``plans``."""
    dtype = jnp.bfloat16 if plans[0].format.scale_encoding == "bf16" else jnp.uint8
    groups = max(plan.slots(bits) * plan.groups(bits) for plan in plans for bits in plan.levels)
    return [
        plgpu.SMEM((workers * plans[0].ring_lines, LINE_WORDS), jnp.uint32),
        plgpu.SMEM((workers, groups, ROW_TILE), dtype),
        barriers_scratch(workers),
    ]
