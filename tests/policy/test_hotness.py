import numpy as np
import pytest

from dynaexq_jax.policy import Hotness


def mass(*values):
    return np.array([values], np.float32)


def test_the_first_interval_starts_the_average():
    hotness = Hotness.cold(1, 2)
    assert hotness.tokens == 0
    assert hotness.update(mass(6, 2), 4).mean.tolist() == [[1.5, 0.5]]


def test_later_intervals_count_by_their_tokens():
    first = Hotness.cold(1, 2, memory=12).update(mass(3, 0), 3)
    short, long = first.update(mass(0, 1), 1), first.update(mass(0, 9), 9)
    assert short.mean.tolist() == [[0.75, 0.25]]
    assert long.mean.tolist() == [[0.25, 0.75]]
    assert first.mean.tolist() == [[1, 0]]
    assert (first.tokens, short.tokens, long.tokens) == (3, 4, 12)


def test_the_past_counts_as_the_memory_at_most():
    past = Hotness.cold(1, 2, memory=12).update(mass(1000, 0), 1000)
    assert past.update(mass(0, 4), 4).mean.tolist() == [[0.75, 0.25]]
    for tokens in (4, 4, 4, 4):
        past = past.update(mass(0, tokens), tokens)
    np.testing.assert_allclose(past.mean[0, 0], 0.75**4, rtol=1e-12)


def test_an_interval_without_tokens_changes_nothing():
    cold = Hotness.cold(1, 2)
    assert cold.update(mass(0, 0), 0) is cold


def test_steady_traffic_is_its_own_average():
    hotness = Hotness.cold(1, 2)
    for tokens in (3, 500, 16):
        hotness = hotness.update(mass(0.25 * tokens, 0.75 * tokens), tokens)
    np.testing.assert_allclose(hotness.mean, [[0.25, 0.75]], rtol=1e-12)


@pytest.mark.parametrize(
    ("values", "tokens", "message"),
    [
        (np.zeros((2, 2)), 1, r"shape \(1, 2\), got \(2, 2\)"),
        (mass(1, np.nan), 1, "finite"),
        (mass(1, -1), 1, "not negative"),
        (mass(1, 1), -1, "-1 tokens"),
    ],
)
def test_bad_statistics_are_refused(values, tokens, message):
    with pytest.raises(ValueError, match=message):
        Hotness.cold(1, 2).update(values, tokens)


@pytest.mark.parametrize(("memory", "tokens"), [(0, 0), (-3, 0), (4, 5), (4, -1)])
def test_bad_memory_is_refused(memory, tokens):
    with pytest.raises(ValueError, match="memory"):
        Hotness(mean=np.zeros((1, 1)), tokens=tokens, memory=memory)
