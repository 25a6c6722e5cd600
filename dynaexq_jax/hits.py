"""Hits: router mass that met an expert above the base. Numpy only.

The mass of an interval is a sum over its steps, and levels may change between any two of them: an
expert that was above the base for a part of them counts for that part.
"""

import numpy as np
from jaxtyping import Bool, Float, Float64


class AboveBase:
    """For how much of an interval every expert was above the base. Its steps count from 0."""

    def __init__(self, above: Bool[np.ndarray, "L E"]) -> None:
        """``above``: who is above the base at the first step."""
        self._above = above
        self._steps = np.zeros(above.shape)
        self._counted = 0

    def change(self, step: int, above: Bool[np.ndarray, "L E"]) -> None:
        """From ``step`` of the interval on, ``above`` holds; steps never decrease."""
        self._count(step)
        self._above = above

    def end_interval(self, steps: int) -> Float64[np.ndarray, "L E"]:
        """The share of the interval's ``steps``; the next interval begins."""
        self._count(steps)
        share = self._steps / max(1, steps)
        self._steps, self._counted = np.zeros(share.shape), 0
        return share

    def _count(self, step: int) -> None:
        self._steps += (step - self._counted) * self._above
        self._counted = step


def hit_mass(
    mass: Float[np.ndarray, "L E"], above: Float[np.ndarray, "L E"] | Bool[np.ndarray, "L E"]
) -> float:
    """The part of the router mass of an interval that met an expert above the base.

    ``above``: for which share of the interval each expert was there.
    """
    return float((np.asarray(mass, np.float64) * above).sum())
