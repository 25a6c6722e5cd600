"""Words of pages and codes of scales, from global memory straight to the registers that use them.

What a thread reads of a step is contiguous over the threads of a warpgroup, in this order of axes:

    words    [2 planes, 2 halves, 4 warps, 8 g, 4 t, v chunks]     of both planes of a page
    scales   [groups / 4, 2 halves, 4 warps, 8 g, 4 t]             lane t holds every fourth group
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.layout import LINE_WORDS, PLANES_PER_PAGE, ROW_TILE
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.target import interpreting
from pallas_kernels.scales import LOG8_STEPS_PER_OCTAVE

LANES_OF_ROW = 4
"""Lanes that share a row of the weights."""


def words_layout(v: int) -> Any:
    """Of both planes of a page for one step."""
    return plgpu.Layout.WG_STRIDED((PLANES_PER_PAGE * v * LINE_WORDS,), v)


def scales_layout(groups: int) -> Any:
    """Of the scales of ``groups`` groups."""
    return plgpu.Layout.WG_STRIDED((_scales_size(groups),), 1)


def load_words(page: Any, line: Any, valid: Any, v: int) -> jax.Array:
    """Lines ``line`` to ``line + 2 v`` of uint32 [_, 256] in global memory: uint32 [512 v].

    What comes where ``valid`` is false is void.
    """
    size = PLANES_PER_PAGE * v * LINE_WORDS
    if interpreting():
        return page[pl.ds(jnp.where(valid, line, 0), PLANES_PER_PAGE * v), :].reshape(size)
    splat = plgpu.Layout.WG_SPLAT
    shape = plgpu.ShapeDtypeStruct((size,), jnp.uint32, layout=words_layout(v))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), splat, splat), return_type=shape)
    def run(ctx: Any, page: Any, line: Any, valid: Any) -> Any:
        del ctx
        start = emit.move64(emit.pointer(page), emit.scalar(line), 4 * LINE_WORDS)
        start = emit.move(start, emit.mul(emit.thread(), 4 * v))
        vectors = [
            _load_if(emit.scalar(valid), emit.move(start, 4 * v * emit.WARPGROUP * index), v)
            for index in range(2 * PLANES_PER_PAGE)
        ]
        return array_of_vectors(vectors, words_layout(v), emit.i32_type())

    return run(page, line, jnp.asarray(valid, jnp.int32))


def load_scales(codes: Any, first: Any, valid: Any, groups: int) -> jax.Array:
    """Codes of groups ``first`` to ``first + groups`` of bfloat16 or uint8 [_, 64]: bits, uint32.

    What comes where ``valid`` is false is void.
    """
    bits = 8 * jnp.dtype(codes.dtype).itemsize
    if interpreting():
        rows = codes[pl.ds(jnp.where(valid, first, 0), groups), :]
        rows = lax.bitcast_convert_type(rows, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)
        rows = jnp.pad(rows, ((0, -groups % LANES_OF_ROW), (0, 0)))
        return rows.reshape(-1, LANES_OF_ROW, 4, 2, 8).transpose(0, 3, 2, 4, 1).reshape(-1)
    splat = plgpu.Layout.WG_SPLAT
    layout = scales_layout(groups)
    shape = plgpu.ShapeDtypeStruct((_scales_size(groups),), jnp.uint32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), splat, splat), return_type=shape)
    def run(ctx: Any, codes: Any, first: Any, valid: Any) -> Any:
        del ctx
        lane, width = emit.lane(), bits // 8
        group = emit.and_(lane, LANES_OF_ROW - 1)
        if groups < LANES_OF_ROW:
            group = arith.minui(group, emit.const(groups - 1))
        row = emit.add(emit.mul(emit.warp(), 16), emit.shift_right(lane, 2))
        place = emit.add(emit.mul(group, ROW_TILE), row)
        start = emit.move64(emit.pointer(codes), emit.scalar(first), ROW_TILE * width)
        start = emit.move(start, emit.mul(place, width))
        loaded = []
        for four in range(-(-groups // LANES_OF_ROW)):
            for half in range(2):
                offset = (four * LANES_OF_ROW * ROW_TILE + 8 * half) * width
                loaded.append([_load_small(emit.scalar(valid), emit.move(start, offset), bits)])
        return array_of_vectors(loaded, layout, emit.i32_type())

    return run(codes, first, jnp.asarray(valid, jnp.int32))


def rotate_words(words: jax.Array, v: int) -> jax.Array:
    """The words of the next chunk in the place of those of the first."""
    if v == 1:
        return words
    if interpreting():
        return jnp.roll(words.reshape(-1, v), -1, axis=1).reshape(-1)
    layout = words_layout(v)
    shape = plgpu.ShapeDtypeStruct(words.shape, jnp.uint32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=shape)
    def run(ctx: Any, words: Any) -> Any:
        del ctx
        vectors = [
            [vector.extract(register, [], [(index + 1) % v]) for index in range(v)]
            for register in words.registers.flat
        ]
        return array_of_vectors(vectors, layout, emit.i32_type())

    return run(words)


def scale_values(bits: jax.Array, log8: bool) -> jax.Array:
    """What ``load_scales`` gives as float32, without the base of a matrix's log8 scales."""
    if not log8:
        return lax.bitcast_convert_type(bits << 16, jnp.float32)
    return jnp.exp2(bits.astype(jnp.float32) * (-1 / LOG8_STEPS_PER_OCTAVE))


def _scales_size(groups: int) -> int:
    return -(-groups // LANES_OF_ROW) * 2 * emit.WARPGROUP


def array_of_vectors(
    vectors: list[list[Any]], layout: Any, element: Any, is_signed: bool | None = False
) -> Any:
    """A thread's vectors as an array in a strided layout."""
    kind = ir.VectorType.get((len(vectors[0]),), element)
    registers = [vector.from_elements(kind, values) for values in vectors]
    return fa.FragmentedArray(
        _registers=np.array(registers, dtype=object), _layout=layout.to_mgpu(), _is_signed=is_signed
    )


def _load_if(valid: Any, where: Any, words: int) -> list[Any]:
    """Words that are read once, so they need no place in the first cache."""
    kind = f".v{words}" if words > 1 else ""
    names = ",".join(f"${index}" for index in range(words))
    names = "{" + names + "}" if words > 1 else names
    text = (
        "{ .reg .pred p; setp.ne.b32 p, $" + str(words + 1) + ", 0; "
        f"@p ld.global.nc.L1::no_allocate{kind}.u32 {names}, [${words}]; }}"
    )
    constraints = ",".join(["=r"] * words + ["l", "r"])
    if words == 1:
        return [emit.asm(text, constraints, [where, valid], emit.i32_type(), effects=True)]
    return emit.asm_many(text, constraints, [where, valid], [emit.i32_type()] * words)


def _load_small(valid: Any, where: Any, bits: int) -> Any:
    text = (
        "{ .reg .pred p; .reg .b16 h; setp.ne.b32 p, $2, 0; mov.b16 h, 0; "
        f"@p ld.global.nc.u{bits} h, [$1]; cvt.u32.u16 $0, h; }}"
    )
    return emit.asm(text, "=r,l,r", [where, valid], emit.i32_type(), effects=True)
