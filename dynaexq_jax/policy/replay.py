"""Runs a policy on recorded traffic, with neither model nor device."""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from dynaexq_jax.policy.hotness import Hotness
from dynaexq_jax.policy.interface import Plan, Policy, PolicyInput
from dynaexq_jax.residency import Residency


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ReplayStep:
    """One interval of a replay."""

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

    ``residency`` is changed as the engine would change it, so its errors are the policy's bugs.
    """
    age = np.zeros(residency.levels().shape, np.int32)
    for mass, tokens in trace:
        levels = residency.levels()
        hotness = hotness.update(mass, tokens)
        plan = policy.plan(
            PolicyInput(
                hotness=hotness.mean,
                levels=levels,
                age=age,
                pool_pages=residency.pool_pages,
                pages_of_level=residency.pages_of_level,
                benefit=benefit,
                pinned=pinned,
                max_transitions=max_transitions,
            )
        )
        for change in plan.demotions:
            residency.demote(change.layer, change.expert, change.to_level)
        for change in plan.promotions:
            residency.commit(residency.reserve(change.layer, change.expert, change.to_level))
        age = np.where(plan.wanted == levels, age + 1, 0)
        yield ReplayStep(levels=levels, plan=plan)
