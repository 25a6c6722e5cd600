"""What each step of the ladder is worth: for every expert, in one unit for all layers.

The output error of an expert at a level is measured over calibration text: the sum over its tokens
of w**2 |f_level(x) - f(x)|**2, with router weight w. What a step takes away of it, for each unit of
router mass (sum of w), makes hotness times benefit the error that the step saves. Errors of
different layers do not compare: the later layers amplify or swallow them. So each layer's are
scaled to the KL divergence that was measured when that layer alone went down to the lowest level.
"""

from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Float

PRIOR: Final = 0.03
"""Experts with little mass lean on their layer's mean, as if it came with this share of the mean
expert's mass."""


class LayerErrors(NamedTuple):
    """Of one layer with experts."""

    errors: Float[np.ndarray, "levels E"]
    """Output errors, summed over the tokens of each expert."""
    mass: Float[np.ndarray, " E"]
    """Router weights of these tokens, summed."""
    tokens: int
    """All tokens that were routed."""


def benefit_of(layer: LayerErrors, divergence: float) -> Float[np.ndarray, "S E"]:
    """Nats a token that each step is worth for a unit of hotness (router mass a token).

    ``divergence`` is the KL, in nats a token, between this layer at the second level and at the
    lowest, all others as they are.
    """
    saved = np.maximum(-np.diff(layer.errors, axis=0), 0.0)
    mean = saved.sum(axis=1, keepdims=True) / layer.mass.sum()
    prior = PRIOR * layer.mass.mean()
    by_mass = (saved + prior * mean) / (layer.mass + prior)
    of_lowest_step = saved[0].sum() / layer.tokens
    return by_mass * (divergence / of_lowest_step if of_lowest_step > 0 else 0.0)
