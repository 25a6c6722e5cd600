"""What a policy is given and what it answers.

Axes: L layers with experts, E experts, S steps of the ladder; step i leads from level i to i + 1.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple, Protocol, Self

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PolicyInput:
    """Everything that a plan depends on. Raises ValueError for parts that contradict each other."""

    hotness: np.ndarray
    """float [L, E]: router mass a token."""
    levels: np.ndarray
    """int [L, E]: level of each expert, counting promotions in flight as done."""
    age: np.ndarray
    """int [L, E]: plans since the expert's level last changed."""
    pool_pages: int
    pages_of_level: tuple[int, ...]
    """Pages above the base that an expert holds at each level; 0 for levels that the base covers.

    Its length says how high the ladder goes: (0, 1, 3) is a base of 2 bits and levels up to 8,
    (0, 1) the same where 8 bits are not to be used.
    """
    benefit: np.ndarray
    """float [S], [L, S] or [L, S, E]: gain of each step for a unit of hotness, S = levels - 1."""
    pinned: tuple[tuple[int, int], ...] = ()
    """(layer, expert) of those that never lose precision."""
    max_transitions: int
    """Promotions that a plan may hold at most."""

    def __post_init__(self) -> None:
        layers, experts = shape = np.shape(self.levels)
        for name in ("hotness", "age"):
            if np.shape(getattr(self, name)) != shape:
                got = np.shape(getattr(self, name))
                raise ValueError(f"{name} must have the shape of levels, {shape}, got {got}")
        steps = self.max_level
        if np.shape(self.benefit) not in ((steps,), (layers, steps), (layers, steps, experts)):
            raise ValueError(
                f"benefit must have shape ({steps},), ({layers}, {steps}) or ({layers}, {steps}, "
                f"{experts}) for pages_of_level {self.pages_of_level}, got {np.shape(self.benefit)}"
            )
        for name in ("hotness", "benefit"):
            values = np.asarray(getattr(self, name))
            if not (values.min(initial=0) >= 0 and values.max(initial=0) < np.inf):
                raise ValueError(f"{name} must be finite and not negative")
        costs = self.step_pages.tolist()[self.base_level :]
        if self.pages_of_level[0] != 0 or min(costs, default=1) < 1 or costs != sorted(costs):
            raise ValueError(
                "pages_of_level must start with 0 and no step above the base may be smaller than "
                f"the one before, got {self.pages_of_level}"
            )
        if self.levels.min() < self.base_level or self.levels.max() > self.max_level:
            raise ValueError(f"levels must be in {self.base_level}..{self.max_level}")
        held = self.pages_held(self.levels)
        if held > self.pool_pages:
            raise ValueError(f"the levels need {held} pages, the pool has {self.pool_pages}")
        for layer, expert in self.pinned:
            if not (0 <= layer < layers and 0 <= expert < experts):
                raise ValueError(f"no expert {expert} of layer {layer} to pin: levels are {shape}")
        if self.max_transitions < 0:
            raise ValueError(f"max_transitions cannot be negative, got {self.max_transitions}")

    @property
    def max_level(self) -> int:
        """The highest level that may be wanted."""
        return len(self.pages_of_level) - 1

    @functools.cached_property
    def base_level(self) -> int:
        """The level that needs no page of the pool; none below it is ever wanted."""
        return self.pages_of_level.count(0) - 1

    @functools.cached_property
    def step_pages(self) -> np.ndarray:
        """int [S]: pages that each step costs; 0 below the base."""
        return np.subtract(self.pages_of_level[1:], self.pages_of_level[:-1])

    def pages_held(self, levels: np.ndarray) -> int:
        """Pages of the pool that ``levels`` [L, E] need."""
        held = 0
        for step, pages in enumerate(self.step_pages.tolist()):
            held += pages * int(np.count_nonzero(levels > step))
        return held


class Change(NamedTuple):
    """One expert's way to another level."""

    layer: int
    expert: int
    from_level: int
    to_level: int


@dataclasses.dataclass(frozen=True, eq=False)
class Changes:
    """Ways of N experts to other levels, in order; sliced and iterated as a sequence of them."""

    layers: np.ndarray
    """int [N]"""
    experts: np.ndarray
    """int [N]"""
    from_levels: np.ndarray
    """int [N]"""
    to_levels: np.ndarray
    """int [N]"""

    @classmethod
    def none(cls) -> Self:
        """No changes."""
        return cls(*(np.zeros(0, np.intp) for _ in range(4)))

    def __len__(self) -> int:
        return self.layers.size

    def __iter__(self) -> Iterator[Change]:
        return map(Change, *(field.tolist() for field in self._fields()))

    def __getitem__(self, which: slice | np.ndarray) -> Self:
        return type(self)(*(field[which] for field in self._fields()))

    def _fields(self) -> tuple[np.ndarray, ...]:
        return self.layers, self.experts, self.from_levels, self.to_levels


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What a policy wants. Promotions may need the pages that demotions free."""

    wanted: np.ndarray
    """int32 [L, E]: levels once the whole plan is carried out."""
    demotions: Changes
    """By value, ascending: who is missed least gives its pages first."""
    promotions: Changes
    """By value, descending."""

    @classmethod
    def unchanged(cls, levels: np.ndarray) -> Self:
        """The plan that leaves everybody at ``levels``, int [L, E]."""
        return cls(
            wanted=levels.astype(np.int32), demotions=Changes.none(), promotions=Changes.none()
        )

    @classmethod
    def between(cls, levels: np.ndarray, wanted: np.ndarray, value: np.ndarray) -> Self:
        """The plan that leads from ``levels`` to ``wanted``, both int [L, E].

        ``value`` float [L, E] orders both kinds, ties by (layer, expert).
        """

        def places(which: np.ndarray, rank: np.ndarray) -> np.ndarray:
            found = np.flatnonzero(which)
            return found[np.argsort(rank.flat[found], kind="stable")]

        demoted, promoted = places(wanted < levels, value), places(wanted > levels, -value)
        return cls.of(levels, wanted, demoted=demoted, promoted=promoted)

    @classmethod
    def of(
        cls, levels: np.ndarray, wanted: np.ndarray, *, demoted: np.ndarray, promoted: np.ndarray
    ) -> Self:
        """The plan that leads from ``levels`` to ``wanted``, both int [L, E].

        ``demoted`` and ``promoted`` are the places that change, int [N], in the plan's order.
        """

        def changes(places: np.ndarray) -> Changes:
            layers, experts = np.unravel_index(places, levels.shape)
            return Changes(layers, experts, levels.take(places), wanted.take(places))

        return cls(
            wanted=wanted.astype(np.int32),
            demotions=changes(demoted),
            promotions=changes(promoted),
        )


class Policy(Protocol):
    """Decides levels; a pure function of its input."""

    @property
    def name(self) -> str:
        """As the command line spells it."""

    @property
    def waits_for_copies(self) -> bool:
        """Whether the engine stops until the copies of a plan have arrived."""

    def plan(self, given: PolicyInput, /) -> Plan:
        """The levels wanted now, never more pages than the pool has."""
