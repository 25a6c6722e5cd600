"""One matmul over pages: for every tile of input rows the rows of its expert's matrix.

A block has one tile of input rows, and each of its warpgroups a tile of 64 rows of the weights. The
words of the planes go from global memory to registers, those of the next step on their way while a
step is multiplied. Page numbers and levels are read from the page table in the kernel.
"""

from collections.abc import Callable
from functools import partial, reduce
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.expert_ffn.grouping import Tiles
from pallas_kernels.expert_ffn.mosaic_mma.chunk import (
    finish_running,
    multiply_chunk,
    multiply_chunk_running,
    start_running,
    zero_sums,
)
from pallas_kernels.expert_ffn.mosaic_mma.fragments import Parts
from pallas_kernels.expert_ffn.mosaic_mma.outputs import GATED_ROWS, store_gated, store_sums
from pallas_kernels.expert_ffn.mosaic_mma.plan import SLOTS, MatmulPlan, Weights
from pallas_kernels.expert_ffn.mosaic_mma.resident import load_resident
from pallas_kernels.expert_ffn.mosaic_mma.rows import Share
from pallas_kernels.expert_ffn.mosaic_mma.streamed import load_rows, start_copy, wait_copies
from pallas_kernels.expert_ffn.mosaic_mma.words import (
    load_scales,
    load_words,
    rotate_words,
    scale_values,
)
from pallas_kernels.layout import CHUNK, ROW_TILE
from pallas_kernels.levels import LEVEL_BITS, PAGES_OF_BITS, Bits
from pallas_kernels.mosaic.target import interpreting
from pallas_kernels.mosaic.workers import sync_block

_MAIN_PAGES = 2
"""Pages of the value at 4 bits; those after them add to it."""


class _Input(NamedTuple):
    """Of one block."""

    x: Any
    x_scale: Any
    """float32 [R] of a streamed input, else None."""
    assignment: Any
    tile: Any
    halves: Any
    """float16 [slots, M, columns + spare]."""
    scale: Any
    """float32 [M]."""
    rows: Any
    """int32 [M]."""


class _Owner(NamedTuple):
    """Whose matrix, and which tile of its rows."""

    expert: Any
    """layer * E + expert."""
    n: Any


def matmul(
    plan: MatmulPlan,
    x: jax.Array,
    x_scale: jax.Array | None,
    tiles: Tiles,
    weights: Weights,
    layer: jax.Array,
) -> jax.Array:
    """float32 [I, M, 32 B] of gate_up (``silu(gate) * up``) or [I, M, 64 B] of down.

    x bfloat16 or float32 [R, >= K]; if streamed float16 [R, padded K] with x_scale float32 [R].
    What tiles without an expert get is void.
    """
    count = tiles.expert.shape[0]
    width = plan.row_tiles * (GATED_ROWS if plan.matmul == "gate_up" else ROW_TILE)
    flat, tree = jax.tree.flatten((x, x_scale, *tiles, weights, layer.reshape(1)))
    # interpreted warpgroups do not wait for each other, so each has an input of its own
    copies = plan.warpgroups if interpreting() else 1

    def body(*refs: Any) -> None:
        arguments = jax.tree.unflatten(tree, refs[: len(flat)])
        out, halves, scale, rows = refs[len(flat) :]
        x, x_scale, expert, assignment, weights, layer = arguments
        tile, warpgroup = lax.axis_index("tile"), lax.axis_index("warpgroup")
        mine = warpgroup if interpreting() else 0
        of_tile = expert[tile]

        @pl.when(of_tile >= 0)
        def _() -> None:
            owner = _Owner(
                layer[0] * plan.experts + of_tile,
                lax.axis_index("n") * plan.warpgroups + warpgroup,
            )
            block = _Input(
                x, x_scale, assignment, tile, halves.at[mine], scale.at[mine], rows.at[mine]
            )
            for bits, chosen, sources in _levels(plan, weights, owner):
                chosen(partial(_multiply, plan, weights, owner, block, out.at[tile], bits, sources))

    rows = plan.input_rows
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((count, rows, width), jnp.float32),
        scratch_types=[
            plgpu.SMEM((copies, *plan.input_shape), jnp.float16),
            plgpu.SMEM((copies, rows), jnp.float32),
            plgpu.SMEM((copies, rows), jnp.int32),
        ],
        grid=(count, plan.row_tiles // plan.warpgroups),
        grid_names=("tile", "n"),
        num_threads=plan.warpgroups,
        thread_name="warpgroup",
        kernel_name=f"{plan.matmul}_mma",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*flat)


def _levels(plan: MatmulPlan, weights: Weights, owner: _Owner) -> list[Any]:
    """(bits, runs its argument if the expert is at this level, sources of its pages)."""
    base = [(ref, owner.expert) for ref in weights.base]
    if len(plan.levels) == 1:
        return [(plan.base_bits, lambda run: run(), base)]
    rungs = PAGES_OF_BITS[LEVEL_BITS[-1]] - len(base)
    stride = plan.layers * plan.experts
    ids = [weights.table[rung * stride + owner.expert] for rung in range(rungs)]
    held = [
        reduce(jnp.logical_and, [page >= 0 for page in ids[: PAGES_OF_BITS[bits] - len(base)]])
        for bits in plan.levels[1:]
    ]
    chosen = [~held[0], *(a & ~b for a, b in pairwise(held)), held[-1]]
    sources = [*base, *((weights.pool, page) for page in ids)]
    return [
        (bits, pl.when(mine), sources[: PAGES_OF_BITS[bits]])
        for bits, mine in zip(plan.levels, chosen, strict=True)
    ]


def _multiply(
    plan: MatmulPlan, weights: Weights, owner: _Owner, block: _Input, out: Any, bits: Bits,
    sources: list[Any],
) -> None:  # fmt: skip
    """All columns of one tile of rows at one level."""
    log8 = plan.format.scale_encoding == "log8"

    def tile_of(matrix: Any) -> Any:
        return matrix * plan.row_tiles + owner.n

    def words_of(page: int, step: Any) -> jax.Array:
        ref, where = sources[page]
        line = (tile_of(where) * plan.steps + step) * plan.step_lines
        return load_words(ref, line, step < plan.steps, plan.v)

    def main_words(step: Any) -> list[jax.Array]:
        return [words_of(page, step) for page in range(min(_MAIN_PAGES, len(sources)))]

    def codes_of(chunk: Any, chunks: int) -> jax.Array:
        first = (tile_of(owner.expert) * plan.chunks + chunk) * plan.groups
        return load_scales(weights.scales, first, chunk < plan.chunks, chunks * plan.groups)

    def do_step(step: Any, carry: Any) -> Any:
        y, main, codes = carry
        scales = scale_values(codes, log8)
        residual = [words_of(page, step) for page in range(_MAIN_PAGES, len(sources))]
        next_codes = codes_of((step + 1) * plan.v, plan.v)

        def multiply(y: Any, parts: Parts, pages: list[Any]) -> Any:
            for chunk in range(plan.v):
                x, column = at_chunk(step * plan.v + chunk)
                y = multiply_chunk(plan.chunk_config(parts), y, pages, scales, x, column, chunk)
            return y

        if not residual:
            following = main_words(step + 1)
            return multiply(y, "main", main), following, next_codes
        y = multiply(y, "main", main)
        following = main_words(step + 1)  # not before: fewer words at a time
        return multiply(y, "residual", [*main, *residual]), following, next_codes

    def do_step_by_chunks(step: Any, carry: Any) -> Any:
        """With many sums: a loop, so that a compiler keeps the registers of chunks apart."""
        running, main, codes = carry
        residual = [words_of(page, step) for page in range(_MAIN_PAGES, len(sources))]
        following = main_words(step + 1)
        config = plan.chunk_config("both" if residual else "main")

        def do_chunk(index: Any, carry: Any) -> Any:
            running, pages, codes = carry
            chunk = step * plan.v + index
            next_codes = codes_of(chunk + 1, 1)
            x, column = at_chunk(chunk)
            scales = scale_values(codes, log8)
            running = multiply_chunk_running(config, running, pages, scales, x, column, 0)
            return running, [rotate_words(page, plan.v) for page in pages], next_codes

        start = (running, [*main, *residual], codes)
        running, _, codes = lax.fori_loop(0, plan.v, do_chunk, start)
        return running, following, codes

    main = main_words(jnp.int32(0))
    codes = codes_of(jnp.int32(0), 1 if plan.streamed else plan.v)
    at_chunk = _open_input(plan, block)
    if plan.streamed:
        running = start_running(plan.input_rows)
        running, _, _ = lax.fori_loop(0, plan.steps, do_step_by_chunks, (running, main, codes))
        y = finish_running(running)
    else:
        start = (zero_sums(plan.input_rows), main, codes)
        y, _, _ = lax.fori_loop(0, plan.steps, do_step, start)
    base = weights.scale_base
    factor = jnp.float32(1) if base is None else base[owner.expert]
    store = store_gated if plan.matmul == "gate_up" else store_sums
    store(y, block.scale, factor, out, owner.n)


def _open_input(plan: MatmulPlan, block: _Input) -> Callable[[Any], tuple[Any, Any]]:
    """Brings the input into shared memory, or starts to; gives (ref, first column) of a chunk.

    A streamed input is asked for its chunks once each, in order.
    """
    mine = Share(lax.axis_index("warpgroup"), plan.warpgroups)
    if not plan.streamed:
        whole = block.halves.at[0]
        load_resident(
            plan.source, block.x, block.assignment, block.tile, whole, block.scale,
            columns=plan.columns, share=mine,
        )  # fmt: skip
        sync_block()
        return lambda chunk: (whole, chunk * CHUNK)

    load_rows(plan.source, block.x_scale, block.assignment, block.tile, block.rows, block.scale)
    sync_block()

    def start(chunk: Any) -> None:
        slot = block.halves.at[chunk % SLOTS]
        start_copy(block.x, block.rows, slot, chunk, chunk < plan.chunks, mine)

    for chunk in range(SLOTS - 1):
        start(jnp.int32(chunk))

    def advance(chunk: Any) -> tuple[Any, Any]:
        wait_copies(SLOTS - 2)
        sync_block()  # the chunk is there for all, and all have done with the one before
        start(chunk + SLOTS - 1)
        return block.halves.at[chunk % SLOTS], 0

    return advance
