"""Precision controller: routing statistics in, page movements out, all on the host.

At the end of every interval it takes the router mass that the device has gathered, lets the policy
plan, and hands the plan to migration. Statistics are read when their copy has arrived, a step or
two late, and no other interval ends before they were planned for, so that it never waits for the
device unless the policy says that it waits for copies.
"""

import dataclasses
from collections.abc import Callable
from typing import Final

import numpy as np

from dynaexq_jax.errors import InputError
from dynaexq_jax.hits import AboveBase, hit_mass
from dynaexq_jax.migration import Migration, MigrationCounters
from dynaexq_jax.policy import Hotness, Plan, Policy, PolicyInput
from dynaexq_jax.residency import Residency
from dynaexq_jax.router_stats import RouterStats
from dynaexq_jax.trees import has_arrived

FIRST_INTERVAL_TOKENS: Final = 32
"""Tokens after which the first interval ends: they already tell much of what a text is about."""
INTERVAL_TOKENS: Final = 2048
"""Tokens after which any other ends before its steps are over, as chunks of a prompt make it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """When the controller looks and how much it may start at once."""

    interval: int = 16
    """Steps (decode steps and chunks) between two looks at the routing, if they read few tokens.

    A few more if no plan has been made by then for what the last one saw."""
    max_transitions: int = 2048
    """Promotions of one plan."""

    def __post_init__(self) -> None:
        for name in ("interval", "max_transitions"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}")


@dataclasses.dataclass(kw_only=True)
class RoutingCounters:
    """Of all intervals read since the start."""

    intervals: int = 0
    mass: float = 0.0
    """Router mass of all layers and experts."""
    hit_mass: float = 0.0
    """What of it met an expert above the base (``hits``)."""


class Controller:
    """Owns hotness and ages; residency and migration own the rest."""

    def __init__(
        self,
        *,
        policy: Policy,
        residency: Residency,
        pages_of_level: tuple[int, ...],
        migration: Migration,
        benefit: np.ndarray,
        pinned: tuple[tuple[int, int], ...] = (),
        hotness: Hotness | None = None,
        record: Callable[[np.ndarray, int], None] | None = None,
        config: ControllerConfig,
    ) -> None:
        """``hotness`` of an earlier run is what the first plan goes by; None is no traffic yet.

        ``record`` is told the router mass float32 [L, E] and the tokens of every interval.
        """
        self.config = config
        self.plans = 0
        self.on_stats: Callable[[RouterStats], object] = lambda stats: None
        """Told of all statistics as they are handed over, on the device."""
        self.on_levels: Callable[[], object] = lambda: None
        """Told when the next step will read other levels than the last."""
        self.routing = RoutingCounters()
        self._policy = policy
        self._residency = residency
        self._pages_of_level = pages_of_level
        self._migration = migration
        self._benefit = benefit
        self._pinned = pinned
        shape = residency.levels().shape
        self._first_hotness = Hotness.cold(*shape) if hotness is None else hotness
        self._hotness = self._first_hotness
        self._record = record
        self._age = np.zeros(shape, np.int32)
        self._steps = 0
        self._begun, self._tokens = 0, 0
        """The step that this interval began with, and its tokens so far."""
        self._pending: RouterStats | None = None
        self._due = False
        """Whether traffic has been read that no plan has seen."""
        self._only_planned = False
        """Whether the last call of ``advance`` did."""
        self._levels_of_plan: np.ndarray | None = None
        """Those that the last plan since the beginning started from."""
        self._above_of_pending = np.zeros(shape)
        self._above = AboveBase(np.zeros(shape, np.bool_))
        self._levels = migration.levels
        """Those that the above knows of."""
        self._begin()

    @property
    def counters(self) -> MigrationCounters:
        """What was moved since the start."""
        return self._migration.counters

    @property
    def hotness(self) -> Hotness:
        """After the last interval whose statistics were read."""
        return self._hotness

    @property
    def transitions_in_flight(self) -> int:
        """Promotions that are planned or under way."""
        return self._migration.in_flight

    def pool_pages(self) -> dict[str, int]:
        """Pages of the pool by state, "used", "reserved" and "free"."""
        residency = self._residency
        return {
            "used": residency.used_pages,
            "reserved": residency.reserved_pages,
            "free": residency.free_pages,
        }

    def wants_stats(self, tokens: int) -> bool:
        """Called after each step, which read ``tokens``: whether to hand over the statistics now.

        An interval ends when its steps are over, or once it has enough tokens; not before the plan
        for the last one has been made, nor with the step beside it: the host has done enough then.
        """
        self._steps += 1
        self._tokens += tokens
        enough = INTERVAL_TOKENS if self._begun else FIRST_INTERVAL_TOKENS
        over = self._steps - self._begun >= self.config.interval or self._tokens >= enough
        busy = self._pending is not None or self._due or self._only_planned
        return over and not busy

    def give_stats(self, stats: RouterStats) -> None:
        """Takes statistics on the device, if ``wants_stats``; their copy to the host starts now."""
        assert self._pending is None
        above = self._above.end_interval(self._steps - self._begun)
        self._begun, self._tokens = self._steps, 0
        self.on_stats(stats)
        for array in stats:
            array.copy_to_host_async()
        self._pending, self._above_of_pending = stats, above

    def advance(self, *, during_chunk: bool = False) -> None:
        """Called between steps: reads statistics that have arrived and moves pages, or plans.

        All in one call would keep the tokens of a short step from their reader, so the plan is made
        in the next call, and its pages move in the one after. ``during_chunk``: once more, right
        after a chunk of a prompt was dispatched, when there is time for all, and for more pages.
        """
        waits = self._policy.waits_for_copies
        at_once = waits or during_chunk
        self._only_planned = self._due and not at_once
        if self._only_planned:
            self._plan_if_due()
            self._migration.publish()
        else:
            if self._pending is not None and (waits or has_arrived(self._pending)):
                self._digest()
            if at_once:
                self._plan_if_due()
            self._migration.advance(during_chunk=during_chunk)
        self._note_levels()

    def settle(self) -> None:
        """Waits until statistics are read and the plan that follows from them is carried out."""
        if self._pending is not None:
            self._digest()
        self._plan_if_due()
        self._migration.drain()
        self._migration.advance()  # demotions alone have nothing to wait for
        self._note_levels()

    def restart(self, policy: Policy | None = None) -> None:
        """Forgets the traffic since the start and begins anew, from every expert at the base.

        From there on ``policy`` decides, if one is given. Counters go on.
        """
        self.settle()
        if policy is not None:
            self._policy = policy
            self._migration.waits_for_copies = policy.waits_for_copies
        levels = self._residency.levels()
        base = np.full_like(levels, self._residency.base_level)
        self._migration.submit(Plan.between(levels, base, self._hotness.mean))
        self._hotness = self._first_hotness
        self._age = np.zeros_like(levels)
        self._levels_of_plan = None
        self._steps, self._begun, self._tokens = 0, 0, 0
        self._above = AboveBase(levels > self._residency.base_level)
        self._begin()

    @property
    def base_level(self) -> int:
        """Level of experts without pages of the pool."""
        return self._residency.base_level

    def levels(self) -> np.ndarray:
        """Level of each expert in the table that the next step reads: int32 [L, E]."""
        return self._migration.levels.copy()

    def _begin(self) -> None:
        """Carries out what the policy wants before any traffic, however much that is."""
        self._plan(max_transitions=max(self._residency.pool_pages, 1))
        self._migration.drain()
        self._migration.advance()
        self._note_levels()

    def _note_levels(self) -> None:
        """The next step reads other levels than the last if another table was shown."""
        if self._migration.levels is not self._levels:
            self._levels = self._migration.levels
            above = self._levels > self._residency.base_level
            self._above.change(self._steps - self._begun, above)
            self.on_levels()

    def _digest(self) -> None:
        assert self._pending is not None
        gathered, tokens = np.asarray(self._pending.mass), int(np.asarray(self._pending.tokens))
        self._pending = None
        mass = gathered.astype(np.float64)
        self.routing.intervals += 1
        self.routing.mass += float(mass.sum())
        self.routing.hit_mass += hit_mass(mass, self._above_of_pending)
        if self._record is not None:
            self._record(gathered, tokens)
        self._hotness = self._hotness.update(mass, tokens)
        self._due = True

    def _plan_if_due(self) -> None:
        """Plans for traffic that was read; promotions under way count as done."""
        if self._due:
            self._due = False
            self._plan(max_transitions=self.config.max_transitions)

    def _plan(self, *, max_transitions: int) -> None:
        levels = self._residency.planned_levels()
        if self._levels_of_plan is not None:
            self._age = (self._age + 1) * (levels == self._levels_of_plan)
        self._levels_of_plan = levels
        plan = self._policy.plan(
            PolicyInput(
                hotness=self._hotness.mean,
                levels=levels,
                age=self._age,
                pool_pages=self._residency.pool_pages,
                pages_of_level=self._pages_of_level,
                pinned=self._pinned,
                benefit=self._benefit,
                max_transitions=max_transitions,
            )
        )
        self.plans += 1
        self._migration.submit(plan)
