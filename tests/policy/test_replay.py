"""Policies on recorded traffic: routing of the shipped model by domain, without model or device."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dynaexq_jax.policy import Hotness, make_policy, replay
from dynaexq_jax.residency import Residency

ROUTING = Path(__file__).resolve().parents[2] / "examples" / "nano-moe" / "routing.json"
BENEFIT = np.array([0.1, 0.01])
INTERVALS = 12


@pytest.fixture(scope="module")
def routing():
    return {name: np.array(m) for name, m in json.loads(ROUTING.read_text()).items()}


def play(policy_name, shares, *, base_bits=2, quarter=True, seed=0):
    """A trace that spends INTERVALS on each of ``shares`` [L, E], sampled by token."""
    layers, experts = shares[0].shape
    rng = np.random.default_rng(seed)
    tokens = 16

    def interval(share):
        return np.stack([rng.multinomial(tokens * 4, row / row.sum()) / 4 for row in share])

    trace = [(interval(share), tokens) for share in shares for _ in range(INTERVALS)]
    residency = Residency(
        layers=layers, experts=experts, base_bits=base_bits, pool_pages=layers * experts // 4
    )
    _, *steps = replay(
        make_policy(policy_name),
        trace,
        residency=residency,
        hotness=Hotness.cold(layers, experts),
        benefit=BENEFIT,
        max_transitions=256,
    )
    residency.check_integrity()
    return steps


def covered(levels, share, base_level=0):
    """Part of the traffic that meets a promoted expert."""
    return float(share[levels > base_level].sum() / share.sum())


def best_covered(share, experts_a_layer):
    return float(np.sort(share, axis=1)[:, -experts_a_layer:].sum() / share.sum())


def test_levels_follow_the_traffic_within_a_few_plans(routing):
    first, second = routing["python"], routing["ru"]
    steps = play("dynamic", [first, second])
    best = best_covered(second, 8)
    at_switch = covered(steps[INTERVALS].levels, second)
    after = [covered(step.levels, second) for step in steps[INTERVALS:]]
    assert at_switch < 0.6 * best
    assert after[6] > 0.85 * best
    assert covered(steps[INTERVALS].levels, first) > 0.85 * best_covered(first, 8)


def test_dynamic_covers_more_than_static_high(routing):
    for share in (routing["python"], routing["ru"]):
        dynamic, static = (play(name, [share])[-1].levels for name in ("dynamic", "static-high"))
        assert covered(dynamic, share) > 1.5 * covered(static, share)


def test_steady_traffic_moves_little_once_settled(routing):
    steps = play("dynamic", [routing["fr"]] * 3)
    moved = [len(step.plan.promotions) for step in steps[INTERVALS:]]
    assert np.mean(moved) < 0.1 * 24  # of 24 pages


def test_off_moves_nothing(routing):
    assert all(np.all(step.plan.wanted == 0) for step in play("off", [routing["fr"]]))


@pytest.mark.parametrize("base_bits", [2, 4, 8])
@pytest.mark.parametrize("name", ["dynamic", "static-high", "blocking", "off"])
def test_replay_is_reproducible_at_every_base(routing, name, base_bits):
    first, second = (play(name, [routing["go"]], base_bits=base_bits) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.levels, other.levels)


def test_policy_and_residency_do_not_load_jax():
    code = (
        "import sys, dynaexq_jax.policy, dynaexq_jax.residency;"
        "print(sorted({'jax', 'jaxlib', 'flax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
