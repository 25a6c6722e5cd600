"""What a dense matrix may be, and the one definition of multiplying by it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Float32, Int8, Int32

LARGEST_CODE = 127
"""Codes are symmetric: -128 is not used."""


class Int8Matrix(NamedTuple):
    """A matrix, or several, at 8 bits: ``codes * scale[..., None]``; a pytree."""

    codes: Int8[jax.Array, "*L N K"]
    """-127 to 127."""
    scale: Float32[jax.Array, "*L N"]
    """One for each row, at least 0."""

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weights."""
        return self.codes.shape


Weight = jax.Array | Int8Matrix
"""Matrices of weights, [*L, N, K]: as they are, or at 8 bits."""


def layer_of(weight: Weight, layer: Int32[jax.Array, ""] | int) -> Weight:
    """Entry ``layer`` of the first axis."""
    if isinstance(weight, Int8Matrix):
        return Int8Matrix(weight.codes[layer], weight.scale[layer])
    return weight[layer]


def as_stack(weight: Weight) -> Weight:
    """[N, K] as a stack of one layer, [1, N, K]; nothing is copied."""
    if isinstance(weight, Int8Matrix):
        return Int8Matrix(weight.codes[None], weight.scale[None])
    return weight[None]


def product(
    x: Float[jax.Array, "... K"], weight: Weight, precision: lax.Precision | None = None
) -> Float32[jax.Array, "... N"]:
    """``x @ weight.T`` for weight [N, K], summed in float32; the weight is read in x's dtype.

    Codes are exact in every float dtype, and their rows' scales come in after the sum.
    """
    if isinstance(weight, Int8Matrix):
        return product(x, weight.codes, precision) * weight.scale
    # transposed before it is converted: written so, XLA on a CPU reads the weight as it lies for
    # one row of x; the other way round it first makes a copy of all of it, in x's dtype
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(
        x,
        weight.T.astype(x.dtype),
        contract,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
