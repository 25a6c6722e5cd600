"""Numbers as float16 with a power of two a row: the largest of a row lies in [2**14, 2**15).

    x = scale * half

A bfloat16 comes out exactly unless it is 2**30 times smaller than the largest of its row, where
float16 loses its lowest bits; a float32 is rounded to the 11 significant bits of float16. A row of
zeros, or one below 2**-86, has the scale 2**-100.
"""

from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir.dialects import arith

from pallas_kernels.mosaic import emit

HIGHEST_EXPONENT: Final = 14
LEAST_EXPONENT: Final = -100
"""Of a scale."""
_BIAS: Final = 127


def row_scale(values: jax.Array) -> jax.Array:
    """Scale of each row: float32 [...] of float32 [..., K]."""
    bits = lax.bitcast_convert_type(jnp.max(jnp.abs(values), axis=-1), jnp.int32)
    exponent = jnp.maximum((bits >> 23) - HIGHEST_EXPONENT, _BIAS + LEAST_EXPONENT)
    return lax.bitcast_convert_type(exponent << 23, jnp.float32)


def to_halves(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float [R, K] to float16 [R, K] and the scales float32 [R]."""
    values = values.astype(jnp.float32)
    scale = row_scale(values)
    return (values / scale[:, None]).astype(jnp.float16), scale


def emit_scale(largest: Any) -> tuple[Any, Any]:
    """Of a row's largest magnitude float32: bits of its scale, and the inverse float32."""
    exponent = emit.add(emit.shift_right(emit.bits_of(largest), 23), -HIGHEST_EXPONENT)
    exponent = arith.maxsi(exponent, emit.const(_BIAS + LEAST_EXPONENT))
    inverse = arith.subi(emit.const(2 * _BIAS), exponent)
    return emit.shift_right(exponent, -23), emit.as_f32(emit.shift_right(inverse, -23))


def emit_halves(values: list[Any], inverse: Any) -> list[Any]:
    """Float32 values, times ``inverse``, to words of two float16."""
    scaled = [arith.mulf(value, inverse) for value in values]
    return [
        emit.asm(
            "cvt.rn.f16x2.f32 $0, $1, $2;", "=r,f,f", [scaled[i + 1], scaled[i]], emit.i32_type()
        )
        for i in range(0, len(scaled), 2)
    ]
