"""Hotness: how much of the router's probability goes to each expert, over recent tokens."""

import dataclasses
from typing import Final, Self

import numpy as np

MEMORY_TOKENS: Final = 64
"""Tokens that the past counts as at most: few enough that new traffic soon weighs more."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Hotness:
    """Moving average of the router mass a token, by expert. A value: ``update`` gives a new one.

    It forgets by tokens, not by intervals: a long interval tells more than a short one, and little
    is left of the traffic before it. Raises ValueError for a memory that is not positive or a
    weight outside of it.
    """

    mean: np.ndarray
    """float64 [L, E]: mass a token; zeros before the first interval."""
    tokens: int
    """Weight of ``mean``: the tokens that it counts as, 0 before the first interval."""
    memory: int
    """What ``tokens`` never exceeds."""

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise ValueError(f"memory must be positive, got {self.memory}")
        if not 0 <= self.tokens <= self.memory:
            raise ValueError(f"tokens must be in 0..{self.memory}, the memory, got {self.tokens}")

    @classmethod
    def cold(cls, layers: int, experts: int, memory: int = MEMORY_TOKENS) -> Self:
        """No traffic seen yet."""
        return cls(mean=np.zeros((layers, experts)), tokens=0, memory=memory)

    @classmethod
    def calibrated(cls, mean: np.ndarray) -> Self:
        """Begins with what calibration has found, [L, E]: it counts as a whole memory."""
        return cls(mean=np.asarray(mean, np.float64), tokens=MEMORY_TOKENS, memory=MEMORY_TOKENS)

    def update(self, mass: np.ndarray, tokens: int) -> Self:
        """Hotness after one more interval.

        ``mass`` [L, E] is the router probability of the selected experts summed over the
        interval's ``tokens``. The first interval starts the average; one without tokens changes
        nothing.

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
        total = self.tokens + tokens
        mean = (self.tokens * self.mean + np.asarray(mass, np.float64)) / total
        return dataclasses.replace(self, mean=mean, tokens=min(total, self.memory))
