"""Figures of runs that were made up, so that what must come out is known."""

import numpy as np
import pytest

from dynaexq_jax.measure.requests import Request
from dynaexq_jax.measure.run import Interval, Levels, RunLog, Tokens
from dynaexq_jax.measure.summary import hit_share, hit_shares, hotness, promoted, summarize


def request(phase=0, arrival_s=None):
    return Request(prompt=np.arange(4), max_tokens=4, phase=phase, arrival_s=arrival_s)


def make_log(**parts):
    return RunLog(
        **{
            "requests": (request(),),
            "tokens": (Tokens(0.0, 0, (0.1, 0.2)),),
            "calls_s": np.array([0.1, 0.2]),
            "steps_s": np.array([0.1, 0.1]),
            "commits": np.array([], np.int64),
            "levels": (Levels(0, 0.0, np.zeros((1, 2), np.int32)),),
            "intervals": (Interval(2, 0.2, np.ones((1, 2), np.float32), 2),),
            "base_level": 0,
            "moved": {},
            **parts,
        }
    )


def levels_at(*changes):
    """Levels of one layer of two experts from (step, levels)."""
    return tuple(Levels(step, 0.1 * step, np.array([levels], np.int32)) for step, levels in changes)


def test_latencies_are_what_a_user_sees():
    log = make_log(
        requests=(request(arrival_s=0.5), request(arrival_s=0.6), request()),
        tokens=(
            Tokens(0.5, 0, (1.0, 1.1, 1.2)),
            Tokens(2.0, 5, (2.6, 2.9)),  # waited for a slot, which counts
            Tokens(3.0, 9, (3.5,)),
        ),
        calls_s=np.array([1.0, 1.1, 1.2, 2.6, 2.9, 4.0]),
    )
    summary = summarize(log)
    assert (summary.requests, summary.tokens, summary.seconds) == (3, 6, 4.0)
    assert summary.tokens_per_s == pytest.approx(1.5)
    assert summary.ttft_p50_ms == pytest.approx(500)  # of 500, 2000, 500
    assert summary.ttft_p95_ms == pytest.approx(1850)
    assert summary.tpot_p50_ms == pytest.approx(100)  # of 100, 100, 300: not across requests
    assert summary.tpot_p99_ms == pytest.approx(296)


def test_an_expert_counts_for_the_steps_it_was_promoted_for():
    mass = np.array([[3.0, 1.0]], np.float32)
    log = make_log(
        # the first expert from step 5 on, the second from 8 to 10
        levels=levels_at((0, [0, 0]), (5, [1, 0]), (8, [2, 1]), (10, [1, 0])),
        intervals=tuple(Interval(step, 0.1 * step, mass, 4) for step in (4, 8, 12)),
    )
    np.testing.assert_allclose(hit_shares(log), [0, 3 * 3 / 4 / 4, (3 + 0.5) / 4])
    assert hit_share(log) == pytest.approx((9 / 4 + 3.5) / 12)
    np.testing.assert_array_equal(promoted(log), [[0], [1], [2], [1]])
    np.testing.assert_allclose(hotness(log), [[0.75, 0.25]])
    base_is_4_bits = make_log(levels=log.levels, intervals=log.intervals, base_level=1)
    np.testing.assert_allclose(hit_shares(base_is_4_bits), [0, 0, 3 * 0.5 / 4])


def test_recovery_counts_from_the_shift_to_nine_tenths_of_the_end():
    """Domains 0 and 1 use one expert each; the second is promoted 3 intervals after the shift."""
    mass = [np.array([[4.0, 0.0]], np.float32)] * 8 + [np.array([[0.4, 3.6]], np.float32)] * 8
    log = make_log(
        requests=(request(0), request(1)),
        tokens=(Tokens(0.0, 0, (0.1,)), Tokens(3.1, 31, (3.2,))),
        levels=levels_at((0, [0, 0]), (4, [1, 0]), (44, [0, 1])),
        intervals=tuple(Interval(4 * n + 4, 0.1 * (4 * n + 4), mass[n], 4) for n in range(16)),
    )
    first, second = summarize(log).recoveries
    assert (first.phase, first.intervals) == (0, 1)
    assert first.final_hit_share == pytest.approx(1.0)
    assert first.seconds == pytest.approx(0.8)
    assert first.steps == 8
    # the interval in which the phase begins still has the old traffic and meets its experts
    assert (second.phase, second.intervals) == (1, 4)
    assert second.final_hit_share == pytest.approx(0.9)
    assert second.start_s == 3.1
    assert second.seconds == pytest.approx(4.8 - 3.1)
    assert second.steps == 48 - 31


def test_nothing_recovers_without_promotions_or_in_a_short_phase():
    intervals = tuple(Interval(n, 0.1 * n, np.ones((1, 2), np.float32), 1) for n in range(1, 9))
    assert summarize(make_log(intervals=intervals)).recoveries == ()
    held = levels_at((0, [1, 1]))
    assert len(summarize(make_log(intervals=intervals, levels=held)).recoveries) == 1
    assert summarize(make_log(intervals=intervals[:3], levels=held)).recoveries == ()
