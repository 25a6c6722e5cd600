"""The value of maps, and the bound that proves a map good."""

import itertools

import numpy as np
import pytest

from dynaexq_jax.policy import StaticMixed
from dynaexq_jax.policy.value import map_value, step_values, value_bound


def test_a_step_is_worth_hotness_times_benefit_a_page(make_input):
    given = make_input([[0.5, 0.2], [0.1, 0.0]], 3)
    np.testing.assert_allclose(step_values(given)[0], [[0.05, 0.02], [0.0025, 0.001]])
    assert map_value(given, np.array([[2, 1], [0, 0]])) == pytest.approx(0.05 + 0.005 + 0.02)
    by_expert = np.array([[[0.1, 0.3], [0.01, 0.6]], [[0.2, 0.2], [0.0, 0.0]]])
    given = make_input([[0.5, 0.2], [0.1, 0.0]], 3, benefit=by_expert)
    # a page of the second step counts no more than one of the first
    np.testing.assert_allclose(step_values(given)[0], [[0.05, 0.06], [0.0025, 0.06]])
    base = make_input([[0.5, 0.2]], 4, base_bits=4)
    assert np.all(np.isinf(step_values(base)[:, 0]))
    assert map_value(base, np.array([[2, 1]])) == pytest.approx(0.5 * 0.01)


@pytest.mark.parametrize("base_bits", [2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_no_map_exceeds_the_bound_and_static_mixed_is_within_a_step_of_it(
    make_input, base_bits, seed
):
    rng = np.random.default_rng(seed)
    hotness = rng.random((2, 3)) ** 3
    benefit = np.sort(rng.random((2, 2, 3)), axis=1)[:, ::-1] * [[[1.0], [0.3]]]
    for pages in range(19):
        pinned = ((1, 2),) if seed % 2 else ()
        given = make_input(hotness, pages, base_bits=base_bits, benefit=benefit, pinned=pinned)
        choices = range(given.base_level, 3)
        pinned_level = StaticMixed(hotness=np.zeros((2, 3))).plan(given).wanted[1, 2]
        values = [
            map_value(given, levels)
            for levels in (np.array(m).reshape(2, 3) for m in itertools.product(choices, repeat=6))
            if given.pages_held(levels) <= pages and levels[1, 2] >= (pinned_level if pinned else 0)
        ]
        bound = value_bound(given)
        assert max(values) <= bound + 1e-12
        found = map_value(given, StaticMixed(hotness=hotness).plan(given).wanted)
        assert found <= max(values) + 1e-12
        costs = given.step_pages[given.base_level :, None]
        last_step = (step_values(given)[:, given.base_level :] * costs).max()
        assert bound - found < last_step
        if base_bits == 4 and pages % 2 == 0:  # one kind of step, and all pages used: exact
            assert found == pytest.approx(bound, rel=1e-12)
