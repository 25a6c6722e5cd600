"""Batches of pages: what is gathered, written, and how large they are."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynaexq_jax.bank import batch_parts, batch_words
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


def test_a_batch_holds_the_pages_that_were_asked_for(small):
    host = small.host()
    stager = Stager(host, small.bank(pool_pages=1).device, pages=7, buffers=2)
    rng = np.random.default_rng(0)
    layers, experts = host.rungs[0].gate_up.shape[:2]
    for count in (1, 2, 6, 7):
        pages = rng.choice(3 * layers * experts, count, replace=False)
        places = rng.integers(99, size=count)
        batch = np.asarray(stager.stage(pages, places).take())
        shapes = Matrices(*(array.shape[2:] for array in host.rungs[0]))
        assert batch.size == batch_words(7, shapes)
        to, matrices = batch_parts(batch, shapes)
        order = np.argsort(pages)
        assert to.tolist() == places[order].tolist() + [-1] * (7 - count)
        for matrix, found in matrices._asdict().items():
            rungs = np.stack([getattr(rung, matrix) for rung in host.rungs])
            np.testing.assert_array_equal(
                found[:count], rungs.reshape(-1, *rungs.shape[3:])[pages[order]]
            )
    stager.close()


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
    assert (config.staging_pages, config.staged_batches) == (32, 8)


def test_what_staging_needs_at_least():
    with pytest.raises(ValueError, match=r"room for the 3 pages of one promotion .* got 2 pages"):
        MigrationConfig(staging_pages=2)
    with pytest.raises(ValueError, match="for one batch, got 32 pages and 0"):
        MigrationConfig(staged_batches=0)
