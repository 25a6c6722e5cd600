"""The policy that follows the traffic: greedy by value, with hysteresis.

A step's value is hotness x benefit for each page that it costs. The pool is spent on the most
valuable steps of all layers.
"""

import dataclasses

import numpy as np

from dynaexq_jax.policy.fill import Steps, fill
from dynaexq_jax.policy.interface import Plan, PolicyInput
from dynaexq_jax.policy.ladder import plan_towards, raise_pinned, steps_held
from dynaexq_jax.policy.value import step_values


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicConfig:
    """How easily an expert that holds pages loses them. Raises ValueError if out of range."""

    margin: float = 0.3
    """A challenger must be worth more than (1 + margin) times what it displaces."""
    dwell: int = 2
    """Plans for which an expert keeps its level after a change."""

    def __post_init__(self) -> None:
        for name in ("margin", "dwell"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} cannot be negative, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dynamic:
    """Precision follows hotness."""

    name: str = "dynamic"
    waits_for_copies: bool = False
    config: DynamicConfig = DynamicConfig()

    def plan(self, given: PolicyInput, /) -> Plan:
        """The greedy plan; see docs/policy.md."""
        if given.max_level == given.base_level:
            return Plan.unchanged(given.levels)
        target, rank = greedy_target(given, self.config)
        return plan_towards(given, target, rank)


def greedy_target(given: PolicyInput, config: DynamicConfig) -> tuple[np.ndarray, np.ndarray]:
    """Levels wanted, int [L, E], and what each step is worth, float [L, S, E].

    There must be a step above the base.
    """
    held = steps_held(given, given.levels)
    value = step_values(given)
    rank = np.where(held, value * (1 + config.margin), value)
    young = given.age < config.dwell
    rank[held & young[:, None, :]] = np.inf
    if given.pinned:
        rank[steps_held(given, _pinned_levels(given, young))] = np.inf
    above = np.s_[:, given.base_level :]
    steps = Steps(rank[above], held[above], given.step_pages[given.base_level :])
    taken = fill(steps, given.pool_pages)
    return taken.sum(axis=1, dtype=given.levels.dtype, initial=given.base_level), rank


def _pinned_levels(given: PolicyInput, young: np.ndarray) -> np.ndarray:
    """Levels of those that must not lose them, pinned experts raised: int [L, E], else base."""
    keeps = young.copy()
    for place in given.pinned:
        keeps[place] = True
    return raise_pinned(given, np.where(keeps, given.levels, given.base_level))
