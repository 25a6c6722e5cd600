"""Batches of pages: what is gathered, written, and how large they are."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynaexq_jax.bank import StagedPages
from dynaexq_jax.migration import (
    LEAST_STAGING_PAGES,
    MOST_BATCHES,
    MOST_STAGING_BYTES,
    MOST_STAGING_PAGES,
    MigrationConfig,
)
from dynaexq_jax.staging import Stager
from pallas_kernels.pages import Matrices

PAGE_30B = 9 * 2**17


@pytest.mark.parametrize("part_bytes", [1, 2**30])
def test_a_batch_holds_the_pages_that_were_asked_for(small, monkeypatch, part_bytes):
    monkeypatch.setattr("dynaexq_jax.staging.PART_BYTES", part_bytes)
    host = small.host()
    device = small.bank(pool_pages=1).device
    stager = Stager(host, device, pages=7, buffers=2, gatherers=3)
    rng = np.random.default_rng(0)
    layers, experts = host.rungs[0].gate_up.shape[:2]
    for count in (1, 2, 6, 7):
        wanted = sorted(
            (int(rng.integers(3)), int(rng.integers(layers)), int(rng.integers(experts)))
            for _ in range(count)
        )
        batch = stager.stage(wanted, range(20, 20 + count)).take()
        np.testing.assert_array_equal(batch.places, [*range(20, 20 + count), *[-1] * (7 - count)])
        for matrix in ("gate_up", "down"):
            expected = [getattr(host.rungs[r], matrix)[at, e] for r, at, e in wanted]
            np.testing.assert_array_equal(getattr(batch.pages, matrix)[:count], expected)
    stager.close()


def test_a_write_leaves_other_pages_as_they_are(small):
    bank = small.bank(pool_pages=5)
    shapes = [matrix.shape[1:] for matrix in bank.experts.pool]
    rng = np.random.default_rng(0)
    expected = [np.zeros((5, *shape), np.uint32) for shape in shapes]

    def batch(*places):
        pages = Matrices(*(rng.integers(0, 99, (3, *s), np.uint32) for s in shapes))
        for pool, new in zip(expected, pages, strict=True):
            for place, page in zip(places, new, strict=True):
                if place >= 0:
                    pool[place] = page
        return StagedPages(Matrices(*map(jnp.asarray, pages)), jnp.asarray(places))

    for staged in (batch(4, 0, -1), batch(2, -1, -1), batch(1, 4, 3)):
        bank.write(staged)
    for pool, wanted in zip(bank.experts.pool, expected, strict=True):
        np.testing.assert_array_equal(pool, wanted)


@given(st.integers(1, 10**8), st.integers(1, 20_000))
def test_staging_is_a_quarter_of_the_pool_at_most_and_grows_with_it(page_bytes, pool_pages):
    config = MigrationConfig.of(page_bytes=page_bytes, pool_pages=pool_pages)
    assert LEAST_STAGING_PAGES <= config.staging_pages <= MOST_STAGING_PAGES
    assert 1 <= config.staged_batches <= MOST_BATCHES
    assert config.pages_on_their_way <= max(LEAST_STAGING_PAGES, pool_pages // 4)
    if config.staging_pages > LEAST_STAGING_PAGES:
        assert config.staging_pages * page_bytes <= MOST_STAGING_BYTES
    more = MigrationConfig.of(page_bytes=page_bytes, pool_pages=pool_pages + 1)
    assert 0 <= more.pages_on_their_way - config.pages_on_their_way <= MOST_BATCHES


def test_staging_of_the_30b_shape():
    config = MigrationConfig.of(page_bytes=PAGE_30B, pool_pages=1536)
    assert (config.staging_pages, config.staged_batches) == (32, 4)


def test_what_staging_needs_at_least():
    with pytest.raises(ValueError, match=r"room for the 3 pages of one promotion .* got 2 pages"):
        MigrationConfig(staging_pages=2)
    with pytest.raises(ValueError, match="one batch and one thread, got 32 pages, 0 and 1"):
        MigrationConfig(staged_batches=0, gatherers=1)
