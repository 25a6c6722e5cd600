"""The phases of the MoE block's kernel, each a function of references."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.expert_ffn.mosaic.input_rows import fetch_rows, load_gated, make_limbs
from pallas_kernels.expert_ffn.mosaic.limbs import SCALE_WORDS
from pallas_kernels.expert_ffn.mosaic.stream import (
    MatmulPlan,
    Ring,
    Stretch,
    Weights,
    ring_scratch,
    stream,
)
from pallas_kernels.expert_ffn.mosaic.sums import store_sums
from pallas_kernels.expert_ffn.mosaic.wgmma_step import BLOCK
from pallas_kernels.layout import ROW_TILE
from pallas_kernels.moe_layer.mosaic.choose import choose
from pallas_kernels.moe_layer.mosaic.combine import combine
from pallas_kernels.moe_layer.mosaic.deal import Line
from pallas_kernels.moe_layer.mosaic.logits import LogitsPlan, write_logits
from pallas_kernels.moe_layer.mosaic.mass import add_mass
from pallas_kernels.moe_layer.mosaic.routed import ChoosePlan, Routed, routed_scratch
from pallas_kernels.mosaic import counts
from pallas_kernels.mosaic.presence import MISSING
from pallas_kernels.mosaic.workers import WARPGROUPS, Workers, quotient, warpgroup


class Arguments(NamedTuple):
    """Arrays in global memory."""

    x: Any
    norm: Any
    norm_layer: Any
    """int32 []: row of ``norm``."""
    router: Any
    layer: Any
    """int32 []: of all else; both numbers are [1] outside of the kernel."""
    valid: Any
    gate_up: Weights
    down: Weights
    table: Any
    """int32 [R L E], or None: everyone is at the base."""
    mass: Any
    """float32 [L, E], a reference: added to in place."""
    counter: Any
    """int32 [1, 1], a reference: of the barrier over the grid (``counter_ref``)."""


class Between(NamedTuple):
    """What phases leave in global memory for the next."""

    h: Any
    logits: Any
    gate_up: Any
    counts: Any
    """Of the sums of gate_up that are there, for each tile; and of those who have stored h."""
    down: Any
    out: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phases:
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

    @property
    def sums_tell(self) -> bool:
        """Whether sums of gate_up say themselves that they are there, instead of their counts.

        That is sooner, but all of them must be cleared: of one token they are few.
        """
        return self.choose.tokens == 1

    def prepare(self, between: Between) -> None:
        """Nothing is there, counts of nothing; ahead of the barrier ahead of the logits.

        The last to wait for either were ``choose`` and ``down`` of the layer before, a barrier over
        the grid ago or a kernel; who stores and counts is behind the next barrier.
        """
        counts.fill(between.logits, MISSING, self.workers)
        counts.fill(between.counts, 0, self.workers)
        if self.sums_tell:
            counts.fill(between.gate_up, MISSING, self.workers)

    def write_logits(self, args: Arguments, between: Between, scratch: list[Any]) -> None:
        """x -> h, logits."""
        write_logits(
            self.logits, self.workers, args.x, args.norm, args.norm_layer, args.router, args.layer,
            between.h, self._count_of_h(between), between.logits, scratch[4].at[warpgroup()],
        )  # fmt: skip

    def choose_experts(self, args: Arguments, between: Between, scratch: list[Any]) -> None:
        """logits -> tiles in shared memory; and h is there."""
        choose(
            self.choose, between.logits, args.valid, self._count_of_h(between),
            self.logits.sharing(self.workers.count), args.table, args.layer, Routed(*scratch[5:]),
        )  # fmt: skip

    def _count_of_h(self, between: Between) -> Any:
        return between.counts.at[self.choose.tiles]

    def multiply_gate_up(
        self, args: Arguments, between: Between, scratch: list[Any], use: Any
    ) -> Any:
        """h -> sums of gate and up, and their counts if they need them.

        Takes and returns the uses of the ring's barriers.
        """
        plan, routed = self.gate_up, Routed(*scratch[5:])
        limbs, scale = self._input(plan, scratch)

        def begin(tile: Any, part: Any) -> None:
            """Before the pages, behind whose copies it would wait."""
            fetch_rows(
                between.h, routed.assignment.at[tile], limbs, scale,
                most=self.choose.most_rows, divisor=self.choose.top_k,
                first=part * plan.part_columns,
            )  # fmt: skip

        def load(tile: Any, part: Any) -> None:
            del part
            make_limbs(routed.assignment.at[tile], limbs, scale, most=self.choose.most_rows)

        def store(tile: Any, part: Any, y: jax.Array, n: Any, factor: Any) -> None:
            store_sums(
                y, scale, routed.assignment.at[tile], factor, between.gate_up.at[tile],
                most=self.choose.most_rows, first=(part * plan.row_tiles + n) * ROW_TILE,
                tell=self.sums_tell,
            )  # fmt: skip

        use = self._over_stretches(
            plan, args, args.gate_up, scratch, limbs, _nothing, _nothing, begin, load, store, use
        )
        if not self.sums_tell:
            counts.add(between.counts, *self._share(plan, routed), plan.items)
        return use

    def multiply_down(
        self, args: Arguments, between: Between, scratch: list[Any], meanwhile: Any, use: Any
    ) -> Any:
        """Sums of gate and up -> sums of the output; ``use`` as above.

        ``meanwhile`` is called once, after the first fetches, ahead of the wait for the sums.
        """
        plan, routed = self.down, Routed(*scratch[5:])
        limbs, scale = self._input(plan, scratch)

        def ready() -> None:
            if self.sums_tell:
                return
            share = self._share(plan, routed)
            counts.wait(between.counts, *share, plan.items, self.gate_up.items)

        def begin(tile: Any, part: Any) -> None:
            """The sums may not be there yet."""

        def load(tile: Any, part: Any) -> None:
            del part  # there is only one
            load_gated(
                between.gate_up, routed.assignment.at[tile], limbs, scale,
                most=self.choose.most_rows, parts=self.gate_up.parts, tile=tile,
                width=plan.columns, wait=self.sums_tell,
            )  # fmt: skip

        def store(tile: Any, part: Any, y: jax.Array, n: Any, factor: Any) -> None:
            del part
            store_sums(
                y, scale, routed.assignment.at[tile], factor, between.down.at[tile],
                most=self.choose.most_rows, first=n * ROW_TILE, tell=False,
            )  # fmt: skip

        return self._over_stretches(
            plan, args, args.down, scratch, limbs, meanwhile, ready, begin, load, store, use
        )

    def add_up(self, args: Arguments, between: Between, scratch: list[Any]) -> None:
        """Sums of the output and x -> out; the mass."""
        routed = Routed(*scratch[5:])
        add_mass(self.choose, self.workers, routed, args.mass, args.layer)
        combine(self.workers, between.down, routed.place, routed.weights, args.x, between.out)

    def _input(self, plan: MatmulPlan, scratch: list[Any]) -> tuple[Any, Any]:
        limbs, scale = (ref.at[warpgroup()] for ref in scratch[3:5])
        return limbs.at[pl.ds(0, plan.part_columns // BLOCK)], scale

    def _share(self, plan: MatmulPlan, routed: Routed) -> tuple[Any, Any]:
        """This worker's items [start, end): row tiles of parts of tiles."""
        if self.choose.tokens == 1:
            return self.workers.share(routed.used[0] * plan.items)
        line = Line.of(plan)
        if (deal := self.choose.deal) is None:
            start, end = self.workers.share(routed.used[0] * line.tile)
        else:
            start, end = (routed.dealt[deal.bound(line, warpgroup() + i)] for i in range(2))
        return line.items_before(start), line.items_before(end)

    def _pages(self, routed: Routed, expert: Any) -> tuple[Any, ...]:
        """Of each rung above the base the pool page of an expert, or -1."""
        if (deal := self.choose.deal) is None:
            return ()
        return tuple(routed.dealt[deal.page(rung, expert)] for rung in range(deal.rungs))

    def _over_stretches(
        self, plan: MatmulPlan, args: Arguments, weights: Weights, scratch: list[Any],
        limbs: Any, meanwhile: Any, ready: Any, begin: Any, load: Any, store: Any, use: Any,
    ) -> Any:  # fmt: skip
        """This worker's stretches; ``meanwhile`` is called once, after the first fetches.

        Behind it ``ready`` is, if there is a stretch.
        """
        routed = Routed(*scratch[5:])
        first_owner = args.layer * self.choose.experts
        start, end = self._share(plan, routed)
        first = quotient(start, plan.row_tiles)
        lines = scratch[0].at[pl.ds(warpgroup() * plan.ring_lines, plan.ring_lines)]
        ring = Ring(lines, *(ref.at[warpgroup()] for ref in scratch[1:3]))

        def do(index: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            at, use = carry
            tile = quotient(index, plan.parts)
            part, n = index - tile * plan.parts, at - index * plan.row_tiles
            count = jnp.minimum(plan.row_tiles - n, end - at)
            expert = routed.expert[tile]

            def between() -> None:
                @pl.when(index == first)
                def _() -> None:
                    meanwhile()
                    ready()

                load(tile, part)

            use = stream(
                plan,
                weights,
                ring,
                Stretch(first_owner + expert, part, n, count, self._pages(routed, expert)),
                limbs,
                use,
                before=partial(begin, tile, part),
                between=between,
                finish=partial(store, tile, part),
            )
            return at + count, use

        last = jnp.where(end > start, quotient(end - 1, plan.row_tiles) + 1, first)
        _, use = lax.fori_loop(first, last, do, (start, use))
        pl.when(end == start)(meanwhile)
        return use


def _nothing() -> None: ...
