"""A tile's sums to rows of the result, as bfloat16.

Sums y [64, n] are in the layout of wgmma's accumulators: lane 4 g + t of a warp holds weight rows
16 warp + g and 16 warp + 8 + g at columns 8 j + 2 t and + 1, which are rows of the input. Lanes
swap halves, so that each stores neighbouring columns of one row. Rows past the tile's last belong
to another tile, and are not written.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.expert_ffn.mosaic.silu import emit_silu
from pallas_kernels.expert_ffn.mosaic_prefill.chunk import ACCUMULATORS, _unpack, in_pair_order
from pallas_kernels.layout import ROW_TILE
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.target import interpreting
from pallas_kernels.pages import GATE_UP_ROWS

_SWAP_NEIGHBOURS = (0x5410, 0x3276)
"""Of (own pair, the neighbour's): both low halves for an even g, both high ones for an odd g."""


def store_gated(y: jax.Array, factor: Any, out: Any, tile: Any, first: Any, count: Any) -> None:
    """``silu(gate) * up`` of a tile of gate_up to out bfloat16 [R, F], columns in pair order.

    Rows ``first`` to ``first + count``, columns 32 tile to 32 tile + 31; factor float32 []
    multiplies the sums.
    """
    if interpreting():
        pairs = (y * factor).reshape(-1, 2, GATE_UP_ROWS, y.shape[1])
        gated = jax.nn.silu(pairs[:, 0]) * pairs[:, 1]
        gated = in_pair_order(gated.reshape(ROW_TILE // 2, -1).T)
        _store_twin(gated, out, ROW_TILE // 2 * tile, first, count)
        return

    def emit_column(sums: list[Any], lanes: "_Lanes") -> None:
        gate, up = sums[:2], sums[2:]
        gated = [arith.mulf(emit_silu(g), u) for g, u in zip(gate, up, strict=True)]
        lanes.store(0, [lanes.swap_neighbours(gated)])

    def column(tile: Any, warp: Any, g: Any) -> Any:
        # of f = 32 tile + 8 warp + (g & ~1), in pair order
        block = emit.add(emit.mul(tile, 2), emit.shift_right(warp, 1))
        lane = emit.add(emit.mul(emit.and_(warp, 1), 2), emit.shift_right(g, 2))
        pair = emit.and_(emit.shift_right(g, 1), 1)
        return emit.add(emit.mul(block, 16), emit.add(emit.mul(pair, 8), emit.mul(lane, 2)))

    _emit(y, factor, out, tile, first, count, column, emit_column)


def store_rows(y: jax.Array, factor: Any, out: Any, tile: Any, first: Any, count: Any) -> None:
    """A tile of down to out bfloat16 [R, H], columns 64 tile to 64 tile + 63; as above."""
    if interpreting():
        _store_twin((y * factor).T, out, ROW_TILE * tile, first, count)
        return

    def emit_column(sums: list[Any], lanes: "_Lanes") -> None:
        low, high = lanes.swap_neighbours(sums[:2]), lanes.swap_neighbours(sums[2:])
        sent = arith.select(lanes.is_second, low, high)
        received = _shuffle(sent, 8)
        words = [
            arith.select(lanes.is_second, received, low),
            arith.select(lanes.is_second, high, received),
        ]
        lanes.store(0, words)

    def column(tile: Any, warp: Any, g: Any) -> Any:
        second = emit.mul(emit.and_(emit.shift_right(g, 1), 1), 8)
        inside = emit.add(emit.mul(warp, 16), emit.add(second, emit.and_(g, 4)))
        return emit.add(emit.mul(tile, ROW_TILE), inside)

    _emit(y, factor, out, tile, first, count, column, emit_column)


def _store_twin(values: jax.Array, out: Any, column: Any, first: Any, count: Any) -> None:
    height, width = values.shape
    place = (pl.ds(first, height), pl.ds(column, width))
    mine = jnp.arange(height)[:, None] < count
    out[place] = jnp.where(mine, values.astype(out.dtype), out[place])


class _Lanes:
    """What a thread does with the sums of one column tile."""

    def __init__(self, out: Any, column: Any, first: Any, count: Any) -> None:
        lane = emit.lane()
        g, t = emit.shift_right(lane, 2), emit.and_(lane, 3)
        is_odd = arith.cmpi(arith.CmpIPredicate.ne, emit.and_(g, 1), emit.const(0))
        self.is_second = arith.cmpi(arith.CmpIPredicate.ne, emit.and_(g, 2), emit.const(0))
        self.selector = arith.select(is_odd, *map(emit.const, reversed(_SWAP_NEIGHBOURS)))
        row = emit.add(emit.mul(t, 2), emit.and_(g, 1))
        self.stride = 2 * ir.MemRefType(out.type).shape[1]
        line = emit.move64(emit.pointer(out), emit.add(row, first), self.stride)
        self.start = emit.move(line, emit.mul(column, 2))
        self.left = arith.subi(count, row)
        self.j = 0

    def swap_neighbours(self, pair: list[Any]) -> Any:
        """Sums of two rows at one column to those of one row at two columns, as bfloat16."""
        own = emit.asm(
            "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", [pair[1], pair[0]], emit.i32_type()
        )
        return emit.permute_bytes(own, _shuffle(own, 4), self.selector)

    def store(self, offset: int, words: list[Any]) -> None:
        where = emit.move(self.start, 8 * self.j * self.stride + offset)
        vector, names = (".v2", "{$1,$2}") if len(words) == 2 else ("", "$1")
        limit, place = len(words) + 1, 8 * self.j
        emit.asm(
            "{ .reg .pred p; "
            f"setp.gt.s32 p, ${limit}, {place}; @p st.global{vector}.b32 [$0], {names}; }}",
            ",".join(["l", *["r"] * limit]),
            [where, *words, self.left],
            effects=True,
        )


def _shuffle(value: Any, distance: int) -> Any:
    return emit.asm(
        f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, 0xffffffff;",
        "=r,r",
        [value],
        emit.i32_type(),
        effects=True,
    )


def _emit(
    y: Any, factor: Any, out: Any, tile: Any, first: Any, count: Any, column: Any,
    emit_column: Any,
) -> None:  # fmt: skip
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(ACCUMULATORS, splat, plgpu.RefType(), splat, splat, splat))
    def run(ctx: Any, y: Any, factor: Any, out: Any, tile: Any, first: Any, count: Any) -> None:
        del ctx
        tile, first, count = map(emit.scalar, (tile, first, count))
        of_lane = column(tile, emit.warp(), emit.shift_right(emit.lane(), 2))
        lanes = _Lanes(out, of_lane, first, count)
        sums = _unpack(y)  # [column tile][half][2]
        for index in range(0, len(sums), 4):
            lanes.j = index // 4
            scaled = [arith.mulf(s, emit.scalar(factor)) for s in sums[index : index + 4]]
            emit_column(scaled, lanes)

    run(y, factor, out, tile, first, count)
