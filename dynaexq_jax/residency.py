"""The master page table: which expert holds which page of the pool. Numpy only.

The host's table is the truth; the device's is a snapshot of it. A promotion first reserves pages,
whose bytes can then be copied, and shows in the table only when it is committed; a demotion drops
pages at once, because nothing has to be copied for it.
"""

from typing import Final, NamedTuple

import numpy as np

from pallas_kernels.levels import LEVEL_BITS, PAGES_OF_BITS, Bits, level_of_bits

MAX_LEVEL: Final = len(LEVEL_BITS) - 1


Indices = np.ndarray | int
"""int [N], or one."""


class PoolExhausted(Exception):
    """The pool has fewer free pages than a reservation needs; nothing was changed."""


class Reservation(NamedTuple):
    """Pages that N experts are going to hold, M in all, not yet in the table."""

    layers: np.ndarray
    """int [N]"""
    experts: np.ndarray
    """int [N]"""
    levels: np.ndarray
    """int [N]: level that each has once this is committed."""
    cells: np.ndarray
    """int [M]: numbers, in the table, of the entries that the pages will fill.

    By expert, and of each from the lowest rung that it lacks, without a gap.
    """
    pages: np.ndarray
    """int32 [M]: pool page of each."""


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

    Experts are named by their layers and numbers, int [N] each or one of them. Raises ValueError
    for a call that breaks a precondition; nothing is changed then.
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
        self._planned = self._levels.copy()
        self._pages_held = np.array(self.pages_of_level)
        self._free = list(range(pool_pages - 1, -1, -1))
        self._open: dict[int, Reservation] = {}
        """By identity."""

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
        return self._planned.copy()

    def planned_table(self) -> np.ndarray:
        """int32 [R, L, E]: the table once all open reservations are committed; a copy."""
        table = self._table.copy()
        for reservation in self._open.values():
            table.put(reservation.cells, reservation.pages)
        return table

    def under_way(self) -> np.ndarray:
        """bool [L, E]: who has a reservation that is neither committed nor cancelled."""
        return self._planned != self._levels

    def reserve(self, layers: Indices, experts: Indices, levels: Indices) -> Reservation:
        """Take from the free list the pages that experts lack for ``levels``, int [N].

        Raises PoolExhausted if there are not enough.
        """
        numbers = self._numbers(layers, experts, "settle it first")
        levels = np.atleast_1d(levels)
        current = self._levels.take(numbers)
        if (refused := (levels <= current) | (levels > MAX_LEVEL)).any():
            first = refused.argmax()
            raise ValueError(
                f"{self._name(numbers[first])} can be promoted to a level above {current[first]} "
                f"and up to {MAX_LEVEL}, got {levels[first]}"
            )
        cells = self._cells(numbers, self._pages_held.take(current), self._pages_held.take(levels))
        if cells.size > len(self._free):
            others = f" and {numbers.size - 1} more" if numbers.size > 1 else ""
            raise PoolExhausted(
                f"{self._name(numbers[0])}{others}: {cells.size} pages are needed, "
                f"{len(self._free)} of {self.pool_pages} are free"
            )
        rest = len(self._free) - cells.size
        pages = np.array(self._free[rest:][::-1], np.int32)
        del self._free[rest:]
        self._planned.put(numbers, levels)
        reservation = Reservation(*self._places(numbers), levels, cells, pages)
        self._open[id(reservation)] = reservation
        return reservation

    def commit(self, reservation: Reservation) -> None:
        """Publish the pages of a reservation in the table."""
        self._close(reservation)
        self._table.put(reservation.cells, reservation.pages)
        self._levels[reservation.layers, reservation.experts] = reservation.levels

    def cancel(self, reservation: Reservation) -> None:
        """Return the pages of a reservation to the free list."""
        self._close(reservation)
        self._free.extend(reservation.pages[::-1].tolist())
        experts = reservation.layers, reservation.experts
        self._planned[experts] = self._levels[experts]

    def demote(self, layers: Indices, experts: Indices, levels: Indices) -> None:
        """Free the pages that experts hold above ``levels``, int [N], at once."""
        numbers = self._numbers(layers, experts, "cancel it before a demotion")
        levels = np.atleast_1d(levels)
        current = self._levels.take(numbers)
        if (refused := (levels < self.base_level) | (levels >= current)).any():
            first = refused.argmax()
            raise ValueError(
                f"{self._name(numbers[first])} can be demoted to a level below {current[first]} "
                f"and from {self.base_level} up, got {levels[first]}"
            )
        held, kept = self._pages_held.take(current), self._pages_held.take(levels)
        cells = self._cells(numbers[::-1], kept[::-1], held[::-1])[::-1]  # from the highest rung
        self._free.extend(self._table.take(cells).tolist())
        self._table.put(cells, -1)
        self._levels.put(numbers, levels)
        self._planned.put(numbers, levels)

    def check_integrity(self) -> None:
        """Check all invariants. Raises AssertionError, for it would be a bug of ours."""
        held = self._table >= 0
        open_ = self._open.values()
        reserved = [page for item in open_ for page in item.pages.tolist()]
        owned = [*self._free, *reserved, *self._table[held].tolist()]
        if sorted(owned) != list(range(self.pool_pages)):
            raise AssertionError(
                f"free {self.free_pages} + reserved {len(reserved)} + used {self.used_pages} "
                f"pages are not the pool's {self.pool_pages}, each once"
            )
        if np.any(held[1:] & ~held[:-1]):
            raise AssertionError("an expert holds a page without those below it")
        if not np.array_equal(held.sum(axis=0), self._pages_held[self._levels]):
            raise AssertionError("an expert does not hold exactly the pages of its level")
        planned = self._levels.copy()
        for item in open_:
            planned[item.layers, item.experts] = item.levels
            if held.take(item.cells).any():
                raise AssertionError(f"{item} fills entries that are held")
            held.put(item.cells, True)
        if not np.array_equal(self._planned, planned):
            raise AssertionError("planned levels are not those of the open reservations")
        if not np.array_equal(held.sum(axis=0), self._pages_held[planned]):
            raise AssertionError("reservations do not bring exactly the pages that levels lack")

    def _close(self, reservation: Reservation) -> None:
        if self._open.pop(id(reservation), None) is None:
            raise ValueError(f"this reservation is not open: {reservation}")

    def _numbers(self, layers: Indices, experts: Indices, remedy: str) -> np.ndarray:
        """Numbers of experts across layers, int [N], which must not be under way."""
        shape = self._levels.shape
        try:
            numbers: np.ndarray = np.ravel_multi_index(np.atleast_1d(layers, experts), shape)
        except ValueError as error:
            raise ValueError(
                f"no experts {experts} of layers {layers}: there are {shape[0]} layers of "
                f"{shape[1]} experts"
            ) from error
        if len(set(numbers.tolist())) < numbers.size:
            raise ValueError(f"an expert is named twice: {numbers.tolist()}")
        if (is_open := self._planned.take(numbers) != self._levels.take(numbers)).any():
            raise ValueError(
                f"{self._name(numbers[is_open.argmax()])} has an open reservation: {remedy}"
            )
        return numbers

    def _cells(self, numbers: np.ndarray, first: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Numbers, in the table, of the rungs ``first`` to ``end`` of each expert; by expert."""
        counts = end - first
        rungs = np.arange(counts.sum()) + np.repeat(first - counts.cumsum() + counts, counts)
        cells: np.ndarray = rungs * self._levels.size + np.repeat(numbers, counts)
        return cells

    def _places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.divmod(numbers, self._levels.shape[1])

    def _name(self, number: int) -> str:
        layer, expert = divmod(int(number), self._levels.shape[1])
        return f"expert {expert} of layer {layer}"
