"""8-bit weights on Hopper's tensor cores: codes in shared memory, bfloat16 fragments in registers.

Each thread loads the codes of its places in a fragment of A, two at a time, and makes bfloat16 of
them by byte permutes, which is exact. Two codes at a time, because so the columns stay in order,
and x, which is B, is used as it lies in memory.
"""

from collections.abc import Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from pallas_kernels.linear.config import LINE, TILE_ROWS
from pallas_kernels.mosaic import emit, mma
from pallas_kernels.mosaic.target import interpreting

SUMS: Final = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 8), (16, 8), (8, 8), (2,), (1,))),
    warp_dims=(-8,),
    lane_dims=(-4, -3),
    vector_dim=-1,
)
"""Of sums float32 [rows, n], one a register: pairs of them would be torn apart at every wgmma."""

_BLOCK = 16
"""Columns of one instruction, and bytes that a swizzle moves together."""
_PART = 64
"""Columns, of one tile, whose fragments are made while the tensor cores work on those before."""
_HIGH_BYTES = 0x43434343
_MAGNITUDES = 0x7F7F7F7F
_SIGNS = 0x80808080


def code_transforms(step: int) -> tuple[Any, ...]:
    """How codes int8 [rows, step] lie in shared memory."""
    line = _line(step)
    return (plgpu.TilingTransform((8, line)), plgpu.SwizzleTransform(line))


def multiply_codes(sums: jax.Array, codes: Any, x: Any, x_transforms: tuple[Any, ...]) -> jax.Array:
    """``sums + codes @ x.T``.

    sums float32 [rows, n] in the layout ``SUMS``; refs of shared memory: codes int8 [rows, step],
    x bfloat16 [n, step]. Both are free again afterwards.
    """
    rows, step = codes.shape
    if interpreting():
        wide = (ref[...].astype(jnp.float32) for ref in (codes, x))
        return sums + jnp.einsum("rk,nk->rn", *wide, precision=lax.Precision.HIGHEST)

    @plgpu.inline_mgpu(
        arg_types=(SUMS, plgpu.RefType(code_transforms(step)), plgpu.RefType(x_transforms)),
        return_type=plgpu.ShapeDtypeStruct(sums.shape, jnp.float32, layout=SUMS),
    )
    def run(ctx: Any, sums: Any, codes: Any, x: Any) -> Any:
        del ctx
        values = [vector.extract(register, [], [0]) for register in sums.registers.flat]
        values = _multiply(values, _Codes(codes, rows, step), _descriptor(x, step), step)
        one = ir.VectorType.get((1,), emit.f32_type())
        registers = [vector.from_elements(one, [value]) for value in values]
        return fa.FragmentedArray(
            _registers=np.array(registers, dtype=object).reshape(sums.registers.shape),
            _layout=sums.layout,
            _is_signed=None,
        )

    return run(sums, codes, x)


def code_pairs(word: Any) -> list[Any]:
    """Four codes of a word as two pairs of bfloat16, exactly, lowest first.

    Below a high byte 0x43 a byte's low seven bits are the mantissa of 128 + value, and its sign
    bit alone is 128 or 256: the difference of the two is the code in two's complement.
    """
    high = emit.const(_HIGH_BYTES)
    magnitudes, signs = emit.and_(word, _MAGNITUDES), emit.and_(word, _SIGNS)
    return [
        emit.sub_bf16_pair(
            emit.permute_bytes(magnitudes, high, selector),
            emit.permute_bytes(signs, high, selector),
        )
        for selector in (0x4140, 0x4342)
    ]


def _line(step: int) -> int:
    """Bytes of a line of codes, and of the swizzle."""
    return min(step, 128)


class _Codes:
    """Where a thread finds its codes in [rows, step]."""

    def __init__(self, codes: Any, rows: int, step: int) -> None:
        self.tiles = rows // TILE_ROWS
        self._line = _line(step)
        self._next_eight = 8 * step  # bytes from eight rows to the next
        row, pair = emit.shift_right(emit.lane(), 2), emit.and_(emit.lane(), 3)
        # blocks of a line are exchanged by the number of the 128 bytes that a row lies in, mod 8
        swizzle = emit.shift_right(row, 0 if self._line == 128 else 1)
        start = emit.add(emit.mul(row, self._line), emit.mul(pair, 2))
        start = emit.add(start, emit.mul(emit.warp(), 2 * self._next_eight))
        self._start, self._swizzle = start, emit.mul(swizzle, _BLOCK)
        self._base = emit.pointer(codes)

    def fragment(self, tile: int, column: int) -> list[Any]:
        """Four registers of A: 64 rows, 16 columns from ``column``."""
        line, within = divmod(column, self._line)
        block = emit.xor(self._swizzle, within)
        where = emit.move(self._base, emit.add(self._start, block))
        halves = []
        for half in range(2):  # row and row + 8 of a warp's sixteen
            place = line * 8 * self._line + (tile * TILE_ROWS // 8 + half) * self._next_eight
            low, high = (emit.load_half(emit.move(where, place + side)) for side in (0, 8))
            halves.append(code_pairs(emit.permute_bytes(low, high, 0x5410)))
        return [halves[half][side] for side in range(2) for half in range(2)]


def _multiply(sums: list[Any], codes: _Codes, descriptor: Any, step: int) -> list[Any]:
    part = _PART // codes.tiles
    for start in range(0, step, part):
        columns = range(start, start + part, _BLOCK)
        fragments = [[codes.fragment(tile, c) for c in columns] for tile in range(codes.tiles)]
        sums = _start(sums, fragments, columns, descriptor)
        if start:  # the registers of the part before may be written again
            sums = mma.wgmma_wait(1, sums)
    return mma.wgmma_wait(0, sums)


def _start(
    sums: list[Any], fragments: list[list[list[Any]]], columns: Sequence[int], descriptor: Any
) -> list[Any]:
    """Starts the products of some columns, by tile and 16 columns."""
    flat = [register for tile in fragments for fragment in tile for register in fragment]
    sums, flat = mma.wgmma_fence(sums, flat)
    registers = iter(flat)
    per_tile = len(sums) // len(fragments)
    done = []
    for tile in range(len(fragments)):
        own = sums[tile * per_tile : (tile + 1) * per_tile]
        for column in columns:
            a = [next(registers) for _ in range(4)]
            b = mma.move_descriptor(descriptor, column // LINE * 1024 + column % LINE * 2)
            own = mma.wgmma_bf16(own, a, b)
        done += own
    mma.wgmma_commit()
    return done


def _descriptor(x: Any, step: int) -> Any:
    """Of x [n, step], tiles of 8 rows by 64 columns, 1024 bytes each."""
    strides, _ = ir.MemRefType(x.type).get_strides_and_offset()
    assert strides == [step // LINE * 512, 512, 64, 1], strides
    return mma.swizzled_descriptor(x, step // LINE * 1024)
