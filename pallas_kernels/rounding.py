"""Rounding that stays: what XLA is free to leave out otherwise."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def round_to(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """float32 ``x`` in a narrower ``dtype``, also where it is widened again at once.

    XLA allows itself excess precision: on a GPU it drops a conversion to bfloat16 and back.
    """
    if jnp.dtype(dtype) == x.dtype:
        return x
    kind = jnp.finfo(dtype)
    return lax.reduce_precision(x, kind.nexp, kind.nmant).astype(dtype)
