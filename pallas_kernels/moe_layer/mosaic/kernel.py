"""The MoE block of a decode step as one kernel on Hopper: few tokens, all memory bandwidth.

Five phases over one grid of workers, with a barrier over the grid between them:

    logits    the norm of the input, and the router's logits
    (choose   every block for itself: top k, and the tiles of tokens that share an expert)
    gate_up   sums of every (tile, part of the columns, tile of weight rows)
    down      silu(gate) * up becomes the input; sums of every (tile, tile of weight rows)
    combine   every token's weighted sum over its experts, and the residual

Work is dealt out as contiguous stretches, so a worker brings an expert's input into shared memory
once. The page table is read in the kernel; what ``down`` will read is fetched while the last
``gate_up`` sums are still being made elsewhere.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.expert_ffn.grouping import tile_count
from pallas_kernels.expert_ffn.mosaic.input_rows import SCALE_WORDS, load_gated, load_rows
from pallas_kernels.expert_ffn.mosaic.stream import (
    Matmul,
    MatmulPlan,
    Ring,
    Stretch,
    Weights,
    ring_scratch,
    stream,
)
from pallas_kernels.expert_ffn.mosaic.sums import store_sums
from pallas_kernels.expert_ffn.mosaic.wgmma_step import BLOCK
from pallas_kernels.layout import LINE_WORDS, ROW_TILE
from pallas_kernels.levels import LEVEL_BITS
from pallas_kernels.moe_layer.mosaic.choose import (
    ChoosePlan,
    Routed,
    add_mass,
    choose,
    routed_scratch,
)
from pallas_kernels.moe_layer.mosaic.combine import combine
from pallas_kernels.moe_layer.mosaic.logits import LogitsPlan, write_logits
from pallas_kernels.mosaic import pdl
from pallas_kernels.mosaic.bulk import initialize
from pallas_kernels.mosaic.target import interpreting
from pallas_kernels.mosaic.workers import (
    WARPGROUPS,
    Workers,
    sync_grid,
    warpgroup,
)
from pallas_kernels.pages import PagedExperts


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Tuning; hashable."""

    rows: int = 4
    """M: rows of a tile of tokens that share an expert; a multiple of 4."""
    ring_lines: int = 48
    """Of a worker's ring, 1 KiB each."""
    gate_up_parts: int = 2
    """Parts of the columns of gate_up: more for few tokens, to occupy all workers."""
    groups_in_flight: int = 4
    """Groups whose products are awaited together: trades registers for latency."""


def default_config(tokens: int, experts: PagedExperts) -> MoeConfig:
    """Config for some number of tokens."""
    steps = MatmulPlan.steps_of(experts.format.hidden)
    return MoeConfig(
        rows=4 if tokens <= 32 else 8,
        gate_up_parts=2 if steps % 2 == 0 else 1,
        groups_in_flight=2 if experts.pool_pages else 4,
    )


class _Arguments(NamedTuple):
    """Arrays in global memory."""

    x: Any
    norm: Any
    norm_layer: Any
    router: Any
    layer: Any
    valid: Any
    gate_up: Weights
    down: Weights
    mass: Any
    """float32 [L, E], a reference: added to in place."""
    counter: Any
    """int32 [1], a reference: of the barrier over the grid."""


class _Between(NamedTuple):
    """What phases leave in global memory for the next."""

    h: Any
    logits: Any
    gate_up: Any
    down: Any
    out: Any


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
        table_stride=experts.layers * experts.experts,
        input_rows=config.rows,
        parts=config.gate_up_parts if matmul == "gate_up" else 1,
        ring_lines=config.ring_lines,
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
    tokens, hidden = x.shape
    workers = Workers.of_device()
    gate_up, down = (matmul_plan(name, experts, config) for name in ("gate_up", "down"))
    levelled = len(gate_up.levels) > 1

    def weights_of(name: Matmul) -> Weights:
        scales = getattr(experts.scales, name)
        return Weights(
            base=tuple(getattr(page, name).reshape(-1, LINE_WORDS) for page in experts.base),
            pool=getattr(experts.pool, name).reshape(-1, LINE_WORDS) if levelled else None,
            scales=scales.codes.reshape(-1, ROW_TILE),
            scale_base=None if scales.base is None else scales.base.reshape(-1),
            table=experts.table.reshape(-1) if levelled else None,
        )

    arguments = _Arguments(
        x,
        norm,
        norm_layer.reshape(1),
        router,
        layer.reshape(1),
        valid,
        weights_of("gate_up"),
        weights_of("down"),
        jax.new_ref(mass),
        jax.new_ref(counter),
    )
    chooses = ChoosePlan(
        tokens=tokens,
        experts=experts.experts,
        top_k=top_k,
        normalize=normalize,
        tiles=tile_count(tokens * top_k, experts.experts, config.rows),
        rows=config.rows,
    )
    phases = _Phases(
        workers=workers,
        logits=LogitsPlan(tokens=tokens, hidden=hidden, experts=experts.experts, eps=eps),
        choose=chooses,
        gate_up=gate_up,
        down=down,
    )
    between = _Between(
        h=jax.ShapeDtypeStruct((tokens, hidden), x.dtype),
        logits=jax.ShapeDtypeStruct((tokens, experts.experts), jnp.float32),
        gate_up=jax.ShapeDtypeStruct(
            (gate_up.parts, chooses.tiles, config.rows, gate_up.row_tiles * ROW_TILE), jnp.float32
        ),
        down=jax.ShapeDtypeStruct(
            (chooses.tiles, config.rows, down.row_tiles * ROW_TILE), jnp.float32
        ),
        out=jax.ShapeDtypeStruct((tokens, hidden), x.dtype),
    )
    run = _interpreted if interpreting() else _launched
    out = run(phases, arguments, between).out
    return out, jax.freeze(arguments.mass), jax.freeze(arguments.counter)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Phases:
    """The phases, each a function of references; hashable."""

    workers: Workers
    logits: LogitsPlan
    choose: ChoosePlan
    gate_up: MatmulPlan
    down: MatmulPlan

    def scratch(self) -> list[Any]:
        """Shared memory: of the rings (3), limbs, scale of rows, and what ``choose`` leaves."""
        rows = self.gate_up.input_rows
        columns = max(self.gate_up.part_columns, self.down.part_columns)
        return [
            *ring_scratch([self.gate_up, self.down], WARPGROUPS),
            plgpu.SMEM((WARPGROUPS, columns // BLOCK, 2 * rows, BLOCK), jnp.float8_e4m3fn),
            plgpu.SMEM((WARPGROUPS, rows, SCALE_WORDS), jnp.float32),
            *routed_scratch(self.choose),
        ]

    def write_logits(self, args: _Arguments, between: _Between) -> None:
        """x -> h, logits."""
        write_logits(
            self.logits, self.workers, args.x, args.norm, args.norm_layer[0], args.router,
            args.layer[0], between.h, between.logits,
        )  # fmt: skip

    def choose_experts(self, args: _Arguments, between: _Between, scratch: list[Any]) -> None:
        """logits -> tiles in shared memory."""
        choose(self.choose, between.logits, args.valid, Routed(*scratch[5:]))

    def multiply_gate_up(
        self, args: _Arguments, between: _Between, scratch: list[Any], before: Any, use: Any
    ) -> Any:
        """h -> sums of gate and up. Takes and returns the uses of the ring's barriers."""
        plan, routed = self.gate_up, Routed(*scratch[5:])
        limbs, scale = self._input(plan, scratch)

        def load(tile: Any, part: Any) -> None:
            load_rows(
                between.h, routed.assignment.at[tile], limbs, scale,
                divisor=self.choose.top_k,
                first=part * plan.part_columns, columns=plan.part_columns,
            )  # fmt: skip

        def store(tile: Any, part: Any, y: jax.Array, n: Any, factor: Any) -> None:
            store_sums(y, scale, factor, between.gate_up.at[part, tile], n * ROW_TILE)

        return self._over_stretches(
            plan, args, args.gate_up, scratch, limbs, before, load, store, use
        )

    def multiply_down(
        self, args: _Arguments, between: _Between, scratch: list[Any], before: Any, use: Any
    ) -> Any:
        """Sums of gate and up -> sums of the output; ``use`` as above."""
        plan, routed = self.down, Routed(*scratch[5:])
        limbs, scale = self._input(plan, scratch)

        def load(tile: Any, part: Any) -> None:
            del part
            load_gated(
                between.gate_up, routed.assignment.at[tile], limbs, scale,
                tile=tile, width=plan.columns,
            )  # fmt: skip

        def store(tile: Any, part: Any, y: jax.Array, n: Any, factor: Any) -> None:
            del part
            store_sums(y, scale, factor, between.down.at[tile], n * ROW_TILE)

        return self._over_stretches(plan, args, args.down, scratch, limbs, before, load, store, use)

    def add_up(self, args: _Arguments, between: _Between, scratch: list[Any]) -> None:
        """Sums of the output and x -> out; the mass."""
        routed = Routed(*scratch[5:])
        add_mass(self.choose, self.workers, routed, args.mass, args.layer[0])
        combine(self.workers, between.down, routed.place, routed.weights, args.x, between.out)

    def _input(self, plan: MatmulPlan, scratch: list[Any]) -> tuple[Any, Any]:
        limbs, scale = (ref.at[warpgroup()] for ref in scratch[3:5])
        return limbs.at[pl.ds(0, plan.part_columns // BLOCK)], scale

    def _over_stretches(
        self, plan: MatmulPlan, args: _Arguments, weights: Weights, scratch: list[Any],
        limbs: Any, before: Any, load: Any, store: Any, use: Any,
    ) -> Any:  # fmt: skip
        """This worker's stretches; ``before`` is called once, after the first fetches."""
        routed = Routed(*scratch[5:])
        first_owner = args.layer[0] * self.choose.experts
        start, end = self.workers.share(routed.used[0] * plan.parts * plan.row_tiles)
        first = start // plan.row_tiles

        ring = Ring(*(ref.at[warpgroup()] for ref in scratch[:3]))

        def do(index: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            at, use = carry
            tile, part = index // plan.parts, index % plan.parts
            n = at % plan.row_tiles
            count = jnp.minimum(plan.row_tiles - n, end - at)

            def between() -> None:
                pl.when(index == first)(before)
                load(tile, part)

            use = stream(
                plan,
                weights,
                ring,
                Stretch(first_owner + routed.expert[tile], part, n, count),
                limbs,
                use,
                between=between,
                finish=partial(store, tile, part),
            )
            return at + count, use

        last = jnp.where(end > start, (end - 1) // plan.row_tiles + 1, first)
        _, use = lax.fori_loop(first, last, do, (start, use))
        pl.when(end == start)(before)
        return use


def _launched(phases: _Phases, arguments: _Arguments, between: _Between) -> _Between:
    """All phases in one kernel."""
    flat, tree = jax.tree.flatten(arguments)

    def kernel(*refs: Any) -> None:
        args = jax.tree.unflatten(tree, refs[: len(flat)])
        outs = _Between(*refs[len(flat) : len(flat) + len(between)])
        scratch = list(refs[len(flat) + len(between) :])
        sync = partial(sync_grid, args.counter, phases.workers)
        pdl.wait()
        pdl.release()
        initialize(scratch[2])  # seen by all after the first barrier
        phases.write_logits(args, outs)
        sync()
        phases.choose_experts(args, outs, scratch)
        use = phases.multiply_gate_up(args, outs, scratch, lambda: None, jnp.int32(0))
        phases.multiply_down(args, outs, scratch, sync, use)
        sync()
        phases.add_up(args, outs, scratch)

    run = phases.workers.kernel(kernel, out_type=tuple(between), scratch_types=phases.scratch())
    return _Between(*run(*flat))


def _interpreted(phases: _Phases, arguments: _Arguments, between: _Between) -> _Between:
    """A kernel for each phase, since interpret mode has no barrier over the grid."""
    flat, tree = jax.tree.flatten(arguments)
    done: dict[str, jax.Array] = {}

    def run(names: tuple[str, ...], phase: Any, *, needs_tiles: bool) -> None:
        known = list(done)

        def kernel(*refs: Any) -> None:
            args = jax.tree.unflatten(tree, refs[: len(flat)])
            named = [*known, *names]
            outs = dict.fromkeys(_Between._fields)
            outs |= dict(zip(named, refs[len(flat) :], strict=False))
            scratch = list(refs[len(flat) + len(named) :])
            if needs_tiles:
                phases.choose_experts(args, _Between(**outs), scratch)
            phase(args, _Between(**outs), scratch)

        shapes = tuple(getattr(between, name) for name in names)
        call = phases.workers.kernel(kernel, out_type=shapes, scratch_types=phases.scratch())
        done.update(zip(names, call(*flat, *done.values()), strict=True))

    nothing = lambda: None  # noqa: E731
    run(("h", "logits"), lambda a, b, _: phases.write_logits(a, b), needs_tiles=False)
    run(
        ("gate_up",),
        lambda a, b, s: phases.multiply_gate_up(a, b, s, nothing, 0),
        needs_tiles=True,
    )
    run(("down",), lambda a, b, s: phases.multiply_down(a, b, s, nothing, 0), needs_tiles=True)
    run(("out",), phases.add_up, needs_tiles=True)
    return _Between(**done)
