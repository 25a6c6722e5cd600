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
    protected = steps_held(given, _protected_levels(given, config.dwell))
    value = step_values(given)
    rank = np.where(protected, np.inf, np.where(held, value * (1 + config.margin), value))
    wanted = held | protected | (value > 0)
    above = np.s_[:, given.base_level :]
    pages = given.step_pages[given.base_level :]
    steps = Steps(rank=rank[above], held=held[above], wanted=wanted[above], pages=pages)
    return given.base_level + fill(steps, given.pool_pages).sum(axis=1), rank


def _protected_levels(given: PolicyInput, dwell: int) -> np.ndarray:
    """Levels that must not be lost: int [L, E], base where nothing is protected."""
    keeps = (given.age < dwell) & (given.levels > given.base_level)
    for place in given.pinned:
        keeps[place] = True
    return raise_pinned(given, np.where(keeps, given.levels, given.base_level))
