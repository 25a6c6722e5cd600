"""The master page table: which expert holds which page of the pool. Numpy only.

The host's table is the truth; the device's is a snapshot of it. A promotion first reserves pages,
whose bytes can then be copied, and shows in the table only when it is committed; a demotion drops
pages at once, because nothing has to be copied for it.
"""

from typing import Final, NamedTuple

import numpy as np

from pallas_kernels.levels import LEVEL_BITS, PAGES_OF_BITS, Bits, level_of_bits

MAX_LEVEL: Final = len(LEVEL_BITS) - 1


class PoolExhausted(Exception):
    """The pool has fewer free pages than a reservation needs; nothing was changed."""


class Reservation(NamedTuple):
    """Pages that an expert is going to hold, not yet in the table."""

    layer: int
    expert: int
    level: int
    """Level that the expert has once this is committed."""
    rungs: tuple[int, ...]
    """Rungs of the page table that the pages will fill, ascending, without a gap."""
    pages: tuple[int, ...]
    """Pool page of each rung."""


def pages_of_levels(base_bits: Bits) -> tuple[int, ...]:
    """Pages above the base that each level needs; none for levels that the base covers.

    (0, 1, 3) for a base of 2 bits, (0, 0, 2) for 4, (0, 0, 0) for 8.
    """
    level_of_bits(base_bits)
    base = PAGES_OF_BITS[base_bits]
    return tuple(max(0, PAGES_OF_BITS[bits] - base) for bits in LEVEL_BITS)


class Residency:
    """Owner of the page table and of the free list.

    Invariants, checked by ``check_integrity``: free + used + reserved = pool pages; a page has at
    most one owner; an expert that holds a rung holds all lower ones. Pages are handed out lowest
    number first at the start, then most recently freed first, so runs repeat exactly.

    Raises ValueError for a call that breaks a precondition; nothing is changed then.
    """

    def __init__(self, *, layers: int, experts: int, base_bits: Bits, pool_pages: int) -> None:
        for name, value, least in (
            ("layers", layers, 1),
            ("experts", experts, 1),
            ("pool_pages", pool_pages, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.base_bits: Final = base_bits
        self.pool_pages: Final = pool_pages
        self.pages_of_level: Final = pages_of_levels(base_bits)
        self.base_level: Final = level_of_bits(base_bits)
        self._table = np.full((self.pages_of_level[-1], layers, experts), -1, np.int32)
        self._levels = np.full((layers, experts), self.base_level, np.int32)
        self._free = list(range(pool_pages - 1, -1, -1))
        self._open: dict[tuple[int, int], Reservation] = {}

    @property
    def table(self) -> np.ndarray:
        """int32 [R, L, E]: pool page of each rung above the base or -1; a read-only view."""
        view = self._table.view()
        view.flags.writeable = False
        return view

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds or has reserved."""
        return len(self._free)

    @property
    def reserved_pages(self) -> int:
        """Pages of open reservations."""
        return sum(len(reservation.pages) for reservation in self._open.values())

    @property
    def used_pages(self) -> int:
        """Pages in the table."""
        return int(np.count_nonzero(self._table >= 0))

    @property
    def open_reservations(self) -> tuple[Reservation, ...]:
        """Reservations that are neither committed nor cancelled, oldest first."""
        return tuple(self._open.values())

    def levels(self) -> np.ndarray:
        """int32 [L, E]: level of each expert that the table gives now; a copy."""
        return self._levels.copy()

    def planned_levels(self) -> np.ndarray:
        """int32 [L, E]: level of each expert once all open reservations are committed; a copy."""
        levels = self.levels()
        for (layer, expert), reservation in self._open.items():
            levels[layer, expert] = reservation.level
        return levels

    def is_open(self, layer: int, expert: int) -> bool:
        """Whether the expert has a reservation that is neither committed nor cancelled."""
        return (layer, expert) in self._open

    def reserve(self, layer: int, expert: int, level: int) -> Reservation:
        """Take from the free list the pages that an expert lacks for ``level``.

        Raises PoolExhausted if there are not enough.
        """
        self._check_expert(layer, expert)
        current = int(self._levels[layer, expert])
        if not current < level <= MAX_LEVEL:
            raise ValueError(
                f"{_name(layer, expert)} can be promoted to a level above {current} and up to "
                f"{MAX_LEVEL}, got {level}"
            )
        if (layer, expert) in self._open:
            raise ValueError(f"{_name(layer, expert)} has an open reservation: settle it first")
        rungs = tuple(range(self.pages_of_level[current], self.pages_of_level[level]))
        if len(rungs) > len(self._free):
            raise PoolExhausted(
                f"{_name(layer, expert)} needs {len(rungs)} pages for level {level}, "
                f"{len(self._free)} of {self.pool_pages} are free"
            )
        pages = tuple(self._free.pop() for _ in rungs)
        reservation = Reservation(layer, expert, level, rungs, pages)
        self._open[layer, expert] = reservation
        return reservation

    def commit(self, reservation: Reservation) -> None:
        """Publish the pages of a reservation in the table."""
        self._close(reservation)
        layer, expert = reservation.layer, reservation.expert
        for rung, page in zip(reservation.rungs, reservation.pages, strict=True):
            self._table[rung, layer, expert] = page
        self._levels[layer, expert] = reservation.level

    def cancel(self, reservation: Reservation) -> None:
        """Return the pages of a reservation to the free list."""
        self._close(reservation)
        self._free.extend(reversed(reservation.pages))

    def demote(self, layer: int, expert: int, level: int) -> None:
        """Free the pages that an expert holds above ``level``, at once."""
        self._check_expert(layer, expert)
        current = int(self._levels[layer, expert])
        if not self.base_level <= level < current:
            raise ValueError(
                f"{_name(layer, expert)} can be demoted to a level below {current} and from "
                f"{self.base_level} up, got {level}"
            )
        if (layer, expert) in self._open:
            raise ValueError(
                f"{_name(layer, expert)} has an open reservation: cancel it before a demotion"
            )
        for rung in reversed(range(self.pages_of_level[level], self.pages_of_level[current])):
            self._free.append(int(self._table[rung, layer, expert]))
            self._table[rung, layer, expert] = -1
        self._levels[layer, expert] = level

    def check_integrity(self) -> None:
        """Check all invariants. Raises AssertionError, for it would be a bug of ours."""
        held = self._table >= 0
        reserved = [page for item in self._open.values() for page in item.pages]
        owned = [*self._free, *reserved, *self._table[held].tolist()]
        if sorted(owned) != list(range(self.pool_pages)):
            raise AssertionError(
                f"free {self.free_pages} + reserved {len(reserved)} + used {self.used_pages} "
                f"pages are not the pool's {self.pool_pages}, each once"
            )
        if np.any(held[1:] & ~held[:-1]):
            raise AssertionError("an expert holds a page without those below it")
        if not np.array_equal(held.sum(axis=0), np.take(self.pages_of_level, self._levels)):
            raise AssertionError("an expert does not hold exactly the pages of its level")
        for item in self._open.values():
            if item.rungs[0] != held[:, item.layer, item.expert].sum():
                raise AssertionError(f"{item} does not start where the table ends")

    def _close(self, reservation: Reservation) -> None:
        key = (reservation.layer, reservation.expert)
        if self._open.get(key) is not reservation:
            raise ValueError(f"{_name(*key)}: this reservation is not open: {reservation}")
        del self._open[key]

    def _check_expert(self, layer: int, expert: int) -> None:
        layers, experts = self._levels.shape
        if not (0 <= layer < layers and 0 <= expert < experts):
            raise ValueError(
                f"no {_name(layer, expert)}: there are {layers} layers of {experts} experts"
            )


def _name(layer: int, expert: int) -> str:
    return f"expert {expert} of layer {layer}"
