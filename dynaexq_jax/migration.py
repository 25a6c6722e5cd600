"""Migration: moves pages from host memory to the pool while decoding goes on.

A promotion is a transition: planned (queued here) -> staged (its pages are reserved and their
copy was started) -> ready (the copy has arrived) -> committed (written to the pool and visible in
the table). One that is only planned can be cancelled. Demotions copy nothing and take effect in the
table at once; they are published with the next commit, so that a freed page is never rewritten
under a table that still shows it.
"""

import collections
import dataclasses
import logging

import numpy as np

from dynaexq_jax.bank import ExpertBank, HostPages
from dynaexq_jax.policy import Plan
from dynaexq_jax.residency import Reservation, Residency
from dynaexq_jax.staging import Staged, Stager
from pallas_kernels.layout import PAGES

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MigrationConfig:
    """How copies are grouped."""

    staging_pages: int = 16
    """Pages of one copy; each batch is staged and committed as a whole."""
    staged_batches: int = 4
    """Batches whose copies may be under way at a time."""

    def __post_init__(self) -> None:
        if self.staging_pages < PAGES - 1 or self.staged_batches < 1:
            raise ValueError(
                f"staging needs room for the {PAGES - 1} pages of one promotion from 2 to 8 bits "
                f"and for one batch, got {self.staging_pages} pages and {self.staged_batches}"
            )


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Batch:
    reservations: tuple[Reservation, ...]
    places: np.ndarray
    """Pool page of each staged page, -1 past the last: int32 [staging_pages]."""
    staged: Staged


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
        self._stager = Stager(
            host, bank.device, pages=config.staging_pages, buffers=config.staged_batches
        )
        self._planned: collections.deque[tuple[int, int, int]] = collections.deque()
        self._staged: collections.deque[_Batch] = collections.deque()
        self._table_changed = False

    @property
    def idle(self) -> bool:
        """Whether no transition is planned or under way."""
        return not (self._planned or self._staged)

    @property
    def in_flight(self) -> int:
        """Promotions that are planned or under way."""
        return len(self._planned) + sum(len(batch.reservations) for batch in self._staged)

    def submit(self, plan: Plan) -> None:
        """Takes on a plan, once the last one is carried out; demotes at once."""
        assert self.idle, "a plan is made for the levels that the last one leaves"
        for change in plan.demotions:
            self._residency.demote(change.layer, change.expert, change.to_level)
            self.counters.demotions += 1
            self._table_changed = True
        self._planned.extend((c.layer, c.expert, c.to_level) for c in plan.promotions)

    def cancel_planned(self) -> None:
        """Gives up the promotions whose copies have not begun; what was demoted stays so."""
        self.counters.cancelled += len(self._planned)
        self._planned.clear()

    def advance(self) -> None:
        """Commits a batch that has arrived, and starts the copies of the next.

        One at most, unless copies are waited for: a commit takes the host a part of a step's time,
        and several in a row would keep a step's tokens from their reader.
        """
        self._stage()
        if self.waits_for_copies:
            self._land_all()
        elif self._staged and self._staged[0].staged.is_ready():
            self._commit(self._staged.popleft())
            self._stage()
        if self._table_changed:
            self._bank.publish(self._residency.table)
            self._table_changed = False

    def drain(self) -> None:
        """Waits until every planned transition is committed."""
        while not self.idle:
            self._stage()
            self._land_all()

    def _land_all(self) -> None:
        while self._staged:
            self._commit(self._staged.popleft())
            self._stage()

    def close(self) -> None:
        """Ends the threads that copy; plans after that fail, and experts stay at their level."""
        self._stager.close()

    def _stage(self) -> None:
        while self._planned and len(self._staged) < self._config.staged_batches:
            reservations = self._reserve()
            if not reservations:
                return
            moves = sorted(
                ((rung, r.layer, r.expert), page)
                for r in reservations
                for rung, page in zip(r.rungs, r.pages, strict=True)
            )
            places = np.full(self._config.staging_pages, -1, np.int32)
            places[: len(moves)] = [page for _, page in moves]
            try:
                staged = self._stager.stage([source for source, _ in moves])
            except Exception:  # whatever it failed of, decoding goes on at the lower level
                self._fail(reservations)
                return
            self._staged.append(
                _Batch(reservations=tuple(reservations), places=places, staged=staged)
            )

    def _reserve(self) -> list[Reservation]:
        """Reserves pages for as many planned promotions as one batch holds."""
        reservations: list[Reservation] = []
        room = self._config.staging_pages
        while self._planned:
            reservation = self._residency.reserve(*self._planned[0])
            if len(reservation.pages) > room:
                self._residency.cancel(reservation)
                break
            self._planned.popleft()
            room -= len(reservation.pages)
            reservations.append(reservation)
        return reservations

    def _commit(self, batch: _Batch) -> None:
        try:
            staged = batch.staged.take()  # arrived already, unless we wait for copies
        except Exception:
            self._fail(batch.reservations)
            return
        for reservation in batch.reservations:
            self._residency.commit(reservation)
        self._bank.commit(self._residency.table, batch.places, staged)
        self._table_changed = False
        moved = int(np.count_nonzero(batch.places >= 0))
        self.counters.promotions += len(batch.reservations)
        self.counters.pages += moved
        self.counters.bytes += moved * self._bank.experts.format.page_bytes
        self.counters.commits += 1

    def _fail(self, reservations: list[Reservation] | tuple[Reservation, ...]) -> None:
        for reservation in reservations:
            self._residency.cancel(reservation)
        self.counters.failures += 1
        _log.exception(
            "copying %d experts' pages to the device failed; they stay at their level",
            len(reservations),
        )
