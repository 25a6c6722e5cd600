"""The bank: tables and pages reach the device as they were when they were handed over."""

import jax
import numpy as np
import pytest

from dynaexq_jax.bank import batch_parts, batch_words, page_shapes
from pallas_kernels.pages import Matrices

POOL = 5


def batch_of(bank, places, seed):
    """A batch with a random table and random pages for ``places``, and its parts."""
    shapes = page_shapes(bank.experts.pool), bank.experts.table.shape
    words = np.random.default_rng(seed).integers(
        2**32, size=batch_words(len(places), *shapes), dtype=np.uint32
    )
    parts = batch_parts(words, *shapes)
    parts.places[:] = places
    return jax.device_put(words, bank.device), parts


def test_a_published_table_is_a_copy(small):
    bank = small.bank(pool_pages=POOL)
    table = np.full(bank.experts.table.shape, 3, np.int32)
    bank.publish(table)
    table[:] = 4
    assert (np.asarray(bank.experts.table) == 3).all()


def test_tables_that_are_published_in_a_row_do_not_share_memory(small):
    bank = small.bank(pool_pages=POOL)
    given, published = bank.experts.table, []
    for number in range(20):
        bank.publish(np.full(given.shape, number, np.int32))
        published.append(bank.experts.table)
    for number, table in enumerate(published):
        assert np.asarray(table).tolist() == np.full(given.shape, number).tolist()
    for array in (given, bank.experts.table):
        assert array.sharding == bank.experts.pool.gate_up.sharding


@pytest.mark.parametrize("places", [[3, 0, -1, 4], [-1, -1, -1], [2]])
def test_a_commit_writes_a_batch_and_nothing_else(small, places):
    bank = small.bank(pool_pages=POOL)
    before = Matrices(*(np.array(pages) for pages in bank.experts.pool))
    staged, parts = batch_of(bank, places, seed=len(places))
    with jax.transfer_guard_host_to_device("disallow_explicit"):
        bank.commit(staged)
    np.testing.assert_array_equal(bank.experts.table, parts.table)
    for was, written, now in zip(before, parts.pages, bank.experts.pool, strict=True):
        for page, place in zip(written, places, strict=True):
            if place >= 0:
                was[place] = page
        np.testing.assert_array_equal(now, was)


def test_a_commit_writes_pool_and_table_where_they_are(small):
    bank = small.bank(pool_pages=POOL)

    def where():
        experts = bank.experts
        return [array.unsafe_buffer_pointer() for array in (*experts.pool, experts.table)]

    before = where()
    for seed in range(5):
        bank.commit(batch_of(bank, [seed], seed)[0])
        assert where() == before
