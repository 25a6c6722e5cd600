"""The policy that fills the pool once, whatever the traffic, and never moves again."""

import dataclasses

import numpy as np

from dynaexq_jax.policy.interface import Plan, PolicyInput
from dynaexq_jax.policy.ladder import plan_towards, raise_pinned


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticHigh:
    """Baseline: what the same pool gives when nothing follows the traffic.

    Breadth first: the lowest step for as many experts as the pool has pages for, then the next.
    Expert 0 of every layer comes before expert 1 of any, so that layers get the same, to one.
    """

    name: str = "static-high"
    waits_for_copies: bool = False

    def plan(self, given: PolicyInput, /) -> Plan:
        """What is still missing of the map; demotes nothing. Pinned experts come first."""
        layers, experts = given.levels.shape
        by_expert = raise_pinned(given, given.levels).T.reshape(-1)  # expert-major: interleaved
        room = given.pool_pages - given.pages_held(by_expert)
        for step in range(given.base_level, given.max_level):
            cost = int(given.step_pages[step])
            taken = np.flatnonzero(by_expert == step)[: room // cost]
            by_expert[taken] = step + 1
            room -= cost * taken.size
        target = by_expert.reshape(experts, layers).T

        first_come = -np.arange(experts * layers, dtype=np.float64).reshape(experts, layers).T
        for layer, expert in given.pinned:
            first_come[layer, expert] = np.inf
        value = np.repeat(first_come[:, None, :], given.max_level, axis=1)
        return plan_towards(given, target, value)
