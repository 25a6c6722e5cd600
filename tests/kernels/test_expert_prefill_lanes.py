"""The instructions of the prefill kernels, lane by lane on a CPU, against their twins."""

import types
from functools import partial

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from kernels import ptx, warps
from kernels.experts import random_tile
from kernels.targets import needs_mosaic
from kernels.warps import inline_at_once

from pallas_kernels.layout import pack_pages
from pallas_kernels.levels import DEFAULT_TABLE, PAGES_OF_BITS

pytestmark = needs_mosaic
BF16 = ml_dtypes.bfloat16


def sums_of(values, height):
    """Registers of sums float32 [64, height]."""
    from jax.experimental.mosaic.gpu import fragmented_array as fa

    from pallas_kernels.expert_ffn.mosaic_prefill import chunk
    from pallas_kernels.mosaic import emit

    layout = chunk.ACCUMULATORS.to_mgpu()
    registers = chunk._vectors(values, emit.f32_type())
    return fa.FragmentedArray(
        _registers=registers.reshape(layout.registers_shape((64, height))),
        _layout=layout,
        _is_signed=None,
    )


@pytest.mark.parametrize(
    ("bits", "chunks", "group_size", "encoding"),
    [(2, 4, 64, "bf16"), (4, 2, 32, "log8"), (4, 4, 128, "bf16"), (8, 1, 16, "bf16")],
)
def test_lanes_multiply_a_step(monkeypatch, bits, chunks, group_size, encoding):
    from pallas_kernels.expert_ffn.mosaic_prefill import chunk as module
    from pallas_kernels.mosaic import emit

    rng = np.random.default_rng(bits)
    height, log8 = 48, encoding == "log8"
    config = module.ChunkConfig(
        bits=bits,
        chunks=chunks,
        height=height,
        group_size=group_size,
        table=DEFAULT_TABLE,
        log8=log8,
    )
    x = rng.normal(size=(height, chunks * 128)).astype(BF16)
    pages, scales = random_tile(
        rng, bits=bits, columns=chunks * 128, group_size=group_size, log8=log8
    )

    def body(x_ref, scale_ref, *refs):
        y = sums_of([emit.const_f32(0.0)] * (height // 2), height)
        fragment, words = module.start_step(config, refs, scale_ref)
        for chunk in range(chunks):
            warps.sync_grid()
            y, fragment, words = module.multiply_chunk(
                config, chunk, y, fragment, words, refs, scale_ref, x_ref
            )
        return module._unpack(y)

    memory = warps.Memory()
    x_address, x_view = memory.place(np.full(height * 128, np.nan, BF16))
    x_bytes, left = x_view.view(np.uint8), iter(np.split(x, chunks, axis=1))

    def bring_chunk():
        x_bytes[...] = ptx.swizzled_tiles(next(left))

    inline_at_once(monkeypatch)
    given = [scales, *pages]
    kinds = [warps.shared_ref((height // 8, 2, 8, 64), "bf16")]
    kinds += [warps.shared_ref(a.shape, f"i{8 * a.itemsize}") for a in given]
    addresses = x_address, *(memory.place(array)[0] for array in given)
    (sums,) = warps.Kernel(body, *kinds).run(
        memory, addresses, warps=4, at_grid_barrier=bring_chunk
    )
    expected = np.zeros((64, height), np.float32)
    for chunk, columns in enumerate(np.split(x, chunks, axis=1)):
        expected = module.step_twin(config, expected, pages, scales, chunk, columns)
    for value, place in zip(sums, ptx.places_of_sums(height), strict=True):
        np.testing.assert_allclose(value, expected[place], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 5, 13, 16])
@pytest.mark.parametrize("matmul", ["gate_up", "down"])
def test_lanes_store_a_tile(monkeypatch, matmul, count):
    from pallas_kernels.expert_ffn.mosaic_prefill import store
    from pallas_kernels.expert_ffn.mosaic_prefill.chunk import in_pair_order

    rng = np.random.default_rng(count)
    height, first, tile = 16, 8, 1
    sums, factor = rng.normal(size=(64, height)).astype(np.float32), np.float32(0.5)
    width = 64 if matmul == "gate_up" else 128
    before = np.full((first + height, width), 7, BF16)
    expected = before.copy()
    if matmul == "gate_up":
        gate, up = (factor * sums).reshape(4, 2, 8, height).swapaxes(0, 1)
        values = (gate / (1 + np.exp(-gate)) * up).reshape(32, height).T
        values = np.asarray(in_pair_order(jnp.asarray(values)))
    else:
        values = factor * sums.T
    block = slice(tile * values.shape[1], (tile + 1) * values.shape[1])
    expected[first : first + count, block] = values[:count].astype(BF16)
    run = store.store_gated if matmul == "gate_up" else store.store_rows

    def body(out, factor, tile, first, count, *values):
        of_all = (
            types.SimpleNamespace(registers=np.array(value, object))
            for value in (factor, tile, first, count)
        )
        factor, *place = of_all
        run(sums_of(values, height), factor, out, *place)

    inline_at_once(monkeypatch)
    kinds = [f"memref<{first + height}x{width}xbf16>", warps.FLOAT, *[warps.WORD] * 3]
    memory = warps.Memory()
    address, out = memory.place(before)
    values = [sums[place] for place in ptx.places_of_sums(height)]
    warps.Kernel(body, *kinds, *[warps.FLOAT] * len(values)).run(
        memory, (address, factor, tile, first, count, *values), warps=4
    )
    np.testing.assert_allclose(out.astype(np.float32), expected.astype(np.float32), rtol=2**-7)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_byte_permutes_decode_every_code_exactly(bits):
    from pallas_kernels.expert_ffn.mosaic_prefill import pairs

    codes = np.random.default_rng(bits).integers(0, 256, (64, 256), dtype=np.uint8)
    pages = pack_pages(codes)[: PAGES_OF_BITS[bits]]
    # page, step, plane, half, thread, chunk
    words = pages.reshape(-1, 1, 2, 2, 128, 2)
    tables = pairs.PairTables.of(DEFAULT_TABLE)

    def body(half, *planes):
        return [pair for both in pairs.decode_half_chunk(tables, planes, half) for pair in both]

    kernels = [
        warps.Kernel(partial(body, half), *[warps.WORD] * (2 * len(pages))) for half in range(2)
    ]
    weights = np.full((4, 2, 8, 2, 8, 4, 4), np.nan, np.float32)  # warp half g chunk R t i
    for chunk, row_half, half in np.ndindex(2, 2, 2):
        planes = [w for page in words[:, 0] for w in page[:, row_half, :, chunk]]
        (found,) = kernels[half].run(None, planes, warps=4)
        found = [p.view(BF16).reshape(4, 8, 4, 2) for p in found]
        for index in range(4):
            both = np.concatenate(found[2 * index : 2 * index + 2], axis=-1)
            weights[:, row_half, :, chunk, 4 * half + index] = both
    expected = DEFAULT_TABLE.values(bits)[codes >> (8 - bits)]
    np.testing.assert_array_equal(weights.reshape(64, 256), expected)
