"""Sums over tokens to the Hessians that a quantizer gets."""

from functools import partial
from typing import Final

import jax
from jaxtyping import Float32

SHRINK: Final = 0.03
"""An expert's mean is mixed with its layer's as if that came with this share of the mean expert's
squared router weight: it matters where an expert saw few tokens."""


@partial(jax.jit, donate_argnames="sums")
def shrunk_to_mean(
    sums: Float32[jax.Array, "E K K"], squared: Float32[jax.Array, " E"]
) -> Float32[jax.Array, "E K K"]:
    """Hessians for a unit of squared router weight; the layer's mean for experts without tokens."""
    mean = sums.sum(axis=0) / squared.sum()
    prior = SHRINK * squared.mean()
    return (sums + prior * mean) / (squared + prior)[:, None, None]
