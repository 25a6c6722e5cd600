"""The input of many rows: float16 already, its chunks streamed through a ring of shared memory.

Asynchronous copies of 16 bytes (cp.async) fill a slot of one chunk of all rows while earlier slots
are multiplied; all warpgroups of the block share the slots.
"""

from typing import Any, Final

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels.expert_ffn.mosaic_mma.rows import RowSource, Share
from pallas_kernels.layout import CHUNK
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.target import interpreting

_PIECE_BYTES: Final = 16
_PIECES_OF_ROW: Final = 2 * CHUNK // _PIECE_BYTES


def load_rows(
    source: RowSource, x_scale: Any, assignment: Any, tile: Any, rows: Any, scale: Any
) -> None:
    """Row of the input, or -1, and its scale, or 0, for each row of a tile: int32 and float32 [M].

    M is at most 128; every warpgroup writes the same. The caller waits for all.
    """
    if interpreting():
        row, present = source.twin(assignment, tile)
        rows[...] = jnp.where(present, row, -1)
        scale[...] = jnp.where(present, x_scale[...][row], 0)
        return

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 4, plgpu.Layout.WG_SPLAT))
    def run(ctx: Any, x_scale: Any, assignment: Any, rows: Any, scale: Any, tile: Any) -> None:
        del ctx
        (count,) = ir.MemRefType(scale.type).shape
        m = emit.thread()
        branch = scf.IfOp(arith.cmpi(arith.CmpIPredicate.ult, m, emit.const(count)))
        with ir.InsertionPoint(branch.then_block):
            row, present = source.emit(assignment, emit.scalar(tile), m)
            (value,) = emit.load_words(emit.pointer(x_scale, emit.mul(row, 4)), 1)
            value = arith.select(present, value, emit.const(0))
            row = arith.select(present, row, emit.const(-1))
            place = emit.mul(m, 4)
            emit.store_words(emit.pointer(rows, place), [row])
            emit.store_words(emit.pointer(scale, place), [value])
            scf.yield_([])

    run(x_scale, assignment, rows, scale, tile)


def start_copy(x: Any, rows: Any, slot: Any, chunk: Any, valid: Any, share: Share) -> None:
    """Starts to copy chunk ``chunk`` of the rows; one group of copies, empty unless ``valid``.

    x float16 [R, K], K a multiple of 128, in global memory; rows int32 [M] and slot float16
    [M, 128 + spare] in shared memory. Rows of -1 give zeros.
    """
    if interpreting():
        row, columns = rows[...], pl.ds(jnp.where(valid, chunk, 0) * CHUNK, CHUNK)
        values = jnp.where(row[:, None] < 0, 0, x[:, columns][jnp.maximum(row, 0)])
        slot[:, pl.ds(0, CHUNK)] = jnp.where(valid, values, jnp.nan)
        return
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 3, splat, splat, splat))
    def run(ctx: Any, x: Any, rows: Any, slot: Any, chunk: Any, valid: Any, warpgroup: Any) -> None:
        del ctx
        columns = ir.MemRefType(x.type).shape[1]
        count, width = ir.MemRefType(slot.type).shape
        threads = share.warpgroups * emit.WARPGROUP
        thread = emit.add(emit.mul(emit.scalar(warpgroup), emit.WARPGROUP), emit.thread())
        within = emit.mul(emit.and_(thread, _PIECES_OF_ROW - 1), _PIECE_BYTES)
        first = emit.shift_right(thread, _PIECES_OF_ROW.bit_length() - 1)
        start = emit.move(emit.pointer(x), emit.mul(emit.scalar(chunk), 2 * CHUNK))
        start = emit.move(start, within)
        target = emit.add(emit.shared_address(slot), within)
        for piece in range(count * _PIECES_OF_ROW // threads):
            m = emit.add(first, piece * threads // _PIECES_OF_ROW)
            (row,) = emit.load_words(emit.pointer(rows, emit.mul(m, 4)), 1)
            absent = arith.cmpi(arith.CmpIPredicate.slt, row, emit.const(0))
            there = emit.move64(start, arith.select(absent, emit.const(0), row), 2 * columns)
            size = arith.select(absent, emit.const(0), emit.const(_PIECE_BYTES))
            here = emit.add(target, emit.mul(m, 2 * width))
            emit.asm(_COPY, "r,l,r,r", [here, there, size, emit.scalar(valid)], effects=True)
        emit.asm("cp.async.commit_group;", "", [], effects=True)

    run(
        x,
        rows,
        slot,
        chunk,
        jnp.asarray(valid, jnp.int32),
        jnp.asarray(share.warpgroup, jnp.int32),
    )


_COPY: Final = (
    "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p cp.async.cg.shared.global [$0], [$1], 16, $2; }"
)


def wait_copies(pending: int) -> None:
    """Until at most ``pending`` of this thread's groups of copies are under way."""
    if interpreting():
        return

    @plgpu.inline_mgpu()
    def run(ctx: Any) -> None:
        del ctx
        emit.asm(f"cp.async.wait_group {pending};", "", [], effects=True)

    run()
