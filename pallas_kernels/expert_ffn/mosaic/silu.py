"""The gate's activation inside kernels."""

from typing import Any

from jaxlib.mlir.dialects import arith

from pallas_kernels.mosaic import emit


def emit_silu(value: Any) -> Any:
    """x / (1 + exp(-x)), with the fast exponential and reciprocal.

    Relative error under 1e-6 for x above -87, below which it may be 0.
    """
    exponent = arith.mulf(value, emit.const_f32(-1.4426950408889634))
    power = emit.asm("ex2.approx.ftz.f32 $0, $1;", "=f,f", [exponent], emit.f32_type())
    below = arith.addf(power, emit.const_f32(1.0))
    inverse = emit.asm("rcp.approx.ftz.f32 $0, $1;", "=f,f", [below], emit.f32_type())
    return arith.mulf(value, inverse)
