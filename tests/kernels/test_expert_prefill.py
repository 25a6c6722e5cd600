"""The prefill kernels against the float64 definition of the expert feed-forward.

Tolerance, per output: the kernels round every weight, every hidden value and every expert's output
to bfloat16, independent relative errors of at most r = 2^-8, so of variance at most r^2 / 3 each;
log8 scales are rounded too, which doubles that of a weight. We allow four standard deviations of
what they sum up to, and the rounding of the result.
"""

import contextlib
import os
import re
import types
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from kernels.experts import expert_matrices, random_experts, random_routing

from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.expert_ffn.grouping import tile_count
from pallas_kernels.layout import pack_pages
from pallas_kernels.levels import DEFAULT_TABLE, PAGES_OF_BITS
from pallas_kernels.pages import ExpertFormat, PlainExperts, abstract_experts

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax 0.11"
)
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


class Registers:
    """What the instructions of ``emit`` do, on arrays of 32-bit words."""

    @staticmethod
    def const(value):
        return np.uint32(value & 0xFFFFFFFF)

    @staticmethod
    def i32_type():
        return None

    @staticmethod
    def shift_right(a, bits):
        return a << np.uint32(-bits) if bits < 0 else a >> np.uint32(bits)

    @staticmethod
    def and_(a, mask):
        return a & np.uint32(mask)

    @staticmethod
    def and_or(a, mask, c):
        return a & np.uint32(mask) | c

    @staticmethod
    def lop3(a, b, c, table):
        result = np.zeros_like(a | b | c)
        for case in range(8):
            if table >> case & 1:
                bits = [w if case >> s & 1 else ~w for w, s in ((a, 2), (b, 1), (c, 0))]
                result |= bits[0] & bits[1] & bits[2]
        return result

    @staticmethod
    def table_word(table):
        return int.from_bytes(bytes(table), "little")

    @staticmethod
    def permute_bytes(low, high, selector):
        selector = np.uint32(selector)
        both = np.uint64(high) << np.uint64(32) | np.uint64(low)
        result = np.uint32(0)
        for byte in range(4):
            nibble = selector >> np.uint32(4 * byte) & np.uint32(15)
            assert (nibble < 8).all()  # the highest bit would repeat a sign
            chosen = both >> (np.uint64(8) * nibble.astype(np.uint64)) & np.uint64(255)
            result = result | chosen.astype(np.uint32) << np.uint32(8 * byte)
        return result

    def asm(self, text, constraints, operands, kind=None, *, effects=False):
        del constraints, kind, effects
        name = text.split()[0]
        if name in ("add.rn.bf16x2", "mul.rn.bf16x2"):
            a, b = (np.ascontiguousarray(o).view(ml_dtypes.bfloat16) for o in operands)
            a, b = a.astype(np.float32), b.astype(np.float32)
            return (a + b if name.startswith("add") else a * b).astype(BF16).view(np.uint32)
        return getattr(self, name.split(".")[0])(text, *operands)


class Address:
    """An offset in bytes into some memory, for each thread."""

    def __init__(self, memory, offset):
        self.memory, self.offset = memory, offset

    def __add__(self, offset):
        return Address(self.memory, self.offset + np.asarray(offset, np.int64))

    def access(self, size):
        offset = np.broadcast_to(self.offset, WARPGROUP)
        assert (offset % size == 0).all()
        return offset[:, None] + np.arange(size)


class Memref:
    """Part of a memory, given as bytes; is its own type, too."""

    def __init__(self, memory, start=0, shape=None, strides=None):
        self.memory, self.start, self.shape, self.strides = memory, start, shape, strides
        self.type = self

    def get_strides_and_offset(self):
        return self.strides, 0


WARPGROUP = 128
BF16 = ml_dtypes.bfloat16


class Warpgroup(Registers):
    """A warpgroup on its own: words and floats are arrays [128], one element a thread.

    Swizzle and descriptors of shared memory and fragments are as the PTX manual has them, in its
    sections on wgmma.
    """

    WARPGROUP = WARPGROUP

    def thread(self):
        return np.arange(WARPGROUP, dtype=np.uint32)

    def warp(self):
        return self.thread() // 32

    def lane(self):
        return self.thread() % 32

    def add(self, a, b):
        return a + np.uint32(b)

    def mul(self, a, b):
        return a * np.uint32(b)

    def f32_type(self):
        return None

    def const_f32(self, value):
        return np.float32(value)

    def scalar(self, value):
        return value

    def pointer(self, ref, offset=0):
        return Address(ref.memory, ref.start) + offset

    def move(self, base, offset):
        return base + offset

    def move64(self, base, index, stride):
        return base + np.asarray(index, np.int64) * stride

    def shared_address(self, ref):
        return np.uint32(ref.start)

    def load_words(self, where, words):
        loaded = where.memory[where.access(4 * words)].view(np.uint32)
        return list(loaded.T.copy())

    def load_half(self, where):
        return where.memory[where.access(2)].view(np.uint16)[:, 0].astype(np.uint32)

    def load_byte(self, where):
        return where.memory[where.access(1)][:, 0].astype(np.uint32)

    def asm_many(self, text, constraints, operands, results):
        if "wgmma.mma_async" in text:
            return self.wgmma(text, *operands)
        assert text.startswith(("wgmma.fence", "wgmma.wait_group"))
        return list(operands)

    def wgmma(self, text, *operands):
        if not operands:
            assert text.startswith("wgmma.commit_group")
            return None
        n = int(re.search(r"\.m64n(\d+)k16\.f32\.bf16\.bf16 ", text)[1])
        assert text.endswith(f"${n + 4}, p, 1, 1, 0; }}")  # adds; K-major
        *sums, a0, a1, a2, a3, descriptor = operands
        warp, g, t = self.warp(), self.lane() // 4, self.lane() % 4
        a = np.zeros((64, 16), np.float32)
        for index, register in enumerate((a0, a1, a2, a3)):
            row, column = 16 * warp + g + 8 * (index % 2), 2 * t + 8 * (index // 2)
            pair = np.ascontiguousarray(register).view(BF16).reshape(-1, 2)
            a[row, column], a[row, column + 1] = pair.T.astype(np.float32)
        b = self.read_k_major(int(descriptor), n)
        d = a @ b.T
        for index in range(n // 2):
            row, column = 16 * warp + g + 8 * (index // 2 % 2), 8 * (index // 4) + 2 * t + index % 2
            sums[index] = sums[index] + d[row, column]
        return sums

    def read_k_major(self, descriptor, n):
        """B [n, 16] in eights of rows, 128 bytes a row, swizzled."""
        assert descriptor >> 62 == 1
        start, next_eight = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 32))
        row, byte = np.mgrid[:n, :32]
        address = swizzled(start + row // 8 * next_eight + row % 8 * 128 + byte)
        return self.shared[address].view(BF16).astype(np.float32)

    def cvt(self, text, high, low):
        assert text.startswith("cvt.rn.bf16x2.f32 $0, $1, $2")
        pair = np.stack(np.broadcast_arrays(low, high), -1).astype(np.float32)
        return pair.astype(BF16).view(np.uint32)[:, 0]

    def ex2(self, text, value):
        return np.exp2(value)

    def rcp(self, text, value):
        return 1 / value

    def shfl(self, text, value):
        distance = int(re.fullmatch(r"shfl.sync.bfly.b32 \$0, \$1, (\d+), 31, \S+;", text)[1])
        return value[self.thread() ^ distance]

    def store_global(self, text, where, *operands):
        *words, left = operands
        place = int(re.search(r"setp.gt.s32 p, \$\d+, (\d+);", text)[1])
        assert (".v2" in text) == (len(words) == 2)
        mine = np.asarray(left).view(np.int32) > place
        values = np.stack(words, -1).view(np.uint8)
        where.memory[where.access(4 * len(words))[mine]] = values[mine]

    def asm(self, text, constraints, operands, kind=None, *, effects=False):
        if "st.global" in text:
            return self.store_global(text, *operands)
        return super().asm(text, constraints, operands, kind, effects=effects)


def swizzled(address):
    """Within 1024 bytes, 16 bytes change places."""
    return address ^ (address >> 7 & 7) << 4


@pytest.fixture
def warpgroup(monkeypatch):
    """Kernel bodies run on a ``Warpgroup``."""
    from pallas_kernels.expert_ffn.mosaic import silu
    from pallas_kernels.expert_ffn.mosaic_prefill import chunk, pairs, store

    emulated = Warpgroup()
    Fake = types.SimpleNamespace
    arith = Fake(
        mulf=np.multiply,
        addf=np.add,
        addi=np.add,
        subi=np.subtract,
        ori=np.bitwise_or,
        uitofp=lambda kind, value: value.astype(np.float32),
        extui=lambda kind, value: np.uint64(value),
        constant=lambda kind, value: np.uint64(value),
        select=lambda which, a, b: np.where(which, a, b),
        cmpi=lambda predicate, a, b: predicate(a, b),
        CmpIPredicate=Fake(ne=np.not_equal),
    )
    ir = Fake(
        MemRefType=lambda kind: kind,
        IntegerType=Fake(get_signless=lambda bits: bits),
        VectorType=Fake(get=lambda *args: None),
    )
    vector = Fake(
        extract=lambda register, *args: register, from_elements=lambda kind, values: Box(values[0])
    )
    fa = Fake(FragmentedArray=lambda _registers, **rest: _registers_of(_registers))
    plgpu = Fake(
        **{name: getattr(chunk.plgpu, name) for name in ("RefType", "ShapeDtypeStruct", "Layout")},
        inline_mgpu=lambda **rest: lambda run: partial(run, None),
    )
    fakes = {"arith": arith, "emit": emulated, "fa": fa, "ir": ir, "plgpu": plgpu, "vector": vector}
    for module in (chunk, pairs, store, silu):
        for name in fakes.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, fakes[name])
    return emulated


class Box:
    """Keeps numpy from taking an array apart."""

    def __init__(self, value):
        self.value = value


def _registers_of(boxes):
    values = [box.value for box in boxes.flat]
    registers = np.empty(len(values), object)
    registers[:] = values
    return types.SimpleNamespace(registers=registers, layout=None)


def registers(values):
    return _registers_of(np.array([Box(value) for value in values], object))


@pytest.mark.parametrize(
    ("bits", "chunks", "group_size", "encoding"),
    [(2, 4, 64, "bf16"), (4, 2, 32, "log8"), (4, 4, 128, "bf16"), (8, 1, 16, "bf16")],
)
def test_lanes_multiply_a_step(warpgroup, bits, chunks, group_size, encoding):
    from pallas_kernels.expert_ffn.mosaic_prefill import chunk as module

    rng = np.random.default_rng(bits)
    height, base, log8 = 48, 3 * 1024, encoding == "log8"
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

    def memref(array):
        padding = np.zeros(64, np.uint8)
        return Memref(np.concatenate([padding, array.reshape(-1).view(np.uint8)]), padding.size)

    refs, scale_ref = [memref(page) for page in pages], memref(scales)
    warpgroup.shared = np.zeros(base + 2 * 128 * height, np.uint8)
    x_ref = Memref(warpgroup.shared, base, strides=[1024, 512, 64, 1])
    y = registers([np.zeros(WARPGROUP, np.float32)] * (height // 2))
    fragment, words = module.start_step(config, refs, scale_ref)
    expected = np.zeros((64, height), np.float32)
    for chunk in range(chunks):
        columns = x[:, 128 * chunk : 128 * (chunk + 1)]
        tiles = columns.reshape(height // 8, 8, 2, 64).swapaxes(1, 2)
        place = base + np.arange(tiles.size * 2)
        warpgroup.shared[swizzled(place)] = np.ascontiguousarray(tiles).reshape(-1).view(np.uint8)
        y, fragment, words = module.multiply_chunk(
            config, chunk, y, fragment, words, refs, scale_ref, x_ref
        )
        expected = module.step_twin(config, expected, pages, scales, chunk, columns)
    g, t, warp = warpgroup.lane() // 4, warpgroup.lane() % 4, warpgroup.warp()
    for index, value in enumerate(y.registers):
        row, column = 16 * warp + g + 8 * (index // 2 % 2), 8 * (index // 4) + 2 * t + index % 2
        np.testing.assert_allclose(value, expected[row, column], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 5, 13, 16])
@pytest.mark.parametrize("matmul", ["gate_up", "down"])
def test_lanes_store_a_tile(warpgroup, matmul, count):
    from pallas_kernels.expert_ffn.mosaic_prefill import store
    from pallas_kernels.expert_ffn.mosaic_prefill.chunk import in_pair_order

    rng = np.random.default_rng(count)
    height, first, tile = 16, 8, 1
    sums, factor = rng.normal(size=(64, height)).astype(np.float32), np.float32(0.5)
    g, t, warp = warpgroup.lane() // 4, warpgroup.lane() % 4, warpgroup.warp()
    y = registers(
        [
            sums[16 * warp + g + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * t + i % 2]
            for i in range(height // 2)
        ]
    )
    width = 64 if matmul == "gate_up" else 128
    out = np.full((first + height, width), 7, BF16)
    expected = out.copy()
    if matmul == "gate_up":
        gate, up = (factor * sums).reshape(4, 2, 8, height).swapaxes(0, 1)
        values = (gate / (1 + np.exp(-gate)) * up).reshape(32, height).T
        values = np.asarray(in_pair_order(jnp.asarray(values)))
    else:
        values = factor * sums.T
    block = slice(tile * values.shape[1], (tile + 1) * values.shape[1])
    expected[first : first + count, block] = values[:count].astype(BF16)
    ref = Memref(out.reshape(-1).view(np.uint8), shape=out.shape)
    run = store.store_gated if matmul == "gate_up" else store.store_rows
    run(y, factor, ref, *map(np.uint32, (tile, first, count)))
    np.testing.assert_allclose(out.astype(np.float32), expected.astype(np.float32), rtol=2**-7)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_byte_permutes_decode_every_code_exactly(monkeypatch, bits):
    from pallas_kernels.expert_ffn.mosaic_prefill import pairs

    monkeypatch.setattr(pairs, "emit", Registers())
    codes = np.random.default_rng(bits).integers(0, 256, (64, 256), dtype=np.uint8)
    pages = pack_pages(codes)[: PAGES_OF_BITS[bits]]
    # page, step, plane, half, warp, g, t, chunk
    words = pages.reshape(-1, 1, 2, 2, 4, 8, 4, 2)
    tables = pairs.PairTables.of(DEFAULT_TABLE)
    weights = np.full((4, 2, 8, 2, 8, 4, 4), np.nan, np.float32)  # warp half g chunk R t i
    for chunk, row_half, half in np.ndindex(2, 2, 2):
        planes = [w for page in words[:, 0] for w in page[:, row_half, ..., chunk]]
        for index, both in enumerate(pairs.decode_half_chunk(tables, planes, half)):
            values = [p.view(ml_dtypes.bfloat16).reshape(4, 8, 4, 2) for p in both]
            weights[:, row_half, :, chunk, 4 * half + index] = np.concatenate(values, -1)
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
