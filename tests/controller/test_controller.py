"""The controller with a policy and a migration that only take notes."""

import numpy as np
import pytest
from controller.fakes import EXPERTS, LAYERS, Scripted, arrive, arrived, make, stats_of

from dynaexq_jax.controller import INTERVAL_TOKENS, ControllerConfig
from dynaexq_jax.errors import InputError
from dynaexq_jax.policy import Hotness, Plan


def test_the_beginning_is_one_plan_carried_out_at_once():
    controller, policy, migration = make()
    (given,) = policy.given
    assert not given.hotness.any()
    assert not given.levels.any()
    assert given.pool_pages == given.max_transitions == 6
    assert given.pages_of_level == (0, 1, 3)
    assert given.pinned == ((1, 2),)
    assert migration.calls[1:] == ["drain", "advance"]
    assert controller.plans == 1
    assert controller.counters is migration.counters


@pytest.mark.parametrize("interval", [1, 3, 16])
def test_statistics_are_wanted_every_interval(interval):
    controller, _, _ = make(interval=interval)
    ends = steps_until_intervals_end(controller, [1] * (3 * interval))
    assert ends == [interval, 2 * interval, 3 * interval]


def steps_until_intervals_end(controller, tokens_of_steps):
    """The steps after which statistics are handed over, which arrive before the next."""
    ends = []
    for step, tokens in enumerate(tokens_of_steps, 1):
        controller.advance(during_chunk=True)
        if controller.wants_stats(tokens):
            controller.give_stats(arrived(1.0, 1))
            ends.append(step)
    return ends


def test_the_first_interval_is_short_and_long_chunks_end_any():
    controller, _, _ = make(interval=16)
    assert steps_until_intervals_end(controller, [8] * 30) == [4, 20]
    assert steps_until_intervals_end(controller, [8] * 6) == [6]  # of 16, 10 are gone
    half = INTERVAL_TOKENS // 2
    assert steps_until_intervals_end(controller, [half] * 4 + [2 * half, 1]) == [2, 4, 5]
    controller.restart()
    assert steps_until_intervals_end(controller, [1] * 60) == [16, 32, 48]
    controller.restart()
    assert steps_until_intervals_end(controller, [31, 1, 31, 1]) == [2]


def test_statistics_are_read_once_their_copy_has_arrived():
    controller, policy, migration = make(max_transitions=2)
    stats = stats_of(4.0, 8)
    controller.give_stats(stats)
    assert all(part.copied == 1 for part in stats)
    for _ in range(3):
        controller.advance()  # goes on without
    assert len(policy.given) == 1
    stats.mass.arrived = True
    controller.advance()  # half of it is not enough
    assert len(policy.given) == 1
    arrive(stats)
    migration.calls.clear()
    for _ in range(3):
        controller.advance()
    # read, and what was planned before moves; planned; moved
    assert [type(call) if isinstance(call, Plan) else call for call in migration.calls] == [
        "advance", Plan, "publish", "advance",
    ]  # fmt: skip
    assert len(policy.given) == 2
    np.testing.assert_array_equal(policy.given[1].hotness, 0.5)  # mass a token
    assert policy.given[1].max_transitions == 2


def test_statistics_at_every_call_keep_no_page_from_moving():
    controller, policy, migration = make(interval=1)
    migration.calls.clear()
    for _ in range(9):
        if controller.wants_stats(1):
            controller.give_stats(arrived(1.0, 8))
        controller.advance()
    moved = [call for call in migration.calls if isinstance(call, str)]
    assert moved == ["advance", "publish", "advance"] * 3
    assert len(policy.given) == 1 + 3


def test_during_a_chunk_pages_of_a_new_plan_move_at_once():
    controller, _, migration = make()
    migration.calls.clear()
    controller.give_stats(arrived(1.0, 8))
    controller.advance(during_chunk=True)
    assert isinstance(migration.calls[0], Plan)
    assert migration.calls[1:] == ["advance"]


def test_an_interval_goes_on_until_the_last_one_is_planned_for():
    controller, policy, _ = make(interval=1)
    first, second = stats_of(1.0, 1), stats_of(9.0, 3)
    assert controller.wants_stats(1)
    controller.give_stats(first)
    for _ in range(2):
        controller.advance()  # never waits
        assert not controller.wants_stats(1)  # the device gathers on
    arrive(first)
    controller.advance()
    assert not controller.wants_stats(1)
    controller.advance()  # plans
    assert not controller.wants_stats(1)
    controller.advance()
    assert controller.wants_stats(1)
    controller.give_stats(second)
    controller.advance()
    assert len(policy.given) == 2
    np.testing.assert_allclose(policy.given[1].hotness, 1.0)
    controller.settle()
    np.testing.assert_allclose(policy.given[2].hotness, (1.0 + 9.0) / 4)


def test_what_is_under_way_counts_as_done_in_the_next_plan():
    controller, policy, migration = make()
    under_way = migration._residency.reserve(0, 1, 1)
    for mass in (1.0, 2.0):
        controller.give_stats(arrived(mass, 1))
        controller.advance(during_chunk=True)
    assert len(policy.given) == 3
    for given in policy.given[1:]:
        assert given.levels[0, 1] == given.levels.sum() == 1
    assert [given.age[0, 1] for given in policy.given] == [0, 0, 1]
    assert not controller.levels().any()  # what steps read
    migration._residency.commit(under_way)
    controller.give_stats(stats_of(1.0, 1))
    controller.settle()
    assert policy.given[-1].age[0, 1] == 2  # it has changed when it was planned for


def test_a_policy_that_waits_reads_at_once():
    controller, policy, _ = make(waits=True)
    controller.give_stats(stats_of(1.0, 2))
    controller.advance()
    assert len(policy.given) == 2


def test_age_counts_plans_since_the_level_changed():
    controller, policy, _ = make(waits=True)

    def promote(given):
        wanted = given.levels.copy()
        wanted[0, 1] = min(len(policy.given) // 2, 1)  # from the second plan on
        return wanted

    policy.wants = promote
    ages = []
    for _ in range(4):
        controller.give_stats(stats_of(1.0, 1))
        controller.settle()
        ages.append(policy.given[-1].age)
    assert [age[0, 0] for age in ages] == [1, 2, 3, 4]  # counted from the beginning
    assert [age[0, 1] for age in ages] == [1, 0, 1, 2]
    assert controller.levels()[0, 1] == 1


def test_settle_reads_what_is_pending_carries_it_out_and_publishes():
    controller, policy, migration = make()
    policy.wants = lambda given: np.eye(LAYERS, EXPERTS, dtype=np.int32)
    controller.give_stats(stats_of(1.0, 1))
    migration.calls.clear()
    controller.settle()
    assert len(policy.given) == 2
    assert isinstance(migration.calls[0], Plan)
    assert migration.calls[1:] == ["drain", "advance"]  # demotions alone are only published there
    np.testing.assert_array_equal(controller.levels(), np.eye(LAYERS, EXPERTS))


def test_restart_forgets_and_begins_again():
    controller, policy, _ = make()
    policy.wants = lambda given: np.eye(LAYERS, EXPERTS, dtype=np.int32) * (given.hotness.max() > 0)
    controller.give_stats(stats_of(1.0, 1))
    controller.settle()
    assert controller.levels().sum() == 2
    controller.give_stats(stats_of(5.0, 1))
    controller.restart()
    assert not controller.levels().any()
    begin = policy.given[-1]
    assert not begin.hotness.any()
    assert not begin.levels.any()
    assert not begin.age.any()
    assert begin.max_transitions == 6
    controller.advance()
    assert policy.given[-1] is begin  # what was pending belongs to the old traffic


def test_hotness_of_an_earlier_run_begins_and_is_blended():
    warm = Hotness(mean=np.full((LAYERS, EXPERTS), 3.0), tokens=3, memory=8)
    eye = np.eye(LAYERS, EXPERTS, dtype=np.int32)
    controller, policy, _ = make(hotness=warm, wants=lambda given: eye * (given.hotness.max() > 2))
    np.testing.assert_array_equal(policy.given[0].hotness, 3.0)
    np.testing.assert_array_equal(controller.levels(), eye)  # before any step
    assert controller.hotness is warm
    controller.give_stats(stats_of(1.0, 1))
    controller.settle()
    blended = (3 * 3.0 + 1.0) / 4
    np.testing.assert_allclose(controller.hotness.mean, blended)
    np.testing.assert_allclose(policy.given[-1].hotness, blended)
    controller.restart()
    assert controller.hotness is warm
    np.testing.assert_array_equal(controller.levels(), eye)


def test_hits_count_for_the_steps_of_their_interval_that_read_a_higher_level():
    controller, policy, _ = make(interval=4)
    eye = np.eye(LAYERS, EXPERTS, dtype=np.int32)

    def step(count):
        for _ in range(count):
            controller.advance()
            controller.wants_stats(1)

    step(4)
    policy.wants = lambda given: eye
    controller.give_stats(stats_of(1.0, 1))  # of steps that were all at the base
    controller.settle()  # planned for it, and carried out: its own traffic is over
    assert vars(controller.routing) == {"intervals": 1, "mass": LAYERS * EXPERTS, "hit_mass": 0.0}
    assert controller.levels().sum() == 2
    step(1)
    policy.wants = lambda given: 0 * eye
    controller._due = True  # as if more traffic had been read
    step(3)  # demoted before the first of them
    policy.wants = lambda given: given.levels
    controller.give_stats(stats_of(4.0, 1))
    controller.settle()
    assert vars(controller.routing) == {
        "intervals": 2,
        "mass": LAYERS * EXPERTS * 5.0,
        "hit_mass": 2 * 4.0 * 1 / 4,
    }


def test_every_interval_is_recorded_once_planned_or_not():
    records = []
    controller, policy, _ = make(record=lambda *interval: records.append(interval))
    assert records == []
    for mass, tokens in ((1.0, 1), (2.0, 0), (4.0, 3)):
        controller.give_stats(arrived(mass, tokens))
        controller._digest()
    assert len(policy.given) == 1
    controller.settle()
    assert [tokens for _, tokens in records] == [1, 0, 3]
    assert all(type(tokens) is int for _, tokens in records)
    for (mass, _), expected in zip(records, (1.0, 2.0, 4.0), strict=True):
        np.testing.assert_array_equal(mass, np.full((LAYERS, EXPERTS), expected))


@pytest.mark.parametrize("name", ["interval", "max_transitions"])
def test_configuration_is_checked(name):
    with pytest.raises(InputError, match=f"{name} must be positive, got 0"):
        ControllerConfig(**{name: 0})


def test_restart_with_another_policy():
    controller, policy, migration = make()
    other = Scripted(waits=True)
    other.wants = lambda given: np.eye(LAYERS, EXPERTS, dtype=np.int32)
    given = len(policy.given)
    controller.restart(other)
    assert len(policy.given) == given
    assert len(other.given) == 1
    assert migration.waits_for_copies
    np.testing.assert_array_equal(controller.levels(), np.eye(LAYERS, EXPERTS))
    controller.restart()  # the same again
    assert len(other.given) == 2


def test_changes_of_levels_are_told():
    controller, policy, _ = make()
    told = []
    controller.on_levels = lambda: told.append(int(controller.levels().sum()))
    controller.advance()
    assert told == []
    policy.wants = lambda given: np.eye(LAYERS, EXPERTS, dtype=np.int32)
    controller.give_stats(stats_of(1.0, 1))
    controller.settle()
    policy.wants = lambda given: np.zeros_like(given.levels)
    controller.give_stats(stats_of(1.0, 1))
    controller.settle()
    assert told == [2, 0]


def test_statistics_are_shown_to_who_wants_to_see_them():
    controller, _, _ = make()
    seen = []
    controller.on_stats = seen.append
    given = [arrived(1.0, 1), arrived(2.0, 1)]
    for stats in given:
        controller.give_stats(stats)
        controller.advance()
    assert seen == given
