"""Norm and rotation of heads in registers, as two halves: pair i is elements i and i + D/2."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from pallas_kernels.mosaic.target import interpreting

Halves = tuple[jax.Array, jax.Array]

# Any: its arguments differ between versions of jax
load: Any = functools.partial(plgpu.load, optimized=False)


def half_layout(heads: int, head: int) -> Any:
    """Layout of one half [heads, D / 2] of some heads: 16 threads hold a row, in pairs.

    Pairs, because only they are rounded to bfloat16 by one fast instruction.
    """
    half = head // 2
    tiles = ((heads, half), (heads // 4, half), (2, 32), (1, 2))
    layout = fragmented_array.TiledLayout(
        plgpu.Tiling(tiles),
        warp_dims=(-8,),
        lane_dims=(-4, -3),
        vector_dim=-1,
        _check_canonical=False,
    ).canonicalize()
    return plgpu.Layout.TILED(
        layout.tiling,
        warp_dims=layout.warp_dims,
        lane_dims=layout.lane_dims,
        vector_dim=layout.vector_dim,
    )


def load_halves(ref: Any, layout: Any) -> Halves:
    """Both halves of the last axis of ``ref`` in global memory."""
    half = ref.shape[-1] // 2
    rows = (slice(None),) * (len(ref.shape) - 1)
    first, second = (ref.at[(*rows, pl.ds(start, half))] for start in (0, half))
    return (
        load(first, layout=layout),
        load(second, layout=layout),
    )


def rotated(
    heads: Halves, weight: Halves, cos: jax.Array, sin: jax.Array, eps: float, layout: Any
) -> Halves:
    """RMS norm and rotation of [heads, D / 2] or [D / 2], rounded after each to bfloat16."""
    first, second = (x.astype(jnp.float32) for x in heads)
    shape = first.shape
    total = jnp.sum(first * first + second * second, axis=-1)
    scale = lax.rsqrt(total * (0.5 / shape[-1]) + eps)
    if len(shape) == 2:
        scale = lax.broadcast_in_dim(scale, shape, (0,))

    def spread(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        return x if len(shape) == 1 else lax.broadcast_in_dim(x, shape, (1,))

    first, second = (
        _to_bfloat16(x * scale * spread(w), layout).astype(jnp.float32)
        for x, w in zip((first, second), weight, strict=True)
    )
    cos, sin = spread(cos), spread(sin)
    return (
        _to_bfloat16(first * cos - second * sin, layout),
        _to_bfloat16(second * cos + first * sin, layout),
    )


def _to_bfloat16(x: jax.Array, layout: Any) -> jax.Array:
    """Rounds pairs by one instruction, where the compiler's own choice is two slow ones."""
    if interpreting():
        return x.astype(jnp.bfloat16)
    result = plgpu.ShapeDtypeStruct(x.shape, jnp.bfloat16, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=result)
    def convert(_: Any, array: Any) -> Any:
        word, pair = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.BF16Type.get())
        registers = np.empty_like(array.registers)
        for index, register in np.ndenumerate(array.registers):
            low, high = (
                vector.extract(
                    register,
                    dynamic_position=[],
                    static_position=ir.DenseI64ArrayAttr.get([element]),
                )
                for element in range(2)
            )
            rounded: Any = llvm.inline_asm(
                word, [high, low], "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f"
            )
            registers[index] = utils.bitcast(rounded, pair)
        return fragmented_array.FragmentedArray(
            _registers=registers, _layout=array.layout, _is_signed=None
        )

    return convert(x)


def dot(q: Halves, k: Halves) -> jax.Array:
    """[heads] float32: every head of q [heads, D / 2] times k [D / 2]."""
    shape = q[0].shape
    products = (
        x.astype(jnp.float32) * lax.broadcast_in_dim(y.astype(jnp.float32), shape, (1,))
        for x, y in zip(q, k, strict=True)
    )
    first, second = products
    return jnp.sum(first + second, axis=-1)
