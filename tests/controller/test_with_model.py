"""The controller in an engine: real policies, pages and programs of the small model."""

import jax
import numpy as np
import pytest
from engine.small import CONFIG, mover

from dynaexq_jax.controller import Controller, ControllerConfig
from dynaexq_jax.metrics import MIGRATION, ROUTING
from dynaexq_jax.policy import make_policy
from pallas_kernels.pages import levels_of_table

LAYERS, EXPERTS = len(CONFIG.sparse_layers), CONFIG.num_experts
POOL = 9
RNG = np.random.default_rng(4)
PROMPTS = [RNG.integers(8, 60, 30).tolist(), RNG.integers(180, 250, 30).tolist()]


class Setup:
    """A bank with everything around it."""

    def __init__(self, small, policy, *, pinned=(), interval=4, base_bits=2):
        self.bank = small.bank(base_bits=base_bits, pool_pages=POOL)
        self.policy = make_policy(policy)
        self.residency, self.migration = mover(
            small, self.bank, pool_pages=POOL, waits=self.policy.waits_for_copies, staging_pages=4
        )
        self.controller = Controller(
            policy=self.policy,
            residency=self.residency,
            pages_of_level=self.residency.pages_of_level,
            migration=self.migration,
            benefit=np.array([0.1, 0.02]),
            pinned=pinned,
            config=ControllerConfig(interval=interval),
        )
        self.engine = small.engine(self.bank, context=64, chunk=16, controller=self.controller)

    def run(self, prompt, max_tokens=30):
        self.engine.add(prompt, max_tokens=max_tokens)
        return [event.token for event in self.engine.run()]

    def device_levels(self):
        return np.asarray(
            levels_of_table(np.asarray(self.bank.experts.table), self.residency.base_bits)
        )

    def check(self):
        self.residency.check_integrity()
        np.testing.assert_array_equal(self.bank.experts.table, self.residency.table)
        np.testing.assert_array_equal(self.device_levels(), self.controller.levels())


@pytest.mark.parametrize("policy", ["dynamic", "blocking", "static-high", "off"])
@pytest.mark.parametrize("base_bits", [2, 4])
def test_the_device_s_table_is_the_host_s_after_settling(small, policy, base_bits):
    setup = Setup(small, policy, base_bits=base_bits)
    for prompt in PROMPTS:
        setup.run(prompt)
        setup.controller.settle()
        setup.check()
    moved = setup.controller.counters.pages > 0
    assert moved == (policy != "off")


def test_static_high_is_there_before_the_first_step(small):
    setup = Setup(small, "static-high")
    setup.check()
    before = setup.controller.levels()
    assert (before > 0).sum() == POOL
    setup.run(PROMPTS[0])
    setup.controller.settle()
    np.testing.assert_array_equal(setup.controller.levels(), before)
    assert setup.controller.counters.pages == POOL


@pytest.mark.parametrize("policy", ["dynamic", "static-high"])
def test_pinned_experts_are_promoted_and_stay(small, policy):
    pinned = ((0, 7), (1, 3))
    setup = Setup(small, policy, pinned=pinned)
    for prompt in (None, *PROMPTS):
        if prompt is not None:
            setup.run(prompt)
            setup.controller.settle()
        assert all(setup.controller.levels()[place] == 2 for place in pinned)
        setup.check()


def test_every_interval_s_traffic_reaches_the_policy(small, monkeypatch):
    """Router mass of all tokens read between the first and the last look, none twice."""
    setup = Setup(small, "blocking", interval=4)
    seen = []
    take = setup.engine.programs.take_stats

    def note(stats):
        fresh, gathered = take(stats)
        seen.append((np.asarray(gathered.mass), int(gathered.tokens)))
        return fresh, gathered

    monkeypatch.setattr(setup.engine.programs, "take_stats", note)
    tokens = setup.run(PROMPTS[0])
    rest = setup.engine.state.stats
    total = sum(count for _, count in seen) + int(rest.tokens)
    assert total == len(PROMPTS[0]) + len(tokens) - 1
    assert len(seen) == setup.engine.steps // 4
    mass = sum(mass for mass, _ in seen) + np.asarray(rest.mass)
    np.testing.assert_allclose(mass.sum(axis=1), total, rtol=1e-5)


@pytest.mark.parametrize("policy", ["dynamic", "blocking"])
def test_metrics_are_the_counters_and_the_page_table_s(small, policy):
    setup = Setup(small, policy)
    engine, controller = setup.engine, setup.controller
    value = engine.metrics.value
    for prompt in PROMPTS:
        engine.add(prompt, max_tokens=30)
        for _ in engine.run():
            states = {
                state: value("dynaexq_pool_pages", state=state)
                for state in ("used", "reserved", "free")
            }
            assert states == controller.pool_pages()
            assert sum(states.values()) == POOL
            in_flight = value("dynaexq_transitions_in_flight")
            assert in_flight == setup.migration.in_flight
            assert (in_flight == 0) == setup.migration.idle
    controller.settle()
    moved = vars(controller.counters)
    found = {name: value(f"dynaexq_{metric}_total") for metric, name, _ in (*MIGRATION, *ROUTING)}
    assert found == moved | vars(controller.routing)
    assert found["pages"] > 0
    assert found["bytes"] == found["pages"] * setup.bank.experts.format.page_bytes
    assert value("dynaexq_pool_pages", state="used") == np.count_nonzero(setup.residency.table >= 0)


def test_decoding_goes_on_at_the_base_while_copies_fail(small, monkeypatch, caplog):
    off = Setup(small, "off", interval=2)
    setup = Setup(small, "dynamic", interval=2)

    def fail(*_, **__):
        raise RuntimeError("the bus is on fire")

    with monkeypatch.context() as patch:
        patch.setattr("dynaexq_jax.staging._Buffer.send", fail)
        for prompt in PROMPTS:
            assert setup.run(prompt) == off.run(prompt)
        setup.controller.settle()
    setup.check()
    failures = setup.engine.metrics.value("dynaexq_copy_failures_total")
    assert failures == setup.controller.counters.failures > 1
    assert setup.controller.counters.pages == 0
    assert setup.controller.pool_pages() == {"used": 0, "reserved": 0, "free": POOL}
    assert "experts' pages to the device failed; they stay at their level" in caplog.text
    assert "the bus is on fire" in caplog.text
    setup.run(PROMPTS[0])  # it works again
    setup.controller.settle()
    setup.check()
    assert setup.controller.counters.pages > 0
    assert setup.controller.levels().any()


def test_the_hit_share_is_that_of_the_traffic_s_levels(small, monkeypatch):
    setup = Setup(small, "blocking", interval=1)
    seen = []
    take = setup.engine.programs.take_stats

    def note(stats):
        fresh, gathered = take(stats)
        # blocking: the levels that the step has read
        seen.append((np.asarray(gathered.mass, np.float64), setup.device_levels()))
        return fresh, gathered

    monkeypatch.setattr(setup.engine.programs, "take_stats", note)
    for prompt in PROMPTS:
        setup.run(prompt)
    setup.controller.settle()
    routing = setup.controller.routing
    assert routing.intervals == len(seen)
    assert routing.mass == pytest.approx(sum(mass.sum() for mass, _ in seen), rel=1e-6)
    hits = sum(mass[levels > 0].sum() for mass, levels in seen)
    assert routing.hit_mass == pytest.approx(hits, rel=1e-6)
    assert 0.1 * routing.mass < hits < routing.mass


def test_restart_brings_everybody_back_and_repeats(small):
    setup = Setup(small, "blocking", interval=1)
    window = np.asarray(PROMPTS[0] + PROMPTS[1][:3], np.int32)
    other = np.asarray(PROMPTS[1], np.int32)

    def scores():
        losses = []
        for _ in range(3):
            losses.append(setup.engine.score(window))
            setup.controller.settle()
        return np.stack(losses), setup.controller.levels()

    first, levels = scores()
    assert levels.any()
    setup.engine.score(other)
    setup.controller.restart()
    setup.check()
    assert not setup.device_levels().any()
    again, levels_again = scores()
    np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(levels_again, levels)


def test_movements_compile_nothing_again(small, caplog):
    setup = Setup(small, "static-high")
    setup.controller.restart(make_policy("off"))
    setup.run(PROMPTS[0])
    with jax.log_compiles():
        setup.controller.restart(make_policy("static-high"))  # commits, and then a table alone
        setup.run(PROMPTS[0])
        setup.controller.restart(make_policy("off"))
        setup.run(PROMPTS[0])
    assert [record.getMessage()[:60] for record in caplog.records] == []
