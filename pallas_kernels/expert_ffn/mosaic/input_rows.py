"""A tile's rows of the input, from global memory to limbs in shared memory.

The rows of a tile that hold a token come first; the limbs of others are undefined.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.expert_ffn.mosaic.limbs import (
    Piece,
    emit_limbs,
    pieces_of,
    store_limbs_twin,
)
from pallas_kernels.expert_ffn.mosaic.silu import emit_silu
from pallas_kernels.expert_ffn.mosaic.wgmma_step import BLOCK
from pallas_kernels.layout import padded_columns
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.loops import loop_once, when
from pallas_kernels.mosaic.presence import emit_await_fours
from pallas_kernels.mosaic.target import interpreting

_EIGHT = 8
"""Columns of a piece of bfloat16: 16 bytes."""
_TWO = 2
"""Units of a piece of sums: 16 bytes of gate, up, gate, up."""


def fetch_rows(
    x: Any, rows: Any, limbs: Any, scale: Any, *, most: int, divisor: int, first: Any
) -> None:
    """Starts to bring rows ``rows[m] // divisor``, from column ``first`` on; see ``make_limbs``.

    x bfloat16 [R, K] in global memory; limbs e4m3 [columns/16, 2M, 16], columns a multiple of 128,
    scale float32 [M, SCALE_WORDS] and rows int32 [M] in shared memory, M a multiple of 4, of which
    at least one and at most ``most`` hold a token. In interpret mode, limbs and scale are made at
    once.
    """
    if interpreting():
        for m in range(scale.shape[0]):
            row = rows[m]
            values = x[jnp.maximum(row, 0) // divisor, pl.ds(first, limbs.shape[0] * BLOCK)]
            store_limbs_twin(limbs, scale, m, jnp.where(row < 0, 0, values.astype(jnp.float32)))
        return

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 3, plgpu.Layout.WG_SPLAT))
    def run(ctx: Any, x: Any, rows: Any, limbs: Any, first: Any) -> None:
        del ctx
        stride = 2 * ir.MemRefType(x.type).shape[1]
        start = emit.move(emit.pointer(x), emit.mul(emit.scalar(first), 2))

        def bring(m: Any) -> None:
            (row,) = emit.load_words(emit.pointer(rows, emit.mul(m, 4)), 1)
            line = emit.move64(start, arith.divui(row, emit.const(divisor)), stride)
            for piece in pieces_of(limbs, _EIGHT):
                source = emit.move(emit.move(line, emit.mul(piece.own, 2)), 2 * piece.start)
                emit.copy_async(piece.raw_pointer(limbs, m), source)

        _for_rows(rows, most, bring)

    run(x, rows, limbs, jnp.asarray(first, jnp.int32))


def make_limbs(rows: Any, limbs: Any, scale: Any, *, most: int) -> None:
    """Waits for the rows that this thread brings, and turns them into limbs and their scale.

    The first word of each row of ``scale`` counts. Ends with a barrier of the warpgroup.
    """
    if interpreting():
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
    def run(ctx: Any, rows: Any, limbs: Any, scale: Any) -> None:
        del ctx
        emit.wait_for_copies()
        pieces = pieces_of(limbs, _EIGHT)

        def do(m: Any) -> None:
            words = [emit.load_words(piece.raw_pointer(limbs, m), 4) for piece in pieces]
            values = [[v for word in of for v in emit.bf16_pair(word)] for of in words]
            emit_limbs(limbs, scale, m, pieces, values)

        _for_rows(rows, most, do)
        emit.commit_shared()

    run(rows, limbs, scale)


def load_gated(
    sums: Any, rows: Any, limbs: Any, scale: Any, *, most: int, parts: int, tile: Any, width: int,
    wait: bool,
) -> None:  # fmt: skip
    """``silu(gate) * up`` of a tile's sums as limbs, rounded to bfloat16.

    sums float32 [I, M, parts N], of the gate_up matmul, whose parts are added first, each in the
    order of ``store_sums``; the rest as in ``fetch_rows``, for ``width`` columns padded to chunks.
    ``wait``: for sums to be there, which say so themselves (``mosaic/presence.py``); ``most`` is 1.
    Ends with a barrier of the warpgroup.
    """
    if interpreting():
        for m in range(scale.shape[0]):
            total, *others = jnp.split(sums[tile, m, :], parts)
            for part in others:
                total = total + part
            gate, up = total[: 2 * width].reshape(-1, 2).T
            gated = jnp.pad(jax.nn.silu(gate) * up, (0, padded_columns(width) - width))
            gated = lax.reduce_precision(gated, 8, 7)
            store_limbs_twin(limbs, scale, m, jnp.where(rows[m] < 0, 0, gated))
        return

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 4, plgpu.Layout.WG_SPLAT))
    def run(ctx: Any, sums: Any, rows: Any, limbs: Any, scale: Any, tile: Any) -> None:
        del ctx
        _, count, columns = ir.MemRefType(sums.type).shape
        start = emit.move64(emit.pointer(sums), emit.scalar(tile), 4 * count * columns)
        pieces = pieces_of(limbs, _TWO)

        def load(m: Any) -> list[list[list[Any]]]:
            line = emit.move(start, emit.mul(m, 4 * columns))
            places = [
                place
                for piece in pieces
                for place in _parts_of(line, piece, width, parts, columns // parts)
            ]
            if wait:
                flat = emit_await_fours(places)
            else:
                flat = [word for place in places for word in emit.load_words(place, 4)]
            fours = [flat[i : i + 4] for i in range(0, len(flat), 4)]
            return [fours[i : i + parts] for i in range(0, len(fours), parts)]

        def finish(m: Any, words: list[list[list[Any]]]) -> None:
            values = [
                _gated(piece, of_piece, width)
                for piece, of_piece in zip(pieces, words, strict=True)
            ]
            emit_limbs(limbs, scale, m, pieces, values)

        _for_pairs_of_rows(rows, most, load, finish)
        emit.commit_shared()

    run(sums, rows, limbs, scale, jnp.asarray(tile, jnp.int32))


def _parts_of(line: Any, piece: Piece, width: int, parts: int, columns: int) -> list[Any]:
    """Where each part has four words: gate and up of two units."""
    own = piece.own
    if (within := _within(piece, width)) is not None:
        own = arith.select(within, own, emit.const(0))
    where = emit.move(emit.move(line, emit.mul(own, 2 * 4)), piece.start * 2 * 4)
    return [emit.move(where, part * 4 * columns) for part in range(parts)]


def _gated(piece: Piece, words: list[list[Any]], width: int) -> list[Any]:
    """The two values, float32 that are bfloat16."""
    first, *others = ([emit.as_f32(word) for word in of_part] for of_part in words)
    for part in others:
        first = [arith.addf(total, sums) for total, sums in zip(first, part, strict=True)]
    values = []
    for gate, up in (first[:2], first[2:]):
        value = arith.mulf(emit_silu(gate), up)
        word = emit.to_bf16_pair(emit.const_f32(0.0), value)
        if (within := _within(piece, width)) is not None:
            word = arith.select(within, word, emit.const(0))
        values.append(emit.as_f32(word))
    return values


def _within(piece: Piece, width: int) -> Any:
    """Whether the piece is not padding; None: always."""
    if piece.start + emit.WARPGROUP * _TWO <= width:
        return None
    return emit.less(piece.own, width - piece.start)


def _for_rows(rows: Any, most: int, body: Callable[[Any], None]) -> None:
    """``body(m)`` for each row that holds a token."""
    if most == 1:
        body(emit.const(0))
    else:
        loop_once(_present(rows), 1, body)


def _for_pairs_of_rows(
    rows: Any, most: int, load: Callable[[Any], Any], finish: Callable[[Any, Any], None]
) -> None:
    """``finish(m, load(m))`` for each row that holds a token; two are loaded at once."""
    if most == 1:
        finish(emit.const(0), load(emit.const(0)))
        return
    count = _present(rows)

    def two(m: Any) -> None:
        words = load(m)
        second = emit.add(m, 1)
        exists = emit.less(second, count)
        second = arith.select(exists, second, m)
        others = load(second)
        finish(m, words)
        when(exists, partial(finish, second, others))

    loop_once(count, 2, two)


def _present(rows: Any) -> Any:
    """How many rows hold a token."""
    count = emit.const(0)
    for m in range(0, ir.MemRefType(rows.type).shape[0], 4):
        for row in emit.load_words(emit.pointer(rows, 4 * m), 4):
            missing = emit.shift_right(row, 31)
            count = emit.add(count, arith.subi(emit.const(1), missing))
    return count
