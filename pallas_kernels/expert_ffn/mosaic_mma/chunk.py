"""One chunk of a page matmul with its scales, in two ways.

``multiply_chunk`` closes every group by itself and adds it, scaled, to the sums: groups do not wait
for each other, which few rows need. ``multiply_chunk_running`` keeps the sums in units of the scale
of the last group: before a group is added they are brought into its units. So there are no sums
beside the sums, and many rows fit in the registers.
"""

from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.expert_ffn.mosaic_mma.fragments import (
    ACCUMULATORS,
    ChunkConfig,
    Products,
    as_accumulators,
    scale_of,
    sums_of,
)
from pallas_kernels.expert_ffn.mosaic_mma.twin import decode_chunk_twin
from pallas_kernels.expert_ffn.mosaic_mma.words import (
    LANES_OF_ROW,
    array_of_vectors,
    scales_layout,
    words_layout,
)
from pallas_kernels.layout import CHUNK, ROW_TILE
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.target import interpreting

_LEAST_UNIT: Final = 2.0**-60
"""What a scale of zero counts as where it is divided by: next to nothing beside other groups, and
no sum overflows in its units."""
_LAST: Final = 2 * emit.WARPGROUP
"""Elements of the units: one for each thread and half."""


def multiply_chunk(
    config: ChunkConfig, y: jax.Array, pages: list[jax.Array], scales: jax.Array, x: Any,
    column: Any, chunk: int,
) -> jax.Array:  # fmt: skip
    """``y + W x`` for chunk ``chunk`` of what is at hand, whose first column is ``column`` of x.

    y float32 [64, M] in the layout of accumulators; pages and scales in the orders of ``words``,
    scales float32, all pages up to the level for "residual" too; x float16 [M, columns + 16] in
    shared memory.
    """
    if interpreting():
        for product, scale in _twin(config, pages, scales, x, column, chunk):
            y = y + product * scale[:, None]
        return y

    @plgpu.inline_mgpu(arg_types=_argument_types(config, pages), return_type=_sums_type(config))
    def run(ctx: Any, y: Any, *arguments: Any) -> Any:
        del ctx
        *pages, scales, x, column = arguments
        products = Products(config, pages, x, emit.scalar(column), chunk)
        sums = sums_of(y)
        for group in range(config.groups):
            added = products.add(group, [[emit.const_f32(0.0)] * 4 for _ in sums])
            scale = [scale_of(scales, chunk * config.groups + group, half) for half in range(2)]
            sums = [
                [emit.fma(four[i], scale[i // 2], before[i]) for i in range(4)]
                for four, before in zip(added, sums, strict=True)
            ]
        return as_accumulators(sums, y)

    return run(y, *pages, scales, x, jnp.asarray(column, jnp.int32))


def multiply_chunk_running(
    config: ChunkConfig, running: tuple[jax.Array, jax.Array], pages: list[jax.Array],
    scales: jax.Array, x: Any, column: Any, chunk: int,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The same for sums in units of the scale of their last group (``start_running``)."""
    y, last = running
    if interpreting():
        unit = _rows_twin(last)[0]
        for product, scale in _twin(config, pages, scales, x, column, chunk):
            scale = jnp.maximum(scale, _LEAST_UNIT)
            y, unit = y * (unit / scale)[:, None] + product, scale
        return y, jnp.repeat(unit.reshape(4, 2, 8).transpose(1, 0, 2).reshape(-1), LANES_OF_ROW)
    result = (
        _sums_type(config),
        plgpu.ShapeDtypeStruct((_LAST,), jnp.float32, layout=_units_layout()),
    )

    @plgpu.inline_mgpu(
        arg_types=(*_argument_types(config, pages), _units_layout()), return_type=result
    )
    def run(ctx: Any, y: Any, *arguments: Any) -> Any:
        del ctx
        *pages, scales, x, column, last = arguments
        products = Products(config, pages, x, emit.scalar(column), chunk)
        sums = sums_of(y)
        unit = [vector.extract(register, [], [0]) for register in last.registers.flat]
        for group in range(config.groups):
            scale = [scale_of(scales, chunk * config.groups + group, half) for half in range(2)]
            scale = [arith.maximumf(value, emit.const_f32(_LEAST_UNIT)) for value in scale]
            ratio = [arith.mulf(unit[half], _inverse(scale[half])) for half in range(2)]
            sums = [[arith.mulf(four[i], ratio[i // 2]) for i in range(4)] for four in sums]
            sums, unit = products.add(group, sums), scale
        vectors = [[value] for value in unit]
        last = array_of_vectors(vectors, _units_layout(), emit.f32_type(), is_signed=None)
        return as_accumulators(sums, y), last

    return run(y, *pages, scales, x, jnp.asarray(column, jnp.int32), last)


def start_running(input_rows: int) -> tuple[jax.Array, jax.Array]:
    """Sums of nothing, and their units."""
    y, units = zero_sums(input_rows), jnp.ones(_LAST, jnp.float32)
    return y, plgpu.layout_cast(units, _units_layout())


def zero_sums(input_rows: int) -> jax.Array:
    """float32 [64, M] in the layout of accumulators."""
    return plgpu.layout_cast(jnp.zeros((ROW_TILE, input_rows), jnp.float32), ACCUMULATORS)


def finish_running(running: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The sums themselves."""
    y, last = running
    if interpreting():
        return y * _rows_twin(last)[0][:, None]
    shape = plgpu.ShapeDtypeStruct(y.shape, jnp.float32, layout=ACCUMULATORS)

    @plgpu.inline_mgpu(arg_types=(ACCUMULATORS, _units_layout()), return_type=shape)
    def run(ctx: Any, y: Any, last: Any) -> Any:
        del ctx
        unit = [vector.extract(register, [], [0]) for register in last.registers.flat]
        sums = [[arith.mulf(four[i], unit[i // 2]) for i in range(4)] for four in sums_of(y)]
        return as_accumulators(sums, y)

    return run(y, last)


def _argument_types(config: ChunkConfig, pages: list[Any]) -> tuple[Any, ...]:
    return (
        ACCUMULATORS,
        *[words_layout(config.chunks)] * len(pages),
        scales_layout(config.groups * config.scaled_chunks),
        plgpu.RefType(),
        plgpu.Layout.WG_SPLAT,
    )


def _sums_type(config: ChunkConfig) -> Any:
    return plgpu.ShapeDtypeStruct((ROW_TILE, config.input_rows), jnp.float32, layout=ACCUMULATORS)


def _units_layout() -> Any:
    return plgpu.Layout.WG_STRIDED((_LAST,), 1)


def _inverse(value: Any) -> Any:
    """1 / value, correct but for the last bit: errors of a group stay in the sums."""
    first = emit.asm("rcp.approx.ftz.f32 $0, $1;", "=f,f", [value], emit.f32_type())
    minus = emit.as_f32(arith.xori(emit.bits_of(value), emit.const(0x80000000)))
    return emit.fma(emit.fma(minus, first, emit.const_f32(1.0)), first, first)


def _twin(
    config: ChunkConfig, pages: list[jax.Array], scales: jax.Array, x: Any, column: Any, chunk: int
) -> list[tuple[jax.Array, jax.Array]]:
    """(products [64, M], scales [64]) of each group of a chunk."""
    weights = decode_chunk_twin(config.table, config.parts, pages, chunk, config.chunks)
    columns = x[:, pl.ds(column, CHUNK)].astype(jnp.float32)
    of_group = _rows_twin(scales)
    result = []
    for group in range(config.groups):
        span = slice(group * config.group_size, (group + 1) * config.group_size)
        product = jnp.dot(weights[:, span], columns[:, span].T, precision=lax.Precision.HIGHEST)
        result.append((product, of_group[chunk * config.groups + group]))
    return result


def _rows_twin(values: jax.Array) -> jax.Array:
    """Values in the order of scales to [groups, 64]."""
    axes = values.reshape(-1, 2, 4, 8, LANES_OF_ROW)  # four half warp g t
    return axes.transpose(0, 4, 2, 1, 3).reshape(-1, ROW_TILE)
