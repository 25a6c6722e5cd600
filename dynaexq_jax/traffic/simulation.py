"""What a policy would have done with recorded traffic, and what it would have been worth."""

import dataclasses
import itertools
import time

import numpy as np

from dynaexq_jax.errors import InputError
from dynaexq_jax.hits import hit_mass
from dynaexq_jax.policy import Hotness, Plan, Policy, replay
from dynaexq_jax.residency import Residency, pages_of_levels
from dynaexq_jax.traffic.trace import Trace, TraceHeader
from pallas_kernels.levels import Bits, level_of_bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ladder:
    """Base, highest level, and pages to promote with."""

    base_bits: Bits
    max_bits: Bits
    pool_pages: int

    @property
    def pages_of_level(self) -> tuple[int, ...]:
        """Pages above the base that an expert holds at each level, up to the highest."""
        return pages_of_levels(self.base_bits)[: level_of_bits(self.max_bits) + 1]

    @property
    def first_step_pages(self) -> int:
        """Pages that bring an expert above the base; 0 where the base is the highest level."""
        return min((pages for pages in self.pages_of_level if pages), default=0)

    def most_pages(self, experts: int) -> int:
        """Pages that bring so many experts from the base to the highest level."""
        return self.pages_of_level[-1] * experts


@dataclasses.dataclass(kw_only=True)
class Simulation:
    """Sums over a replay. Mass is the router's, and is a hit on an expert above the base."""

    intervals: int = 0
    plans: int = 0
    """One more than intervals: the first is made before any traffic."""
    tokens: int = 0
    promotions: int = 0
    demotions: int = 0
    pages_moved: int = 0
    mass: float = 0.0
    hit_mass: float = 0.0
    best_mass: float = 0.0
    """Hits of the best map for each interval, known beforehand and reached without a copy."""
    seconds: float = 0.0
    """Of the policy and the page table."""

    @property
    def hit_share(self) -> float:
        """Hits of all mass; 0 where there is none."""
        return self.hit_mass / self.mass if self.mass else 0.0

    @property
    def of_best(self) -> float | None:
        """Hits of those of the best maps; None where these have none."""
        return self.hit_mass / self.best_mass if self.best_mass else None

    @property
    def plans_per_s(self) -> float:
        """Plans a second."""
        return self.plans / self.seconds


def simulate(
    trace: Trace,
    policy: Policy,
    *,
    ladder: Ladder,
    interval: int,
    hotness: Hotness | None = None,
) -> Simulation:
    """Replays a trace; each plan is carried out at once, before the next interval.

    ``interval`` in steps, a multiple of the recorded one. ``hotness`` of an earlier run is what the
    first plan goes by. Raises InputError for what the trace does not hold.
    """
    header = trace.header
    _check(header, ladder, interval)
    layers, experts = header.model.layers, header.model.experts
    residency = Residency(
        layers=layers, experts=experts, base_bits=ladder.base_bits, pool_pages=ladder.pool_pages
    )
    given, served = itertools.tee(trace.intervals(interval // header.interval))
    steps = replay(
        policy,
        given,
        residency=residency,
        hotness=hotness or Hotness.cold(layers, experts),
        benefit=header.benefit[:, : len(ladder.pages_of_level) - 1],
        max_transitions=header.max_transitions,
        pinned=header.pinned,
    )
    promotable = min(ladder.pool_pages // max(ladder.first_step_pages, 1), layers * experts)
    result = Simulation()
    for traffic in itertools.chain([None], served):
        started = time.perf_counter()
        step = next(steps)
        result.seconds += time.perf_counter() - started
        _count_changes(result, step.plan, ladder.pages_of_level)
        if traffic is not None:
            _count_traffic(result, *traffic, step.levels > residency.base_level, promotable)
    return result


def _check(header: TraceHeader, ladder: Ladder, interval: int) -> None:
    if interval < 1 or interval % header.interval:
        raise InputError(
            f"--interval must be a multiple of the {header.interval} steps that each record of the "
            f"trace holds, got {interval}"
        )
    for name, bits in (("--base-bits", ladder.base_bits), ("--max-bits", ladder.max_bits)):
        if bits not in header.bits:
            raise InputError(f"{name} must be one of the trace's {header.bits}, got {bits}")
    if ladder.max_bits < ladder.base_bits:
        raise InputError(
            f"--max-bits must be at least the base's {ladder.base_bits}, got {ladder.max_bits}"
        )
    most = ladder.most_pages(header.model.layers * header.model.experts)
    if not 0 <= ladder.pool_pages <= most:
        raise InputError(
            f"--pages must be in 0..{most}, which bring every expert from {ladder.base_bits} to "
            f"{ladder.max_bits} bits, got {ladder.pool_pages}"
        )


def _count_changes(result: Simulation, plan: Plan, pages_of_level: tuple[int, ...]) -> None:
    result.plans += 1
    result.promotions += len(plan.promotions)
    result.demotions += len(plan.demotions)
    held, up = np.array(pages_of_level), plan.promotions
    result.pages_moved += int((held[up.to_levels] - held[up.from_levels]).sum())


def _count_traffic(
    result: Simulation, mass: np.ndarray, tokens: int, promoted: np.ndarray, promotable: int
) -> None:
    result.intervals += 1
    result.tokens += tokens
    result.mass += float(mass.sum(dtype=np.float64))
    result.hit_mass += hit_mass(mass, promoted)
    result.best_mass += _largest(mass, promotable)


def _largest(mass: np.ndarray, count: int) -> float:
    """Sum of the ``count`` largest."""
    if not count:
        return 0.0
    return float(np.partition(mass, mass.size - count, axis=None)[-count:].sum(dtype=np.float64))
