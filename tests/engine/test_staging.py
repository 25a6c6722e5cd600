"""Batches of pages: what is gathered, written, and how large they are."""

import collections
import gc

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynaexq_jax.bank import batch_parts, batch_words, page_shapes
from dynaexq_jax.migration import (
    LEAST_STAGING_PAGES,
    MOST_BATCHES,
    MOST_STAGING_BYTES,
    MOST_STAGING_PAGES,
    MigrationConfig,
)
from dynaexq_jax.staging import Stager
from pallas_kernels.levels import DEFAULT_TABLE
from pallas_kernels.pages import ExpertFormat, abstract_experts

PAGE_30B = 9 * 2**17


def test_a_batch_holds_the_pages_that_were_asked_for(small):
    host, bank = small.host(), small.bank(pool_pages=1)
    stager = Stager(host, bank, pages=7, buffers=2)
    shapes = page_shapes(bank.experts.pool), bank.experts.table.shape
    rng = np.random.default_rng(0)
    layers, experts = host.rungs[0].gate_up.shape[:2]
    for count in (1, 2, 6, 7):
        pages = rng.choice(3 * layers * experts, count, replace=False)
        places = rng.integers(99, size=count)
        table = rng.integers(-1, 99, shapes[1], np.int32)
        batch = np.asarray(stager.stage(pages, places, table).take())
        assert batch.size == batch_words(7, *shapes)
        parts = batch_parts(batch, *shapes)
        np.testing.assert_array_equal(parts.table, table)
        order = np.argsort(pages)
        assert parts.places.tolist() == places[order].tolist() + [-1] * (7 - count)
        for matrix, found in parts.pages._asdict().items():
            rungs = np.stack([getattr(rung, matrix) for rung in host.rungs])
            np.testing.assert_array_equal(
                found[:count], rungs.reshape(-1, *rungs.shape[3:])[pages[order]]
            )
    stager.close()


def test_batches_take_the_same_memory_of_the_device_from_the_start(small, monkeypatch):
    """As many live arrays, and of as many bytes, before, between and after batches."""
    bank = small.bank(pool_pages=1)
    before = live_sizes(bank.device)
    stager = Stager(small.host(), bank, pages=3, buffers=2)
    config = MigrationConfig(staging_pages=3, staged_batches=2)
    kept = live_sizes(bank.device) - before
    assert kept.total() == 2
    assert sum(kept.elements()) == config.bytes_for(bank.experts)
    table = np.array(bank.experts.table)
    put = jax.device_put

    def in_place_of_another(*args, **options):
        assert (live_sizes(bank.device) - before).total() < kept.total()
        return put(*args, **options)

    monkeypatch.setattr("dynaexq_jax.staging.jax.device_put", in_place_of_another)
    for _ in range(5):  # in turn: who looks at all arrays holds them for as long
        array = stager.stage(np.arange(3), np.arange(3), table).take()
        assert live_sizes(bank.device) - before == kept
        del array
        assert live_sizes(bank.device) - before == kept
    stager.close()


def live_sizes(device):
    """Bytes of the arrays on a device, counted."""
    gc.collect()
    return collections.Counter(
        array.nbytes
        for array in jax.live_arrays()
        if array.devices() == {device} and array.sharding.memory_kind != "pinned_host"
    )


def pages_of(config):
    return config.staging_pages * config.staged_batches


@given(st.integers(1, 10**8), st.integers(1, 20_000))
def test_staging_is_a_quarter_of_the_pool_at_most_and_grows_with_it(page_bytes, pool_pages):
    config = MigrationConfig.of(page_bytes=page_bytes, pool_pages=pool_pages)
    assert LEAST_STAGING_PAGES <= config.staging_pages <= MOST_STAGING_PAGES
    assert 1 <= config.staged_batches <= MOST_BATCHES
    assert pages_of(config) <= max(LEAST_STAGING_PAGES, pool_pages // 4)
    if config.staging_pages > LEAST_STAGING_PAGES:
        assert config.staging_pages * page_bytes <= MOST_STAGING_BYTES
    more = MigrationConfig.of(page_bytes=page_bytes, pool_pages=pool_pages + 1)
    assert 0 <= pages_of(more) - pages_of(config) <= MOST_BATCHES


def test_staging_of_the_30b_shape():
    config = MigrationConfig.of(page_bytes=PAGE_30B, pool_pages=1536)
    assert (config.staging_pages, config.staged_batches) == (32, 8)
    fmt = ExpertFormat(
        hidden=2048, width=768, group_size=32, scale_encoding="log8", table=DEFAULT_TABLE
    )
    experts = abstract_experts(fmt, layers=48, experts=128, base_bits=2, pool_pages=1536)
    # pages, their places, and a table of three rungs
    assert config.bytes_for(experts) == 8 * (32 * (PAGE_30B + 4) + 3 * 48 * 128 * 4)


def test_what_staging_needs_at_least():
    with pytest.raises(ValueError, match=r"room for the 3 pages of one promotion .* got 2 pages"):
        MigrationConfig(staging_pages=2)
    with pytest.raises(ValueError, match="for one batch, got 32 pages and 0"):
        MigrationConfig(staged_batches=0)
