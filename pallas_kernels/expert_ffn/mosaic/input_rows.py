"""Rows of the input as limbs in shared memory, in the order that wgmma reads without swizzle.

A bfloat16 has 8 significant bits and an e4m3 limb 4: with a power of two a row,

    x = scale * (high + low / 16)

is exact for all but numbers 2**15 times smaller than the largest of the row; of a float32 it keeps
8 bits. Row m's limbs are rows 2 m and 2 m + 1 of the operand [K/16, 2M, 16].
"""

from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels.expert_ffn.mosaic.silu import emit_silu
from pallas_kernels.expert_ffn.mosaic.wgmma_step import BLOCK
from pallas_kernels.layout import padded_columns
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.target import interpreting
from pallas_kernels.pages import GATE_UP_ROWS

LOW_LIMB: Final = 1 / 16
SCALE_WORDS: Final = 8
"""Words of shared memory a row: its scale, three unused, the largest number of each warp."""
_EIGHT: Final = 8
_BATCH: Final = 4  # rows whose numbers are held in registers together
_HIGHEST_EXPONENT: Final = 6  # of a scaled number: below 128, so that rounding stays finite
_LEAST_EXPONENT: Final = -100  # of a scale
_BIAS: Final = 127


def load_rows(
    x: Any, rows: Any, limbs: Any, scale: Any, *, divisor: int, first: Any, columns: int
) -> None:
    """Columns ``first`` to ``first + columns`` of rows ``rows[m] // divisor``; -1 gives zeros.

    x bfloat16 [R, K] and rows int32 [M] in global memory, M a multiple of 4; limbs e4m3
    [columns/16, 2M, 16], columns a multiple of 128, and scale float32 [M, SCALE_WORDS], of which
    the first counts, in shared memory. Ends with a barrier of the warpgroup.
    """
    if interpreting():
        for m in range(scale.shape[0]):
            row = rows[m]
            values = x[jnp.maximum(row, 0) // divisor, pl.ds(first, columns)]
            _store_twin(limbs, scale, m, jnp.where(row < 0, 0, values.astype(jnp.float32)))
        return

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 4, plgpu.Layout.WG_SPLAT))
    def run(ctx: Any, x: Any, rows: Any, limbs: Any, scale: Any, first: Any) -> None:
        del ctx
        stride = 2 * ir.MemRefType(x.type).shape[1]

        def read(m: Any, row: Any) -> Callable[[Any], list[Any]]:
            del m
            index = arith.divui(row, emit.const(divisor))
            line = emit.move64(emit.pointer(x), index, stride)

            def read_eight(column: Any) -> list[Any]:
                at = emit.mul(emit.add(column, emit.scalar(first)), 2)
                words = emit.load_words(emit.move(line, at), 4)
                return [half for word in words for half in emit.bf16_pair(word)]

            return read_eight

        _emit(rows, limbs, scale, columns, columns, read)

    run(x, rows, limbs, scale, jnp.asarray(first, jnp.int32))


def load_gated(sums: Any, rows: Any, limbs: Any, scale: Any, *, tile: Any, width: int) -> None:
    """``silu(gate) * up`` of a tile's sums; rows whose ``rows[m]`` is -1 give zeros.

    sums float32 [parts, I, M, N], of the gate_up matmul, whose parts are added first; the rest as
    in ``load_rows``, for ``width`` columns padded to chunks.
    """
    padded = padded_columns(width)
    if interpreting():
        for m in range(scale.shape[0]):
            total = sums[0, tile, m, :]
            for part in range(1, sums.shape[0]):
                total = total + sums[part, tile, m, :]
            pairs = total[: 2 * width].reshape(-1, 2, GATE_UP_ROWS)
            gated = (jax.nn.silu(pairs[:, 0]) * pairs[:, 1]).reshape(-1)
            gated = jnp.pad(gated, (0, padded - width))
            _store_twin(limbs, scale, m, jnp.where(rows[m] < 0, 0, gated))
        return

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 4, plgpu.Layout.WG_SPLAT))
    def run(ctx: Any, sums: Any, rows: Any, limbs: Any, scale: Any, tile: Any) -> None:
        del ctx
        parts, tiles, count, columns = ir.MemRefType(sums.type).shape
        start = emit.move64(emit.pointer(sums), emit.scalar(tile), 4 * count * columns)

        def read(m: Any, row: Any) -> Callable[[Any], list[Any]]:
            del row
            line = emit.move64(start, m, 4 * columns)

            def read_eight(column: Any) -> list[Any]:
                # eight columns of the hidden row are sixteen sums: eight of gate, eight of up
                at = emit.move(line, emit.mul(column, 8))
                totals: list[Any] = []
                for part in range(parts):
                    there = emit.move(at, part * tiles * count * columns * 4)
                    words = [
                        emit.as_f32(word)
                        for quarter in range(4)
                        for word in emit.load_words(emit.move(there, 16 * quarter), 4)
                    ]
                    totals = (
                        [arith.addf(t, w) for t, w in zip(totals, words, strict=True)]
                        if totals
                        else words
                    )
                gates, ups = totals[:_EIGHT], totals[_EIGHT:]
                return [arith.mulf(emit_silu(g), u) for g, u in zip(gates, ups, strict=True)]

            return read_eight

        _emit(rows, limbs, scale, padded, width, read)

    run(sums, rows, limbs, scale, jnp.asarray(tile, jnp.int32))


def _store_twin(limbs: Any, scale: Any, m: int, values: jax.Array) -> None:
    bits = lax.bitcast_convert_type(jnp.max(jnp.abs(values)), jnp.int32)
    exponent = jnp.maximum((bits >> 23) - _HIGHEST_EXPONENT, _BIAS + _LEAST_EXPONENT)
    power = lax.bitcast_convert_type(exponent << 23, jnp.float32)
    scaled = values / power
    high = lax.reduce_precision(scaled, 4, 3)
    low = lax.reduce_precision((scaled - high) / LOW_LIMB, 4, 3)
    limbs[:, 2 * m, :] = high.reshape(-1, BLOCK).astype(limbs.dtype)
    limbs[:, 2 * m + 1, :] = low.reshape(-1, BLOCK).astype(limbs.dtype)
    scale[m, 0] = power


def _emit(
    rows: Any, limbs: Any, scale: Any, padded: int, columns: int, read: Callable[..., Any]
) -> None:
    """``read(m, rows[m])(column)`` gives eight float32 of a row.

    Each warp does a quarter of every row; they tell each other their largest numbers.
    """
    count = ir.MemRefType(scale.type).shape[0]
    warp = emit.warp()
    for first in range(0, count, _BATCH):
        batch = range(first, min(first + _BATCH, count))
        vectors = {m: _read_quarter(rows, m, warp, padded, columns, read) for m in batch}
        for m, values in vectors.items():
            largest = emit.const_f32(0.0)
            for value in values:
                largest = emit.max_magnitude(largest, value)
            largest = emit.asm(
                "redux.sync.max.u32 $0, $1, 0xffffffff;",
                "=r,r",
                [emit.bits_of(largest)],
                emit.i32_type(),
                effects=True,
            )
            where = emit.pointer(scale, emit.mul(warp, 4))
            emit.store_words(emit.move(where, 4 * (SCALE_WORDS * m + 4)), [largest])
        emit.barrier()
        for m, values in vectors.items():
            _store_quarter(limbs, scale, m, count, warp, padded, values)
    emit.commit_shared()


def _columns_of_lane(warp: Any, padded: int) -> list[tuple[Any, Any]]:
    """(column, whether there is one) of each eight columns of a lane in its warp's quarter."""
    quarter = padded // 4
    places = []
    for start in range(0, quarter, 32 * _EIGHT):
        within = emit.add(emit.mul(emit.lane(), _EIGHT), start)
        exists = arith.cmpi(arith.CmpIPredicate.ult, within, emit.const(quarter))
        places.append((emit.add(emit.mul(warp, quarter), within), exists))
    return places


def _read_quarter(
    rows: Any, m: int, warp: Any, padded: int, columns: int, read: Callable[..., Any]
) -> list[Any]:
    zero = emit.const_f32(0.0)
    places = _columns_of_lane(warp, padded)
    (row,) = emit.load_words(emit.pointer(rows, 4 * m), 1)
    present = arith.cmpi(arith.CmpIPredicate.sge, row, emit.const(0))
    branch = scf.IfOp(present, [emit.f32_type()] * (_EIGHT * len(places)), has_else=True)
    with ir.InsertionPoint(branch.then_block):
        read_eight = read(emit.const(m), row)
        values = []
        for column, exists in places:
            within = arith.cmpi(arith.CmpIPredicate.ult, column, emit.const(columns))
            exists = arith.andi(exists, within)
            eight = read_eight(arith.select(exists, column, emit.const(0)))
            values += [arith.select(exists, value, zero) for value in eight]
        scf.yield_(values)
    with ir.InsertionPoint(branch.else_block):
        scf.yield_([zero] * (_EIGHT * len(places)))
    return list(branch.results)


def _store_quarter(
    limbs: Any, scale: Any, m: int, count: int, warp: Any, padded: int, values: list[Any]
) -> None:
    largest = emit.const(0)
    for part in emit.load_words(emit.pointer(scale, 4 * (SCALE_WORDS * m + 4)), 4):
        largest = arith.maxui(largest, part)
    exponent = emit.add(emit.shift_right(largest, 23), -_HIGHEST_EXPONENT)
    exponent = arith.maxsi(exponent, emit.const(_BIAS + _LEAST_EXPONENT))
    inverse = arith.subi(emit.const(2 * _BIAS), exponent)
    inverse = emit.as_f32(emit.shift_right(inverse, -23))
    for index, (column, exists) in enumerate(_columns_of_lane(warp, padded)):
        eight = values[_EIGHT * index : _EIGHT * (index + 1)]
        high, low = _limbs_of_eight(eight, inverse)
        branch = scf.IfOp(exists)
        with ir.InsertionPoint(branch.then_block):
            block = emit.mul(emit.shift_right(column, 4), 2 * count * BLOCK)
            place = emit.add(block, emit.and_(column, BLOCK - 1))
            where = emit.move(emit.pointer(limbs, place), 2 * BLOCK * m)
            emit.store_words(where, high)
            emit.store_words(emit.move(where, BLOCK), low)
            scf.yield_([])
    power = emit.shift_right(exponent, -23)
    emit.store_words(emit.pointer(scale, 4 * SCALE_WORDS * m), [power])  # every thread the same


_LIMBS_OF_PAIR: Final = """{
    .reg .b16 h, l; .reg .b32 t; .reg .f16 p, q; .reg .f32 a, b, u, v;
    mul.f32 a, $1, $3; mul.f32 b, $2, $3;
    cvt.rn.satfinite.e4m3x2.f32 h, b, a;
    cvt.rn.f16x2.e4m3x2 t, h;
    mov.b32 {p, q}, t;
    cvt.f32.f16 u, p; cvt.f32.f16 v, q;
    sub.f32 u, a, u; sub.f32 v, b, v;
    mul.f32 u, u, 0f41800000; mul.f32 v, v, 0f41800000;
    cvt.rn.satfinite.e4m3x2.f32 l, v, u;
    mov.b32 $0, {h, l};
}"""
"""Two float32 and the inverse scale to their high limbs (low half) and low limbs (high half)."""


def _limbs_of_eight(values: list[Any], inverse: Any) -> tuple[list[Any], list[Any]]:
    pairs = [
        emit.asm(_LIMBS_OF_PAIR, "=r,f,f,f", [*values[i : i + 2], inverse], emit.i32_type())
        for i in range(0, _EIGHT, 2)
    ]
    highs = [emit.permute_bytes(pairs[i], pairs[i + 1], 0x5410) for i in (0, 2)]
    lows = [emit.permute_bytes(pairs[i], pairs[i + 1], 0x7632) for i in (0, 2)]
    return highs, lows
