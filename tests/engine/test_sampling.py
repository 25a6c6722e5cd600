"""Sampling against the exact filtered distribution, on vocabularies small enough to count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynaexq_jax.engine.sampling import SamplingArrays, SamplingParams, sample
from dynaexq_jax.errors import InputError

DRAWS = 4000
LOGITS = np.array([0.3, 2.0, -1.0, 1.1, 0.0, 1.9, -4.0, 0.6], np.float32)
"""No two are equal, and the likeliest is not the first."""

jitted = jax.jit(sample)


def slots(*params):
    """Settings of one slot each."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(SamplingArrays.of, params))


def draw(params, logits=LOGITS, draws=DRAWS):
    """Tokens of ``draws`` positions under one setting."""
    settings = jax.tree.map(lambda leaf: jnp.repeat(leaf, draws), slots(params))
    rows = jnp.broadcast_to(jnp.asarray(logits), (draws, len(logits)))
    return np.asarray(jitted(rows, settings, jnp.arange(draws, dtype=jnp.int32)))


def exact(logits, *, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution, by the definition: filters one after another on what is left."""
    p = np.exp(logits.astype(np.float64) / temperature)
    p /= p.sum()
    ranked = np.argsort(-p, kind="stable")
    if top_k:
        p[ranked[top_k:]] = 0
        p /= p.sum()
    kept, reached = np.zeros(len(p), bool), 0.0
    for token in ranked:
        if reached >= top_p:
            break
        kept[token] = True
        reached += p[token]
    kept &= p >= min_p * p.max()
    p = np.where(kept, p, 0)
    return p / p.sum()


FILTERS = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.0, "top_k": 100},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 2.0, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.3},
    {"temperature": 1.0, "min_p": 0.9},
    {"temperature": 1.0, "min_p": 0.99},
    {"temperature": 1.5, "top_k": 5, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.95, "min_p": 0.35},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_tokens_follow_the_filtered_distribution(options):
    expected = exact(LOGITS, **options)
    counts = np.bincount(draw(SamplingParams(seed=17, **options)), minlength=len(LOGITS))
    kept = expected > 0
    assert not counts[~kept].any()
    assert (counts[kept] > 0).all() or expected[kept].min() * DRAWS < 10
    chi_square = ((counts - DRAWS * expected)[kept] ** 2 / (DRAWS * expected[kept])).sum()
    freedom = kept.sum() - 1
    # four standard deviations above the mean, with the seed fixed
    assert chi_square <= freedom + 4 * np.sqrt(2 * freedom) + 1e-6


def test_temperature_zero_takes_the_likeliest_whatever_the_filters():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(64, 50)).astype(np.float32)
    for params in (SamplingParams(), SamplingParams(top_k=5, top_p=0.3, min_p=0.5, seed=9)):
        settings = jax.tree.map(lambda leaf: jnp.repeat(leaf, 64), slots(params))
        tokens = jitted(jnp.asarray(logits), settings, jnp.arange(64, dtype=jnp.int32))
        np.testing.assert_array_equal(tokens, logits.argmax(axis=1))
        assert tokens.dtype == jnp.int32


def test_of_equal_logits_the_first_are_kept():
    logits = np.zeros(6, np.float32)
    assert set(draw(SamplingParams(temperature=1.0, top_k=2), logits)) == {0, 1}
    assert set(draw(SamplingParams(temperature=1.0, top_p=0.5), logits)) == {0, 1, 2}
    assert set(draw(SamplingParams(), logits)) == {0}


def test_slots_are_independent():
    """Each slot draws as it would alone, whatever the others' settings are."""
    rng = np.random.default_rng(1)
    every = [
        SamplingParams(),
        SamplingParams(temperature=0.7, seed=3),
        SamplingParams(temperature=1.3, top_k=4, seed=2**32 - 1),
        SamplingParams(temperature=1.0, top_p=0.6, seed=3),
        SamplingParams(temperature=2.0, min_p=0.2),
    ]
    logits = jnp.asarray(rng.normal(size=(len(every), 40)).astype(np.float32) * 2)
    for start in range(0, 60, 7):
        positions = start + jnp.arange(len(every), dtype=jnp.int32)
        together = jitted(logits, slots(*every), positions)
        alone = [
            int(jitted(logits[i : i + 1], slots(params), positions[i : i + 1])[0])
            for i, params in enumerate(every)
        ]
        assert together.tolist() == alone


def test_seed_and_position_decide():
    warm = SamplingParams(temperature=3.0, seed=1)
    first = draw(warm, draws=64)
    np.testing.assert_array_equal(draw(warm, draws=64), first)
    assert (draw(SamplingParams(temperature=3.0, seed=2), draws=64) != first).any()
    assert len(set(first.tolist())) > 3  # positions differ from one another


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -0.1, "temperature must be 0 or more, and finite, got -0.1"),
        ("temperature", float("nan"), "temperature must be 0 or more, and finite, got nan"),
        ("temperature", float("inf"), "temperature must be 0 or more, and finite, got inf"),
        ("top_k", -1, r"top_k must be in 0\.\.2\^31-1, where 0 is off, got -1"),
        ("top_k", 2**31, r"top_k must be in 0\.\.2\^31-1, where 0 is off, got 2147483648"),
        ("top_p", 0.0, r"top_p must be in \(0, 1\], got 0.0"),
        ("top_p", 1.01, r"top_p must be in \(0, 1\], got 1.01"),
        ("min_p", -0.1, r"min_p must be in \[0, 1\), got -0.1"),
        ("min_p", 1.0, r"min_p must be in \[0, 1\), got 1.0"),
        ("seed", -1, "seed must be in 0..2.32-1, got -1"),
        ("seed", 2**32, "seed must be in 0..2.32-1, got 4294967296"),
    ],
)
def test_settings_out_of_range_are_refused(field, value, message):
    with pytest.raises(InputError, match=message):
        SamplingParams(**{field: value})
