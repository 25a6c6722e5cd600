"""The prefill kernels against the float64 definition of the expert feed-forward.

Tolerance, per output: the kernels round every weight, every hidden value and every expert's output
to bfloat16, independent relative errors of at most r = 2^-8, so of variance at most r^2 / 3 each;
log8 scales are rounded too, which doubles that of a weight. We allow four standard deviations of
what they sum up to, and the rounding of the result.
"""

import contextlib
import os

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
    assert sorted(rows.place[valid].tolist()) == list(range(valid.sum()))
    expert_of_row = np.full(valid.sum(), -1)
    expert_of_row[rows.place[valid]] = ids[valid]
    assert (np.diff(expert_of_row) >= 0).all()
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
    assert covered == list(range(valid.sum()))
    assert rows.height.max(initial=0) <= most


class Registers:
    """What the instructions of ``emit`` do, on arrays of 32-bit words."""

    @staticmethod
    def const(value):
        return np.uint32(value)

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

    @staticmethod
    def asm(text, constraints, operands, kind):
        del constraints, kind
        assert text.startswith("add.rn.bf16x2")
        a, b = (np.ascontiguousarray(o).view(ml_dtypes.bfloat16) for o in operands)
        total = a.astype(np.float32) + b.astype(np.float32)
        return total.astype(ml_dtypes.bfloat16).view(np.uint32)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_byte_permutes_decode_every_code_exactly(monkeypatch, bits):
    from pallas_kernels.expert_ffn.mosaic_prefill import pairs

    monkeypatch.setattr(pairs, "emit", Registers)
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


def lower_for_hopper(tokens, *, base_bits, pool_pages, group_size=64, encoding="bf16"):
    fmt = ExpertFormat(
        hidden=2048,
        width=768,
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
                jax.ShapeDtypeStruct((tokens, 2048), jnp.bfloat16),
                jax.ShapeDtypeStruct((tokens, 8), jnp.int32),
                jax.ShapeDtypeStruct((tokens, 8), jnp.float32),
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
