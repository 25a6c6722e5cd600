"""Hits against a count step by step."""

import numpy as np
import pytest

from dynaexq_jax.hits import AboveBase, hit_mass


@pytest.mark.parametrize("seed", range(5))
def test_shares_are_those_of_a_count_by_step(seed):
    rng = np.random.default_rng(seed)
    above = rng.random((2, 3)) < 0.5
    tracker = AboveBase(above)
    interval, found, expected = [], [], []
    for _ in range(60):
        for _ in range(rng.integers(0, 3)):  # the last one before a step counts
            above = rng.random((2, 3)) < 0.5
            tracker.change(len(interval), above)
        interval.append(above)
        if rng.random() < 0.2:
            found.append(tracker.end_interval(len(interval)))
            expected.append(np.mean(interval, axis=0))
            interval = []
    assert len(found) > 3
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_hit_mass_is_the_mass_by_share():
    mass = np.array([[3.0, 1.0]], np.float32)
    assert hit_mass(mass, np.array([[0.75, 0.5]])) == 3 * 0.75 + 0.5
    assert hit_mass(mass, np.array([[True, False]])) == 3.0
    assert not AboveBase(mass > 0).end_interval(0).any()  # nothing was read
