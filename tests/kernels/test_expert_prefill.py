"""The prefill kernels against the float64 definition of the expert feed-forward.

Tolerance, per output: the kernels round every weight, every hidden value and every expert's output
to bfloat16, independent relative errors of at most r = 2^-8, so of variance at most r^2 / 3 each;
log8 scales are rounded too, which doubles that of a weight. We allow four standard deviations of
what they sum up to, and the rounding of the result.
"""

import contextlib
import os
import types
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from kernels import ptx, warps
from kernels.experts import expert_matrices, random_experts, random_routing

from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.expert_ffn.grouping import tile_count
from pallas_kernels.layout import pack_pages
from pallas_kernels.levels import DEFAULT_TABLE, PAGES_OF_BITS
from pallas_kernels.pages import ExpertFormat, PlainExperts, abstract_experts

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11"
)
BF16 = ml_dtypes.bfloat16
EXPERTS = 6
ROUNDING = 2**-8 / np.sqrt(3)


def runner():
    """Where "mosaic" runs: on the CPU it is interpreted."""
    if jax.default_backend() == "gpu":
        return contextlib.nullcontext()
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.force_gpu_interpret_mode()


def assuming_hopper():
    from pallas_kernels.mosaic.target import assume_compute_capability

    return assume_compute_capability((9, 0))


def define(matrices_of, x, ids, weights, log8):
    """The result in float64, and the variance of its error."""
    of_weight = ROUNDING**2 * (2 if log8 else 1)
    y, variance = np.zeros(x.shape), np.zeros(x.shape)
    for token, k in np.ndindex(*ids.shape):
        if ids[token, k] < 0:
            continue
        gate_up, down = matrices_of(ids[token, k])
        products = (gate_up @ x[token]).reshape(-1, 2, 8)  # eights alternate
        errors = of_weight * (gate_up**2 @ x[token] ** 2).reshape(-1, 2, 8)
        gate, up = (products[:, i].reshape(-1) for i in range(2))
        of_gate, of_up = (errors[:, i].reshape(-1) for i in range(2))
        silu = gate / (1 + np.exp(-gate))
        hidden = silu * up
        of_hidden = (1.1 * up) ** 2 * of_gate + silu**2 * of_up + (ROUNDING * hidden) ** 2
        out = down @ hidden
        of_out = down**2 @ (of_hidden + of_weight * hidden**2) + (ROUNDING * out) ** 2
        y[token] += weights[token, k] * out
        variance[token] += weights[token, k] ** 2 * of_out
    return y, variance


def assert_matches(experts, ids, weights, *, layer=1, call=None):
    x = np.random.default_rng(9).normal(size=(ids.shape[0], experts.hidden))
    x = jnp.asarray(x, jnp.bfloat16)

    def by_name(x, ids, weights, experts, layer):
        return expert_ffn(x, ids, weights, experts, layer, "mosaic")

    with runner():
        run = jax.jit(call or by_name)
        y = run(x, jnp.asarray(ids), jnp.asarray(weights), experts, jnp.int32(layer))
    log8 = experts.format.scale_encoding == "log8"
    matrices = {e: expert_matrices(experts, layer, e) for e in set(ids[ids >= 0].tolist())}
    wide = np.asarray(x, np.float64)
    expected, variance = define(matrices.__getitem__, wide, ids, weights, log8)
    error = np.abs(np.asarray(y, np.float64) - expected)
    assert y.dtype == jnp.bfloat16
    assert (error <= 4 * np.sqrt(variance) + 2**-8 * np.abs(expected)).all()


@pytest.mark.parametrize("base_bits", [2, 4, 8])
def test_any_mix_of_levels(base_bits):
    experts = random_experts(hidden=256, width=128, base_bits=base_bits)
    assert_matches(experts, *random_routing(70, 3, EXPERTS))


@pytest.mark.parametrize(("group_size", "encoding"), [(16, "bf16"), (32, "log8"), (128, "log8")])
def test_groups_and_scale_encodings(group_size, encoding):
    experts = random_experts(hidden=128, width=128, group_size=group_size, encoding=encoding)
    assert_matches(experts, *random_routing(5, 2, EXPERTS))


@pytest.mark.parametrize(("hidden", "width"), [(384, 256), (512, 384)])
def test_steps_of_one_two_and_four_chunks(hidden, width):
    assert_matches(random_experts(hidden=hidden, width=width), *random_routing(4, 3, EXPERTS))


def test_all_tokens_choose_one_expert():
    """More rows than a tile holds: 160 are two tiles of 80."""
    ids = np.full((160, 1), 4, np.int32)
    assert_matches(random_experts(hidden=128, width=128), ids, np.ones((160, 1), np.float32))


def test_ragged_routing_with_empty_experts_and_tokens_without():
    ids = np.repeat(np.asarray([2, 0, -1, 5], np.int32), [17, 1, 4, 9])[:, None]
    weights = np.linspace(0.1, 1, 31, dtype=np.float32)[:, None]
    experts = random_experts(hidden=128, width=128)
    assert_matches(experts, ids, weights, layer=0)
    assert_matches(experts, np.full_like(ids, -1), weights)


def test_every_height_and_three_consumers():
    """Five row tiles for three consumers: the last item has one too few."""
    if int(os.environ.get("NPROC") or os.cpu_count() or 1) < 4 and jax.default_backend() != "gpu":
        pytest.skip("interpreting four warpgroups takes four CPU cores, or NPROC=4")
    from pallas_kernels.expert_ffn.mosaic_prefill.ffn import expert_ffn_mosaic
    from pallas_kernels.expert_ffn.mosaic_prefill.plan import PrefillConfig

    config = PrefillConfig(heights=(16, 32, 48))
    ids = np.repeat(np.arange(5, dtype=np.int32), [3, 60, 33, 16, 40])[:, None]
    weights = np.linspace(0.1, 1, ids.size, dtype=np.float32)[:, None]
    assert_matches(
        random_experts(hidden=640, width=128),
        ids,
        weights,
        call=lambda *args: expert_ffn_mosaic(*args, config),
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("most", [8, 16, 48])
def test_rows_are_sorted_and_tiles_cover_them(seed, most):
    from pallas_kernels.expert_ffn.mosaic_prefill.rows import group_rows

    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, 5, (rng.integers(1, 300), 3)).astype(np.int32)
    rows = jax.tree.map(np.asarray, group_rows(jnp.asarray(ids), 5, most))
    valid = ids >= 0
    assert (rows.place[~valid] == -1).all()
    expert_of_row = np.full(rows.token.size, -1)
    expert_of_row[rows.place[valid]] = ids[valid]
    in_use = np.flatnonzero(expert_of_row >= 0)
    assert in_use.size == valid.sum()  # no row is given twice
    assert (np.diff(expert_of_row[in_use]) >= 0).all()
    token = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)
    assert (rows.token[rows.place[valid]] == token[valid]).all()

    assert rows.expert.size == tile_count(ids.size, 5, most)
    assert (rows.height[rows.used :] == 0).all()
    covered = [
        row
        for expert, first, count in zip(rows.expert, rows.first, rows.height, strict=True)
        for row in range(first, first + count)
        if expert_of_row[row] == expert
    ]
    assert covered == in_use.tolist()
    assert rows.height.max(initial=0) <= most
    # what a copy from shared memory's eights to the tile wants, which interpret mode does without
    assert (rows.first % 8 == 0).all()
    assert rows.token.size % 8 == 0
    assert rows.first.max(initial=0) + most <= rows.token.size


def inline_at_once(monkeypatch):
    """Bodies of ``inline_mgpu`` are traced where they are called."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setattr(plgpu, "inline_mgpu", lambda **rest: lambda run: partial(run, None))


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


def places_of_sums(height):
    """Rows and columns [128] of each register of the sums."""
    thread = np.arange(128)
    row, column = 16 * (thread // 32) + thread % 32 // 4, 2 * (thread % 4)
    return [
        (row + 8 * (index // 2 % 2), 8 * (index // 4) + column + index % 2)
        for index in range(height // 2)
    ]


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
    codes = rng.integers(0, 256, (64, chunks * 128), dtype=np.uint8)
    pages = list(pack_pages(codes)[: PAGES_OF_BITS[bits], 0])
    scales = rng.uniform(0.01, 0.03, (chunks * 128 // group_size, 64)).astype(BF16)
    if log8:
        scales = rng.integers(0, 64, scales.shape, dtype=np.uint8)

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
        tiles = next(left).reshape(height // 8, 8, 2, 64).swapaxes(1, 2)
        place = ptx.swizzled(np.arange(x_bytes.size))
        x_bytes[place] = np.ascontiguousarray(tiles).reshape(-1).view(np.uint8)

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
    for value, place in zip(sums, places_of_sums(height), strict=True):
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
    values = [sums[place] for place in places_of_sums(height)]
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


def lower_for_hopper(
    tokens,
    *,
    base_bits,
    pool_pages,
    group_size=64,
    encoding="bf16",
    hidden=2048,
    width=768,
    top_k=8,
):
    fmt = ExpertFormat(
        hidden=hidden,
        width=width,
        group_size=group_size,
        scale_encoding=encoding,
        table=DEFAULT_TABLE,
    )
    experts = abstract_experts(
        fmt, layers=48, experts=128, base_bits=base_bits, pool_pages=pool_pages
    )

    def two_layers(x, ids, weights, experts):
        for layer in range(2):
            x = x + expert_ffn(x, ids, weights, experts, layer, "mosaic")
        return x

    with assuming_hopper():
        return (
            jax.jit(two_layers)
            .trace(
                jax.ShapeDtypeStruct((tokens, hidden), jnp.bfloat16),
                jax.ShapeDtypeStruct((tokens, top_k), jnp.int32),
                jax.ShapeDtypeStruct((tokens, top_k), jnp.float32),
                experts,
            )
            .lower(lowering_platforms=("cuda",))
            .as_text()
        )


@pytest.mark.parametrize("tokens", [65, 2048, 4096])
def test_lowers_for_hopper_once_for_all_layers(tokens):
    text = lower_for_hopper(tokens, base_bits=4, pool_pages=0)
    assert text.count("custom_call @mosaic_gpu") == 2


@pytest.mark.parametrize(
    ("base_bits", "group_size", "encoding"), [(2, 64, "bf16"), (4, 32, "log8"), (8, 128, "bf16")]
)
def test_every_level_and_encoding_lowers_for_hopper(base_bits, group_size, encoding):
    lower_for_hopper(
        512,
        base_bits=base_bits,
        pool_pages=4 if base_bits < 8 else 0,
        group_size=group_size,
        encoding=encoding,
    )


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (5, 2), (70, 3)])
def test_awkward_sizes_lower_for_hopper(tokens, top_k):
    """Rows that are no multiple of eight, and 64 bytes of scales a step."""
    lower_for_hopper(
        tokens,
        base_bits=2,
        pool_pages=4,
        group_size=128,
        encoding="log8",
        hidden=128,
        width=384,
        top_k=top_k,
    )


def test_named_kernel_that_cannot_run_says_why():
    experts = random_experts(hidden=128, width=128)
    ids, weights = map(jnp.asarray, random_routing(3, 2, EXPERTS))
    x = jnp.ones((3, 128), jnp.bfloat16)

    def run(x, experts):
        expert_ffn(x, ids, weights, experts, 0, "mosaic")

    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match="'mosaic' cannot run: there is no GPU"):
            run(x, experts)
    with assuming_hopper():
        with pytest.raises(ValueError, match="x must be bfloat16, not float32"):
            run(x.astype(jnp.float32), experts)
        with pytest.raises(ValueError, match="width must be a multiple of 128, not 64"):
            run(x, random_experts(hidden=128, width=64))
        plain = PlainExperts(jnp.zeros((1, 6, 256, 128)), jnp.zeros((1, 6, 128, 128)))
        with pytest.raises(ValueError, match="these experts are not quantized"):
            run(x, plain)


def test_bad_tuning_is_named():
    from pallas_kernels.expert_ffn.mosaic_prefill.plan import PrefillConfig

    with pytest.raises(ValueError, match="heights must be ascending multiples of 16"):
        PrefillConfig(heights=(32, 24))
    with pytest.raises(ValueError, match="slots must be at least 4, got 3"):
        PrefillConfig(slots=3)
