"""Migration: moves pages from host memory to the pool while decoding goes on.

A promotion is a transition: planned (queued here) -> staged (its pages are reserved and their
copy was started) -> ready (the copy has arrived) -> committed (written to the pool and visible in
the table). One that is only planned can be cancelled. Demotions copy nothing. An expert gives its
pages when a promotion is staged that needs them, or at once if none will. A batch brings the table
that is to be read once its pages are written: without those who had given pages when it was staged,
so a page is never rewritten under one that still shows it, and steps read it until then. With
nothing under way the table is published by itself.
"""

import collections
import dataclasses
import logging
from typing import Final, Self

import jax
import numpy as np

from dynaexq_jax.bank import ExpertBank, HostPages, batch_words, page_shapes
from dynaexq_jax.policy import Changes, Plan
from dynaexq_jax.residency import Reservation, Residency
from dynaexq_jax.staging import Staged, Stager
from pallas_kernels.layout import PAGES
from pallas_kernels.pages import PagedExperts

_log = logging.getLogger(__name__)


MOST_STAGING_PAGES: Final = 32
MOST_STAGING_BYTES: Final = 36 * 2**20
"""Of one batch: 32 pages of a 30B model. Each batch costs the interpreter about as much."""
MOST_BATCHES: Final = 8
"""At once, a thread each: one gathers a fraction of what the bus carries."""
LEAST_STAGING_PAGES: Final = PAGES - 1
"""Of one batch: what a promotion from 2 to 8 bits needs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MigrationConfig:
    """How copies are grouped. ``of`` chooses it."""

    staging_pages: int = MOST_STAGING_PAGES
    """Pages of one copy; each batch is staged and committed as a whole."""
    staged_batches: int = MOST_BATCHES
    """Batches whose copies may be under way at a time."""

    def __post_init__(self) -> None:
        if self.staging_pages < LEAST_STAGING_PAGES or self.staged_batches < 1:
            raise ValueError(
                f"staging needs room for the {LEAST_STAGING_PAGES} pages of one promotion from 2 "
                f"to 8 bits and for one batch, got {self.staging_pages} pages and "
                f"{self.staged_batches}"
            )

    @classmethod
    def of(cls, *, page_bytes: int, pool_pages: int) -> Self:
        """For pages of that size and a pool of so many.

        At most a quarter of the pool is on its way at a time, in batches as large as that allows.
        """
        share = pool_pages // 4
        batches = min(MOST_BATCHES, max(1, share // LEAST_STAGING_PAGES))
        most = min(MOST_STAGING_PAGES, MOST_STAGING_BYTES // page_bytes, share // batches)
        return cls(staging_pages=max(LEAST_STAGING_PAGES, most), staged_batches=batches)

    def bytes_for(self, experts: PagedExperts) -> int:
        """Of all batches to experts of these shapes: on the device, and as much on the host."""
        words = batch_words(self.staging_pages, page_shapes(experts.pool), experts.table.shape)
        return self.staged_batches * words * 4


@dataclasses.dataclass(kw_only=True)
class MigrationCounters:
    """What was moved since the start."""

    promotions: int = 0
    demotions: int = 0
    pages: int = 0
    bytes: int = 0
    commits: int = 0
    cancelled: int = 0
    """Promotions that were planned and given up before their copy began."""
    failures: int = 0


@dataclasses.dataclass(kw_only=True)
class _Batch:
    reservation: Reservation
    staged: Staged
    levels: np.ndarray
    """int32 [L, E]: those of the table that it brings."""
    outdated: bool = False
    """Whether that table has pages of a batch before it, whose copy failed."""


class Migration:
    """Carries out plans. ``advance`` is called between steps and never waits, unless told to."""

    def __init__(
        self,
        *,
        host: HostPages,
        residency: Residency,
        bank: ExpertBank,
        config: MigrationConfig,
        waits_for_copies: bool = False,
    ) -> None:
        self.counters = MigrationCounters()
        self.waits_for_copies = waits_for_copies
        """Whether ``advance`` waits for what is on its way."""
        self._residency = residency
        self._bank = bank
        self._config = config
        self._stager = Stager(host, bank, pages=config.staging_pages, buffers=config.staged_batches)
        self._pages_held = np.array(residency.pages_of_level)
        self._demotions = Changes.none()
        self._planned = Changes.none()
        """What of the plan has not begun; its promotions."""
        self._staged: collections.deque[_Batch] = collections.deque()
        self.levels = residency.levels()
        """int32 [L, E]: levels of the experts in the table that the next step reads."""
        self._table_changed = False
        """Whether somebody has given pages since the last table was made, a batch's or another."""

    @property
    def idle(self) -> bool:
        """Whether no transition is planned or under way."""
        return not (self._planned or self._staged)

    @property
    def in_flight(self) -> int:
        """Promotions that are planned or under way."""
        under_way = sum(batch.reservation.levels.size for batch in self._staged)
        return len(self._planned) + under_way

    def submit(self, plan: Plan) -> None:
        """Takes on a plan, in place of what of the last one has not begun.

        Experts whose pages are under way stay out of it; the next plan may think otherwise.
        """
        under_way = self._residency.under_way()

        def free(changes: Changes) -> Changes:
            return changes[~under_way[changes.layers, changes.experts]]

        promotions = free(plan.promotions)
        # the same promotion in the new plan goes on waiting, maybe from another level
        wanted = np.zeros_like(under_way)
        wanted[promotions.layers, promotions.experts] = True
        given_up = ~wanted[self._planned.layers, self._planned.experts]
        self.counters.cancelled += int(given_up.sum())
        self._planned, self._demotions = promotions, free(plan.demotions)
        self._demote_if_nothing_waits()

    def advance(self, *, during_chunk: bool = False) -> None:
        """Commits a batch that has arrived, or starts the copies of another if none has.

        Either takes the host a part of a decode step's time, and both in a row would keep its
        tokens from their reader. ``during_chunk``, while the device is busy with a chunk of a
        prompt for many times as long, all that have arrived, and as many as there are buffers.
        """
        if self.waits_for_copies:
            self.drain()
        elif during_chunk:
            while self._commit_arrived():
                pass
            while self._stage():  # after that, for each of them has freed a buffer
                pass
        elif not self._commit_arrived():
            self._stage()
        self.publish()

    def publish(self) -> None:
        """Shows the next step who has given pages, unless something is under way.

        The table's copy would be queued behind that of pages, and the step would wait for both.
        """
        if self._table_changed and not self._staged:
            self._publish()
            self._table_changed = False

    def drain(self) -> None:
        """Waits until every planned transition is committed."""
        while not self.idle:
            while self._stage():
                pass
            if self._staged:
                self._commit_oldest()

    def close(self) -> None:
        """Ends the threads that copy; plans after that fail, and experts stay at their level."""
        self._stager.close()

    def _stage(self) -> bool:
        """Starts the copy of one more batch. Returns whether it did."""
        if not self._planned or len(self._staged) >= self._config.staged_batches:
            return False
        reservation = self._reserve()
        if reservation is None:
            return False
        table, levels = self._residency.planned_table(), self._residency.planned_levels()
        try:
            staged = self._stager.stage(reservation.cells, reservation.pages, table)
        except Exception:  # whatever it failed of, decoding goes on at the lower level
            self._fail(reservation)
            return False
        self._staged.append(_Batch(reservation=reservation, staged=staged, levels=levels))
        self._table_changed = False
        return True

    def _reserve(self) -> Reservation | None:
        """Reserves pages for as many planned promotions as one batch holds."""
        pages = self._pages_between(self._planned[: self._config.staging_pages])
        count = int(np.searchsorted(pages, self._config.staging_pages, side="right"))
        self._make_room(pages[count - 1])
        if pages[count - 1] > self._residency.free_pages:  # who should make room is under way
            count = int(np.searchsorted(pages, self._residency.free_pages, side="right"))
            self.counters.cancelled += len(self._planned) - count
            self._planned = self._planned[:count]
        now, self._planned = self._planned[:count], self._planned[count:]
        self._demote_if_nothing_waits()
        return self._residency.reserve(now.layers, now.experts, now.to_levels) if now else None

    def _make_room(self, pages: int) -> None:
        """Demotes as few as it takes for so many pages to be free, or all that are to be."""
        missing = pages - self._residency.free_pages
        if missing > 0 and self._demotions:
            freed = self._pages_between(self._demotions)
            self._demote(int(np.searchsorted(freed, missing)) + 1)

    def _pages_between(self, changes: Changes) -> np.ndarray:
        """Pages that the changes take or free up to each, int [N]."""
        held = self._pages_held
        return np.abs(held[changes.to_levels] - held[changes.from_levels]).cumsum()

    def _demote_if_nothing_waits(self) -> None:
        if self._demotions and not self._planned:
            self._demote(len(self._demotions))

    def _demote(self, count: int) -> None:
        now, self._demotions = self._demotions[:count], self._demotions[count:]
        self._residency.demote(now.layers, now.experts, now.to_levels)
        self.counters.demotions += len(now)
        self._table_changed = True

    def _commit_arrived(self) -> bool:
        """Commits the oldest batch if its copy is over, whether it has failed or not."""
        if not (self._staged and self._staged[0].staged.is_ready()):
            return False
        self._commit_oldest()
        return True

    def _commit_oldest(self) -> None:
        """Waits for its pages; its buffer is free then. Copies that have failed commit nothing."""
        batch = self._staged.popleft()
        try:
            pages = batch.staged.take()
        except Exception:
            self._fail(batch.reservation)
            for later in self._staged:
                later.outdated = True
        else:
            self._commit(batch, pages)

    def _commit(self, batch: _Batch, pages: jax.Array) -> None:
        reservation = batch.reservation
        self._residency.commit(reservation)
        self._bank.commit(pages)
        self.levels = batch.levels
        if batch.outdated:  # no step has been dispatched in between
            self._publish()
        moved = reservation.pages.size
        self.counters.promotions += reservation.levels.size
        self.counters.pages += moved
        self.counters.bytes += moved * self._bank.experts.format.page_bytes
        self.counters.commits += 1

    def _publish(self) -> None:
        self._bank.publish(self._residency.table)
        self.levels = self._residency.levels()

    def _fail(self, reservation: Reservation) -> None:
        self._residency.cancel(reservation)
        self._table_changed = True  # who gave pages for it has given them
        # the next plan tries again; nobody gives pages to copies that may fail as well
        self.counters.cancelled += len(self._planned)
        self._planned = self._demotions = Changes.none()
        self.counters.failures += 1
        _log.exception(
            "copying %d experts' pages to the device failed; they stay at their level",
            reservation.levels.size,
        )
