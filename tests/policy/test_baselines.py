import numpy as np
import pytest

from dynaexq_jax.errors import InputError
from dynaexq_jax.policy import POLICY_NAMES, StaticMixed, make_policy

ANY_HOTNESS = np.linspace(0, 1, 12).reshape(3, 4)


def test_policies_by_name():
    policies = [make_policy(name) for name in POLICY_NAMES]
    assert tuple(policy.name for policy in policies) == POLICY_NAMES
    assert [policy.waits_for_copies for policy in policies] == [False, False, False, True]
    assert make_policy("static-mixed", ANY_HOTNESS).hotness is ANY_HOTNESS
    with pytest.raises(
        InputError, match="static-mixed holds a calibrated map: give one with --map"
    ):
        make_policy("static-mixed")
    with pytest.raises(
        InputError, match=r"no policy 'best': choose one of dynamic, .*static-mixed"
    ):
        make_policy("best")


@pytest.mark.parametrize("base_bits", [2, 4, 8])
def test_off_promotes_nothing_and_clears_what_is_above_the_base(make_input, base_bits):
    given = make_input(ANY_HOTNESS, 36, base_bits=base_bits, pinned=((0, 0),))
    plan = make_policy("off").plan(given)
    np.testing.assert_array_equal(plan.wanted, given.levels)
    assert not plan.promotions
    assert not plan.demotions
    given = make_input(ANY_HOTNESS, 36, base_bits=base_bits, levels=np.full((3, 4), 2))
    assert np.all(make_policy("off").plan(given).wanted == given.base_level)


@pytest.mark.parametrize(
    ("base_bits", "pool_pages", "by_layer"),
    [
        (2, 0, [[0, 0, 0, 0]] * 3),
        (2, 5, [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]),
        (2, 12, [[1, 1, 1, 1]] * 3),
        (2, 17, [[2, 1, 1, 1], [2, 1, 1, 1], [1, 1, 1, 1]]),
        (2, 99, [[2, 2, 2, 2]] * 3),
        (4, 7, [[2, 1, 1, 1]] * 3),
        (8, 0, [[2, 2, 2, 2]] * 3),
    ],
)
def test_static_high_fills_breadth_first_and_evenly(make_input, base_bits, pool_pages, by_layer):
    plan = make_policy("static-high").plan(make_input(ANY_HOTNESS, pool_pages, base_bits=base_bits))
    assert plan.wanted.tolist() == by_layer
    assert plan.wanted.dtype == np.int32


@pytest.mark.parametrize("max_transitions", [1, 2, 5, 100])
def test_static_high_reaches_one_map_in_bites_and_never_moves_again(make_input, max_transitions):
    rng = np.random.default_rng(0)
    policy, pinned = make_policy("static-high"), ((2, 3),)
    levels = np.zeros((3, 4), np.int32)
    for _ in range(40):
        given = make_input(
            rng.random((3, 4)), 17, levels=levels, pinned=pinned, max_transitions=max_transitions
        )
        plan = policy.plan(given)
        assert len(plan.promotions) <= max_transitions
        assert not plan.demotions
        levels = plan.wanted
    assert not plan.promotions
    assert levels.tolist() == [[2, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 2]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"age": np.zeros((1, 1))}, "age must have the shape of levels"),
        ({"hotness": np.full((3, 4), np.nan)}, "hotness must be finite"),
        ({"benefit": np.array([1.0])}, "benefit must have shape"),
        ({"benefit": np.array([1.0, -1.0])}, "benefit must be finite and not negative"),
        ({"pages_of_level": (0, 2, 3)}, "no step above the base may be smaller"),
        ({"pages_of_level": (0, 3, 2)}, "no step above the base may be smaller"),
        ({"levels": np.full((3, 4), 3)}, r"levels must be in 0\.\.2"),
        ({"levels": np.full((3, 4), 1)}, "need 12 pages, the pool has 5"),
        ({"pinned": ((0, 4),)}, "no expert 4 of layer 0 to pin"),
        ({"max_transitions": -1}, "max_transitions cannot be negative, got -1"),
    ],
)
def test_contradicting_input_is_refused(make_input, changes, message):
    with pytest.raises(ValueError, match=message):
        make_input(**{"hotness": ANY_HOTNESS, "pool_pages": 5, **changes})


def test_static_mixed_is_what_dynamic_chooses_for_its_hotness_and_stays(make_input):
    rng = np.random.default_rng(3)
    known = rng.dirichlet(np.full(8, 0.3), size=3)
    policy = StaticMixed(hotness=known)
    for base_bits, pages in ((2, 9), (4, 8), (2, 0)):
        best = make_policy("dynamic").plan(make_input(known, pages, base_bits=base_bits))
        given = make_input(np.zeros((3, 8)), pages, base_bits=base_bits, max_transitions=2)
        levels, plans = given.levels, 0
        while (plan := policy.plan(given)).promotions:  # a few at a time, whatever the traffic
            assert len(plan.promotions) <= 2
            assert not plan.demotions
            levels = plan.wanted
            plans += 1
            given = make_input(
                rng.random((3, 8)), pages, base_bits=base_bits, max_transitions=2, levels=levels
            )
        np.testing.assert_array_equal(levels, best.wanted)
        assert (plans > 1) == (pages > 0)
        assert not plan.demotions


def test_static_mixed_clears_what_others_left_and_keeps_pinned_experts(make_input):
    known = np.zeros((3, 4))
    known[:, 1] = 1.0
    left = np.zeros((3, 4), np.int32)
    left[:, 3] = 1
    given = make_input(ANY_HOTNESS, 3, levels=left, pinned=((2, 0),))
    plan = StaticMixed(hotness=known).plan(given)
    assert plan.wanted.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [2, 0, 0, 0]]


@pytest.mark.parametrize("hotness", [np.ones(3), -np.ones((2, 2)), np.full((2, 2), np.nan)])
def test_static_mixed_checks_its_hotness(hotness):
    with pytest.raises(ValueError, match="hotness must be finite and not negative"):
        StaticMixed(hotness=hotness)
