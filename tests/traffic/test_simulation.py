"""Simulation: the policy's plans on a trace, and their figures."""

import numpy as np
import pytest

from dynaexq_jax.errors import InputError
from dynaexq_jax.policy import POLICY_NAMES, Hotness, PolicyInput, make_policy
from dynaexq_jax.traffic import Ladder, Trace, TraceWriter, simulate

LADDER = Ladder(base_bits=2, max_bits=8, pool_pages=9)


def by_hand(traffic, header, policy, ladder, hotness):
    """(promotions, demotions, pages moved, hits) from plans alone: no page table, no replay."""
    pages_of_level = np.array(ladder.pages_of_level)
    base = int(np.count_nonzero(pages_of_level == 0)) - 1
    levels = np.full(traffic[0][0].shape, base, np.int32)
    age = np.zeros_like(levels)
    up = down = moved = hits = 0
    for number, (mass, tokens) in enumerate([(None, 0), *traffic]):
        if number:
            hits += mass[levels > base].astype(np.float64).sum()
            hotness = hotness.update(mass, tokens)
        plan = policy.plan(
            PolicyInput(
                hotness=hotness.mean,
                levels=levels,
                age=age,
                pool_pages=ladder.pool_pages,
                pages_of_level=ladder.pages_of_level,
                benefit=header.benefit[:, : len(pages_of_level) - 1],
                pinned=header.pinned,
                max_transitions=header.max_transitions if number else max(ladder.pool_pages, 1),
            )
        )
        up += int((plan.wanted > levels).sum())
        down += int((plan.wanted < levels).sum())
        change = pages_of_level[plan.wanted] - pages_of_level[levels]
        moved += int(change[change > 0].sum())
        age = np.where(plan.wanted == levels, age + 1, 0)
        levels = plan.wanted
    return up, down, moved, hits


@pytest.mark.parametrize("name", POLICY_NAMES)
@pytest.mark.parametrize(
    "ladder",
    [
        LADDER,
        Ladder(base_bits=2, max_bits=4, pool_pages=6),
        Ladder(base_bits=4, max_bits=8, pool_pages=11),
        Ladder(base_bits=8, max_bits=8, pool_pages=0),
        Ladder(base_bits=2, max_bits=8, pool_pages=0),
    ],
)
@pytest.mark.parametrize("warm", [False, True])
def test_figures_are_those_of_the_plans(recorded, traffic, name, ladder, warm):
    trace = Trace.read(recorded)
    hotness = Hotness.cold(3, 8)
    if warm:
        hotness = hotness.update(traffic[3][0], traffic[3][1])
    policy = make_policy(name)
    got = simulate(trace, policy, ladder=ladder, interval=4, hotness=hotness if warm else None)
    up, down, moved, hits = by_hand(traffic, trace.header, policy, ladder, hotness)
    assert (got.promotions, got.demotions, got.pages_moved) == (up, down, moved)
    assert got.hit_mass == pytest.approx(hits, rel=1e-12)
    total = sum(mass.sum() for mass, _ in traffic)
    assert got.hit_share == pytest.approx(hits / total, rel=1e-6)
    assert got.tokens == sum(tokens for _, tokens in traffic)
    assert (got.intervals, got.plans) == (22, 23)
    if name == "dynamic" and ladder is LADDER:
        assert up > 9
        assert down > 0
        assert got.plans_per_s > 0


def test_the_best_map_knows_the_interval(recorded, traffic):
    trace = Trace.read(recorded)
    got = simulate(trace, make_policy("dynamic"), ladder=LADDER, interval=4)
    best = sum(np.sort(mass, axis=None)[-9:].astype(np.float64).sum() for mass, _ in traffic)
    assert got.best_mass == pytest.approx(best, rel=1e-12)
    assert 0.4 < got.of_best < 1
    # a base of 4 bits: steps of two pages
    ladder = Ladder(base_bits=4, max_bits=8, pool_pages=9)
    got = simulate(trace, make_policy("dynamic"), ladder=ladder, interval=4)
    best = sum(np.sort(mass, axis=None)[-4:].astype(np.float64).sum() for mass, _ in traffic)
    assert got.best_mass == pytest.approx(best, rel=1e-12)
    ladder = Ladder(base_bits=8, max_bits=8, pool_pages=0)
    assert simulate(trace, make_policy("dynamic"), ladder=ladder, interval=4).of_best is None


def test_longer_intervals_serve_the_same_traffic(recorded, traffic):
    trace = Trace.read(recorded)
    short = simulate(trace, make_policy("dynamic"), ladder=LADDER, interval=4)
    long = simulate(trace, make_policy("dynamic"), ladder=LADDER, interval=12)
    assert (long.intervals, long.tokens) == (8, short.tokens)
    assert long.mass == pytest.approx(short.mass, rel=1e-12)
    merged = list(trace.intervals(3))
    up, down, moved, hits = by_hand(
        merged, trace.header, make_policy("dynamic"), LADDER, Hotness.cold(3, 8)
    )
    assert (long.promotions, long.demotions, long.pages_moved) == (up, down, moved)
    assert long.hit_mass == pytest.approx(hits, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interval": 6}, r"--interval must be a multiple of the 4 steps .* got 6"),
        ({"interval": 0}, r"--interval must be a multiple of the 4 steps .* got 0"),
        ({"base_bits": 4, "max_bits": 2}, "--max-bits must be at least the base's 4, got 2"),
        ({"pool_pages": 73}, r"--pages must be in 0\.\.72, .* from 2 to 8 bits, got 73"),
        ({"pool_pages": -1}, r"--pages must be in 0\.\.72, .* got -1"),
        ({"base_bits": 8, "pool_pages": 1}, r"--pages must be in 0\.\.0, .* got 1"),
    ],
)
def test_what_the_trace_does_not_hold_is_refused(recorded, changes, message):
    options = {"base_bits": 2, "max_bits": 8, "pool_pages": 9, "interval": 4, **changes}
    interval = options.pop("interval")
    with pytest.raises(InputError, match=message):
        simulate(
            Trace.read(recorded),
            make_policy("dynamic"),
            ladder=Ladder(**options),
            interval=interval,
        )


def test_levels_that_were_not_recorded_are_refused(tmp_path, header, traffic):
    path = tmp_path / "four.trace"
    TraceWriter(path, header(bits=(2, 4), benefit=np.full((3, 1), 0.1))).add(*traffic[0])
    trace = Trace.read(path)
    with pytest.raises(InputError, match=r"--max-bits must be one of the trace's \(2, 4\), got 8"):
        simulate(trace, make_policy("dynamic"), ladder=LADDER, interval=4)
    ladder = Ladder(base_bits=2, max_bits=4, pool_pages=9)
    assert simulate(trace, make_policy("dynamic"), ladder=ladder, interval=4).promotions > 0
