"""What the error of one column of weights asks of another, from a Hessian.

The loss of a row with errors d [K] is ``d @ H @ d``. Seen from one column c it is a parabola,
``curvature[c] * (q[c] - x[c])**2`` and a rest, with its least value at the target

    x[c] = w[c] - sum over j of matrix[c, j] * d[j]

In descent the sum is over all other columns, whose errors are known; this is what coordinate
descent minimises. In a start it is over earlier columns only, and later ones are taken to follow
without error; this is GPTQ (Frantar et al., arXiv:2210.17323) in the form of LDLQ (Chee et al.,
arXiv:2307.13304, theorem 6), which needs no inverse of H.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float32


class Feedback(NamedTuple):
    """Targets and their parabolas; a pytree."""

    matrix: Float32[jax.Array, "E K K"]
    """Row c: what the error of each column takes from the target of column c. Diagonal 0."""
    curvature: Float32[jax.Array, "E K"]


def damped(hessians: Float32[jax.Array, "E K K"], damping: float) -> Float32[jax.Array, "E K K"]:
    """Hessians of mean diagonal 1, ``damping`` added to it; the identity where all is zero."""
    identity = jnp.eye(hessians.shape[-1], dtype=jnp.float32)
    mean = jnp.trace(hessians, axis1=-2, axis2=-1)[:, None, None] / hessians.shape[-1]
    scaled = jnp.where(mean > 0, hessians / jnp.where(mean > 0, mean, 1.0), identity)
    return (scaled + scaled.mT) / 2 + damping * identity


def descent_feedback(hessians: Float32[jax.Array, "E K K"]) -> Feedback:
    """Feedback between all columns."""
    diagonal = jnp.diagonal(hessians, axis1=-2, axis2=-1)
    others = hessians * (1 - jnp.eye(hessians.shape[-1], dtype=jnp.float32))
    return Feedback(others / diagonal[..., None], diagonal)


def start_feedback(hessians: Float32[jax.Array, "E K K"]) -> Feedback:
    """Feedback from earlier columns to later ones, for positive definite Hessians.

    With H = R R^T, R upper triangular, the loss is the sum over c of
    ``(sum over j <= c of d[j] R[j, c])**2``.
    """
    lower = lax.linalg.cholesky(jnp.flip(hessians, (-2, -1)), symmetrize_input=False)
    upper = jnp.flip(lower, (-2, -1))
    diagonal = jnp.diagonal(upper, axis1=-2, axis2=-1)
    return Feedback(jnp.tril((upper / diagonal[:, None, :]).mT, -1), jnp.square(diagonal))


def padded(feedback: Feedback, columns: int) -> Feedback:
    """Feedback for more columns, which ask nothing and weigh nothing."""
    spare = columns - feedback.matrix.shape[-1]
    return Feedback(
        jnp.pad(feedback.matrix, ((0, 0), (0, spare), (0, spare))),
        jnp.pad(feedback.curvature, ((0, 0), (0, spare))),
    )
