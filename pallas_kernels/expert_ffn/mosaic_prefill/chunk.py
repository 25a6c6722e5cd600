"""One chunk of 128 columns on Hopper's tensor cores: weights as bfloat16 fragments in registers.

A warpgroup owns a tile of 64 rows of weights. It decodes half a chunk while the tensor cores work
on the half before: an instruction takes 16 columns, A from registers, and B, rows of the input,
from shared memory. The weight and its scale are multiplied first and rounded to bfloat16, so that
one accumulator runs over all of K. The rounding is a relative error of at most 2**-8 a weight,
1.7e-3 on average (root of the mean square), without bias; for normal weights the 8-bit level itself
errs by 1.3e-2. A log8 scale is rounded once more by itself.

An instruction's 16 columns are, in the order of A's registers, k = 4 t + (0, 1) for all lanes t and
then k = 4 t + (2, 3): inputs come with each 16 columns in that order (``in_pair_order``).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.expert_ffn.mosaic.wgmma_step import StepConfig, _decode
from pallas_kernels.expert_ffn.mosaic_prefill.pairs import (
    REGISTERS,
    PairTables,
    decode_half_chunk,
    scale_pair,
)
from pallas_kernels.layout import CHUNK, ROW_TILE
from pallas_kernels.levels import PAGES_OF_BITS, Bits, LevelTable
from pallas_kernels.mosaic import emit
from pallas_kernels.scales import LOG8_STEPS_PER_OCTAVE

ACCUMULATORS = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 8), (16, 8), (8, 8), (2,), (1,))),
    warp_dims=(-8,),
    lane_dims=(-4, -3),
    vector_dim=-1,
)
"""Of sums float32 [64, n], one a register: pairs of them would be torn apart at every wgmma."""
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
"""How the input lies in shared memory."""

_K_STEP = 16
_HALF = CHUNK // 2
_FRAGMENT = 4 * REGISTERS
"""Registers of A that half a chunk takes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkConfig:
    """What the code of a step depends on; hashable."""

    bits: Bits
    chunks: int
    """v: chunks of a step."""
    height: int
    """Rows of the input: n of the instruction."""
    group_size: int
    table: LevelTable
    log8: bool

    @property
    def planes(self) -> int:
        """Planes that an expert holds."""
        return 2 * PAGES_OF_BITS[self.bits]

    @property
    def width(self) -> int:
        """Chunks whose words are read from shared memory together."""
        return min(self.chunks, 2 if self.bits < 8 else 1)


def in_pair_order(x: jax.Array) -> jax.Array:
    """Columns of [*S, K] in the order that the kernels want."""
    sixteens = x.reshape(*x.shape[:-1], -1, 4, 2, 2)
    return jnp.swapaxes(sixteens, -3, -2).reshape(x.shape)


def from_pair_order(x: jax.Array) -> jax.Array:
    """The inverse of ``in_pair_order``."""
    sixteens = x.reshape(*x.shape[:-1], -1, 2, 4, 2)
    return jnp.swapaxes(sixteens, -3, -2).reshape(x.shape)


def zero_sums(height: int) -> jax.Array:
    """Sums float32 [64, height] to start with."""
    return plgpu.layout_cast(jnp.zeros((ROW_TILE, height), jnp.float32), ACCUMULATORS)


def step_twin(
    config: ChunkConfig, y: jax.Array, pages: list[Any], scales: Any, chunk: int, x: jax.Array
) -> jax.Array:
    """What the kernel adds for one chunk of a step, in plain jnp; x [n, 128] in pair order."""
    whole = StepConfig(
        bits=config.bits,
        side_by_side=config.chunks,
        chunks=config.chunks,
        group_size=config.group_size,
        columns=0,
        table=config.table,
        log8=config.log8,
    )
    planes = [plane for page in pages for plane in page[...].reshape(2, 2, 4, 8, 4, -1)]
    weights = _decode(planes, whole)
    scale = scales[...].astype(jnp.float32)  # [groups, 64]
    if config.log8:
        scale = jnp.exp2(scale * (-1 / LOG8_STEPS_PER_OCTAVE))
    scale = _rounded(scale).T.repeat(config.group_size, axis=1)
    weights = _rounded(_rounded(weights) * scale)[:, chunk * CHUNK : (chunk + 1) * CHUNK]
    rows = from_pair_order(x).astype(jnp.float32)
    return y + jnp.dot(weights, rows.T, precision=lax.Precision.HIGHEST)


def _rounded(x: jax.Array) -> jax.Array:
    return lax.reduce_precision(x, 8, 7)


def start_step(config: ChunkConfig, pages: Sequence[Any], scales: Any) -> tuple[Any, Any]:
    """(fragment of the first half chunk, words of the first chunks) of a step, in registers.

    pages: refs of shared memory, uint32 [2v, 256] each; scales [groups, 64].
    """
    refs = (plgpu.RefType(),) * (len(pages) + 1)
    types = (_registers_type(_FRAGMENT), _registers_type(_word_count(config)))

    @plgpu.inline_mgpu(arg_types=refs, return_type=types)
    def run(ctx: Any, *refs: Any) -> Any:
        del ctx
        *pages, scales = refs
        words = _load_words(config, pages, 0)
        return _pack(_fragment(config, words, scales, 0, 0)), _pack(words)

    return run(*pages, scales)


def multiply_chunk(
    config: ChunkConfig, chunk: int, y: jax.Array, fragment: Any, words: Any,
    pages: Sequence[Any], scales: Any, x: Any,
) -> tuple[jax.Array, Any, Any]:  # fmt: skip
    """y + W x of one chunk of a step, and (fragment, words) for the next.

    y float32 [64, n]; x bfloat16 [n, 128] in shared memory, which is free again afterwards.
    """
    held = (_registers_layout(_FRAGMENT), _registers_layout(_word_count(config)))
    refs = (plgpu.RefType(),) * (len(pages) + 1)
    sums = plgpu.ShapeDtypeStruct((ROW_TILE, config.height), jnp.float32, layout=ACCUMULATORS)
    results = (sums, _registers_type(_FRAGMENT), _registers_type(_word_count(config)))

    @plgpu.inline_mgpu(
        arg_types=(ACCUMULATORS, *held, *refs, plgpu.RefType(SWIZZLED)), return_type=results
    )
    def run(ctx: Any, y: Any, fragment: Any, words: Any, *refs: Any) -> Any:
        del ctx
        *pages, scales, x = refs
        sums, a, words = _unpack(y), _unpack(fragment), _unpack(words)
        descriptor = _descriptor(x)
        sums = _issue(config, sums, a, descriptor, 0)
        b = _fragment(config, words, scales, chunk, 1)
        sums = _issue(config, sums, b, descriptor, _HALF)
        # the first half has been multiplied, so its fragment's registers may be written
        sums, _ = _wait(1, sums, [])
        after = chunk + 1
        if after < config.chunks:
            if after % config.width == 0:
                words = _load_words(config, pages, after)
            a = _fragment(config, words, scales, after, 0)
        sums, a = _wait(0, sums, a)
        y = fa.FragmentedArray(
            _registers=_vectors(sums, emit.f32_type()).reshape(y.registers.shape),
            _layout=y.layout,
            _is_signed=None,
        )
        return y, _pack(a), _pack(words)

    return run(y, fragment, words, *pages, scales, x)


def _word_count(config: ChunkConfig) -> int:
    return 2 * config.planes * config.width


def _registers_layout(count: int) -> Any:
    return plgpu.Layout.WG_STRIDED((emit.WARPGROUP * count,), vec_size=1)


def _registers_type(count: int) -> Any:
    """``count`` 32-bit registers of each thread of the warpgroup."""
    shape = (emit.WARPGROUP * count,)
    return plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=_registers_layout(count))


def _vectors(values: list[Any], kind: Any) -> np.ndarray:
    one = ir.VectorType.get((1,), kind)
    return np.array([vector.from_elements(one, [value]) for value in values], dtype=object)


def _pack(values: list[Any]) -> Any:
    return fa.FragmentedArray(
        _registers=_vectors(values, emit.i32_type()),
        _layout=_registers_layout(len(values)).to_mgpu(),
        _is_signed=True,
    )


def _unpack(array: Any) -> list[Any]:
    return [vector.extract(register, [], [0]) for register in array.registers.flat]


def _load_words(config: ChunkConfig, pages: Sequence[Any], first: int) -> list[Any]:
    """Words of ``width`` chunks from ``first``: [plane][half][chunk], flattened."""
    v = config.chunks
    words = []
    at = emit.mul(emit.thread(), 4 * v)
    for page in pages:
        start = emit.pointer(page, at)
        for plane in range(2):
            for half in range(2):
                place = v * (2 * plane + half) * emit.WARPGROUP + first
                words += emit.load_words(emit.move(start, 4 * place), config.width)
    return words


def _fragment(
    config: ChunkConfig, words: list[Any], scales: Any, chunk: int, half: int
) -> list[Any]:
    """Registers of A for half a chunk: four for each 16 columns."""
    tables = PairTables.of(config.table)
    row = emit.add(emit.mul(emit.warp(), 16), emit.shift_right(emit.lane(), 2))  # and row + 8
    first = chunk * CHUNK + half * _HALF
    groups = [(first + _K_STEP * index) // config.group_size for index in range(REGISTERS)]
    by_half = []
    for row_half in range(2):
        planes = [
            words[(2 * plane + row_half) * config.width + chunk % config.width]
            for plane in range(config.planes)
        ]
        pairs = decode_half_chunk(tables, planes, half)
        scale_of = {g: _scale(config, scales, g, row, row_half) for g in sorted(set(groups))}
        by_half.append(
            [
                [scale_pair(pair, scale_of[group]) for pair in both]
                for both, group in zip(pairs, groups, strict=True)
            ]
        )
    return [
        by_half[row_half][register][pair]
        for register in range(REGISTERS)
        for pair in range(2)
        for row_half in range(2)
    ]


def _scale(config: ChunkConfig, scales: Any, group: int, row: Any, row_half: int) -> Any:
    """A group's scale as a pair of bfloat16."""
    place = group * ROW_TILE + 8 * row_half
    if not config.log8:
        half = emit.load_half(emit.move(emit.pointer(scales, emit.mul(row, 2)), 2 * place))
        return emit.permute_bytes(half, half, 0x1010)
    octaves = arith.mulf(
        arith.uitofp(emit.f32_type(), emit.load_byte(emit.move(emit.pointer(scales, row), place))),
        emit.const_f32(-1 / LOG8_STEPS_PER_OCTAVE),
    )
    scale = emit.asm("ex2.approx.f32 $0, $1;", "=f,f", [octaves], emit.f32_type())
    return emit.asm("cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", [scale, scale], emit.i32_type())


def _descriptor(x: Any) -> Any:
    """Of the input [n, 128], tiles of 8 rows by 64 columns swizzled over 128 bytes.

    The two tiles of eight rows lie side by side, 1024 bytes each.
    """
    strides, _ = ir.MemRefType(x.type).get_strides_and_offset()
    assert strides == [1024, 512, 64, 1], strides
    i64 = ir.IntegerType.get_signless(64)
    start = emit.shift_right(emit.and_(emit.shared_address(x), 0x3FFFF), 4)
    next_rows, swizzle_128 = 2048, 1
    fixed = (next_rows >> 4) << 32 | swizzle_128 << 62
    return arith.ori(arith.extui(i64, start), arith.constant(i64, fixed))


def _issue(
    config: ChunkConfig, sums: list[Any], a: list[Any], descriptor: Any, column: int
) -> list[Any]:
    """Starts four products, of 16 columns each, from ``column``."""
    f32, i32 = emit.f32_type(), emit.i32_type()
    i64 = ir.IntegerType.get_signless(64)
    # all that the instructions read passes through the fence, so that it is written before
    tied = [*sums, *a]
    outs = ["=f"] * len(sums) + ["=r"] * len(a)
    constraints = ",".join(outs + [str(index) for index in range(len(tied))])
    kinds = [f32] * len(sums) + [i32] * len(a)
    tied = emit.asm_many("wgmma.fence.sync.aligned;", constraints, tied, kinds)
    sums, a = tied[: len(sums)], tied[len(sums) :]
    for index in range(REGISTERS):
        offset = column // 64 * 1024 + 2 * _K_STEP * index
        moved = arith.addi(descriptor, arith.constant(i64, offset >> 4))
        sums = _wgmma(sums, a[4 * index : 4 * index + 4], moved, config.height)
    emit.asm("wgmma.commit_group.sync.aligned;", "", [], effects=True)
    return sums


def _wgmma(sums: list[Any], a: list[Any], descriptor: Any, n: int) -> list[Any]:
    count = n // 2
    assert len(sums) == count
    first = 2 * count
    text = (
        "{ .reg .pred p; setp.ne.b32 p, 1, 0; "
        f"wgmma.mma_async.sync.aligned.m64n{n}k{_K_STEP}.f32.bf16.bf16 "
        "{" + ",".join(f"${index}" for index in range(count)) + "}, "
        "{" + ",".join(f"${first + index}" for index in range(4)) + "}, "
        f"${first + 4}, p, 1, 1, 0; }}"
    )
    constraints = ",".join(
        ["=f"] * count + [str(index) for index in range(count)] + ["r"] * 4 + ["l"]
    )
    return emit.asm_many(text, constraints, [*sums, *a, descriptor], [emit.f32_type()] * count)


def _wait(pending: int, sums: list[Any], words: list[Any]) -> tuple[list[Any], list[Any]]:
    """Waits until at most ``pending`` halves are under way; ``words`` are made before."""
    tied = [*sums, *words]
    outs = ["=f"] * len(sums) + ["=r"] * len(words)
    constraints = ",".join(outs + [str(index) for index in range(len(tied))])
    kinds = [emit.f32_type()] * len(sums) + [emit.i32_type()] * len(words)
    tied = emit.asm_many(f"wgmma.wait_group.sync.aligned {pending};", constraints, tied, kinds)
    return tied[: len(sums)], tied[len(sums) :]
