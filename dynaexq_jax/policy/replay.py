"""Runs a policy on recorded traffic, with neither model nor device."""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from dynaexq_jax.policy.hotness import Hotness
from dynaexq_jax.policy.interface import Plan, Policy, PolicyInput
from dynaexq_jax.residency import Residency


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ReplayStep:
    """One plan of a replay."""

    levels: np.ndarray
    """int32 [L, E]: levels while the interval's traffic was served."""
    plan: Plan
    """What the policy wanted after it."""


def replay(
    policy: Policy,
    trace: Iterable[tuple[np.ndarray, int]],
    *,
    residency: Residency,
    hotness: Hotness,
    benefit: np.ndarray,
    max_transitions: int,
    pinned: tuple[tuple[int, int], ...] = (),
) -> Iterator[ReplayStep]:
    """Plays a trace of (router mass [L, E], tokens) intervals; every plan is carried out at once.

    The first step is the beginning: as in the controller, a plan before any traffic, as large as
    the pool. ``benefit`` [S], [L, S] or [L, S, E] says how many levels there are. ``residency`` is
    changed as the engine would change it, so its errors are the policy's bugs.
    """
    age = np.zeros(residency.levels().shape, np.int32)
    steps = benefit.shape[min(benefit.ndim - 1, 1)]
    pages_of_level = residency.pages_of_level[: steps + 1]

    def step(max_transitions: int) -> ReplayStep:
        nonlocal age
        levels = residency.levels()
        plan = policy.plan(
            PolicyInput(
                hotness=hotness.mean,
                levels=levels,
                age=age,
                pool_pages=residency.pool_pages,
                pages_of_level=pages_of_level,
                benefit=benefit,
                pinned=pinned,
                max_transitions=max_transitions,
            )
        )
        down, up = plan.demotions, plan.promotions
        residency.demote(down.layers, down.experts, down.to_levels)
        residency.commit(residency.reserve(up.layers, up.experts, up.to_levels))
        age = np.where(plan.wanted == levels, age + 1, 0)
        return ReplayStep(levels=levels, plan=plan)

    yield step(max(residency.pool_pages, 1))
    for mass, tokens in trace:
        hotness = hotness.update(mass, tokens)
        yield step(max_transitions)
