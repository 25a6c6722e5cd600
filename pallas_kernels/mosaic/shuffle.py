"""Values that cross the lanes of a warp: see ``emit``, whose rules hold here too."""

from typing import Any

from jaxlib.mlir.dialects import arith

from pallas_kernels.mosaic import emit


def sum_of_warp(value: Any) -> Any:
    """Sum of a float32 over the lanes of the warp, the same in each; always in the same order."""
    for distance in (16, 8, 4, 2, 1):
        text = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, 0xffffffff;"
        other = emit.asm(text, "=f,f", [value], emit.f32_type(), effects=True)
        value = arith.addf(value, other)
    return value


def shuffle_xor(value: Any, distance: int) -> Any:
    """The float32 of the lane whose number differs by ``distance`` (a power of two)."""
    text = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, 0xffffffff;"
    return emit.asm(text, "=f,f", [value], emit.f32_type(), effects=True)


def from_lane(value: Any, lane: Any) -> Any:
    """The float32 that a lane holds; ``lane``: int or register."""
    lane = emit.const(lane) if isinstance(lane, int) else lane
    text = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"
    return emit.asm(text, "=f,f,r", [value, lane], emit.f32_type(), effects=True)


def from_quad(value: Any, place: int) -> Any:
    """The float32 that lane ``place`` of each four lanes holds, for all four."""
    text = f"shfl.sync.idx.b32 $0, $1, {place}, 0x1c1f, 0xffffffff;"
    return emit.asm(text, "=f,f", [value], emit.f32_type(), effects=True)


def max_of_warp(value: Any) -> Any:
    """Largest of a float32 over the lanes of the warp, the same in each."""
    for distance in (16, 8, 4, 2, 1):
        value = emit.max_f32(value, shuffle_xor(value, distance))
    return value


def reduce_of_warp(operation: str, value: Any) -> Any:
    """ "max", "min" or "add" of an unsigned word over the lanes of the warp, the same in each."""
    text = f"redux.sync.{operation}.u32 $0, $1, 0xffffffff;"
    return emit.asm(text, "=r,r", [value], emit.i32_type(), effects=True)
