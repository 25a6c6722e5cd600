"""The input of a few rows: all of its columns in shared memory, made float16 on the way."""

from collections.abc import Callable
from typing import Any, Final

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels.expert_ffn.mosaic_mma.rows import RowSource, Share
from pallas_kernels.expert_ffn.mosaic_mma.scaled import emit_halves, emit_scale, row_scale
from pallas_kernels.layout import padded_columns
from pallas_kernels.mosaic import emit, shuffle
from pallas_kernels.mosaic.target import interpreting

_EIGHT: Final = 8
"""Columns that a lane reads side by side."""
_WARPS: Final = 4
"""Of a warpgroup."""


def load_resident(
    source: RowSource, x: Any, assignment: Any, tile: Any, halves: Any, scale: Any,
    *, columns: int, share: Share,
) -> None:  # fmt: skip
    """Rows of a tile to ``halves`` float16 [M, padded columns + spare] and ``scale`` float32 [M].

    x bfloat16 or float32 [R, >= columns] in global memory, its rows aligned to 16 bytes; columns a
    multiple of 8; M a multiple of the warps of all warpgroups, which share the work. Empty rows and
    the padding give zeros. The caller waits for the other warpgroups.
    """
    padded = padded_columns(columns)
    if interpreting():
        row, present = source.twin(assignment, tile)
        values = x[...][row, :columns].astype(jnp.float32)
        values = jnp.where(present[:, None], values, 0)
        power = row_scale(values)
        scaled = jnp.pad(values / power[:, None], ((0, 0), (0, padded - columns)))
        halves[:, pl.ds(0, padded)] = scaled.astype(jnp.float16)
        scale[...] = power
        return
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 4, splat, splat))
    def run(
        ctx: Any, x: Any, assignment: Any, halves: Any, scale: Any, tile: Any, warpgroup: Any
    ) -> None:
        del ctx
        (count,) = ir.MemRefType(scale.type).shape
        first = emit.add(emit.mul(emit.scalar(warpgroup), _WARPS), emit.warp())
        for start in range(0, count, _WARPS * share.warpgroups):
            m = emit.add(first, start)
            row, present = source.emit(assignment, emit.scalar(tile), m)
            where = emit.pointer(halves, emit.mul(m, _row_bytes(halves)))
            where_scale = emit.pointer(scale, emit.mul(m, 4))
            branch = scf.IfOp(present, has_else=True)
            with ir.InsertionPoint(branch.then_block):
                _emit_row(_reader(x, row), columns, padded, where, where_scale)
                scf.yield_([])
            with ir.InsertionPoint(branch.else_block):
                zeros = [emit.const(0)] * 4
                for chunk, column in _columns_of_lane(padded):
                    _store_eight(where, chunk, column, padded, zeros)
                emit.store_words(where_scale, zeros[:1])
                scf.yield_([])

    run(x, assignment, halves, scale, tile, jnp.asarray(share.warpgroup, jnp.int32))


def _row_bytes(ref: Any) -> int:
    kind = ir.MemRefType(ref.type)
    return kind.shape[-1] * kind.element_type.width // 8


def _reader(x: Any, row: Any) -> Callable[[Any], list[Any]]:
    """Reads eight columns of a row, from a given one on, as float32."""
    line = emit.move64(emit.pointer(x), row, _row_bytes(x))
    if ir.MemRefType(x.type).element_type.width == 32:

        def read_floats(column: Any) -> list[Any]:
            at = emit.move(line, emit.mul(column, 4))
            words = [word for k in range(2) for word in emit.load_words(emit.move(at, 16 * k), 4)]
            return [emit.as_f32(word) for word in words]

        return read_floats

    def read_bfloats(column: Any) -> list[Any]:
        words = emit.load_words(emit.move(line, emit.mul(column, 2)), 4)
        return [
            emit.as_f32(half)
            for word in words
            for half in (emit.shift_right(word, -16), emit.and_(word, 0xFFFF0000))
        ]

    return read_bfloats


def _emit_row(
    read_eight: Callable[[Any], list[Any]], columns: int, padded: int, where: Any, where_scale: Any
) -> None:
    vectors = []
    largest = emit.const_f32(0.0)
    for start, column in _columns_of_lane(padded):
        if start + 32 * _EIGHT <= columns:
            values = read_eight(column)
        else:
            beyond = arith.cmpi(arith.CmpIPredicate.uge, column, emit.const(columns))
            values = read_eight(arith.select(beyond, emit.const(0), column))
            values = [arith.select(beyond, emit.const_f32(0.0), value) for value in values]
        vectors.append((start, column, values))
    for _, _, values in vectors:
        for value in values:
            largest = emit.max_magnitude(largest, value)
    largest = shuffle.reduce_of_warp("max", emit.bits_of(largest))
    scale, inverse = emit_scale(emit.as_f32(largest))
    for start, column, values in vectors:
        _store_eight(where, start, column, padded, emit_halves(values, inverse))
    emit.store_words(where_scale, [scale])  # every lane the same


def _columns_of_lane(padded: int) -> list[tuple[int, Any]]:
    """(first column of all lanes, first of this lane's eight) of each access to a row."""
    mine = emit.mul(emit.lane(), _EIGHT)
    return [(start, emit.add(mine, start)) for start in range(0, padded, 32 * _EIGHT)]


def _store_eight(row: Any, start: int, column: Any, padded: int, halves: list[Any]) -> None:
    where = emit.move(row, emit.mul(column, 2))
    if start + 32 * _EIGHT <= padded:
        emit.store_words(where, halves)
        return
    branch = scf.IfOp(arith.cmpi(arith.CmpIPredicate.ult, column, emit.const(padded)))
    with ir.InsertionPoint(branch.then_block):
        emit.store_words(where, halves)
        scf.yield_([])
