"""All layers of a decode step as one kernel: what it takes, how it lowers, and, on a GPU, numbers.

Its lanes are tested on a CPU in ``test_decode_layers_lanes``.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.experts import random_experts
from kernels.targets import like_the_counter, needs_mosaic

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_layers import LayerWeights, decode_layers, obstacle
from pallas_kernels.levels import DEFAULT_TABLE
from pallas_kernels.linear import Int8Matrix, linear
from pallas_kernels.moe_layer import moe_layer
from pallas_kernels.pages import ExpertFormat, PlainExperts, abstract_experts

EPS = 1e-6
HEAD = 128


def assuming(capability):
    from pallas_kernels.mosaic.target import assume_compute_capability

    return assume_compute_capability(capability)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Axis letters as in ``decode_layers``."""

    layers: int
    hidden: int
    width: int
    experts: int
    top_k: int
    q_heads: int
    kv_heads: int
    context: int

    @property
    def rows(self):
        return (self.q_heads + 2 * self.kv_heads) * HEAD


QWEN3_30B = Sizes(
    layers=48,
    hidden=2048,
    width=768,
    experts=128,
    top_k=8,
    q_heads=32,
    kv_heads=4,
    context=1024,
)
SMALL = Sizes(
    layers=3,
    hidden=512,
    width=64,
    experts=16,
    top_k=2,
    q_heads=8,
    kv_heads=2,
    context=256,
)


def matrix_kind(bits):
    """A random matrix [L, N, K], or its shape, at 8 or 16 bits."""

    def abstract(*shape):
        if bits == 16:
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        codes = jax.ShapeDtypeStruct(shape, jnp.int8)
        return Int8Matrix(codes, jax.ShapeDtypeStruct(shape[:-1], jnp.float32))

    return abstract


def abstract_arguments(sizes, tokens, *, bits=16, base_bits=4, pool_pages=0):
    array, matrix = jax.ShapeDtypeStruct, matrix_kind(bits)
    layers, hidden, bfloat16 = sizes.layers, sizes.hidden, jnp.bfloat16
    weights = LayerWeights(
        attention_norm=array((layers, hidden), bfloat16),
        qkv=matrix(layers, sizes.rows, hidden),
        q_norm=array((layers, HEAD), bfloat16),
        k_norm=array((layers, HEAD), bfloat16),
        o=matrix(layers, hidden, sizes.q_heads * HEAD),
        mlp_norm=array((layers, hidden), bfloat16),
        router=array((layers, sizes.experts, hidden), bfloat16),
    )
    fmt = ExpertFormat(
        hidden=hidden,
        width=sizes.width,
        group_size=64,
        scale_encoding="bf16",
        table=DEFAULT_TABLE,
    )
    experts = abstract_experts(
        fmt, layers=layers, experts=sizes.experts, base_bits=base_bits, pool_pages=pool_pages
    )
    cache = array((layers, tokens, sizes.context, sizes.kv_heads, HEAD), bfloat16)
    turn = array((tokens, HEAD // 2), jnp.float32)
    return [
        array((tokens, hidden), bfloat16),
        weights,
        experts,
        turn,
        turn,
        cache,
        cache,
        array((tokens,), jnp.int32),
        array((layers, sizes.experts), jnp.float32),
        array((1,), jnp.int32),
    ]


def call_of(sizes):
    return functools.partial(decode_layers, eps=EPS, top_k=sizes.top_k, normalize=True)


def lower(sizes, tokens, **kinds):
    with assuming((9, 0)):
        traced = jax.jit(call_of(sizes)).trace(*abstract_arguments(sizes, tokens, **kinds))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_mosaic
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("tokens", [1, 8, 16])
@pytest.mark.parametrize("sizes", [QWEN3_30B, SMALL], ids=["30B", "small"])
def test_all_layers_lower_as_one_kernel(sizes, tokens, bits):
    text = lower(sizes, tokens, bits=bits, pool_pages=64)
    assert text.count("custom_call @mosaic_gpu") == 1
    assert not like_the_counter(text)


@needs_mosaic
@pytest.mark.parametrize(("base_bits", "pool_pages"), [(2, 0), (2, 64), (4, 0), (8, 0)], ids=str)
def test_every_base_level_lowers(base_bits, pool_pages):
    text = lower(QWEN3_30B, 8, base_bits=base_bits, pool_pages=pool_pages)
    assert text.count("custom_call @mosaic_gpu") == 1


def with_sizes(**changed):
    return abstract_arguments(dataclasses.replace(SMALL, **changed), 2)


def with_array(name, dtype):
    arguments = abstract_arguments(SMALL, 2)
    weights = arguments[1]
    changed = jax.ShapeDtypeStruct(getattr(weights, name).shape, dtype)
    arguments[1] = weights._replace(**{name: changed})
    return arguments


def with_argument(place, value):
    arguments = abstract_arguments(SMALL, 2)
    arguments[place] = value
    return arguments


def other_heads():
    """Of 64 elements."""
    arguments = abstract_arguments(SMALL, 2)
    cache = jax.ShapeDtypeStruct((3, 2, 256, 4, 64), jnp.bfloat16)
    arguments[5:7] = [cache, cache]
    return arguments


REASONS = {
    "tokens": (lambda: abstract_arguments(SMALL, 17), "it takes 1 to 16 tokens, not 17"),
    "no token": (lambda: abstract_arguments(SMALL, 0), "it takes 1 to 16 tokens, not 0"),
    "head": (other_heads, "heads must have 128 elements, not 64"),
    "group": (
        lambda: with_sizes(q_heads=18),
        "at most 8 query heads a key-value head, not 18",
    ),
    "context": (lambda: with_sizes(context=250), "the context must be a multiple of 16, not 250"),
    "hidden": (lambda: with_sizes(hidden=384), "H must be a multiple of 256, not 384"),
    "large projection": (
        lambda: with_sizes(hidden=4096, q_heads=16),
        "24 rows of 8256 bytes, a block's of qkv, are too many",
    ),
    "uneven heads": (
        lambda: with_sizes(q_heads=9, kv_heads=2),
        "9 query heads are no multiple of 2 others",
    ),
    "pairs": (
        lambda: with_sizes(q_heads=80, kv_heads=80),
        "2 tokens of 80 heads are more than 132 blocks",
    ),
    "large output": (
        lambda: with_sizes(hidden=1280, q_heads=48, kv_heads=8),
        "16 rows of 12352 bytes, a block's of o, are too many",
    ),
    "layers without experts": (
        lambda: with_argument(2, abstract_arguments(dataclasses.replace(SMALL, layers=2), 2)[2]),
        "every layer must have experts: 2 of 3 have",
    ),
    "plain experts": (
        lambda: with_argument(
            2,
            PlainExperts(
                jax.ShapeDtypeStruct((3, 16, 128, 512), jnp.bfloat16),
                jax.ShapeDtypeStruct((3, 16, 512, 64), jnp.bfloat16),
            ),
        ),
        "experts must be packed in pages",
    ),
    "x": (
        lambda: with_argument(0, jax.ShapeDtypeStruct((2, 512), jnp.float32)),
        "x must be bfloat16, not float32",
    ),
    "cache": (
        lambda: with_argument(5, jax.ShapeDtypeStruct((3, 2, 256, 2, 128), jnp.float32)),
        "the cache must be bfloat16, not float32",
    ),
    **{
        name: (
            functools.partial(with_array, name, jnp.float32),
            f"{name} must be bfloat16, not float32",
        )
        for name in LayerWeights._fields
    },
}


def assert_refuses(arguments, reason):
    """Both functions say so."""
    assert obstacle(*arguments[:3], arguments[5]) == reason
    with pytest.raises(ValueError, match="run layer by layer") as info:
        jax.eval_shape(call_of(SMALL), *arguments)
    assert str(info.value).startswith(f"decode_layers cannot run: {reason};")


@needs_mosaic
@pytest.mark.parametrize("name", REASONS)
def test_what_it_does_not_take_is_named(name, monkeypatch):
    from pallas_kernels.mosaic import workers

    monkeypatch.setattr(workers, "multiprocessors", lambda: 132)
    make, reason = REASONS[name]
    with assuming((9, 0)):
        assert_refuses(make(), reason)


@needs_mosaic
@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("sizes", [QWEN3_30B, SMALL], ids=["30B", "small"])
def test_nothing_is_in_the_way(sizes, tokens):
    for bits in (8, 16):
        x, weights, experts, _, _, keys, *_ = abstract_arguments(sizes, tokens, bits=bits)
        with assuming((9, 0)):
            assert obstacle(x, weights, experts, keys) is None


@needs_mosaic
def test_other_targets_are_named():
    arguments = abstract_arguments(SMALL, 2)
    with assuming((8, 6)):
        assert_refuses(arguments, "it needs compute capability 9.x, this is 8.6")
    if jax.default_backend() != "gpu":
        from jax.experimental.pallas import mosaic_gpu as plgpu

        assert_refuses(arguments, "there is no GPU")
        with plgpu.force_gpu_interpret_mode():
            assert_refuses(arguments, "interpret mode has no barrier over the grid")


def test_old_jax_is_named():
    if jax.__version_info__ >= (0, 11):
        pytest.skip("this jax has what the kernel needs")
    assert_refuses(abstract_arguments(SMALL, 2), f"it needs jax 0.11, this is {jax.__version__}")


@needs_mosaic
def test_contradicting_rows_are_named():
    arguments = with_argument(0, jax.ShapeDtypeStruct((3, 512), jnp.bfloat16))
    with assuming((9, 0)), pytest.raises(ValueError, match=r"x must have a row a cache slot, 2"):
        jax.eval_shape(call_of(SMALL), *arguments)


DRAWS = 8
"""Of each slot, of which the one is taken whose choice of experts is clearest in every layer."""
GAP = 0.1
"""Of logits; several times what bfloat16 changes in them."""


def random_arguments(sizes, tokens, bits, base_bits, seed=0):
    """Arguments whose idle slots, first and last positions come early."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return jnp.asarray(rng.normal(size=shape) * scale, jnp.bfloat16)

    def matrix(rows, columns):
        shape = sizes.layers, rows, columns
        if bits == 16:
            return normal(*shape, scale=columns**-0.5)
        codes = jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)
        return Int8Matrix(codes, jnp.full(shape[:2], columns**-0.5 / 73, jnp.float32))

    def norm(size):
        return 1 + normal(sizes.layers, size, scale=0.25)

    weights = LayerWeights(
        attention_norm=norm(sizes.hidden),
        qkv=matrix(sizes.rows, sizes.hidden),
        q_norm=norm(HEAD),
        k_norm=norm(HEAD),
        o=matrix(sizes.hidden, sizes.q_heads * HEAD),
        mlp_norm=norm(sizes.hidden),
        router=normal(sizes.layers, sizes.experts, sizes.hidden, scale=2 * sizes.hidden**-0.5),
    )
    experts = random_experts(
        hidden=sizes.hidden,
        width=sizes.width,
        base_bits=base_bits,
        layers=sizes.layers,
        experts=sizes.experts,
    )
    slots = DRAWS * tokens
    early = np.array([100, -1, 0, sizes.context - 1, 16])[:tokens]
    later = rng.integers(-1, sizes.context, tokens - len(early))
    positions = np.repeat(np.concatenate([early, later]).astype(np.int32), DRAWS)
    angles = rng.uniform(0, 7, (slots, HEAD // 2))
    cache = sizes.layers, slots, sizes.context, sizes.kv_heads, HEAD
    drawn = [
        normal(slots, sizes.hidden),
        weights,
        experts,
        *(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin)),
        normal(*cache),
        normal(*cache),
        jnp.asarray(positions),
        jnp.asarray(rng.uniform(size=(sizes.layers, sizes.experts)), jnp.float32),
        jnp.zeros(1, jnp.int32),
    ]
    *_, gaps = compose(sizes, in_float32(drawn))
    gaps = np.where(positions < 0, np.inf, gaps).reshape(tokens, DRAWS)
    assert gaps.max(axis=1).min() > GAP
    taken = DRAWS * np.arange(tokens) + gaps.argmax(axis=1)
    for place, axis in ((0, 0), (3, 0), (4, 0), (5, 1), (6, 1), (7, 0)):
        drawn[place] = jnp.take(drawn[place], taken, axis=axis)
    return drawn


def in_float32(arguments):
    """The same numbers; experts stay packed."""

    def wide(array):
        return array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array

    return [a if place == 2 else jax.tree.map(wide, a) for place, a in enumerate(arguments)]


def compose(sizes, arguments, implementation="xla"):
    """What the kernel computes, operation by operation; and each slot's least gap of logits."""
    plain = {"implementation": implementation}

    @jax.jit
    def run(x, weights, experts, cos, sin, keys, values, positions, mass, counter):
        def one(layer, carry):
            x, keys, values, mass, counter, gap = carry
            norm = weights.attention_norm, EPS
            qkv = linear(x, weights.qkv, layer, norm=norm, **plain)
            heads = weights.q_norm, weights.k_norm, EPS, cos, sin, keys, values
            y, keys, values = decode_attention(qkv, *heads, positions, layer, **plain)
            x = linear(y, weights.o, layer, residual=x, **plain)
            h = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPS)
            logits = jnp.sort(h * weights.mlp_norm[layer] @ weights.router[layer].T)
            last = logits[:, -sizes.top_k] - logits[:, -sizes.top_k - 1]
            x, mass, counter = moe_layer(
                x,
                (weights.mlp_norm, layer, EPS),
                weights.router,
                experts,
                layer,
                positions >= 0,
                mass,
                counter,
                top_k=sizes.top_k,
                normalize=True,
                **plain,
            )
            return x, keys, values, mass, counter, jnp.minimum(gap, last)

        gap = jnp.full(x.shape[0], jnp.inf, x.dtype)
        return jax.lax.fori_loop(0, sizes.layers, one, (x, keys, values, mass, counter, gap))

    with jax.default_matmul_precision("highest"):
        return [np.asarray(result) for result in run(*arguments)]


@pytest.mark.parametrize(
    ("tokens", "bits", "base_bits"),
    [(1, 16, 2), (5, 8, 2), (16, 16, 2), (5, 16, 4), (16, 8, 4), (5, 16, 8), (1, 8, 8)],
)
def test_equals_layer_by_layer(tokens, bits, base_bits):
    """Against the composition in float32, from which the kernels of single layers are off as much.

    These round where this one does; plain JAX in bfloat16 need not, so it is no measure. Errors of
    a token hang together (those of its router's logits change all its outputs), so that two ways
    of rounding may differ by a factor of two. A second step goes on with the counter of the first
    and gives the same bits.
    """
    x, weights, experts, _, _, keys, *_ = abstract_arguments(SMALL, tokens, bits=bits)
    if reason := obstacle(x, weights, experts, keys):
        pytest.skip(reason)
    arguments = random_arguments(SMALL, tokens, bits, base_bits)
    run = jax.jit(call_of(SMALL))
    first = run(*arguments)
    second = run(*arguments[:-1], first[-1])
    for ours, theirs in zip(first[:-1], second[:-1], strict=True):  # not the counter
        np.testing.assert_array_equal(*(np.asarray(a, np.float32) for a in (ours, theirs)))
    assert not np.asarray(first[-1] & 0x7FFFFFFF).any()

    positions = np.asarray(arguments[7])
    active = positions >= 0
    new = np.arange(SMALL.context) == positions[:, None]
    places = [np.s_[active], np.s_[:, new], np.s_[:, new], np.s_[:]]
    wide, narrow = compose(SMALL, in_float32(arguments)), compose(SMALL, arguments, "mosaic")
    for ours, exact, rounded, place in zip(first[:4], wide, narrow, places, strict=False):
        ours, exact, rounded = (np.asarray(a, np.float64)[place] for a in (ours, exact, rounded))
        ours, rounded = np.abs(ours - exact), np.abs(rounded - exact)
        assert np.sqrt(np.mean(ours**2)) <= 2 * np.sqrt(np.mean(rounded**2))
        assert ours.max() <= 3 * rounded.max()
    assert np.isfinite(np.asarray(first[0], np.float32)).all()
    for ours, before in zip(first[1:3], arguments[5:7], strict=True):
        ours, before = (np.asarray(a).view(np.uint16)[:, ~new] for a in (ours, before))
        np.testing.assert_array_equal(ours, before)
