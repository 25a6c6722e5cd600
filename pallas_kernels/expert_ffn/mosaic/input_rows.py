"""Rows of the input as limbs in shared memory, in the order that wgmma reads without swizzle.

A bfloat16 has 8 significant bits and an e4m3 limb 4: with a power of two a row,

    x = scale * (high + low / 16)

is exact for all but numbers 2**15 times smaller than the largest of the row. Row m's limbs are
rows 2 m and 2 m + 1 of the operand [K/16, 2M, 16]. The bfloat16 come first, into the bytes that
their limbs will take; each thread turns those into limbs that it brought itself.

The rows of a tile that hold a token come first; the limbs of others are undefined.
"""

import dataclasses
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.expert_ffn.mosaic.silu import emit_silu
from pallas_kernels.expert_ffn.mosaic.wgmma_step import BLOCK
from pallas_kernels.layout import padded_columns
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.loops import loop, when
from pallas_kernels.mosaic.target import interpreting
from pallas_kernels.pages import GATE_UP_ROWS

LOW_LIMB: Final = 1 / 16
SCALE_WORDS: Final = 8
"""Words of shared memory a row: its scale, three unused, the largest number of each warp."""
_EIGHT: Final = 8
"""Columns of a piece: 16 bytes of bfloat16, which one thread deals with."""
_HIGHEST_EXPONENT: Final = 6  # of a scaled number: below 128, so that rounding stays finite
_LEAST_EXPONENT: Final = -100  # of a scale
_BIAS: Final = 127


def fetch_rows(x: Any, rows: Any, limbs: Any, scale: Any, *, divisor: int, first: Any) -> None:
    """Starts to bring rows ``rows[m] // divisor``, from column ``first`` on; see ``make_limbs``.

    x bfloat16 [R, K] in global memory; limbs e4m3 [columns/16, 2M, 16], columns a multiple of 128,
    scale float32 [M, SCALE_WORDS] and rows int32 [M] in shared memory, M a multiple of 4. In
    interpret mode, limbs and scale are made at once.
    """
    if interpreting():
        for m in range(scale.shape[0]):
            row = rows[m]
            values = x[jnp.maximum(row, 0) // divisor, pl.ds(first, limbs.shape[0] * BLOCK)]
            _store_twin(limbs, scale, m, jnp.where(row < 0, 0, values.astype(jnp.float32)))
        return

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 3, plgpu.Layout.WG_SPLAT))
    def run(ctx: Any, x: Any, rows: Any, limbs: Any, first: Any) -> None:
        del ctx
        stride = 2 * ir.MemRefType(x.type).shape[1]
        start = emit.move(emit.pointer(x), emit.mul(emit.scalar(first), 2))

        def bring(m: Any) -> None:
            (row,) = emit.load_words(emit.pointer(rows, emit.mul(m, 4)), 1)
            line = emit.move64(start, arith.divui(row, emit.const(divisor)), stride)
            for piece in _pieces(limbs):
                source = emit.move(line, emit.mul(piece.column, 2))
                address = emit.add(emit.shared_address(limbs), piece.raw(m))
                text = "cp.async.cg.shared.global [$0], [$1], 16;"
                copy = partial(emit.asm, text, "r,l", [address, source], effects=True)
                when(piece.exists, copy)

        loop(0, _present(rows), 1, bring)

    run(x, rows, limbs, jnp.asarray(first, jnp.int32))


def make_limbs(rows: Any, limbs: Any, scale: Any) -> None:
    """Waits for the rows that this thread brings, and turns them into limbs and their scale.

    The first word of each row of ``scale`` counts. Ends with a barrier of the warpgroup.
    """
    if interpreting():
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
    def run(ctx: Any, rows: Any, limbs: Any, scale: Any) -> None:
        del ctx
        emit.asm("cp.async.wait_all;", "~{memory}", [], effects=True)
        _emit_limbs(rows, limbs, scale)

    run(rows, limbs, scale)


def load_gated(sums: Any, rows: Any, limbs: Any, scale: Any, *, tile: Any, width: int) -> None:
    """``silu(gate) * up`` of a tile's sums as limbs, rounded to bfloat16.

    sums float32 [parts, I, M, N], of the gate_up matmul, whose parts are added first; the rest as
    in ``fetch_rows``, for ``width`` columns padded to chunks. Ends with a barrier of the warpgroup.
    """
    if interpreting():
        for m in range(scale.shape[0]):
            total = sums[0, tile, m, :]
            for part in range(1, sums.shape[0]):
                total = total + sums[part, tile, m, :]
            pairs = total[: 2 * width].reshape(-1, 2, GATE_UP_ROWS)
            gated = (jax.nn.silu(pairs[:, 0]) * pairs[:, 1]).reshape(-1)
            gated = jnp.pad(gated, (0, padded_columns(width) - width))
            gated = lax.reduce_precision(gated, 8, 7)
            _store_twin(limbs, scale, m, jnp.where(rows[m] < 0, 0, gated))
        return

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 4, plgpu.Layout.WG_SPLAT))
    def run(ctx: Any, sums: Any, rows: Any, limbs: Any, scale: Any, tile: Any) -> None:
        del ctx
        parts, tiles, count, columns = ir.MemRefType(sums.type).shape
        start = emit.move64(emit.pointer(sums), emit.scalar(tile), 4 * count * columns)
        part_bytes = 4 * tiles * count * columns

        def gate(m: Any) -> None:
            line = emit.move64(start, m, 4 * columns)
            for piece in _pieces(limbs):
                when(piece.exists, partial(_gate, line, m, piece))

        def _gate(line: Any, m: Any, piece: "_Piece") -> None:
            words = [emit.const(0)] * 4
            if padded_columns(width) == width:
                words = _gated_words(line, piece.column, parts, part_bytes)
            else:
                within = emit.less(piece.column, width)
                column = arith.select(within, piece.column, emit.const(0))
                words = [
                    arith.select(within, word, zero)
                    for word, zero in zip(
                        _gated_words(line, column, parts, part_bytes), words, strict=True
                    )
                ]
            emit.store_words(emit.pointer(limbs, piece.raw(m)), words)

        loop(0, _present(rows), 1, gate)
        _emit_limbs(rows, limbs, scale)

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Piece:
    """Eight columns of a thread."""

    column: Any
    exists: Any
    """i1, or None: always."""
    row_bytes: int
    """Of 16 columns of all rows."""

    def raw(self, m: Any) -> Any:
        """Offset of the bfloat16 of row m in the limbs."""
        return emit.add(self._block(m), emit.mul(emit.and_(self.column, _EIGHT), 2))

    def high(self, m: Any) -> Any:
        """Offset of the high limbs; the low ones are ``BLOCK`` bytes on."""
        return emit.add(self._block(m), emit.and_(self.column, _EIGHT))

    def _block(self, m: Any) -> Any:
        block = emit.mul(emit.shift_right(self.column, 4), self.row_bytes)
        return emit.add(block, emit.mul(m, 2 * BLOCK))


def _pieces(limbs: Any) -> list[_Piece]:
    """Of each row, those of this thread."""
    blocks, rows, _ = ir.MemRefType(limbs.type).shape
    columns, mine = blocks * BLOCK, emit.mul(emit.thread(), _EIGHT)
    stride = emit.WARPGROUP * _EIGHT
    pieces = []
    for start in range(0, columns, stride):
        column = emit.add(mine, start)
        exists = None
        if start + stride > columns:
            exists = emit.less(column, columns)
            column = arith.select(exists, column, emit.const(0))
        pieces.append(_Piece(column=column, exists=exists, row_bytes=rows * BLOCK))
    return pieces


def _present(rows: Any) -> Any:
    """How many rows hold a token."""
    count = emit.const(0)
    for m in range(0, ir.MemRefType(rows.type).shape[0], 4):
        for row in emit.load_words(emit.pointer(rows, 4 * m), 4):
            missing = emit.shift_right(row, 31)
            count = emit.add(count, arith.subi(emit.const(1), missing))
    return count


def _gated_words(line: Any, column: Any, parts: int, part_bytes: int) -> list[Any]:
    """Four words of bfloat16: eight columns are sixteen sums, eight of gate and eight of up."""
    start = emit.move(line, emit.mul(column, 2 * 4))
    totals: list[Any] = []
    for part in range(parts):
        there = emit.move(start, part * part_bytes)
        words = [
            emit.as_f32(word)
            for quarter in range(4)
            for word in emit.load_words(emit.move(there, 16 * quarter), 4)
        ]
        totals = [arith.addf(t, w) for t, w in zip(totals, words, strict=True)] if part else words
    gates, ups = totals[:_EIGHT], totals[_EIGHT:]
    gated = [arith.mulf(emit_silu(g), u) for g, u in zip(gates, ups, strict=True)]
    return [emit.to_bf16_pair(*gated[i : i + 2]) for i in range(0, _EIGHT, 2)]


def _emit_limbs(rows: Any, limbs: Any, scale: Any) -> None:
    count, pieces = _present(rows), _pieces(limbs)

    def read(m: Any, piece: _Piece) -> list[Any]:
        return emit.load_words(emit.pointer(limbs, piece.raw(m)), 4)

    def find_largest(m: Any) -> None:
        largest = emit.const(0)
        for piece in pieces:
            of_piece = emit.const(0)
            for word in read(m, piece):
                of_piece = _max_of_halves(of_piece, emit.and_(word, 0x7FFF7FFF))
            if piece.exists is not None:
                of_piece = arith.select(piece.exists, of_piece, emit.const(0))
            largest = _max_of_halves(largest, of_piece)
        largest = arith.maxui(emit.shift_right(largest, 16), emit.and_(largest, 0xFFFF))
        largest = emit.reduce_of_warp("max", largest)
        place = emit.add(emit.mul(m, 4 * SCALE_WORDS), emit.mul(emit.warp(), 4))
        emit.store_words(emit.pointer(scale, emit.add(place, 16)), [largest])

    def split(m: Any) -> None:
        of_row = emit.pointer(scale, emit.mul(m, 4 * SCALE_WORDS))
        largest = emit.const(0)
        for part in emit.load_words(emit.move(of_row, 16), 4):
            largest = arith.maxui(largest, part)
        exponent = emit.add(emit.shift_right(largest, 7), -_HIGHEST_EXPONENT)
        exponent = arith.maxsi(exponent, emit.const(_BIAS + _LEAST_EXPONENT))
        inverse = arith.subi(emit.const(2 * _BIAS), exponent)
        inverse = emit.as_f32(emit.shift_right(inverse, -23))
        for piece in pieces:
            words = read(m, piece)
            emit.asm("bar.warp.sync 0xffffffff;", "~{memory}", [], effects=True)
            when(piece.exists, partial(_store, m, piece, words, inverse))
        power = emit.shift_right(exponent, -23)
        emit.store_words(of_row, [power])  # every thread the same

    def _store(m: Any, piece: _Piece, words: list[Any], inverse: Any) -> None:
        high, low = _limbs_of_eight(words, inverse)
        where = emit.pointer(limbs, piece.high(m))
        emit.store_words(where, high)
        emit.store_words(emit.move(where, BLOCK), low)

    loop(0, count, 1, find_largest)
    emit.barrier()
    loop(0, count, 1, split)
    emit.commit_shared()


def _max_of_halves(a: Any, b: Any) -> Any:
    return emit.asm("max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], emit.i32_type())


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


def _limbs_of_eight(words: list[Any], inverse: Any) -> tuple[list[Any], list[Any]]:
    pairs = [
        emit.asm(_LIMBS_OF_PAIR, "=r,f,f,f", [*emit.bf16_pair(word), inverse], emit.i32_type())
        for word in words
    ]
    highs = [emit.permute_bytes(pairs[i], pairs[i + 1], 0x5410) for i in (0, 2)]
    lows = [emit.permute_bytes(pairs[i], pairs[i + 1], 0x7632) for i in (0, 2)]
    return highs, lows
