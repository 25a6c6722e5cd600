"""Levels that change while decoding change tokens through the weights alone."""

import numpy as np
import pytest
from engine.small import CONFIG, copy_tree, held_pages, mover

from dynaexq_jax.controller import Controller, ControllerConfig
from dynaexq_jax.engine.sampling import SamplingParams
from dynaexq_jax.policy import Plan, make_policy

POOL = 14


def random_plan(rng, residency) -> Plan:
    """Some demotions and promotions that the pool has room for."""
    levels = residency.levels()
    wanted = levels.copy()
    for place in rng.permutation(list(np.ndindex(*levels.shape)))[:6]:
        wanted[tuple(place)] = rng.integers(residency.base_level, 3)
    pages = np.asarray(residency.pages_of_level)
    for place in rng.permutation(list(np.ndindex(*levels.shape))):
        if pages[wanted].sum() <= residency.pool_pages:
            break
        wanted[tuple(place)] = residency.base_level
    return Plan.between(levels, wanted, rng.uniform(size=levels.shape))


def fresh_bank(small, levels, base_bits):
    """Another bank at the same levels, filled in another order: other pages, same weights."""
    bank = small.bank(base_bits=base_bits, pool_pages=POOL)
    residency, migration = mover(small, bank, pool_pages=POOL)
    base = np.full_like(levels, residency.base_level)
    migration.submit(Plan.between(base, levels, np.random.default_rng(5).uniform(size=base.shape)))
    migration.drain()
    migration.advance()
    assert (residency.levels() == levels).all()
    return bank


@pytest.mark.parametrize("base_bits", [2, 4])
@pytest.mark.parametrize("waits", [True, False])
def test_every_step_equals_a_fresh_engine_at_the_same_levels(small, base_bits, waits):
    rng = np.random.default_rng(base_bits)
    bank = small.bank(base_bits=base_bits, pool_pages=POOL)
    residency, migration = mover(
        small, bank, pool_pages=POOL, waits=waits, staging_pages=4, staged_batches=2
    )
    engine = small.engine(bank, batch=2, context=64)
    warm = SamplingParams(temperature=0.9, seed=3)
    engine.add(rng.integers(8, 250, 11), max_tokens=40, sampling=warm)
    engine.add(rng.integers(8, 250, 20), max_tokens=40)
    params, programs = engine.params, engine.programs
    seen = []
    for _ in range(30):
        if migration.idle:
            migration.submit(random_plan(rng, residency))
        migration.advance()
        residency.check_integrity()
        levels = migration.levels
        state = copy_tree(engine.state)
        engine.step()
        if engine.steps < 4:
            continue  # still prompts: the steps below are decode steps
        fresh = fresh_bank(small, levels, base_bits)
        expected, tokens = programs.decode(params, fresh.experts, copy_tree(state))
        got, got_tokens = programs.decode(params, bank.experts, copy_tree(state))
        np.testing.assert_array_equal(got_tokens, tokens)
        for ours, theirs in zip(got.cache, expected.cache, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(got.stats.mass, expected.stats.mass)
        seen.append(levels.tobytes())
    assert len(set(seen)) > 10  # precision did move


def test_pool_holds_what_the_table_says(small):
    rng = np.random.default_rng(1)
    bank = small.bank(pool_pages=POOL)
    residency, migration = mover(small, bank, pool_pages=POOL, staging_pages=5)
    rungs = [page for bits in (4, 8) for page in small.source.level(bits)]
    for _ in range(25):
        migration.submit(random_plan(rng, residency))
        migration.drain()
        migration.advance()
        np.testing.assert_array_equal(bank.experts.table, residency.table)
        for (rung, layer, expert), content in held_pages(bank.experts).items():
            assert content == b"".join(m[layer, expert].tobytes() for m in rungs[rung])
    assert migration.counters.bytes == migration.counters.pages * bank.experts.format.page_bytes


def test_pool_is_never_reallocated(small):
    bank = small.bank(pool_pages=POOL)
    residency, migration = mover(small, bank, pool_pages=POOL)
    where = [m.unsafe_buffer_pointer() for m in bank.experts.pool]
    rng = np.random.default_rng(2)
    for _ in range(5):
        migration.submit(random_plan(rng, residency))
        migration.drain()
        migration.advance()
        assert [m.unsafe_buffer_pointer() for m in bank.experts.pool] == where


def test_shapes_of_the_small_model():
    assert CONFIG.num_experts * len(CONFIG.sparse_layers) == 16


def test_the_engine_moves_pages_ahead_of_each_step_and_during_each_chunk(small):
    bank = small.bank(pool_pages=POOL)
    dispatched = []

    class Recorder(Controller):
        def advance(self, *, during_chunk=False):
            dispatched.append("during chunk" if during_chunk else "ahead")

        def wants_stats(self, tokens):
            dispatched.append(tokens)
            return False

    residency, migration = mover(small, bank, pool_pages=POOL)
    recorder = Recorder(
        policy=make_policy("off"),
        residency=residency,
        pages_of_level=residency.pages_of_level,
        migration=migration,
        benefit=np.ones(2),
        config=ControllerConfig(),
    )
    engine = small.engine(bank, chunk=16, controller=recorder)
    engine.add(np.arange(8, 28), max_tokens=3)
    for _ in range(3):
        engine.step()
    chunks = ["ahead", 16, "during chunk", "ahead", 4, "during chunk", 1]
    assert dispatched == [*chunks, "ahead", 1]
