import numpy as np
import pytest

from dynaexq_jax.policy import Hotness


def mass(*values):
    return np.array([values], np.float32)


def test_the_first_interval_starts_the_average():
    hotness = Hotness.cold(1, 2, decay=0.9)
    assert not hotness.started
    assert hotness.update(mass(6, 2), 4).mean.tolist() == [[1.5, 0.5]]


def test_later_intervals_are_blended_by_decay_whatever_their_length():
    first = Hotness.cold(1, 2, decay=0.75).update(mass(4, 0), 4)
    short, long = first.update(mass(0, 1), 1), first.update(mass(0, 64), 64)
    assert short.mean.tolist() == long.mean.tolist() == [[0.75, 0.25]]
    assert first.mean.tolist() == [[1, 0]]


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


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_bad_decay_is_refused(decay):
    with pytest.raises(ValueError, match="decay"):
        Hotness.cold(1, 1, decay=decay)
