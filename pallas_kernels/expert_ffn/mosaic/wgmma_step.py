"""One step of a page matmul on Hopper's tensor cores: planes in shared memory to float8 fragments.

A warpgroup owns a tile of 64 rows. Its threads read their words of a step (some chunks of 128
columns, all of one run), turn them into e4m3 fragments in registers, and multiply with the input,
two e4m3 limbs a row in shared memory. Each group of weights closes in float32, where its scale
comes in.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.expert_ffn.mosaic.levels_bytes import (
    ByteTables,
    decode_chunk,
    held_word,
)
from pallas_kernels.layout import CHUNK, ROW_TILE, SIGN_PLANES
from pallas_kernels.levels import Bits, LevelTable
from pallas_kernels.mosaic import emit, shuffle
from pallas_kernels.mosaic.target import interpreting
from pallas_kernels.scales import LOG8_STEPS_PER_OCTAVE

ACCUMULATORS = plgpu.Layout.WGMMA
K_STEP = 32
"""Columns of one wgmma instruction on float8."""
BLOCK = 16
"""Columns of a core matrix: eight input rows of 16 bytes, contiguous in shared memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What a step's code depends on; hashable."""

    bits: Bits
    side_by_side: int
    """v: chunks of a run, whose words of one thread lie side by side."""
    chunks: int
    """Of a step: v or a part of it."""
    group_size: int
    columns: int
    """Rows of the input, two limbs each: n of the instruction."""
    table: LevelTable
    log8: bool
    groups_in_flight: int = 4

    @property
    def groups(self) -> int:
        """Groups of a row in a step."""
        return self.chunks * CHUNK // self.group_size


def hold_table(config: StepConfig) -> Any:
    """Part of the level's table, for ``step``: once, ahead of loops over steps; int32 []."""
    if interpreting():
        return jnp.int32(0)
    kind = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(return_type=kind)
    def run(ctx: Any) -> Any:
        del ctx
        word = held_word(ByteTables.of(config.table), config.bits)
        return fa.FragmentedArray.splat(word, (), is_signed=True)

    return run()


def step(
    config: StepConfig, y: jax.Array, pages: list[Any], scales: Any, x: Any, first: Any, held: Any
) -> jax.Array:
    """``y + W x`` for the columns of one step: chunks of a run from ``first``, int32 [], on.

    y float32 [64, n] in the layout of accumulators; pages: refs of shared memory, uint32 [2v, 256]
    each, of the run; scales [groups, 64]; x float8_e4m3fn [8 chunks, n, 16]; held: ``hold_table``.
    """
    if interpreting():
        return _twin(config, y, [page[...] for page in pages], scales[...], x[...], first)
    refs = (plgpu.RefType(),) * (len(pages) + 2)
    shape = plgpu.ShapeDtypeStruct((ROW_TILE, config.columns), jnp.float32, layout=ACCUMULATORS)
    types = (ACCUMULATORS, *refs, *(plgpu.Layout.WG_SPLAT,) * 2)

    @plgpu.inline_mgpu(arg_types=types, return_type=shape)
    def run(ctx: Any, y: Any, *args: Any) -> Any:
        del ctx
        *pages, scales, x, first, held = args
        return _emit(config, y, pages, scales, x, emit.scalar(first), emit.scalar(held))

    return run(y, *pages, scales, x, first, held)


def _twin(
    config: StepConfig, y: jax.Array, pages: list[Any], scales: jax.Array, x: jax.Array, first: Any
) -> jax.Array:
    planes = [plane for page in pages for plane in _planes(page)]
    chunks = [lax.dynamic_slice_in_dim(words, first, config.chunks, axis=-1) for words in planes]
    weights = _decode(chunks, config)
    rows = x.transpose(1, 0, 2).reshape(config.columns, -1).astype(jnp.float32)
    for group in range(config.groups):
        span = slice(group * config.group_size, (group + 1) * config.group_size)
        product = jnp.dot(weights[:, span], rows[:, span].T, precision=lax.Precision.HIGHEST)
        scale = scales[group].astype(jnp.float32)
        if config.log8:
            scale = jnp.exp2(scale * (-1 / LOG8_STEPS_PER_OCTAVE))
        y = y + product * scale[:, None]
    return y


def _planes(page: jax.Array) -> list[jax.Array]:
    """Words of each plane of a run: [half, warp, g, t, chunk]."""
    return list(page.reshape(2, 2, 4, 8, 4, -1))


def _decode(planes: list[jax.Array], config: StepConfig) -> jax.Array:
    """Weights [64, 128 chunks] in units of their scales. A kernel may hold no array constants, so
    this is arithmetic on indices where ``layout`` has tables."""
    register = lax.broadcasted_iota(jnp.uint32, (8, 4), 0)
    byte = lax.broadcasted_iota(jnp.uint32, (8, 4), 1)
    bits = []
    for index, words in enumerate(planes):
        is_sign = index in SIGN_PLANES
        magnitude_bit = 16 * (register % 2) + 4 * byte + register // 2
        shift = 8 * byte + register if is_sign else magnitude_bit
        bit = (words[..., None, None] >> shift) & 1  # half warp g t chunk R i
        bits.append(bit.transpose(1, 0, 2, 4, 5, 3, 6).reshape(ROW_TILE, -1))

    def choose(values: Any, choice: jax.Array) -> jax.Array:
        chosen = jnp.full(choice.shape, float(values[0]), jnp.float32)
        for index, value in enumerate(values):
            chosen = jnp.where(choice == index, float(value), chosen)
        return chosen

    def sign(bit: jax.Array) -> jax.Array:
        return 1 - 2 * bit.astype(jnp.float32)

    table = config.table
    if config.bits == 2:
        return sign(bits[0]) * choose(table.base, bits[1])
    child = 4 * bits[1] + 2 * bits[2] + bits[3]
    weights = sign(bits[0]) * choose([*table.children[0], *table.children[1]], child)
    if config.bits == 8:
        steps = (4 * bits[5] + 2 * bits[6] + bits[7]).astype(jnp.float32) + 0.5
        weights += sign(bits[4]) * steps * choose(table.residual_step, bits[1])
    return weights


def _emit(
    config: StepConfig, y: Any, pages: list[Any], scales: Any, x: Any, first: Any, held: Any
) -> Any:
    v, n = config.side_by_side, config.columns
    thread, lane = emit.thread(), emit.lane()
    warp = emit.shift_right(thread, 5)
    row = emit.add(emit.mul(warp, 16), emit.shift_right(lane, 2))  # and row + 8

    words: list[list[Any]] = [[None, None] for _ in range(2 * len(pages))]  # plane, half: chunks
    at = emit.mul(emit.add(emit.mul(thread, v), first), 4)
    for index, page in enumerate(pages):
        start = emit.pointer(page, at)
        for plane in range(2):
            for half in range(2):
                where = emit.move(start, 4 * v * (2 * plane + half) * emit.WARPGROUP)
                words[2 * index + plane][half] = emit.load_words(where, config.chunks)

    tables = ByteTables.of(config.table)
    descriptor, scale_of = _descriptor(x, n), _reader(config, scales, row)
    sums = [
        [vector.extract(register, [], [c]) for c in range(2)] for register in y.registers.flat
    ]  # [column tile * 2 + half][2]

    per_chunk = CHUNK // config.group_size
    pending: list[tuple[int, list[Any]]] = []
    for chunk in range(config.chunks):
        halves = [
            decode_chunk(tables, [plane[half][chunk] for plane in words], held) for half in range(2)
        ]
        for part in range(per_chunk):
            group = chunk * per_chunk + part
            pending.append((group, _fragments(config, halves, chunk, part)))
            if len(pending) == config.groups_in_flight or group == config.groups - 1:
                _close(config, sums, pending, descriptor, scale_of)
                pending = []

    kind = ir.VectorType.get((2,), emit.f32_type())
    registers = [vector.from_elements(kind, pair) for pair in sums]
    return fa.FragmentedArray(
        _registers=np.array(registers, dtype=object).reshape(y.registers.shape),
        _layout=y.layout,
        _is_signed=None,
    )


def _fragments(config: StepConfig, halves: Any, chunk: int, part: int) -> list[Any]:
    """(four registers of A, first column of the step) for each instruction of one group."""
    instructions = []
    for index in range(config.group_size // K_STEP):
        register = (part * config.group_size + index * K_STEP) // 16
        column = chunk * CHUNK + register * 16
        for kind in range(2):
            if halves[0][kind] is not None:
                a = [halves[half][kind][register + r] for r in range(2) for half in range(2)]
                instructions.append((a, column))
    return instructions


def _close(
    config: StepConfig, sums: Any, groups: list[Any], descriptor: Any,
    scale_of: Callable[[int, int], Any],
) -> None:  # fmt: skip
    """Multiplies some groups, waits once for all, and adds them to ``sums`` with their scales."""
    n = config.columns
    f32 = emit.f32_type()
    products = []
    # before the products, whose latency hides theirs
    scales = [[scale_of(group, half) for half in range(2)] for group, _ in groups]
    emit.asm("wgmma.fence.sync.aligned;", "", [], effects=True)
    for _, instructions in groups:
        accumulators = [emit.const_f32(0.0)] * (n // 2)
        for index, (a, column) in enumerate(instructions):
            accumulators = _wgmma(accumulators, a, descriptor, column, n, keep=index > 0)
        products.append(accumulators)
    emit.asm("wgmma.commit_group.sync.aligned;", "", [], effects=True)
    flat = [register for accumulators in products for register in accumulators]
    # the accumulators pass through the wait, so that nothing can read them before it
    ties = ",".join(["=f"] * len(flat) + [str(index) for index in range(len(flat))])
    flat = emit.asm_many("wgmma.wait_group.sync.aligned 0;", ties, flat, [f32] * len(flat))
    for position in range(len(groups)):
        accumulators = flat[position * n // 2 : (position + 1) * n // 2]
        for half in range(2):
            scale = scales[position][half]
            for tile in range(n // 8):
                for c in range(2):
                    value = accumulators[4 * tile + 2 * half + c]
                    pair = sums[2 * tile + half]
                    pair[c] = emit.fma(value, scale, pair[c])


def _reader(config: StepConfig, scales: Any, row: Any) -> Callable[[int, int], Any]:
    """Scale by group and half: of row ``row`` or ``row + 8``."""
    if not config.log8:
        start = emit.pointer(scales, emit.mul(row, 2))

        def read(group: int, half: int) -> Any:
            where = emit.move(start, 2 * (group * ROW_TILE + 8 * half))
            return emit.as_f32(emit.shift_right(emit.load_half(where), -16))

        return read

    # the four lanes that share a row decode a quarter each, and give it to the others
    count = 2 * config.groups
    place = emit.and_(emit.lane(), min(count, 4) - 1)
    group, half = emit.shift_right(place, 1), emit.and_(place, 1)
    start = emit.add(emit.mul(group, ROW_TILE), emit.mul(half, 8))
    start = emit.pointer(scales, emit.add(row, start))
    own = [
        _decode_log8(emit.load_byte(emit.move(start, first // 2 * ROW_TILE)))
        for first in range(0, count, 4)
    ]
    return lambda group, half: shuffle.from_quad(own[group // 2], 2 * (group % 2) + half)


def _decode_log8(code: Any) -> Any:
    octaves = arith.mulf(
        arith.uitofp(emit.f32_type(), code), emit.const_f32(-1 / LOG8_STEPS_PER_OCTAVE)
    )
    # never subnormal, but the assembler cannot know
    return emit.asm("ex2.approx.ftz.f32 $0, $1;", "=f,f", [octaves], emit.f32_type())


def _descriptor(x: Any, n: int) -> Any:
    """Of the input [8 chunks, n, 16] without swizzle: core matrices of 8 rows by 16 bytes."""
    i64 = ir.IntegerType.get_signless(64)
    start = emit.shift_right(emit.and_(emit.shared_address(x), 0x3FFFF), 4)
    next_columns, next_rows = n * BLOCK, 8 * BLOCK
    fixed = (next_columns >> 4) << 16 | (next_rows >> 4) << 32
    return arith.ori(arith.extui(i64, start), arith.constant(i64, fixed))


def _wgmma(
    accumulators: list[Any], a: list[Any], descriptor: Any, column: int, n: int, *, keep: bool
) -> list[Any]:
    i64 = ir.IntegerType.get_signless(64)
    moved = arith.addi(descriptor, arith.constant(i64, column // BLOCK * n * BLOCK >> 4))
    count = n // 2
    names = [f"${index}" for index in range(count)]
    first = 2 * count
    text = (
        "{ .reg .pred p; setp.ne.b32 p, " + str(int(keep)) + ", 0; "
        f"wgmma.mma_async.sync.aligned.m64n{n}k{K_STEP}.f32.e4m3.e4m3 "
        "{" + ",".join(names) + "}, "
        "{" + ",".join(f"${first + index}" for index in range(4)) + "}, "
        f"${first + 4}, p, 1, 1; }}"
    )
    constraints = ",".join(
        ["=f"] * count + [str(index) for index in range(count)] + ["r"] * 4 + ["l"]
    )
    return emit.asm_many(text, constraints, [*accumulators, *a, moved], [emit.f32_type()] * count)
