"""The matmul over pages for tiles of many rows, as one kernel on Hopper.

One block a multiprocessor stays for all its items; an item is a tile of input rows and three tiles
of 64 weight rows, one for each of three warpgroups that multiply. A fourth warpgroup only brings
input and pages, whole items ahead if it can. Items are dealt out in turn, so that blocks which run
together share an input tile and its expert in the L2 cache. Three warpgroups take turns at the
tensor cores by themselves: while one decodes, the products of the others run.
"""

from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.expert_ffn.mosaic_prefill.chunk import (
    SWIZZLED,
    ChunkConfig,
    multiply_chunk,
    start_step,
    step_twin,
    zero_sums,
)
from pallas_kernels.expert_ffn.mosaic_prefill.plan import MatmulPlan
from pallas_kernels.expert_ffn.mosaic_prefill.rows import Rows
from pallas_kernels.expert_ffn.mosaic_prefill.store import store_gated, store_rows
from pallas_kernels.layout import CHUNK, LINE_WORDS, ROW_TILE
from pallas_kernels.levels import PAGES_OF_BITS, Bits
from pallas_kernels.mosaic import pdl
from pallas_kernels.mosaic.target import interpreting
from pallas_kernels.mosaic.workers import multiprocessors
from pallas_kernels.pages import PagedExperts

_CONSUMER_REGISTERS = 152
_PRODUCER_REGISTERS = 56
"""Of a thread; three consumers and a producer have 128 on average."""


class _Arrays(NamedTuple):
    """In global memory."""

    x: Any
    """bfloat16 [R, K], columns in pair order."""
    expert: Any
    """int32 [I], and so are the next two."""
    first: Any
    count: Any
    used: Any
    """int32 [1]."""
    layer: Any
    """int32 [1]."""
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


class _Shared(NamedTuple):
    """Shared memory of a block, and its barriers; "free" ones are where consumers arrive."""

    x: Any
    """bfloat16 [stages, M, 128]."""
    lines: Any
    """uint32 [consumer, slots * 2v, 256]."""
    scales: Any
    """[consumer, slots * lines of scales, 64]."""
    x_full: Any
    x_free: Any
    page_full: Any
    page_free: Any
    scale_full: Any
    """Freed with the pages: a step has at least one."""


class _Turn(NamedTuple):
    """How much has gone through the rings; all int32 []."""

    chunk: Any
    page: Any
    step: Any


class _Item(NamedTuple):
    """What a block works on."""

    block: Any
    """Which row tiles."""
    owner: Any
    """layer * E + expert."""
    first: Any
    count: Any
    pages: tuple[Any, ...]
    """Of the pool, for each rung of the table."""
    held: Any
    """Pages that the expert's level takes."""


def page_matmul(
    plan: MatmulPlan, x: jax.Array, rows: Rows, experts: PagedExperts, layer: jax.Array
) -> jax.Array:
    """Rows of the result, bfloat16 [R, N or F]; those of no tile are undefined."""
    name, consumers = plan.matmul, plan.config.consumers
    levelled, scales = len(plan.levels) > 1, getattr(experts.scales, name)
    arrays = _Arrays(
        x=x,
        expert=rows.expert,
        first=rows.first,
        count=rows.height,
        used=rows.used.reshape(1),
        layer=layer.reshape(1),
        base=tuple(getattr(page, name).reshape(-1, LINE_WORDS) for page in experts.base),
        pool=getattr(experts.pool, name).reshape(-1, LINE_WORDS) if levelled else None,
        scales=scales.codes.reshape(-1, ROW_TILE),
        scale_base=scales.base.reshape(-1) if plan.log8 else None,
        table=experts.table.reshape(-1) if levelled else None,
    )
    flat, tree = jax.tree.flatten(arrays)

    def kernel(*refs: Any) -> None:
        arrays = jax.tree.unflatten(tree, refs[: len(flat)])
        out, *scratch = refs[len(flat) :]
        _kernel(plan, experts.experts, arrays, out, _Shared(*scratch))

    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((x.shape[0], plan.outputs), jnp.bfloat16),
        scratch_types=_scratch(plan),
        grid=(_blocks(),),
        grid_names=("block",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        kernel_name=f"expert_{name}",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=mgpu.LoweringSemantics.Lane
        ),
    )
    return run(*flat)


def _blocks() -> int:
    return 2 if interpreting() else multiprocessors()


def _scratch(plan: MatmulPlan) -> tuple[Any, ...]:
    slots, stages, consumers = plan.config.slots, plan.stages, plan.config.consumers
    codes = jnp.uint8 if plan.log8 else jnp.bfloat16
    rings = consumers * slots
    return tuple(
        _Shared(
            x=plgpu.SMEM((stages, plan.config.most, CHUNK), jnp.bfloat16, transforms=SWIZZLED),
            lines=plgpu.SMEM((consumers, slots * plan.lines, LINE_WORDS), jnp.uint32),
            scales=plgpu.SMEM((consumers, slots * plan.scale_lines, ROW_TILE), codes),
            x_full=plgpu.Barrier(num_barriers=stages),
            x_free=plgpu.Barrier(num_barriers=stages, num_arrivals=consumers),
            page_full=plgpu.Barrier(num_barriers=rings),
            page_free=plgpu.Barrier(num_barriers=rings),
            scale_full=plgpu.Barrier(num_barriers=rings),
        )
    )


def _kernel(plan: MatmulPlan, experts: int, arrays: _Arrays, out: Any, shared: _Shared) -> None:
    pdl.wait()
    pdl.release()
    warpgroup, consumers = lax.axis_index("warpgroup"), plan.config.consumers
    block, blocks = lax.axis_index("block"), _blocks()
    total = arrays.used[0] * plan.blocks
    items = (total - block + blocks - 1) // blocks
    layer = arrays.layer[0]

    def over_items(do: Any) -> None:
        def body(index: Any, turn: _Turn) -> _Turn:
            at = block + index * blocks
            item = _item(plan, arrays, layer * experts, at // plan.blocks, at % plan.blocks)
            do(item, turn)
            return _Turn(
                turn.chunk + plan.chunks,
                turn.page + plan.steps * item.held,
                turn.step + plan.steps,
            )

        lax.fori_loop(0, items, body, _Turn(*(jnp.int32(0),) * 3))

    @pl.when(warpgroup == consumers)
    def _produce() -> None:
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        over_items(partial(_fetch_item, plan, arrays, shared))
        # until all is free again: no barrier ends with an arrival that nobody waited for
        for stage in range(plan.stages):
            plgpu.barrier_wait(shared.x_free.at[stage])
        for slot in range(consumers * plan.config.slots):
            plgpu.barrier_wait(shared.page_free.at[slot])

    @pl.when(warpgroup < consumers)
    def _consume() -> None:
        plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
        for stage in range(plan.stages):
            plgpu.barrier_arrive(shared.x_free.at[stage])
        for slot in range(plan.config.slots):
            plgpu.barrier_arrive(shared.page_free.at[warpgroup * plan.config.slots + slot])
        over_items(partial(_multiply_item, plan, arrays, out, shared, warpgroup))


def _item(plan: MatmulPlan, arrays: _Arrays, first_expert: Any, tile: Any, block: Any) -> _Item:
    owner = first_expert + arrays.expert[tile]
    held = jnp.int32(PAGES_OF_BITS[plan.base_bits])
    pages: tuple[Any, ...] = ()
    if len(plan.levels) > 1:
        rungs = PAGES_OF_BITS[plan.levels[-1]] - PAGES_OF_BITS[plan.base_bits]
        pages = tuple(arrays.table[rung * plan.table_stride + owner] for rung in range(rungs))
        for bits in plan.levels[1:]:
            needed = pages[: PAGES_OF_BITS[bits] - PAGES_OF_BITS[plan.base_bits]]
            has = reduce(jnp.logical_and, [page >= 0 for page in needed])
            held = jnp.where(has, PAGES_OF_BITS[bits], held)
    return _Item(block, owner, arrays.first[tile], arrays.count[tile], pages, held)


def _row_tile(plan: MatmulPlan, item: _Item, consumer: Any) -> Any:
    """Of a consumer; where there is none left, it does the last one again, and does not store."""
    return jnp.minimum(item.block * plan.config.consumers + consumer, plan.row_tiles - 1)


def _scale_line(plan: MatmulPlan, item: _Item, tile: Any, step: Any) -> Any:
    """First line of a step's scales."""
    return ((item.owner * plan.row_tiles + tile) * plan.steps + step) * plan.groups


def _of_height(plan: MatmulPlan, count: Any, do: Any) -> None:
    """Calls ``do(height)`` with the least height that holds ``count`` rows."""
    heights = plan.config.heights
    for below, height in zip((0, *heights), heights, strict=False):
        pl.when((below < count) & (count <= height))(partial(do, height))


def _fetch_item(
    plan: MatmulPlan, arrays: _Arrays, shared: _Shared, item: _Item, turn: _Turn
) -> None:
    slots, levels = plan.config.slots, PAGES_OF_BITS[plan.levels[-1]]
    sources = [(ref, item.owner) for ref in arrays.base]
    sources += [(arrays.pool, page) for page in item.pages]

    def fetch_pages(consumer: int, step: Any) -> None:
        tile = _row_tile(plan, item, consumer)

        def fetch(which: int) -> None:
            ref, owner = sources[which]
            slot = (turn.page + step * item.held + which) % slots
            barrier = consumer * slots + slot
            plgpu.barrier_wait(shared.page_free.at[barrier])
            line = ((owner * plan.row_tiles + tile) * plan.steps + step) * plan.lines
            plgpu.copy_gmem_to_smem(
                ref.at[pl.ds(line, plan.lines)],
                shared.lines.at[consumer, pl.ds(slot * plan.lines, plan.lines)],
                shared.page_full.at[barrier],
            )

        fetch(0)
        place = (turn.step + step) % slots
        line = _scale_line(plan, item, tile, step)
        line -= lax.rem(line, plan.scale_lines)
        plgpu.copy_gmem_to_smem(
            arrays.scales.at[pl.ds(line, plan.scale_lines)],
            shared.scales.at[consumer, pl.ds(place * plan.scale_lines, plan.scale_lines)],
            shared.scale_full.at[consumer * slots + place],
        )
        for which in range(1, levels):
            pl.when(which < item.held)(partial(fetch, which))

    def fetch_input(chunk: Any) -> None:
        stage = (turn.chunk + chunk) % plan.stages
        plgpu.barrier_wait(shared.x_free.at[stage])

        def fetch(height: int) -> None:
            plgpu.copy_gmem_to_smem(
                arrays.x.at[pl.ds(item.first, height), pl.ds(chunk * CHUNK, CHUNK)],
                shared.x.at[stage, pl.ds(0, height)],
                shared.x_full.at[stage],
            )

        _of_height(plan, item.count, fetch)

    def fetch_step(step: Any, _: Any) -> Any:
        for consumer in range(plan.config.consumers):
            fetch_pages(consumer, step)

        def each(chunk: Any, _: Any) -> Any:
            fetch_input(step * plan.v + chunk)
            return 0

        return lax.fori_loop(0, plan.v, each, 0)

    lax.fori_loop(0, plan.steps, fetch_step, 0)


def _multiply_item(
    plan: MatmulPlan, arrays: _Arrays, out: Any, shared: _Shared, consumer: Any, item: _Item,
    turn: _Turn,
) -> None:  # fmt: skip
    def at_height(height: int) -> None:
        for bits in plan.levels:
            run = partial(_multiply, plan, arrays, out, shared, consumer, item, turn, height, bits)
            if len(plan.levels) == 1:
                run()
            else:
                pl.when(item.held == PAGES_OF_BITS[bits])(run)

    _of_height(plan, item.count, at_height)


def _multiply(
    plan: MatmulPlan, arrays: _Arrays, out: Any, shared: _Shared, consumer: Any, item: _Item,
    turn: _Turn, height: int, bits: Bits,
) -> None:  # fmt: skip
    slots, pages = plan.config.slots, PAGES_OF_BITS[bits]
    config = ChunkConfig(
        bits=bits,
        chunks=plan.v,
        height=height,
        group_size=plan.format.group_size,
        table=plan.format.table,
        log8=plan.log8,
    )

    tile = _row_tile(plan, item, consumer)

    def do_step(step: Any, y: jax.Array) -> jax.Array:
        mine = [(turn.page + step * pages + which) % slots for which in range(pages)]
        place = (turn.step + step) % slots
        for slot in mine:
            plgpu.barrier_wait(shared.page_full.at[consumer * slots + slot])
        plgpu.barrier_wait(shared.scale_full.at[consumer * slots + place])
        refs = [shared.lines.at[consumer, pl.ds(s * plan.lines, plan.lines)] for s in mine]
        line = _scale_line(plan, item, tile, step)
        line = place * plan.scale_lines + lax.rem(line, plan.scale_lines)
        scales = shared.scales.at[consumer, pl.ds(line, plan.groups)]
        fragment = words = None
        if not interpreting():
            fragment, words = start_step(config, refs, scales)
        for chunk in range(plan.v):
            stage = (turn.chunk + step * plan.v + chunk) % plan.stages
            plgpu.barrier_wait(shared.x_full.at[stage])
            x = shared.x.at[stage, pl.ds(0, height)]
            if interpreting():
                y = step_twin(config, y, refs, scales, chunk, x[...])
            else:
                y, fragment, words = multiply_chunk(
                    config, chunk, y, fragment, words, refs, scales, x
                )
            plgpu.barrier_arrive(shared.x_free.at[stage])
        for slot in mine:
            plgpu.barrier_arrive(shared.page_free.at[consumer * slots + slot])
        return y

    y = lax.fori_loop(0, plan.steps, do_step, zero_sums(height))
    factor = jnp.float32(1) if arrays.scale_base is None else arrays.scale_base[item.owner]
    store = store_gated if plan.matmul == "gate_up" else store_rows

    @pl.when(item.block * plan.config.consumers + consumer < plan.row_tiles)
    def _() -> None:
        store(y, factor, out, tile, item.first, item.count)
