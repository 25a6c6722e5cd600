"""Traffic through the small model's engine, and what is noted of it."""

import dataclasses
import json

import numpy as np
import pytest
from engine.small import CONFIG, EOS, mover

from dynaexq_jax.controller import Controller, ControllerConfig
from dynaexq_jax.errors import InputError
from dynaexq_jax.measure.policies import run_policy, warm_up
from dynaexq_jax.measure.report import run_json, runs_table
from dynaexq_jax.measure.requests import Request
from dynaexq_jax.measure.run import run_traffic
from dynaexq_jax.measure.summary import hit_shares, hotness
from dynaexq_jax.policy import Off, StaticMixed, make_policy

POOL, INTERVAL, BATCH = 9, 8, 2
LAYERS, EXPERTS = len(CONFIG.sparse_layers), CONFIG.num_experts


def make_requests(count=6, arrivals=None, max_tokens=10):
    rng = np.random.default_rng(5)
    return [
        Request(
            prompt=rng.integers(8, 250, 20, dtype=np.int32),
            max_tokens=max_tokens,
            phase=number // 3,
            arrival_s=None if arrivals is None else arrivals[number],
        )
        for number in range(count)
    ]


@pytest.fixture
def engine(small):
    bank = small.bank(pool_pages=POOL)
    residency, migration = mover(small, bank, pool_pages=POOL, waits=False, staging_pages=4)
    controller = Controller(
        policy=Off(),
        residency=residency,
        pages_of_level=residency.pages_of_level,
        migration=migration,
        benefit=np.array([0.1, 0.02]),
        config=ControllerConfig(interval=INTERVAL),
    )
    yield small.engine(bank, batch=BATCH, context=64, chunk=16, controller=controller)
    migration.close()


def test_every_token_and_all_routing_are_noted_once(engine, small):
    requests = make_requests()
    alone = small.engine(small.bank(pool_pages=POOL), batch=BATCH, context=64, chunk=16)
    for request in requests:
        alone.add(request.prompt, max_tokens=request.max_tokens)
    wanted = {}
    for event in alone.run():
        wanted.setdefault(event.sequence, []).append(event.token)

    run_traffic(engine, make_requests(count=1))  # leaves statistics that are not this run's
    log = run_policy(engine, Off(), requests).log
    counts = [len(tokens.arrivals_s) for tokens in log.tokens]
    assert counts == [len(tokens) for tokens in wanted.values()]
    for tokens, arrived in zip(wanted.values(), log.tokens, strict=True):
        assert len(tokens) == 10 or tokens[-1] == EOS
        assert list(arrived.arrivals_s) == sorted(arrived.arrivals_s)
        assert 0 <= arrived.added_s < arrived.arrivals_s[0] <= log.calls_s[-1]
    # two slots: two run from the start, and nobody is added before another has ended
    steps = [tokens.added_step for tokens in log.tokens]
    assert steps[:2] == [0, 0]
    assert 0 < steps[2] <= steps[3] <= steps[4] <= steps[5]
    # each prompt token and each new one but the last is routed in every layer
    routed = sum(20 + count - 1 for count in counts)
    assert sum(interval.tokens for interval in log.intervals) == routed
    mass = sum(interval.mass for interval in log.intervals)
    np.testing.assert_allclose(mass.sum(axis=1), routed, rtol=1e-5)
    ends = [interval.step for interval in log.intervals]
    first = 4  # the steps that its 32 tokens take
    assert ends[:-1] == list(range(first, ends[-1], INTERVAL))[: len(ends) - 1]
    assert log.moved["pages"] == 0
    assert log.commits.size == 0


def test_policies_start_alike_and_move_what_is_theirs(engine):
    requests = make_requests()
    warm_up(engine, requests)
    off = run_policy(engine, Off(), requests)
    assert off.summary.hit_share == 0
    runs = [off]
    for policy in (
        StaticMixed(hotness=hotness(off.log)),
        make_policy("dynamic"),
        make_policy("blocking"),
        make_policy("static-high"),
    ):
        run = run_policy(engine, policy, requests)
        runs.append(run)
        assert run.policy == policy.name
        assert run.log.moved["failures"] == 0
        assert [len(t.arrivals_s) for t in run.log.tokens] == [
            len(t.arrivals_s) for t in off.log.tokens
        ]
        fixed = policy.name.startswith("static")
        assert (run.log.moved["pages"] == 0) == fixed  # before the traffic, if at all
        assert (run.log.commits.size == 0) == fixed
        assert (run.log.levels[0].levels > 0).any() == fixed
        assert len(run.log.levels) - 1 >= run.log.commits.size  # twice in a call with a chunk
        assert 0 < run.summary.hit_share < 1
    by_policy = {run.policy: run.summary.hit_share for run in runs}
    # the best fixed map for this very traffic, and one that does not look at it
    assert by_policy["static-mixed"] > by_policy["static-high"]
    again = run_policy(engine, make_policy("blocking"), requests)
    assert again.summary.hit_share == by_policy["blocking"]  # repeats exactly

    table = runs_table(runs).splitlines()
    assert [line.split()[0] for line in table[2:]] == list(by_policy)
    data = json.loads(json.dumps([run_json(run) for run in runs]))
    assert [run["hit_share"] for run in data] == list(by_policy.values())
    assert data[2]["moved"]["pages"] == runs[2].log.moved["pages"]
    assert len(data[0]["hit_share_by_interval"]) == len(off.log.intervals)


def test_the_counters_count_the_same_hits(engine):
    requests = make_requests()
    warm_up(engine, requests)
    engine.controller.settle()
    before = dataclasses.replace(engine.controller.routing)
    log = run_policy(engine, make_policy("dynamic"), requests).log
    after = engine.controller.routing
    read = after.intervals - before.intervals  # the last of the log may not have been over
    assert read in (len(log.intervals), len(log.intervals) - 1)
    mass = [interval.mass.sum(dtype=np.float64) for interval in log.intervals[:read]]
    assert after.mass - before.mass == pytest.approx(sum(mass), rel=1e-6)
    hits = np.dot(hit_shares(log)[:read], mass)
    assert after.hit_mass - before.hit_mass == pytest.approx(hits, rel=1e-6)
    assert hits > 0


def test_one_token_has_no_time_to_the_next(engine):
    run = run_policy(engine, Off(), make_requests(2, max_tokens=1))
    data = json.loads(json.dumps(run_json(run), allow_nan=False))
    assert data["tokens"] == 2
    assert data["tpot_p50_ms"] is data["tpot_p95_ms"] is data["tpot_p99_ms"] is None
    assert runs_table([run]).splitlines()[-1].split()[4:7] == ["-", "-", "-"]


def test_requests_wait_for_their_time(engine):
    arrivals = [0.0, 0.0, 0.5]
    run_policy(engine, Off(), make_requests(3, max_tokens=3))  # compiled, so that it is fast
    log = run_policy(engine, Off(), make_requests(3, arrivals, max_tokens=3)).log
    assert all(t.added_s >= at for t, at in zip(log.tokens, arrivals, strict=True))
    assert log.tokens[2].arrivals_s[0] > 0.5
    assert not engine.busy
    # steps fill the time but for that in which there was nothing to do
    begins = log.calls_s - log.steps_s
    idle = begins - np.concatenate([[0.0], log.calls_s[:-1]])
    came = np.searchsorted(log.calls_s, 0.5)
    assert np.flatnonzero(idle > 1e-9).tolist() == [came]
    assert begins[came] >= 0.5


def test_an_engine_without_a_pool_is_refused(small):
    engine = small.engine(small.bank(pool_pages=0))
    with pytest.raises(InputError, match="no pool of pages"):
        run_traffic(engine, make_requests(1))
