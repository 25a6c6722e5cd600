import itertools
import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dynaexq_jax.policy import Dynamic, DynamicConfig, PolicyInput
from dynaexq_jax.policy.dynamic import greedy_target
from dynaexq_jax.policy.value import step_values
from dynaexq_jax.residency import pages_of_levels

EAGER = Dynamic(config=DynamicConfig(margin=0.0, dwell=0))


def gain_of(levels, hotness, benefit, base_level):
    cumulative = np.concatenate([[0.0], np.cumsum(benefit)])
    return float((hotness * (cumulative[levels] - cumulative[base_level])).sum())


def pages_of(given, levels):
    return int(np.take(given.pages_of_level, levels).sum())


def best_gain(given):
    """The most that any map of one layer's levels gains within the pool, by trying all."""
    choices = range(given.base_level, given.max_level + 1)
    maps = (np.array([m]) for m in itertools.product(choices, repeat=given.levels.shape[1]))
    return max(
        gain_of(m, given.hotness, given.benefit, given.base_level)
        for m in maps
        if pages_of(given, m) <= given.pool_pages
    )


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_the_best_when_all_steps_cost_the_same(make_input, seed):
    hotness = np.random.default_rng(seed).random((1, 6))
    for pool_pages in range(14):
        policy_input = make_input(hotness, pool_pages, base_bits=4)
        wanted = EAGER.plan(policy_input).wanted
        gain = gain_of(wanted, hotness, policy_input.benefit, policy_input.base_level)
        assert gain == pytest.approx(best_gain(policy_input), rel=1e-12)


@pytest.mark.parametrize("benefit", [(0.1, 0.01), (0.1, 0.15)])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_loses_at_most_one_page_when_steps_cost_one_and_two(make_input, seed, benefit):
    rng = np.random.default_rng(seed)
    hotness = rng.random((1, 5)) ** 4
    best_seen = False
    for pool_pages in range(17):
        policy_input = make_input(hotness, pool_pages, benefit=np.array(benefit))
        wanted = EAGER.plan(policy_input).wanted
        assert pages_of(policy_input, wanted) <= pool_pages
        gain = gain_of(wanted, hotness, policy_input.benefit, 0)
        best = best_gain(policy_input)
        # What the one page that a two-page step could not use would have earned at most.
        assert gain >= best - (hotness * benefit[1] / 2).max() - 1e-12
        best_seen |= gain == pytest.approx(best, rel=1e-12) and 0 < pool_pages < 15
    assert best_seen


@pytest.mark.parametrize(
    ("pool_pages", "wanted"),
    [
        (1, [0, 0, 1, 0]),
        (2, [1, 0, 1, 0]),
        (3, [1, 1, 1, 0]),
        (4, [1, 1, 1, 0]),
        (5, [1, 1, 2, 0]),
        (9, [2, 2, 2, 0]),
        (12, [2, 2, 2, 0]),
    ],
)
def test_one_layer_by_hand(make_input, pool_pages, wanted):
    # Values a page: 2 -> 4 bits .04 .03 .05 0, 4 -> 8 bits .002 .0015 .0025 0.
    assert EAGER.plan(make_input([[0.4, 0.3, 0.5, 0.0]], pool_pages)).wanted.tolist() == [wanted]


def test_a_much_hotter_expert_gets_8_bits_before_a_cold_one_gets_4(make_input):
    plan = EAGER.plan(make_input([[0.9, 0.05, 0.05]], 3))
    assert plan.wanted.tolist() == [[1, 1, 1]]
    plan = EAGER.plan(make_input([[0.92, 0.04, 0.04]], 3))
    assert plan.wanted.tolist() == [[2, 0, 0]]
    assert [(c.from_level, c.to_level) for c in plan.promotions] == [(0, 2)]


def test_the_higher_step_never_comes_before_the_lower_even_if_it_is_worth_more(make_input):
    plan = EAGER.plan(make_input([[0.5, 0.4]], 2, benefit=np.array([0.01, 1.0])))
    assert plan.wanted.tolist() == [[1, 1]]


def test_the_most_valuable_steps_of_all_layers_are_taken(make_input):
    hotness = [[0.4, 0.3, 0.2, 0.1], [0.04, 0.03, 0.02, 0.01]]
    assert EAGER.plan(make_input(hotness, 4)).wanted.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    by_layer = np.array([[0.1, 0.0], [1.1, 0.0]])
    plan = EAGER.plan(make_input(hotness, 4, benefit=by_layer))
    assert plan.wanted.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
    by_expert = np.repeat(by_layer[:, :, None], 4, axis=2)
    np.testing.assert_array_equal(
        EAGER.plan(make_input(hotness, 4, benefit=by_expert)).wanted, plan.wanted
    )
    by_expert[0, :, 0] /= 2
    by_expert[1, :, 3] *= 9
    plan = EAGER.plan(make_input(hotness, 4, benefit=by_expert))
    assert plan.wanted.tolist() == [[0, 1, 0, 0], [1, 1, 0, 1]]


def test_a_layer_gets_no_more_than_it_can_use(make_input):
    hotness = [[0.5, 0.0, 0.0], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]
    plan = EAGER.plan(make_input(hotness, 6, pages_of_level=(0, 1), benefit=np.array([0.1])))
    assert plan.wanted.tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]


def test_no_page_is_wasted_where_every_step_costs_two(make_input):
    plan = EAGER.plan(make_input(np.full((3, 4), 0.25), 10, base_bits=4))
    assert pages_of(make_input(np.ones((3, 4)), 10, base_bits=4), plan.wanted) == 10


def test_single_pages_left_in_layers_are_put_together(make_input):
    # Each layer: three experts at 4 bits and one page left of four, too few for 8 bits.
    plan = EAGER.plan(make_input([[0.4, 0.3, 0.3], [0.4, 0.3, 0.3]], 8))
    assert plan.wanted.tolist() == [[2, 1, 1], [1, 1, 1]]


def test_experts_without_traffic_are_never_promoted(make_input):
    assert not EAGER.plan(make_input(np.zeros((2, 3)), 18)).promotions


def test_ties_go_to_the_lower_layer_and_expert(make_input):
    plan = EAGER.plan(make_input(np.full((3, 4), 0.25), 5))
    assert plan.wanted.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    places = [(c.layer, c.expert) for c in plan.promotions]
    assert places == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]


def test_promotions_are_ordered_by_value_and_cut_at_max_transitions(make_input):
    hotness = [[0.1, 0.6, 0.3], [0.5, 0.1, 0.4]]
    plan = EAGER.plan(make_input(hotness, 4, max_transitions=3))
    assert [(c.layer, c.expert) for c in plan.promotions] == [(0, 1), (1, 0), (1, 2)]
    assert plan.wanted.tolist() == [[0, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize(("challenger", "moves"), [(0.24, False), (0.2401, True)])
def test_an_incumbent_is_displaced_only_by_a_clear_margin(make_input, challenger, moves):
    policy = Dynamic(config=DynamicConfig(margin=0.2, dwell=0))
    given = make_input([[0.2, challenger, 0.1]], 1, levels=np.array([[1, 0, 0]]))
    plan = policy.plan(given)
    assert plan.wanted.tolist() == ([[0, 1, 0]] if moves else [[1, 0, 0]])
    assert len(plan.demotions) == len(plan.promotions) == moves


@pytest.mark.parametrize(("age", "moves"), [(0, False), (1, False), (2, True)])
def test_an_expert_dwells_after_a_change(make_input, age, moves):
    policy = Dynamic(config=DynamicConfig(margin=0.2, dwell=2))
    levels = np.array([[1, 0]])
    given = make_input([[0.0, 0.9]], 1, levels=levels, age=np.array([[age, 50]]))
    assert policy.plan(given).wanted.tolist() == ([[0, 1]] if moves else [[1, 0]])


def test_nothing_is_demoted_before_its_pages_are_needed(make_input):
    levels = np.array([[2, 1, 0, 0]])
    hotness = [[0.0, 0.0, 0.0, 0.9]]
    fits = EAGER.plan(make_input(hotness, 5, levels=levels, benefit=np.array([0.1, 0.0])))
    assert fits.wanted.tolist() == [[2, 1, 0, 1]]
    assert not fits.demotions
    needs_one = EAGER.plan(make_input(hotness, 6, levels=levels))
    assert needs_one.wanted.tolist() == [[1, 1, 0, 2]]
    needs_none = EAGER.plan(make_input(hotness, 4, levels=levels, max_transitions=0))
    assert needs_none.wanted.tolist() == levels.tolist()


def test_a_cut_plan_demotes_only_for_the_promotions_that_remain(make_input):
    levels = np.array([[1, 1, 0, 0]])
    given = make_input([[0.1, 0.05, 0.5, 0.4]], 2, levels=levels, max_transitions=1)
    plan = EAGER.plan(given)
    assert [(c.expert, c.to_level) for c in plan.demotions] == [(1, 0)]
    assert [(c.expert, c.to_level) for c in plan.promotions] == [(2, 1)]


def test_pinned_experts_come_first_and_stay(make_input):
    pinned = ((0, 3), (1, 2))
    cold = np.zeros((2, 4))
    plan = EAGER.plan(make_input(cold, 7, pinned=pinned))
    assert plan.wanted.tolist() == [[0, 0, 0, 2], [0, 0, 2, 0]]
    hot_others = np.array([[0.5, 0.5, 0, 0]] * 2)
    plan = EAGER.plan(make_input(hot_others, 7, pinned=pinned, levels=plan.wanted))
    assert plan.wanted.tolist() == [[1, 0, 0, 2], [0, 0, 2, 0]]
    assert EAGER.plan(make_input(cold, 5, pinned=pinned)).wanted.tolist() == [
        [0, 0, 0, 2],
        [0, 0, 1, 0],
    ]
    first = EAGER.plan(make_input(hot_others, 7, pinned=pinned, max_transitions=1)).promotions
    assert [(c.layer, c.expert, c.to_level) for c in first] == [(0, 3, 2)]


@pytest.mark.parametrize("name", ["margin", "dwell"])
def test_bad_config_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} cannot be negative, got -1"):
        DynamicConfig(**{name: -1})


@st.composite
def inputs(draw):
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    base_bits = draw(st.sampled_from((2, 4, 8)))
    pages_of_level = pages_of_levels(base_bits)
    base_level = sum(pages == 0 for pages in pages_of_level) - 1
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (layers, experts)
    levels = rng.integers(base_level, 3, shape)
    held = int(np.take(pages_of_level, levels).sum())
    places = [(layer, expert) for layer in range(layers) for expert in range(experts)]
    return PolicyInput(
        hotness=rng.integers(0, 6, shape) / 5,
        levels=levels,
        age=rng.integers(0, 4, shape),
        pool_pages=held + draw(st.integers(0, 8)),
        pages_of_level=pages_of_level,
        benefit=rng.choice(
            [0.0, 0.01, 0.1, 0.5], draw(st.sampled_from([(layers, 2), (layers, 2, experts)]))
        ),
        pinned=tuple(draw(st.lists(st.sampled_from(places), max_size=3))),
        max_transitions=draw(st.sampled_from((0, 1, 3, 100))),
    )


@settings(max_examples=300, deadline=None)
@given(inputs(), st.sampled_from((0.0, 0.2)), st.sampled_from((0, 2)))
def test_every_plan_keeps_the_rules(given, margin, dwell):
    plan = Dynamic(config=DynamicConfig(margin=margin, dwell=dwell)).plan(given)
    again = Dynamic(config=DynamicConfig(margin=margin, dwell=dwell)).plan(given)
    assert [*plan.demotions] == [*again.demotions]
    assert [*plan.promotions] == [*again.promotions]
    np.testing.assert_array_equal(plan.wanted, again.wanted)

    assert pages_of(given, plan.wanted) <= given.pool_pages
    assert plan.wanted.min() >= given.base_level
    assert len(plan.promotions) <= given.max_transitions
    reached = given.levels.copy()
    for change in (*plan.demotions, *plan.promotions):
        assert reached[change.layer, change.expert] == change.from_level
        reached[change.layer, change.expert] = change.to_level
    np.testing.assert_array_equal(reached, plan.wanted)
    assert all(c.to_level < c.from_level for c in plan.demotions)
    assert all(c.to_level > c.from_level for c in plan.promotions)
    lost = [step_values(given)[c.layer, c.from_level - 1, c.expert] for c in plan.demotions]
    assert lost == sorted(lost)  # who is missed least gives its pages first
    for change in plan.demotions:
        assert given.age[change.layer, change.expert] >= dwell
        assert (change.layer, change.expert) not in given.pinned
    for change in plan.promotions:
        place = (change.layer, change.expert)
        assert given.hotness[place] > 0 or place in given.pinned
    if plan.demotions:  # only for pages that are needed: undoing the smallest would not fit
        smallest = min(
            given.pages_of_level[c.to_level + 1] - given.pages_of_level[c.to_level]
            for c in plan.demotions
        )
        assert pages_of(given, plan.wanted) + smallest > given.pool_pages


@settings(max_examples=100, deadline=None)
@given(inputs())
def test_a_plan_carried_out_is_where_the_next_one_stays(given):
    """Steady traffic: no page moves twice, though each plan sees the levels of the last."""
    config = DynamicConfig(margin=0.2, dwell=0)
    fields = {name: getattr(given, name) for name in given.__dataclass_fields__}
    fields["max_transitions"] = 10**6
    for _ in range(4):
        plan = Dynamic(config=config).plan(PolicyInput(**fields))
        fields["levels"] = plan.wanted
    assert not plan.promotions
    assert not plan.demotions


@settings(max_examples=300, deadline=None)
@given(inputs())
def test_steps_are_taken_one_by_one_in_order(given):
    """The target, by a loop over all steps."""
    assume(given.max_level > given.base_level)
    target, rank = greedy_target(given, DynamicConfig(margin=0.2, dwell=2))
    layers, number, experts = rank.shape
    held = np.arange(number)[:, None] < given.levels[:, None, :]
    places = [
        (-rank[layer, step, expert], not held[layer, step, expert], step, layer, expert)
        for step in range(given.base_level, number)
        for layer in range(layers)
        for expert in range(experts)
    ]
    expected = np.full((layers, experts), given.base_level)
    room = given.pool_pages
    for minus_rank, is_new, step, layer, expert in sorted(places):
        cost = given.step_pages[step]
        if cost <= room and (minus_rank < 0 or not is_new):
            assert expected[layer, expert] == step
            expected[layer, expert] += 1
            room -= cost
    np.testing.assert_array_equal(target, expected)


def test_a_plan_for_a_30b_model_is_fast():
    rng = np.random.default_rng(0)
    hotness = rng.random((48, 128)) ** 4
    given = PolicyInput(
        hotness=hotness,
        levels=np.zeros((48, 128), np.int32),
        age=np.zeros((48, 128), np.int32),
        pool_pages=48 * 32 + 17,
        pages_of_level=(0, 1, 3),
        benefit=rng.random((48, 2)),
        max_transitions=256,
    )
    times = []
    for _ in range(20):
        start = time.perf_counter()
        Dynamic().plan(given)
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-3
