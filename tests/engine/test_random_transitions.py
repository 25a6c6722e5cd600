"""Migration under random plans, copies that come late or fail: 10^5 transitions, and what holds.

The device is an array of what each page of its pool holds, so a step is seen reading a wrong page.
"""

import collections
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from dynaexq_jax.migration import LEAST_STAGING_PAGES, Migration, MigrationConfig
from dynaexq_jax.policy import Plan
from dynaexq_jax.residency import Residency
from pallas_kernels.pages import levels_of_table

LAYERS, EXPERTS, POOL, PAGE_BYTES = 3, 8, 29, 100
TRANSITIONS, STEPS = 100_000, 80_000
"""Of both bases together, at least; of each."""
FAILS, ARRIVES, PLANS, CHUNKS = 0.02, 0.3, 0.3, 0.2


class Device:
    """Stands for the bank: ``pool`` has the (rung, layer, expert) of each page, as a number."""

    def __init__(self, rungs):
        self.device = None
        self.experts = SimpleNamespace(format=SimpleNamespace(page_bytes=PAGE_BYTES))
        self.numbers = np.arange(rungs * LAYERS * EXPERTS).reshape(rungs, LAYERS, EXPERTS)
        self.pool = np.full(POOL, -1)
        self.table = np.full(self.numbers.shape, -1)

    def publish(self, table):
        self.table = table.copy()

    def commit(self, staged):
        for place, number in staged.items():
            self.pool[place] = number
        self.publish(staged.table)

    def check(self):
        held = self.table >= 0
        np.testing.assert_array_equal(self.pool[self.table[held]], self.numbers[held])


class Batch(dict):
    """Stands for a batch on the device, whose pages are there for as long as it is."""

    def __init__(self, pages, table):
        super().__init__(pages)
        self.table = table


class Copies:
    """Stands for the stager: copies arrive at random, and some fail, at once or on their way."""

    def __init__(self, device, rng, buffers):
        self.device, self.rng, self.free = device, rng, buffers
        self.failed = 0
        self.fails = FAILS
        self.taken = weakref.WeakValueDictionary()

    def stage(self, pages, places, table):
        assert self.free > len(self.taken)  # nobody holds the batch whose place this one takes
        if self.rng.random() < self.fails / 2:
            self.failed += 1
            raise RuntimeError("no thread")
        self.free -= 1
        return SimpleNamespace(
            is_ready=lambda: self.rng.random() < ARRIVES,
            take=lambda: self.take(pages, places, table),
        )

    def take(self, pages, places, table):
        self.free += 1
        if self.rng.random() < self.fails / 2:
            self.failed += 1
            raise RuntimeError("the bus is on fire")
        batch = Batch(zip(places, self.device.numbers.flat[pages], strict=True), table)
        self.taken[id(batch)] = batch
        return batch


def random_plan(rng, residency):
    """Changes of random experts that the pool has room for; copies under way count as done."""
    levels = residency.planned_levels()
    wanted = levels.copy()
    chosen = rng.permutation(wanted.size)[: rng.integers(1, 14)]
    wanted.flat[chosen] = rng.integers(residency.base_level, 3, chosen.size)
    pages = np.asarray(residency.pages_of_level)
    for place in rng.permutation(wanted.size):
        if pages[wanted].sum() <= POOL:
            break
        wanted.flat[place] = residency.base_level
    return Plan.between(levels, wanted, rng.random(wanted.shape))


@pytest.mark.parametrize("base_bits", [2, 4])
def test_random_transitions_keep_every_page_where_the_table_says(base_bits, monkeypatch, caplog):
    caplog.set_level("CRITICAL")  # thousands of failures, each with its traceback
    rng = np.random.default_rng(base_bits)
    config = MigrationConfig(staging_pages=LEAST_STAGING_PAGES + 2, staged_batches=3)
    residency = Residency(layers=LAYERS, experts=EXPERTS, base_bits=base_bits, pool_pages=POOL)
    device = Device(len(residency.table))
    copies = Copies(device, rng, config.staged_batches)
    monkeypatch.setattr("dynaexq_jax.migration.Stager", lambda *args, **sizes: copies)
    migration = Migration(host=None, residency=residency, bank=device, config=config)
    counters, seen = migration.counters, collections.Counter()
    for _ in range(STEPS):
        if rng.random() < PLANS:
            migration.submit(random_plan(rng, residency))
        migration.advance(during_chunk=rng.random() < CHUNKS)
        if not residency.reserved_pages:  # nothing to come that shows who has given pages
            np.testing.assert_array_equal(device.table, residency.table)
        np.testing.assert_array_equal(levels_of_table(device.table, base_bits), migration.levels)
        device.check()
        residency.check_integrity()
        assert bool(residency.reserved_pages) == (copies.free < config.staged_batches)
        seen[copies.free] += 1
    assert counters.promotions + counters.demotions > TRANSITIONS // 2
    assert set(seen) == set(range(config.staged_batches + 1))  # from none under way to all
    assert counters.failures == copies.failed > 100
    assert counters.cancelled > 1000
    assert counters.bytes == counters.pages * PAGE_BYTES > 0

    copies.fails = 0
    plan = random_plan(rng, residency)
    migration.submit(plan)
    migration.drain()
    migration.advance()
    assert migration.idle
    assert copies.free == config.staged_batches
    assert residency.reserved_pages == 0
    device.check()
