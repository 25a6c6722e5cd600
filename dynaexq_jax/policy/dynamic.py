"""The policy that follows the traffic: greedy by value, with hysteresis.

A step's value is hotness x benefit for each page that it costs. Every layer has a share of the
pool and spends it on its most valuable steps, so values are only ever compared inside a layer.
"""

import dataclasses

import numpy as np

from dynaexq_jax.policy.interface import Plan, PolicyInput
from dynaexq_jax.policy.ladder import plan_towards, raise_pinned, steps_held
from dynaexq_jax.policy.shares import even_shares


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicConfig:
    """How easily an expert that holds pages loses them. Raises ValueError if out of range."""

    margin: float = 0.2
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
        held = steps_held(given, given.levels)
        protected = steps_held(given, self._protected_levels(given))
        value = _step_values(given)
        rank = np.where(protected, np.inf, np.where(held, value * (1 + self.config.margin), value))
        wanted = held | protected | (value > 0)
        above = np.s_[:, given.base_level :]
        taken = _fill(
            given,
            rank[above],
            held=held[above],
            wanted=wanted[above],
            protected=protected[above],
        )
        target = given.base_level + taken.sum(axis=1)
        return plan_towards(given, target, rank)

    def _protected_levels(self, given: PolicyInput) -> np.ndarray:
        """Levels that must not be lost: int [L, E], base where nothing is protected."""
        keeps = (given.age < self.config.dwell) & (given.levels > given.base_level)
        for place in given.pinned:
            keeps[place] = True
        return raise_pinned(given, np.where(keeps, given.levels, given.base_level))


def _step_values(given: PolicyInput) -> np.ndarray:
    """Hotness x benefit for each page: float [L, S, E], never rising with the step.

    A step that is worth more than the one below it counts as much as that one, because it cannot
    be had without; a good ladder has none.
    """
    above = slice(given.base_level, None)
    benefit = np.broadcast_to(given.benefit, (given.levels.shape[0], given.max_level))
    per_page = np.minimum.accumulate(benefit[:, above] / given.step_pages[above], axis=1)
    value = np.full((*benefit.shape, given.levels.shape[1]), np.inf)  # the base is held anyway
    value[:, above] = per_page[:, :, None] * given.hotness[:, None, :]
    return value


def _fill(
    given: PolicyInput,
    rank: np.ndarray,
    *,
    held: np.ndarray,
    wanted: np.ndarray,
    protected: np.ndarray,
) -> np.ndarray:
    """Takes steps in the order of ``rank`` while each layer's share lasts: bool [L, S, E].

    All arrays are of the steps above the base. Of equal rank, the step that is held comes first,
    then the lower step, then the lower expert; what is not wanted ranks behind all that is.
    """
    layers, steps, experts = rank.shape
    step_pages = given.step_pages[given.base_level :]
    number_wanted = np.count_nonzero(wanted, axis=2)
    # Shares are multiples of what all costs are multiples of: 2 pages where 8 follows on 4 bits.
    unit = int(np.gcd.reduce(step_pages))
    shares = unit * even_shares(
        given.pool_pages // unit,
        np.count_nonzero(protected, axis=2) @ step_pages // unit,
        number_wanted @ step_pages // unit,
    )
    if _stays(given, rank, held=held, others=wanted & ~held, shares=shares):
        return held
    order = np.lexsort((~held.reshape(layers, -1), -rank.reshape(layers, -1)))
    sorted_cost = np.repeat(step_pages, experts)[order]
    sorted_wanted = np.arange(steps * experts) < number_wanted.sum(axis=1)[:, None]
    sorted_taken = sorted_wanted & (np.cumsum(sorted_cost, axis=1) <= shares[:, None])
    place = order + np.arange(0, held.size, steps * experts)[:, None]  # in a flat [L, S, E]
    room = given.pool_pages - int(sorted_cost[sorted_taken].sum())
    if room:
        sorted_held = held.ravel()[place]
        _hand_round(
            room, cost=sorted_cost, held=sorted_held, wanted=sorted_wanted, taken=sorted_taken
        )
    taken = np.zeros(held.size, np.bool_)
    taken[place[sorted_taken]] = True
    return taken.reshape(held.shape)


def _stays(
    given: PolicyInput,
    rank: np.ndarray,
    *,
    held: np.ndarray,
    others: np.ndarray,
    shares: np.ndarray,
) -> bool:
    """Whether ``_fill`` would take exactly what is held; tells without sorting.

    So it is where all that is held ranks before the ``others`` that are wanted, and neither a
    layer's share nor the pages that are free pay for the next of them. May be False nevertheless.
    """
    layers, _, experts = rank.shape
    step_pages = given.step_pages[given.base_level :]
    rank_of_others = np.where(others, rank, -1).reshape(layers, -1)
    first = rank_of_others.argmax(axis=1)
    first_rank = rank_of_others[np.arange(layers), first]
    last_held_rank = np.where(held, rank, np.inf).min(axis=(1, 2))
    if np.any(first_rank > last_held_rank):
        return False
    pages = np.count_nonzero(held, axis=2) @ step_pages
    pays = pages + step_pages[first // experts] <= shares
    affordable = step_pages <= given.pool_pages - pages.sum()
    return not (np.any(pays & (first_rank >= 0)) or np.any(others[:, affordable]))


def _hand_round(
    room: int, *, cost: np.ndarray, held: np.ndarray, wanted: np.ndarray, taken: np.ndarray
) -> None:
    """Gives ``room`` pages, left over where the next step costs more, to steps that they pay for.

    It goes round the layers in order, each with its next step, first for steps that are held.
    All arrays are [L, S x E] in the layers' own order; ``taken`` is changed.
    """
    layers, steps = cost.shape
    rounds = np.arange(steps) - np.count_nonzero(taken, axis=1)[:, None]
    queue = (rounds + steps * ~held) * layers + np.arange(layers)[:, None]
    end = queue.max() + 1
    queue[taken | ~wanted] = end
    while True:
        queue[cost > room] = end
        first = queue.argmin()
        if queue.flat[first] == end:
            return
        taken.flat[first] = True
        queue.flat[first] = end
        room -= int(cost.flat[first])
