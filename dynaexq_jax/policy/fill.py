"""Which steps of the ladder a pool pays for, in the order of their rank.

Axes: L layers, S steps above the base, E experts. Of equal rank, the step that is held comes first,
then the lower step, then the lower layer and expert.
"""

from typing import NamedTuple

import numpy as np


class Steps(NamedTuple):
    """The steps above the base that can be taken."""

    rank: np.ndarray
    """float [L, S, E], never rising with the step."""
    held: np.ndarray
    """bool [L, S, E]."""
    wanted: np.ndarray
    """bool [L, S, E]: all that are held, and others."""
    pages: np.ndarray
    """int [S]: what each costs, never falling with the step."""


def fill(steps: Steps, pool_pages: int) -> np.ndarray:
    """Takes steps in order while the pool has pages: bool [L, S, E].

    Pages that are left because the next step costs more go to the first that costs no more.
    """
    layers, number, experts = steps.rank.shape
    shape = (number, layers, experts)  # lower steps first
    rank, held, wanted = (array.swapaxes(0, 1).ravel() for array in steps[:3])
    cost = np.repeat(steps.pages, layers * experts)
    taken = np.zeros(rank.size, np.bool_)
    order = _first(rank, held, wanted, pool_pages)
    taken[order[np.cumsum(cost[order]) <= pool_pages]] = True
    room = pool_pages - int(cost[taken].sum())
    while room and (waiting := np.flatnonzero(wanted & ~taken & (cost <= room))).size:
        best = waiting[rank[waiting] == rank[waiting].max()]
        first = best[np.argmax(held[best])]
        taken[first] = True
        room -= int(cost[first])
    return taken.reshape(shape).swapaxes(0, 1)


def _first(rank: np.ndarray, held: np.ndarray, wanted: np.ndarray, count: int) -> np.ndarray:
    """Places of the first ``count`` wanted steps, and of all that rank as the last, in order."""
    places = np.flatnonzero(wanted)
    ranks = rank[places]
    if 0 < count < places.size:  # far fewer than there are: only these are sorted
        last = np.partition(ranks, -count)[-count]
        first = np.flatnonzero(ranks >= last)
        places, ranks = places[first], ranks[first]
    return places[np.lexsort((~held[places], -ranks))]
