"""All layers of a decode step as one kernel, compiled on a GPU: its numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.decode_shapes import EPS, HEAD, SMALL, abstract_arguments, call_of
from kernels.experts import random_experts

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_layers import LayerWeights, obstacle
from pallas_kernels.linear import Int8Matrix, linear
from pallas_kernels.moe_layer import moe_layer

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
