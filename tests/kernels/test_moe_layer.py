"""Every implementation of the MoE block against its float64 definition.

In most cases all elements of a token have one magnitude, a power of two. Its norm is then plus or
minus the norm's weights, whatever rounds it where, so logits are 32-bit sums of exact products:
2e-6 of the sum of their magnitudes, and no token has its next best expert that near. A kernel may
round the experts' activations once to 8 significant bits: independent relative errors of at most
2^-9, so an error of 2^-9 / sqrt(3) of the root of the sum of squared products, of which we allow
six. The result is rounded to bfloat16, by at most 2^-8 of it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.experts import expert_matrices, random_experts
from kernels.moe_blocks import (
    EPS,
    HIDDEN,
    LAYER,
    NORM_LAYER,
    WIDTH,
    decided,
    define,
    normed,
    random_weights,
    signs,
)
from kernels.targets import RUNNABLE, needs_mosaic, runner

from pallas_kernels.moe_layer import moe_layer
from pallas_kernels.pages import PlainExperts, interleave_gate_up


@functools.cache
def jitted(**keywords):
    """``moe_layer`` of traced layers."""

    def call(x, norm, router, experts, valid, layer, norm_layer, mass, counter):
        norm = (norm, norm_layer, EPS)
        return moe_layer(x, norm, router, experts, layer, valid, mass, counter, **keywords)

    return jax.jit(call)


def run(x, norm, router, experts, valid, *, implementation, **keywords):
    """``moe_layer`` under jit; (y, what it added to the mass [E])."""
    call = jitted(implementation=implementation, **keywords)
    before = np.stack([np.full(router.shape[1], 2.0), np.arange(router.shape[1]) % 2])
    with runner(implementation):
        layers = jnp.int32(LAYER), jnp.int32(NORM_LAYER)
        state = jnp.asarray(before, jnp.float32), jnp.zeros(1, jnp.int32)
        y, mass, counter = call(x, norm, router, experts, jnp.asarray(valid), *layers, *state)
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
@pytest.mark.parametrize(
    ("base_bits", "encoding"), [(2, "bf16"), (2, "log8"), (4, "bf16"), (8, "log8")]
)
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
    "changed",
    [
        {"gate_up_parts": 2, "ring_lines": 32},
        {"gate_up_parts": 1, "rows": 8, "gate_up_lines": 32, "down_lines": 24},
    ],
)
def test_any_config(changed):
    """1024 columns are two runs of chunks: as many parts as there can be."""
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
    arguments = decided(signs, 5, norm, router, 2), norm, router
    experts = random_experts(hidden=HIDDEN, width=WIDTH, experts=8)
    first, second = (
        run(*arguments, experts, np.ones(5, bool), implementation="mosaic", top_k=2, normalize=True)
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
