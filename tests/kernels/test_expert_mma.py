"""The expert feed-forward for GPUs that have mma and no wgmma, against its float64 definition.

Tolerance, relative to the largest output: the hidden row is rounded to the 11 significant bits of
float16, independent relative errors of at most 2**-11 a product, of which a sum keeps far less than
one; all else is exact or float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.experts import define, expert_matrices, random_experts, random_routing
from kernels.targets import runner

from pallas_kernels.levels import DEFAULT_TABLE, LevelTable
from pallas_kernels.pages import ExpertFormat, abstract_experts

if jax.__version_info__ < (0, 11):
    pytest.skip("Mosaic GPU kernels need jax 0.11", allow_module_level=True)

from pallas_kernels.expert_ffn.mosaic_mma import MmaConfig, default_config, expert_ffn_mma, halves
from pallas_kernels.expert_ffn.mosaic_mma.scaled import to_halves
from pallas_kernels.mosaic import emit
from pallas_kernels.mosaic.target import assume_compute_capability

TOLERANCE = 2.0**-11
EXPERTS = 6
RESIDENT = MmaConfig(rows=8, warpgroups=1)
CONFIGS = [
    RESIDENT,
    MmaConfig(rows=8, warpgroups=2),
    MmaConfig(rows=16, warpgroups=1),
    MmaConfig(rows=16, warpgroups=2),
]


jitted = jax.jit(expert_ffn_mma, static_argnames="config")


def run(x, ids, weights, experts, layer, config):
    with runner():
        return jitted(
            *map(jnp.asarray, (x, ids, weights)), experts, jnp.int32(layer), config=config
        )


def assert_matches(experts, ids, weights, *, config=None, layer=1, x=None):
    if x is None:
        x = np.random.default_rng(9).normal(size=(ids.shape[0], experts.hidden))
    x = x.astype(jnp.bfloat16)
    y = run(x, ids, weights, experts, layer, config)
    wide = x.astype(np.float32)
    expected = define(lambda e: expert_matrices(experts, layer, e), wide, ids, weights)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, atol=TOLERANCE * max(np.abs(expected).max(), 1e-9))


@pytest.mark.parametrize(
    ("config", "base_bits"),
    [*((RESIDENT, bits) for bits in (2, 4, 8)), *zip(CONFIGS[1:], (8, 2, 4), strict=True)],
    ids=str,
)
def test_any_mix_of_levels(config, base_bits):
    experts = random_experts(hidden=96, width=40, base_bits=base_bits)
    assert_matches(experts, *random_routing(7, 2, EXPERTS), config=config)


@pytest.mark.parametrize(
    ("config", "group_size", "encoding"),
    [
        (RESIDENT, 16, "bf16"),
        (RESIDENT, 64, "log8"),
        (RESIDENT, 128, "bf16"),
        (CONFIGS[2], 16, "bf16"),
        (CONFIGS[2], 32, "log8"),
    ],
    ids=str,
)
def test_groups_and_scale_encodings(config, group_size, encoding):
    experts = random_experts(hidden=128, width=32, group_size=group_size, encoding=encoding)
    assert_matches(experts, *random_routing(2, 2, EXPERTS), config=config)


@pytest.mark.parametrize(
    ("config", "hidden", "width"),
    [
        (RESIDENT, 200, 304),
        (RESIDENT, 512, 16),
        (CONFIGS[3], 200, 304),
        (CONFIGS[3], 768, 64),
    ],
    ids=str,
)
def test_shapes(config, hidden, width):
    """One, two and four chunks a step; more chunks than slots."""
    experts = random_experts(hidden=hidden, width=width)
    assert_matches(experts, *random_routing(2, 2, EXPERTS), config=config)


@pytest.mark.parametrize("layer", [0, 1])
def test_one_token_of_any_layer(layer):
    ids, weights = random_routing(1, 4, EXPERTS)
    ids[0, 1] = -1
    assert_matches(random_experts(hidden=64, width=32), ids, weights, layer=layer)


@pytest.mark.parametrize("config", [RESIDENT, CONFIGS[2]], ids=str)
def test_ragged_routing_with_empty_experts(config):
    ids = np.repeat(np.asarray([0, 2, 5], np.int32), [1, 17, 9])[:, None]
    ids[3] = -1
    weights = np.linspace(0.1, 1, 27, dtype=np.float32)[:, None]
    assert_matches(random_experts(hidden=64, width=32), ids, weights, config=config)


def test_no_expert_at_all():
    ids, weights = random_routing(4, 2, EXPERTS)
    experts = random_experts(hidden=64, width=32)
    assert_matches(experts, np.full_like(ids, -1), weights, config=RESIDENT)


@pytest.mark.parametrize("config", [RESIDENT, CONFIGS[2]], ids=str)
def test_tokens_of_any_magnitude(config):
    """Each row has a power of two of its own, so that small ones do not vanish beside large."""
    ids, weights = random_routing(4, 2, EXPERTS)
    x = np.random.default_rng(1).normal(size=(4, 64)) * np.asarray([[1e-4], [0], [1], [30]])
    experts = random_experts(hidden=64, width=32)
    y = run(x.astype(jnp.bfloat16), ids, weights, experts, 1, config)
    wide = x.astype(jnp.bfloat16).astype(np.float32)
    expected = define(lambda e: expert_matrices(experts, 1, e), wide, ids, weights)
    largest = np.abs(expected).max(axis=1, keepdims=True)
    assert (np.abs(y - expected) <= TOLERANCE * largest).all()


def test_groups_whose_scale_is_zero():
    experts = random_experts(hidden=128, width=32, group_size=32)

    def without_some(codes):
        groups = jnp.arange(codes.shape[-2])[:, None]
        return jnp.where(groups % 3 == 0, 0, codes).astype(codes.dtype)

    scales = jax.tree.map(without_some, experts.scales)
    experts = experts.__class__(**{**vars(experts), "scales": scales})
    for config in (RESIDENT, CONFIGS[2]):
        assert_matches(experts, *random_routing(2, 2, EXPERTS), config=config)


def test_halves_are_exact_for_bfloat16():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 300)) * np.exp2(rng.integers(-28, 0, (5, 300)))
    x = x * np.asarray([[1e-20], [1], [1e20], [0], [7]])
    x = np.where(np.abs(x) < np.abs(x).max(axis=1, keepdims=True) * 2.0**-30, 0, x)
    x = jnp.asarray(x, jnp.bfloat16)
    values, scale = to_halves(x)
    restored = np.asarray(values, np.float64) * np.asarray(scale, np.float64)[:, None]
    np.testing.assert_array_equal(restored, np.asarray(x, np.float64))
    largest = np.abs(np.asarray(values, np.float32)).max(axis=1)[[0, 1, 2, 4]]
    assert ((largest >= 2**14) & (largest < 2**15)).all()


class NumpyEmit:
    """What the decoding's instructions do, on arrays of words."""

    table_word = staticmethod(emit.table_word)

    @staticmethod
    def const(value):
        return np.uint32(value)

    @staticmethod
    def add(a, b):
        return (a + b).astype(np.uint32)

    @staticmethod
    def shift_right(a, bits):
        return a >> np.uint32(bits) if bits >= 0 else (a << np.uint32(-bits)).astype(np.uint32)

    @staticmethod
    def and_(a, mask):
        return a & np.uint32(mask)

    @staticmethod
    def and_or(a, mask, c):
        return (a & np.uint32(mask)) | c

    @staticmethod
    def permute_bytes(low, high, selector):
        low, high, selector = np.broadcast_arrays(low, high, np.asarray(selector, np.uint32))
        eight = np.stack([word >> np.uint32(8 * i) & 255 for word in (low, high) for i in range(4)])
        result = np.zeros(low.shape, np.uint32)
        for i in range(4):
            choice = selector >> np.uint32(4 * i) & 15
            assert (choice < 8).all()  # 8 and above would spread the sign
            byte = np.take_along_axis(eight, choice[None].astype(np.int64), 0)[0]
            result |= (byte << np.uint32(8 * i)).astype(np.uint32)
        return result


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "table",
    [
        DEFAULT_TABLE,
        LevelTable(  # four significant bits, and one step for both
            base=(0.5, 1.875),
            children=((9 / 64, 3 / 8, 5 / 8, 7 / 8), (5 / 4, 13 / 8, 2.0, 5 / 2)),
            residual_step=(1 / 16, 1 / 16),
        ),
    ],
)
def test_decoding_instructions(monkeypatch, table, bits):
    """The bytes that the instructions make are the level's values in float16."""
    from pallas_kernels.layout import bit_shifts

    monkeypatch.setattr(halves, "emit", NumpyEmit)
    codes = np.random.default_rng(0).integers(0, 256, (64, 32)).astype(np.uint8)  # word, 4 R + i
    codes[:8] = np.arange(256).reshape(8, 32)
    planes = [
        ((codes >> np.uint8(7 - plane) & 1).astype(np.uint32) << bit_shifts(plane)).sum(
            axis=1, dtype=np.uint32
        )
        for plane in range(8)
    ]
    tables = halves.HalfTables.of(table)
    kinds = [halves.decode_main(tables, planes[: min(bits, 4)])]
    if bits == 8:
        kinds.append(halves.decode_residual(tables, planes[1], planes[4:]))
    values = np.zeros(codes.shape, np.float32)
    for block in range(halves.REGISTERS):
        for kind in kinds:
            words = np.stack(kind(block), axis=1)  # [word, pair]
            values[:, 4 * block : 4 * block + 4] += words.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(values, table.values(bits)[codes >> (8 - bits)])


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (12, 0)])
@pytest.mark.parametrize("tokens", [1, 8, 64, 4096])
def test_lowers_for_cuda(capability, tokens):
    """At the shape of Qwen3-30B-A3B, every level possible."""
    fmt = ExpertFormat(
        hidden=2048, width=768, group_size=64, scale_encoding="bf16", table=DEFAULT_TABLE
    )
    experts = abstract_experts(fmt, layers=48, experts=128, base_bits=2, pool_pages=100)
    arguments = (
        jax.ShapeDtypeStruct((tokens, 2048), jnp.bfloat16),
        jax.ShapeDtypeStruct((tokens, 8), jnp.int32),
        jax.ShapeDtypeStruct((tokens, 8), jnp.float32),
        experts,
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    with assume_compute_capability(capability):
        text = jax.jit(expert_ffn_mma).trace(*arguments).lower(lowering_platforms=("cuda",))
        assert text.as_text().count("mosaic_gpu") >= 2


def test_tiles_grow_with_the_tokens_of_an_expert():
    experts = random_experts(hidden=64, width=32, experts=8)
    rows = [default_config(count, experts).rows for count in (1, 64, 65, 200, 300, 10_000)]
    assert rows == [8, 8, 16, 32, 48, 64]


def test_bad_arguments_are_named():
    ids, weights = map(jnp.asarray, random_routing(2, 2, EXPERTS))
    experts = random_experts(hidden=64, width=32)
    with pytest.raises(ValueError, match="takes bfloat16 inputs, got float32"):
        expert_ffn_mma(jnp.ones((2, 64)), ids, weights, experts, 0)
    experts = random_experts(hidden=60, width=32)
    with pytest.raises(ValueError, match="H to be a multiple of 8, got 60"):
        expert_ffn_mma(jnp.ones((2, 60), jnp.bfloat16), ids, weights, experts, 0)
