"""The MoE block of a decode step as one kernel on Hopper: few tokens, all memory bandwidth.

Five phases over one grid of workers:

    logits    the norm of the input, and the router's logits
    (choose   every block for itself: top k, and the tiles of tokens that share an expert)
    gate_up   sums of every (tile, part of the columns, tile of weight rows)
    down      silu(gate) * up becomes the input; sums of every (tile, tile of weight rows)
    combine   every token's weighted sum over its experts, and the residual

Barriers over the grid are ahead of ``logits`` and of ``combine``. ``choose`` waits until each logit
is there, a worker of ``down`` until the sums of the tiles that it reads are.

Work is dealt out as contiguous stretches, so a worker brings an expert's input into shared memory
once. The page table is read in the kernel; what ``down`` will read is fetched while the last
``gate_up`` sums are still being made elsewhere.
"""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.expert_ffn.grouping import tile_count
from pallas_kernels.expert_ffn.mosaic.stream import (
    Matmul,
    MatmulPlan,
    Weights,
)
from pallas_kernels.layout import LINE_WORDS, ROW_TILE
from pallas_kernels.levels import LEVEL_BITS
from pallas_kernels.moe_layer.mosaic.deal import DealPlan, Line
from pallas_kernels.moe_layer.mosaic.logits import LogitsPlan
from pallas_kernels.moe_layer.mosaic.phases import Arguments, Between, Phases
from pallas_kernels.moe_layer.mosaic.routed import ChoosePlan
from pallas_kernels.mosaic import pdl
from pallas_kernels.mosaic.bulk import initialize
from pallas_kernels.mosaic.counts import counts_shape
from pallas_kernels.mosaic.target import interpreting
from pallas_kernels.mosaic.workers import (
    Workers,
    counter_ref,
    fits,
    freeze_counter,
    sync_grid,
)
from pallas_kernels.pages import PagedExperts

Phase = Literal["choose", "gate_up", "down", "combine"]
"""Where the kernel can end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Tuning; hashable."""

    rows: int = 4
    """M: rows of a tile of tokens that share an expert; a multiple of 4."""
    ring_lines: int = 48
    """Of a worker's ring, 1 KiB each; fewer where shared memory does not hold them."""
    gate_up_lines: int = 16
    """Lines of pages that are waited for together."""
    down_lines: int = 16
    gate_up_parts: int = 2
    """Parts of the columns of gate_up: more for few tokens, to occupy all workers."""
    groups_in_flight: int = 4
    """Groups whose products are awaited together: trades registers for latency."""
    last: Phase = "combine"
    """The last phase that runs; only a benchmark leaves some out, to tell their times apart."""


def default_config(tokens: int, experts: PagedExperts) -> MoeConfig:
    """Config for some number of tokens."""
    runs = MatmulPlan.runs_of(experts.format.hidden)
    return MoeConfig(
        rows=4 if tokens <= 32 else 8,
        # few tokens have an item a worker: gate_up waits for pages, and down for gate_up
        gate_up_lines=16 if tokens > 2 else 8,
        down_lines=48 if tokens <= 2 else 16 if tokens <= 16 else 24,
        gate_up_parts=2 if runs % 2 == 0 else 1,
    )


def moe_layer_kernel(
    x: jax.Array,
    *,
    norm: tuple[jax.Array, jax.Array, float],
    router: jax.Array,
    experts: PagedExperts,
    layer: jax.Array,
    valid: jax.Array,
    top_k: int,
    normalize: bool,
    mass: jax.Array,
    counter: jax.Array,
    config: MoeConfig | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``moe_layer`` on Hopper: bfloat16 x [T, H] -> (x + experts' output [T, H], mass, counter).

    mass [L, E] and counter int32 [1] are updated in place where the caller gives them up. The
    counter is that of barriers over the grid: zero at first, then whatever comes back.
    """
    weight, norm_layer, eps = norm
    return _moe_layer(
        x,
        weight,
        jnp.asarray(norm_layer, jnp.int32),
        router,
        experts,
        jnp.asarray(layer, jnp.int32),
        valid.astype(jnp.int32),
        mass,
        counter,
        eps=float(eps),
        top_k=top_k,
        normalize=normalize,
        config=config or default_config(x.shape[0], experts),
    )


def matmul_plan(matmul: Matmul, experts: PagedExperts, config: MoeConfig) -> MatmulPlan:
    """Plan of one matmul."""
    shape = experts.format.matrix_shapes[matmul]
    above = [bits for bits in LEVEL_BITS if bits > experts.base_bits and experts.pool_pages]
    return MatmulPlan(
        rows=shape[0],
        columns=shape[1],
        format=experts.format,
        base_bits=experts.base_bits,
        levels=(experts.base_bits, *above),
        input_rows=config.rows,
        parts=config.gate_up_parts if matmul == "gate_up" else 1,
        ring_lines=config.ring_lines,
        step_lines=config.gate_up_lines if matmul == "gate_up" else config.down_lines,
        groups_in_flight=config.groups_in_flight,
    )


@partial(jax.jit, static_argnames=("eps", "top_k", "normalize", "config"))
def _moe_layer(
    x: jax.Array,
    norm: jax.Array,
    norm_layer: jax.Array,
    router: jax.Array,
    experts: PagedExperts,
    layer: jax.Array,
    valid: jax.Array,
    mass: jax.Array,
    counter: jax.Array,
    *,
    eps: float,
    top_k: int,
    normalize: bool,
    config: MoeConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    phases, weights, between = moe_phases(
        experts, tokens=x.shape[0], eps=eps, top_k=top_k, normalize=normalize, config=config
    )
    arguments = Arguments(
        x,
        norm,
        norm_layer.reshape(1),
        router,
        layer.reshape(1),
        valid,
        *weights,
        jax.new_ref(mass),
        counter_ref(counter),
    )
    if interpreting():
        out = _interpreted(phases, arguments, between).out
    else:
        out = _launched(phases, arguments, between, config.last).out
    return out, jax.freeze(arguments.mass), freeze_counter(arguments.counter)


def moe_phases(
    experts: PagedExperts, *, tokens: int, eps: float, top_k: int, normalize: bool,
    config: MoeConfig,
) -> tuple[Phases, tuple[Weights, Weights, jax.Array | None], Between]:  # fmt: skip
    """The phases for these experts, their arrays (gate_up, down, table), what phases leave."""
    hidden = experts.hidden
    phases = _phases(
        experts, tokens=tokens, eps=eps, top_k=top_k, normalize=normalize, config=config
    )
    gate_up, down, chooses = phases.gate_up, phases.down, phases.choose
    levelled = len(gate_up.levels) > 1

    def weights_of(name: Matmul) -> Weights:
        scales = getattr(experts.scales, name)
        return Weights(
            base=tuple(getattr(page, name).reshape(-1, LINE_WORDS) for page in experts.base),
            pool=getattr(experts.pool, name).reshape(-1, LINE_WORDS) if levelled else None,
            scales=scales.codes.reshape(-1, ROW_TILE),
            scale_base=None if scales.base is None else scales.base.reshape(-1),
        )

    between = Between(
        h=jax.ShapeDtypeStruct((tokens, hidden), jnp.bfloat16),
        logits=jax.ShapeDtypeStruct((tokens, experts.experts), jnp.float32),
        gate_up=jax.ShapeDtypeStruct(
            (chooses.tiles, config.rows, gate_up.items * ROW_TILE), jnp.float32
        ),
        counts=counts_shape(chooses.tiles + 1),
        down=jax.ShapeDtypeStruct(
            (chooses.tiles, config.rows, down.row_tiles * ROW_TILE), jnp.float32
        ),
        out=jax.ShapeDtypeStruct((tokens, hidden), jnp.bfloat16),
    )
    table = experts.table.reshape(-1) if levelled else None
    return phases, (weights_of("gate_up"), weights_of("down"), table), between


def _phases(
    experts: PagedExperts, *, tokens: int, eps: float, top_k: int, normalize: bool,
    config: MoeConfig,
) -> Phases:  # fmt: skip
    """With as many lines of the config's ring as fit; the plans raise ValueError if too few do."""
    gate_up, down = (matmul_plan(name, experts, config) for name in ("gate_up", "down"))
    workers = Workers.of_device()
    deal = DealPlan(
        experts=experts.experts,
        base_bits=experts.base_bits,
        levels=gate_up.levels,
        table_stride=experts.layers * experts.experts,
        lines=tuple(map(Line.of, (gate_up, down))),
        workers=workers.count,
    )
    phases = Phases(
        workers=workers,
        logits=LogitsPlan(tokens=tokens, hidden=experts.hidden, experts=experts.experts, eps=eps),
        choose=ChoosePlan(
            tokens=tokens,
            experts=experts.experts,
            top_k=top_k,
            normalize=normalize,
            tiles=tile_count(tokens * top_k, experts.experts, config.rows),
            rows=config.rows,
            deal=deal if len(deal.levels) > 1 else None,
        ),
        gate_up=gate_up,
        down=down,
    )
    if fits(phases.scratch()):
        return phases
    fewer = dataclasses.replace(config, ring_lines=config.ring_lines - 1)
    return _phases(experts, tokens=tokens, eps=eps, top_k=top_k, normalize=normalize, config=fewer)


def _launched(phases: Phases, arguments: Arguments, between: Between, last: Phase) -> Between:
    """All phases in one kernel, up to the last that is wanted."""
    flat, tree = jax.tree.flatten(arguments)

    def kernel(*refs: Any) -> None:
        args = _with_layers(jax.tree.unflatten(tree, refs[: len(flat)]))
        outs = Between(*refs[len(flat) : len(flat) + len(between)])
        scratch = list(refs[len(flat) + len(between) :])
        sync = partial(sync_grid, args.counter, phases.workers)
        pdl.wait()
        pdl.release()
        initialize(scratch[2])  # seen by all after the first barrier
        phases.prepare(outs)
        sync()
        phases.write_logits(args, outs, scratch)
        phases.choose_experts(args, outs, scratch)
        if last == "choose":
            return
        use = phases.multiply_gate_up(args, outs, scratch, jnp.int32(0))
        if last == "gate_up":
            return
        phases.multiply_down(args, outs, scratch, lambda: None, use)
        if last == "down":
            return
        sync()
        phases.add_up(args, outs, scratch)

    run = phases.workers.kernel(
        kernel, name="moe_layer", out_type=tuple(between), scratch_types=phases.scratch()
    )
    return Between(*run(*flat))


def _with_layers(arguments: Arguments) -> Arguments:
    """Inside the kernel: the numbers of the layers instead of references [1]."""
    return arguments._replace(layer=arguments.layer[0], norm_layer=arguments.norm_layer[0])


def _interpreted(phases: Phases, arguments: Arguments, between: Between) -> Between:
    """A kernel for each phase, since interpret mode has no barrier over the grid."""
    flat, tree = jax.tree.flatten(arguments)
    done: dict[str, jax.Array] = {}

    def run(names: tuple[str, ...], phase: Any, *, needs_tiles: bool) -> None:
        known = list(done)

        def kernel(*refs: Any) -> None:
            args = _with_layers(jax.tree.unflatten(tree, refs[: len(flat)]))
            named = [*known, *names]
            outs = dict.fromkeys(Between._fields)
            outs |= dict(zip(named, refs[len(flat) :], strict=False))
            scratch = list(refs[len(flat) + len(named) :])
            if needs_tiles:
                phases.choose_experts(args, Between(**outs), scratch)
            phase(args, Between(**outs), scratch)

        shapes = tuple(getattr(between, name) for name in names)
        call = phases.workers.kernel(
            kernel, name="moe_layer_phase", out_type=shapes, scratch_types=phases.scratch()
        )
        done.update(zip(names, call(*flat, *done.values()), strict=True))

    def nothing() -> None: ...

    run(("h", "logits", "counts"), phases.write_logits, needs_tiles=False)
    run(("gate_up",), lambda a, b, s: phases.multiply_gate_up(a, b, s, 0), needs_tiles=True)
    run(("down",), lambda a, b, s: phases.multiply_down(a, b, s, nothing, 0), needs_tiles=True)
    run(("out",), phases.add_up, needs_tiles=True)
    return Between(**done)
