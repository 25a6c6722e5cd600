"""Hotness: how much of the router's probability goes to each expert, averaged over time."""

import dataclasses
from typing import Final, Self

import numpy as np

DEFAULT_DECAY: Final = 0.8
"""Weight of the past against one new interval: an average over about five intervals."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Hotness:
    """Moving average of the router mass a token, by expert. A value: ``update`` gives a new one.

    Raises ValueError for a decay outside [0, 1).
    """

    mean: np.ndarray
    """float64 [L, E]: mass a token; zeros before the first interval."""
    started: bool
    """Whether an interval has been counted."""
    decay: float

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")

    @classmethod
    def cold(cls, layers: int, experts: int, decay: float = DEFAULT_DECAY) -> Self:
        """No traffic seen yet."""
        return cls(mean=np.zeros((layers, experts)), started=False, decay=decay)

    def update(self, mass: np.ndarray, tokens: int) -> Self:
        """Hotness after one more interval.

        ``mass`` [L, E] is the router probability of the selected experts summed over the
        interval's ``tokens``. It is divided by the tokens, so that long and short intervals
        compare. The first interval starts the average instead of being blended with zeros; an
        interval without tokens changes nothing.

        Raises ValueError for another shape, or for mass that is negative or not finite.
        """
        if np.shape(mass) != self.mean.shape:
            raise ValueError(f"router mass must have shape {self.mean.shape}, got {np.shape(mass)}")
        if tokens < 0:
            raise ValueError(f"an interval cannot have {tokens} tokens")
        if not (np.all(np.isfinite(mass)) and np.all(mass >= 0)):
            raise ValueError("router mass must be finite and not negative: are there NaN weights?")
        if tokens == 0:
            return self
        latest = np.asarray(mass, np.float64) / tokens
        mean = self.decay * self.mean + (1 - self.decay) * latest if self.started else latest
        return dataclasses.replace(self, mean=mean, started=True)
