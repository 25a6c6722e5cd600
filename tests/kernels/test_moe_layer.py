"""Every implementation of the MoE block against its float64 definition.

In most cases all elements of a token have one magnitude, a power of two. Its norm is then plus or
minus the norm's weights, whatever rounds it where, so logits are 32-bit sums of exact products:
2e-6 of the sum of their magnitudes, and no token has its next best expert that near. A kernel may
round the experts' activations once to 8 significant bits: independent relative errors of at most
2^-9, so an error of 2^-9 / sqrt(3) of the root of the sum of squared products, of which we allow
six. The result is rounded to bfloat16, by at most 2^-8 of it.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.experts import expert_matrices, random_experts

from pallas_kernels.levels import DEFAULT_TABLE
from pallas_kernels.moe_layer import moe_layer
from pallas_kernels.pages import ExpertFormat, PlainExperts, abstract_experts, interleave_gate_up

MOSAIC = jax.__version_info__ >= (0, 11)
needs_mosaic = pytest.mark.skipif(not MOSAIC, reason="the kernel needs jax 0.11")
RUNNABLE = ["xla", pytest.param("mosaic", marks=needs_mosaic)]
EPS = 1e-6
HIDDEN, WIDTH = 256, 64
LAYER, NORM_LAYER = 1, 2  # of 2 layers with experts and 4 in all
GAP = 1e-2
"""Least distance of the logits between which a token's experts end."""


def runner(implementation):
    """Where the implementation runs: on the CPU "mosaic" is interpreted."""
    if implementation != "mosaic" or jax.default_backend() == "gpu":
        return contextlib.nullcontext()
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.force_gpu_interpret_mode()


def assuming_hopper():
    from pallas_kernels.mosaic.target import assume_compute_capability

    return assume_compute_capability((9, 0))


def random_weights(experts, hidden=HIDDEN, seed=0):
    """Norm [4, H] and router [2, E, H], bfloat16; logits have a spread of about 2."""
    rng = np.random.default_rng(seed)
    norm = jnp.asarray(1 + rng.normal(size=(4, hidden)) / 4, jnp.bfloat16)
    router = rng.normal(size=(2, experts, hidden)) * 2 / np.sqrt(hidden)
    return norm, jnp.asarray(router, jnp.bfloat16)


def decided(draw, tokens, norm, router, top_k):
    """Those of many drawn tokens whose choice of experts is clearest."""
    x = draw(np.random.default_rng(3), (8 * tokens, norm.shape[1]))
    ranked = np.sort(logits_of(normed(x, norm), router), axis=1)[:, ::-1]
    if top_k < ranked.shape[1]:
        gap = ranked[:, top_k - 1] - ranked[:, top_k]
        x = x[np.sort(np.argsort(-gap, kind="stable")[:tokens])]
        assert np.sort(gap)[-tokens] > GAP
    return jnp.asarray(x[:tokens], jnp.bfloat16)


def signs(rng, shape):
    """Rows of one magnitude, about that of what the experts add."""
    return rng.choice([-1.0, 1.0], shape) * 2.0 ** rng.integers(-5, -2, (shape[0], 1))


def normed(x, norm):
    x = np.asarray(x, np.float64)
    h = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * np.asarray(norm[NORM_LAYER])
    return h.astype(jnp.bfloat16).astype(np.float64)


def logits_of(h, router):
    return h @ np.asarray(router[LAYER], np.float64).T


def define(h, router, matrices_of, valid, top_k, normalize):
    """What experts add, what it may be off by, and the mass, by loops over tokens and experts."""
    logits = logits_of(h, router)
    added, error = np.zeros_like(h), np.zeros_like(h)
    mass = np.zeros(logits.shape[1])
    for t in np.flatnonzero(valid):
        share = np.exp(logits[t] - logits[t].max())
        ids = sorted(range(len(share)), key=lambda e: (-logits[t, e], e))[:top_k]
        share /= share[ids].sum() if normalize else share.sum()
        for e in ids:
            gate_up, down = matrices_of(e)
            product = (gate_up @ h[t]).reshape(-1, 2, 8)  # eights alternate
            gate, up = product[:, 0].reshape(-1), product[:, 1].reshape(-1)
            hidden = gate / (1 + np.exp(-gate)) * up
            added[t] += share[e] * (down @ hidden)
            error[t] += (share[e] * down * hidden) ** 2 @ np.ones(len(hidden))
            mass[e] += share[e]
    return added, 6 * 2**-9 / np.sqrt(3) * np.sqrt(error), mass


def run(x, norm, router, experts, valid, *, implementation, **keywords):
    """``moe_layer`` under jit, with traced layers; (y, what it added to the mass [E])."""

    def call(x, norm, router, experts, valid, layer, norm_layer, mass, counter):
        return moe_layer(
            x,
            (norm, norm_layer, EPS),
            router,
            experts,
            layer,
            valid,
            mass,
            counter,
            implementation=implementation,
            **keywords,
        )

    before = np.stack([np.full(router.shape[1], 2.0), np.arange(router.shape[1]) % 2])
    with runner(implementation):
        layers = jnp.int32(LAYER), jnp.int32(NORM_LAYER)
        state = jnp.asarray(before, jnp.float32), jnp.zeros(1, jnp.int32)
        y, mass, counter = jax.jit(call)(
            x, norm, router, experts, jnp.asarray(valid), *layers, *state
        )
    assert (counter.shape, counter.dtype) == ((1,), jnp.int32)
    mass = np.asarray(mass, np.float64) - before
    assert not mass[1 - LAYER].any()
    return np.asarray(y), mass[LAYER]


def assert_matches(
    experts, x, norm, router, *, implementation, top_k, normalize=True, dropped=(), rtol=1e-4
):
    valid = ~np.isin(np.arange(x.shape[0]), dropped)
    y, mass = run(
        x, norm, router, experts, valid,
        implementation=implementation, top_k=top_k, normalize=normalize,
    )  # fmt: skip
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    matrices_of = functools.cache(lambda e: expert_matrices(experts, LAYER, e))
    added, error, expected_mass = define(
        normed(x, norm), router, matrices_of, valid, top_k, normalize
    )
    error += rtol * np.abs(added).max()
    expected = np.asarray(x, np.float64) + added
    assert (np.abs(y.astype(np.float64) - expected) <= error + 2**-8 * np.abs(expected)).all()
    np.testing.assert_allclose(mass, expected_mass, rtol=rtol, atol=1e-6)
    assert np.array_equal(y[~valid], np.asarray(x)[~valid])


@pytest.mark.parametrize("implementation", RUNNABLE)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "normalize", "dropped"),
    [
        pytest.param(1, 8, 2, True, (), id="one-token"),
        pytest.param(1, 8, 2, True, (0,), id="nothing-valid"),
        pytest.param(2, 8, 1, True, (), id="one-expert-each"),
        pytest.param(3, 16, 4, False, (1,), id="shares-of-all"),
        pytest.param(4, 8, 8, True, (), id="every-expert"),
        pytest.param(9, 32, 8, True, (0, 8), id="ragged"),
        pytest.param(33, 16, 4, False, (0, 7, 32), id="many"),
    ],
)
def test_routing(implementation, tokens, experts, top_k, normalize, dropped):
    norm, router = random_weights(experts)
    assert_matches(
        random_experts(hidden=HIDDEN, width=WIDTH, experts=experts),
        decided(signs, tokens, norm, router, top_k),
        norm,
        router,
        implementation=implementation,
        top_k=top_k,
        normalize=normalize,
        dropped=dropped,
    )


@pytest.mark.parametrize("implementation", RUNNABLE)
@pytest.mark.parametrize("base_bits", [2, 4, 8])
@pytest.mark.parametrize("encoding", ["bf16", "log8"])
def test_any_mix_of_levels(implementation, base_bits, encoding):
    norm, router = random_weights(8)
    experts = random_experts(
        hidden=HIDDEN, width=WIDTH, experts=8, base_bits=base_bits, encoding=encoding
    )
    x = decided(signs, 4, norm, router, 3)
    assert_matches(experts, x, norm, router, implementation=implementation, top_k=3)


@pytest.mark.parametrize("implementation", RUNNABLE)
def test_all_tokens_choose_the_same_experts(implementation):
    norm, router = random_weights(8)
    x = jnp.tile(decided(signs, 1, norm, router, 2), (12, 1))
    experts = random_experts(hidden=HIDDEN, width=WIDTH, experts=8)
    assert_matches(experts, x, norm, router, implementation=implementation, top_k=2)


@pytest.mark.parametrize("implementation", RUNNABLE)
def test_norm_of_any_input(implementation):
    """Where rounding may fall either way, an element of h is off by 2^-8 of itself."""
    norm, router = random_weights(8)

    def draw(rng, shape):
        return rng.normal(size=shape) * 10.0 ** rng.integers(-2, 3, (shape[0], 1))

    x = decided(draw, 5, norm, router, 2)
    experts = random_experts(hidden=HIDDEN, width=WIDTH, experts=8)
    assert_matches(experts, x, norm, router, implementation=implementation, top_k=2, rtol=5e-3)


@needs_mosaic
@pytest.mark.parametrize(
    "changed", [{"gate_up_parts": 2, "ring_lines": 32}, {"gate_up_parts": 1, "rows": 8}]
)
def test_any_config(changed):
    """1024 columns are two runs of chunks: as many parts as there can be."""
    import dataclasses

    from pallas_kernels.moe_layer.mosaic import moe_layer_kernel
    from pallas_kernels.moe_layer.mosaic.kernel import default_config

    hidden, tokens = 1024, 6
    norm, router = random_weights(8, hidden)
    experts = random_experts(hidden=hidden, width=384, experts=8)
    x = decided(signs, tokens, norm, router, 3)
    valid = np.ones(tokens, bool)
    expected, mass = run(
        x, norm, router, experts, valid, implementation="xla", top_k=3, normalize=True
    )
    config = dataclasses.replace(default_config(tokens, experts), **changed)
    with runner("mosaic"):
        y, ours, _ = moe_layer_kernel(
            x, norm=(norm, jnp.int32(NORM_LAYER), EPS), router=router, experts=experts,
            layer=jnp.int32(LAYER), valid=jnp.asarray(valid), top_k=3, normalize=True,
            mass=jnp.zeros((2, 8)), counter=jnp.zeros(1, jnp.int32), config=config,
        )  # fmt: skip
    scale = np.abs(expected.astype(np.float32) - np.asarray(x, np.float32)).max()
    np.testing.assert_allclose(
        np.asarray(y, np.float32), expected.astype(np.float32), rtol=2**-7, atol=2e-2 * scale
    )
    np.testing.assert_allclose(ours[LAYER], mass, rtol=1e-4, atol=1e-6)


@needs_mosaic
def test_repeats_bit_for_bit():
    norm, router = random_weights(8)
    arguments = decided(signs, 3, norm, router, 2), norm, router
    experts = random_experts(hidden=HIDDEN, width=WIDTH, experts=8)
    first, second = (
        run(*arguments, experts, np.ones(3, bool), implementation="mosaic", top_k=2, normalize=True)
        for _ in range(2)
    )
    for ours, theirs in zip(first, second, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_float32_and_plain_experts():
    """Everything in float32: sums of at most 256 products, relative to the largest result."""
    norm, router = (a.astype(jnp.float32) for a in random_weights(6, hidden=48))
    rng = np.random.default_rng(0)
    gate_up, down = rng.normal(size=(2, 6, 64, 48)), rng.normal(size=(2, 6, 48, 32))
    plain = PlainExperts(*(jnp.asarray(w, jnp.float32) for w in (gate_up, down)))
    x = rng.normal(size=(5, 48)).astype(np.float32)
    keywords = {"top_k": 2, "normalize": True}
    y, mass = run(
        jnp.asarray(x), norm, router, plain, np.ones(5, bool), implementation="xla", **keywords
    )
    h = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + EPS)
    h = h * np.asarray(norm[NORM_LAYER], np.float64)
    stored = interleave_gate_up(*np.split(gate_up[LAYER], 2, axis=1))
    added, _, expected_mass = define(
        h, router, lambda e: (stored[e], down[LAYER, e]), np.ones(5, bool), **keywords
    )
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y - x, added, atol=4e-6 * np.abs(added).max())
    np.testing.assert_allclose(mass, expected_mass, rtol=1e-5, atol=1e-6)


def abstract_30b(tokens, base_bits=4, pool_pages=64, encoding="log8"):
    """Arguments of Qwen3-30B-A3B: x, norm, router, experts, valid, both layers, mass, counter."""
    fmt = ExpertFormat(
        hidden=2048, width=768, group_size=64, scale_encoding=encoding, table=DEFAULT_TABLE
    )
    array = jax.ShapeDtypeStruct
    return (
        array((tokens, 2048), jnp.bfloat16),
        array((48, 2048), jnp.bfloat16),
        array((48, 128, 2048), jnp.bfloat16),
        abstract_experts(fmt, layers=48, experts=128, base_bits=base_bits, pool_pages=pool_pages),
        array((tokens,), jnp.bool_),
        array((), jnp.int32),
        array((), jnp.int32),
        array((48, 128), jnp.float32),
        array((1,), jnp.int32),
    )


@needs_mosaic
@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 16, 32, 64])
def test_lowers_for_hopper(tokens):
    def call(x, norm, router, experts, valid, layer, norm_layer, mass, counter):
        norm = (norm, norm_layer, EPS)
        keywords = {"top_k": 8, "normalize": True, "implementation": "mosaic"}
        return moe_layer(x, norm, router, experts, layer, valid, mass, counter, **keywords)

    with assuming_hopper():
        traced = jax.jit(call).trace(*abstract_30b(tokens))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1


def arguments(tokens=2, experts=6):
    norm, router = random_weights(experts)
    packed = random_experts(hidden=HIDDEN, width=WIDTH, experts=experts)
    x = jnp.ones((tokens, HIDDEN), jnp.bfloat16)
    state = jnp.zeros((2, experts)), jnp.zeros(1, jnp.int32)
    return [x, (norm, 0, EPS), router, packed, 0, jnp.ones(tokens, bool), *state]


KEYWORDS = {"top_k": 2, "normalize": True}


def test_auto_is_xla_on_a_cpu():
    if jax.default_backend() != "cpu":
        pytest.skip("there is another device")
    first, second = (
        moe_layer(*arguments(), **KEYWORDS, implementation=name) for name in ("auto", "xla")
    )
    np.testing.assert_array_equal(np.asarray(first[0]), np.asarray(second[0]))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, jnp.zeros((2, 255)), r"x must be \[T, 256\]"),
        (1, (jnp.zeros((2, 128)), 0, EPS), r"norm's weight must be \[L, 256\]"),
        (1, (jnp.zeros((2, 256)), 2, EPS), r"norm's layer must be in 0\.\.1, got 2"),
        (2, jnp.zeros((1, 6, 256)), r"router must be \(2, 6, 256\)"),
        (4, 2, r"layer must be in 0\.\.1, got 2"),
        (5, jnp.ones(3, bool), r"valid must be bool \(2,\)"),
        (5, jnp.ones(2), r"valid must be bool .*, got float32"),
        (6, jnp.zeros(6), r"mass must be float32 \(2, 6\), got float32 \(6,\)"),
        (7, jnp.zeros(1), r"counter must be int32 \(1,\), got float32"),
    ],
)
def test_bad_arguments_are_named(place, value, message):
    changed = arguments()
    changed[place] = value
    with pytest.raises(ValueError, match=message):
        moe_layer(*changed, **KEYWORDS)


def test_bad_choices_are_named():
    with pytest.raises(ValueError, match=r"top_k must be in 1\.\.6"):
        moe_layer(*arguments(), top_k=7, normalize=True)
    with pytest.raises(ValueError, match=r"implementation must be one of .*, got 'cuda'"):
        moe_layer(*arguments(), **KEYWORDS, implementation="cuda")


@needs_mosaic
def test_named_kernel_that_cannot_run_says_why():
    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match="'mosaic' cannot run: there is no GPU"):
            moe_layer(*arguments(), **KEYWORDS, implementation="mosaic")
    plain = PlainExperts(jnp.zeros((2, 6, 128, HIDDEN)), jnp.zeros((2, 6, HIDDEN, 64)))
    norm, router = random_weights(6)
    for place, value, message in (
        (0, jnp.ones((2, HIDDEN)), "x must be bfloat16, not float32"),
        (1, (norm.astype(jnp.float32), 0, EPS), "norm's weight must be bfloat16"),
        (2, router.astype(jnp.float32), "router must be bfloat16"),
        (3, plain, "experts must be packed in pages"),
    ):
        changed = arguments()
        changed[place] = value
        with assuming_hopper(), pytest.raises(ValueError, match=message):
            moe_layer(*changed, **KEYWORDS, implementation="mosaic")
    with assuming_hopper(), pytest.raises(ValueError, match="1 to 64 tokens, not 65"):
        moe_layer(*arguments(tokens=65), **KEYWORDS, implementation="mosaic")
