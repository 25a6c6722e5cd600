"""The bank: tables and pages reach the device as they were when they were handed over."""

import jax
import numpy as np
import pytest

from dynaexq_jax.bank import batch_parts, batch_words
from pallas_kernels.pages import Matrices

POOL = 5


def batch_of(bank, places, seed):
    """A batch with random pages for ``places``, and those pages."""
    shapes = Matrices(*(pages.shape[1:] for pages in bank.experts.pool))
    words = np.random.default_rng(seed).integers(
        2**32, size=batch_words(len(places), shapes), dtype=np.uint32
    )
    to, pages = batch_parts(words, shapes)
    to[:] = places
    return jax.device_put(words, bank.device), pages


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


def test_page_locked_tables_are_used_again(small):
    bank = small.bank(pool_pages=POOL)
    for number in range(5):
        bank.publish(np.full(bank.experts.table.shape, number, np.int32))
        jax.block_until_ready(bank.experts.table)
    assert len(bank._sent) == 1


@pytest.mark.parametrize("places", [[3, 0, -1, 4], [-1, -1, -1], [2]])
def test_a_commit_writes_a_batch_and_nothing_else(small, places):
    bank = small.bank(pool_pages=POOL)
    before = Matrices(*(np.array(pages) for pages in bank.experts.pool))
    table = np.arange(bank.experts.table.size, dtype=np.int32).reshape(bank.experts.table.shape)
    staged, pages = batch_of(bank, places, seed=len(places))
    bank.commit(table, staged)
    np.testing.assert_array_equal(bank.experts.table, table)
    for was, written, now in zip(before, pages, bank.experts.pool, strict=True):
        for page, place in zip(written, places, strict=True):
            if place >= 0:
                was[place] = page
        np.testing.assert_array_equal(now, was)
