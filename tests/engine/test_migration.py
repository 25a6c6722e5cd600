"""How plans are carried out: what is staged and committed when, and copies that fail."""

import numpy as np
from engine.small import copy_tree, mover

from dynaexq_jax.policy import Plan

POOL = 14


def under_way(small, monkeypatch, wanted_of_base, **config):
    """A mover whose copies have begun, as many as there are batches, and do not arrive."""
    bank = small.bank(pool_pages=POOL)
    residency, migration = mover(small, bank, pool_pages=POOL, waits=False, **config)
    base = residency.levels()
    monkeypatch.setattr("dynaexq_jax.staging.Staged.is_ready", lambda self: False)
    migration.submit(Plan.between(base, wanted_of_base(base), np.ones(base.shape)))
    for _ in range(config["staged_batches"]):
        migration.advance()
    return bank, residency, migration


def finish(migration, residency, bank):
    migration.drain()
    migration.advance()
    residency.check_integrity()
    np.testing.assert_array_equal(bank.experts.table, residency.table)
    return residency.levels()


def first_experts(count):
    def wanted(base):
        levels = base.copy()
        levels.flat[:count] = 1
        return levels

    return wanted


def test_failed_copy_leaves_experts_at_their_level(small, monkeypatch, caplog):
    bank = small.bank(pool_pages=POOL)
    residency, migration = mover(small, bank, pool_pages=POOL)
    base = residency.levels()
    wanted = base.copy()
    wanted[0, :3] = 1

    def fail(*args):
        raise RuntimeError("the bus is on fire")

    with monkeypatch.context() as patch:
        patch.setattr("dynaexq_jax.staging._Buffer.send", fail)
        migration.submit(Plan.between(base, wanted, np.ones(base.shape)))
        migration.drain()
    assert migration.counters.failures == 1
    assert "stay at their level" in caplog.text
    assert migration.idle
    residency.check_integrity()
    assert residency.free_pages == POOL
    np.testing.assert_array_equal(bank.experts.table, -1)

    migration.submit(Plan.between(base, wanted, np.ones(base.shape)))  # the next plan succeeds
    migration.drain()
    np.testing.assert_array_equal(residency.levels(), wanted)


def test_threads_that_are_gone_leave_experts_at_their_level(small, caplog):
    bank = small.bank(pool_pages=POOL)
    residency, migration = mover(small, bank, pool_pages=POOL, staging_pages=3)
    engine = small.engine(bank, batch=1)
    engine.add(np.arange(8, 20), max_tokens=6)
    wanted = residency.levels()
    wanted[0, :5] = 1
    migration.close()
    migration.submit(Plan.between(residency.levels(), wanted, np.ones(wanted.shape)))
    tokens = []
    while engine.busy:
        migration.advance()
        tokens += engine.step()
    assert len(tokens) == 6
    assert migration.idle
    assert migration.counters.failures == 1
    assert migration.counters.cancelled == 2  # the rest of the plan; the next one tries again
    assert "stay at their level" in caplog.text
    residency.check_integrity()
    assert residency.free_pages == POOL
    np.testing.assert_array_equal(bank.experts.table, -1)


def test_nobody_gives_pages_to_copies_after_one_that_failed(small):
    bank = small.bank(pool_pages=6)
    residency, migration = mover(small, bank, pool_pages=6, waits=False, staging_pages=3)
    base = residency.levels()
    full, other = first_experts(6)(base), base.copy()
    other.flat[6:12] = 1
    migration.submit(Plan.between(base, full, np.ones(base.shape)))
    migration.drain()
    migration.close()
    migration.submit(Plan.between(full, other, np.ones(base.shape)))
    for _ in range(3):
        migration.advance()
    assert migration.idle
    assert migration.counters.demotions == 3  # for the copy that failed
    assert finish(migration, residency, bank).sum() == 3


def test_cancelled_promotions_lose_nothing(small, monkeypatch):
    bank = small.bank(pool_pages=POOL)
    residency, migration = mover(
        small, bank, pool_pages=POOL, waits=False, staging_pages=3, staged_batches=2
    )
    base = residency.levels()
    first, second = base.copy(), base.copy()
    first[0] = 1
    second[1] = 1
    with monkeypatch.context() as patch:
        patch.setattr("dynaexq_jax.staging.Staged.is_ready", lambda self: False)
        migration.submit(Plan.between(base, first, np.ones(base.shape)))
        migration.advance()
        migration.advance()  # each begins a batch
    migration.submit(Plan.unchanged(residency.planned_levels()))
    migration.drain()
    migration.advance()
    residency.check_integrity()
    levels = residency.levels()
    assert levels.sum() == migration.counters.promotions == 6  # the two batches that had begun
    assert migration.counters.cancelled == first.sum() - 6
    migration.submit(Plan.between(levels, second, np.ones(base.shape)))
    migration.drain()
    migration.advance()
    np.testing.assert_array_equal(residency.levels(), second)
    np.testing.assert_array_equal(bank.experts.table, residency.table)


def test_pages_are_read_until_the_commit_that_rewrites_them(small, monkeypatch):
    bank = small.bank(pool_pages=1)
    residency, migration = mover(small, bank, pool_pages=1)
    base = residency.levels()
    first, second = base.copy(), base.copy()
    first[0, 0] = second[1, 5] = 1
    migration.submit(Plan.between(base, first, np.ones(base.shape)))
    migration.drain()
    old = bank.experts
    page = copy_tree(old.pool)
    migration.submit(Plan.between(first, second, np.ones(base.shape)))
    with monkeypatch.context() as patch:
        patch.setattr("dynaexq_jax.staging.Staged.is_ready", lambda self: False)
        patch.setattr(migration, "waits_for_copies", False)
        migration.advance()
    assert residency.levels()[0, 0] == 0 < residency.reserved_pages  # the page is given
    assert bank.experts is old
    np.testing.assert_array_equal(migration.levels, first)
    assert np.asarray(old.table)[0, 0, 0] == 0
    migration.drain()
    np.testing.assert_array_equal(migration.levels, second)
    table = np.asarray(bank.experts.table)
    assert table[0, 0, 0] == -1
    assert table[0, 1, 5] == 0
    assert any(np.any(np.asarray(a) != b) for a, b in zip(bank.experts.pool, page, strict=True))


def test_no_table_is_copied_by_itself_while_pages_are(small, monkeypatch):
    bank = small.bank(pool_pages=POOL)
    residency, migration = mover(
        small, bank, pool_pages=POOL, waits=False, staging_pages=3, staged_batches=2
    )
    base = residency.levels()
    migration.submit(Plan.between(base, first_experts(4)(base), np.ones(base.shape)))
    levels = finish(migration, residency, bank)
    published = []
    monkeypatch.setattr(bank, "publish", lambda table: published.append(table.copy()))
    wanted = levels.copy()
    wanted.flat[4:6] = 1
    with monkeypatch.context() as patch:
        patch.setattr("dynaexq_jax.staging.Staged.is_ready", lambda self: False)
        migration.submit(Plan.between(levels, wanted, np.ones(base.shape)))
        migration.advance()
        wanted.flat[:4] = 0
        migration.submit(Plan.between(residency.planned_levels(), wanted, np.ones(base.shape)))
        migration.advance()
    assert not residency.levels().flat[:4].any()  # they have given their pages
    assert migration.levels.flat[:4].all()  # and are read, as the table says
    assert published == []
    migration.drain()
    np.testing.assert_array_equal(migration.levels.flat[:6], 1)
    migration.advance()
    np.testing.assert_array_equal(migration.levels, wanted)
    np.testing.assert_array_equal(published, [residency.table])


def test_experts_keep_their_pages_until_others_need_them(small, monkeypatch):
    pages = 7
    bank = small.bank(pool_pages=pages)
    residency, migration = mover(
        small, bank, pool_pages=pages, waits=False, staging_pages=3, staged_batches=1
    )
    base = residency.levels()
    full = first_experts(pages)(base)
    migration.submit(Plan.between(base, full, np.ones(base.shape)))
    assert (finish(migration, residency, bank) == full).all()
    wanted = base.copy()
    wanted.flat[pages : 2 * pages] = 1
    value = np.arange(base.size, dtype=float).reshape(base.shape)
    monkeypatch.setattr("dynaexq_jax.staging.Staged.is_ready", lambda self: False)
    migration.submit(Plan.between(full, wanted, value))
    assert migration.counters.demotions == 0
    migration.advance()  # one batch of three begins
    left = residency.levels()
    assert not left.flat[:3].any()  # who is worth least
    assert left.flat[3:pages].all()
    assert migration.counters.demotions == 3
    migration.submit(Plan.unchanged(residency.planned_levels()))  # the rest is given up
    levels = finish(migration, residency, bank)
    assert levels.sum() == pages  # no page lies idle
    assert migration.counters.cancelled == 4


def test_demotions_that_nobody_waits_for_are_done_at_once(small):
    bank = small.bank(pool_pages=POOL)
    residency, migration = mover(small, bank, pool_pages=POOL)
    base = residency.levels()
    full = first_experts(POOL)(base)
    migration.submit(Plan.between(base, full, np.ones(base.shape)))
    migration.drain()
    migration.submit(Plan.between(full, base, np.ones(base.shape)))
    assert residency.free_pages == POOL
    assert not finish(migration, residency, bank).any()


def test_a_new_plan_takes_over_while_copies_are_under_way(small, monkeypatch):
    bank, residency, migration = under_way(
        small, monkeypatch, first_experts(9), staging_pages=3, staged_batches=2
    )
    levels = residency.planned_levels()
    assert levels.sum() == 6
    wanted = residency.levels()
    wanted.flat[2:12] = 1  # neither 0 nor 1, which are under way; 6 to 8 still wait
    migration.submit(Plan.between(levels, wanted, np.ones(levels.shape)))
    assert migration.counters.cancelled == 0  # all that waited is wanted again
    got = finish(migration, residency, bank)
    assert got.flat[:12].all()  # who is under way keeps its way
    assert got.sum() == 12
    assert migration.counters.promotions == 12


def test_promotions_without_room_are_given_up(small, monkeypatch):
    bank, residency, migration = under_way(
        small, monkeypatch, first_experts(POOL), staging_pages=POOL, staged_batches=1
    )
    levels = residency.planned_levels()
    assert residency.free_pages == 0
    wanted = residency.levels()
    wanted.flat[POOL : POOL + 2] = 1  # in place of those whose pages are under way
    migration.submit(Plan.between(levels, wanted, np.ones(levels.shape)))
    got = finish(migration, residency, bank)
    assert got.flat[:POOL].all()
    assert got.sum() == POOL
    assert migration.counters.cancelled == 2


def test_a_batch_moves_a_step_and_all_of_them_during_a_chunk(small, monkeypatch):
    bank = small.bank(pool_pages=POOL)
    residency, migration = mover(
        small, bank, pool_pages=POOL, waits=False, staging_pages=3, staged_batches=3
    )
    base = residency.levels()
    migration.submit(Plan.between(base, first_experts(12)(base), np.ones(base.shape)))
    with monkeypatch.context() as patch:
        patch.setattr("dynaexq_jax.staging.Staged.is_ready", lambda self: False)
        migration.advance()
        assert residency.reserved_pages == 3
        migration.advance(during_chunk=True)
        assert residency.reserved_pages == 9  # every buffer
    monkeypatch.setattr("dynaexq_jax.staging.Staged.is_ready", lambda self: True)
    migration.advance()
    assert migration.counters.commits == 1
    assert residency.reserved_pages == 6  # nothing was staged beside that
    migration.advance(during_chunk=True)
    assert migration.counters.commits == 3
    assert residency.reserved_pages == 3
    migration.advance()
    assert migration.counters.commits == 4
    assert finish(migration, residency, bank).sum() == 12
