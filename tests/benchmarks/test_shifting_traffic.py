"""Requests of shifting traffic: seeded, Poisson, from their phase's domains."""

import math

import numpy as np
import pytest
from shifting_traffic import Phase, Traffic

DOMAINS = ("a", "b", "c")
VOCABULARY = 100


def domains_of(requests):
    found = [set((request.prompt % len(DOMAINS)).tolist()) for request in requests]
    assert all(len(of_prompt) == 1 for of_prompt in found)
    return [DOMAINS[of_prompt.pop()] for of_prompt in found]


def make(*phases, **options):
    options = {"prompt_tokens": 20, "output_tokens": 5} | options
    return Traffic(phases=tuple(map(Phase.parse, phases)), **options).requests(DOMAINS, VOCABULARY)


def test_phases_as_they_are_written():
    assert Phase.parse("a:32") == Phase(mix={"a": 1}, requests=32)
    assert Phase.parse("a=3+b:1.5s") == Phase(mix={"a": 3, "b": 1}, seconds=1.5)
    for text in ("a", "a:", ":3", "a:-1", "a=x:3", "a=0:3", "a:0s"):
        with pytest.raises(ValueError, match="phase"):
            Phase.parse(text)


def test_the_same_seed_gives_the_same_traffic():
    first, again, other = (make("a=2+b:30", "c:10", rate=4.0, seed=seed) for seed in (1, 1, 2))
    assert [r.arrival_s for r in first] == [r.arrival_s for r in again]
    assert all(np.array_equal(r.prompt, s.prompt) for r, s in zip(first, again, strict=True))
    assert [r.arrival_s for r in first] != [r.arrival_s for r in other]


def test_prompts_are_of_their_phase_and_fill_its_mix():
    requests = make("a=3+b:400", "c:50")
    assert [r.phase for r in requests] == [0] * 400 + [1] * 50
    assert all(r.arrival_s is None for r in requests)
    assert {(r.prompt.dtype, r.prompt.shape, r.max_tokens) for r in requests} == {
        (np.dtype(np.int32), (20,), 5)
    }
    assert all(r.prompt.min() >= 0 and r.prompt.max() < VOCABULARY for r in requests)
    found = domains_of(requests)
    assert set(found[:400]) == {"a", "b"}
    assert found[:400].count("a") == pytest.approx(300, abs=4 * math.sqrt(400 * 3 / 16))
    assert set(found[400:]) == {"c"}
    tokens = np.concatenate([r.prompt for r in requests[400:]])
    assert set(tokens.tolist()) == set(range(2, VOCABULARY, 3))


def test_arrivals_are_poisson():
    rate, count = 8.0, 4000
    arrivals = np.array([r.arrival_s for r in make(f"a:{count}", rate=rate, prompt_tokens=1)])
    gaps = np.diff(arrivals, prepend=0.0)
    assert (gaps > 0).all()
    assert gaps.mean() == pytest.approx(1 / rate, rel=4 / math.sqrt(count))
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # as of an exponential
    a_second = np.bincount(arrivals.astype(int))[:-1]
    assert a_second.var() == pytest.approx(a_second.mean(), rel=0.3)


def test_phases_of_seconds_follow_one_another():
    requests = make("a:200s", "b:100s", rate=5.0, prompt_tokens=1)
    ends = [[r.arrival_s for r in requests if r.phase == phase] for phase in (0, 1)]
    assert 0 < ends[0][0] < ends[0][-1] < 200 < ends[1][0] < ends[1][-1] < 300
    assert len(ends[0]) == pytest.approx(1000, rel=0.15)
    assert len(ends[1]) == pytest.approx(500, rel=0.2)


def test_all_at_once():
    assert {r.arrival_s for r in make("a:5", "b:5", rate=math.inf)} == {0.0}


@pytest.mark.parametrize(
    ("phases", "options", "message"),
    [
        ((), {}, "at least one phase"),
        (("a:3",), {"rate": 0.0}, "rate must be positive, got 0.0"),
        (("a:3",), {"prompt_tokens": 0}, "prompt_tokens must be positive, got 0"),
        (("a:3s",), {}, "needs a finite rate of arrivals, got None"),
        (("d:3",), {}, "no domain 'd': there are a, b, c"),
    ],
)
def test_what_cannot_be_is_refused(phases, options, message):
    with pytest.raises(ValueError, match=message):
        make(*phases, **options)
