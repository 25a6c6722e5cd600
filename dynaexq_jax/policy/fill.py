"""Which steps of the ladder a pool pays for, in the order of their rank.

Axes: L layers, S steps above the base, E experts. Of equal rank, the step that is held comes first,
then the lower step, then the lower layer and expert. A step of rank 0 is wanted only if it is held.
"""

from typing import NamedTuple

import numpy as np


class Steps(NamedTuple):
    """The steps above the base that can be taken."""

    rank: np.ndarray
    """float [L, S, E], not negative, never rising with the step."""
    held: np.ndarray
    """bool [L, S, E]."""
    pages: np.ndarray
    """int [S]: what each costs, never falling with the step."""


def fill(steps: Steps, pool_pages: int) -> np.ndarray:
    """Takes steps in order while the pool has pages: bool [L, S, E].

    Pages that are left because the next step costs more go to the first that costs no more.
    """
    rank, held = steps.rank.ravel(), steps.held.ravel()
    # What ranks below the least that is held is out, if more than fits ranks as high as that.
    pages = _rank_of_pages(steps, rank.compress(held).min(initial=np.inf))
    if pages.size <= pool_pages:
        pages = _rank_of_pages(steps, 0)
    next_rank = _following(pages, pool_pages)
    taken = rank > next_rank
    room = pool_pages - int(np.count_nonzero(pages > next_rank))
    while room >= steps.pages[0]:
        small = np.broadcast_to(steps.pages[:, None] <= room, steps.rank.shape).ravel()
        waiting = np.flatnonzero(small & ~taken & (held | (rank > 0)))
        if not waiting.size:
            break
        best = waiting[rank[waiting] == rank[waiting].max()]
        _, step, _ = np.unravel_index(best, steps.rank.shape)
        order = np.lexsort((step, ~held[best]))
        spent = np.cumsum(steps.pages[step[order]])
        fits = np.searchsorted(spent, room, side="right")
        taken[best[order[:fits]]] = True
        room -= int(spent[fits - 1])
    return taken.reshape(steps.rank.shape)


def _rank_of_pages(steps: Steps, least: float) -> np.ndarray:
    """Of each page that a step of at least that rank costs."""
    ranks = []
    for step, pages in enumerate(steps.pages.tolist()):
        rank = steps.rank[:, step].ravel()
        ranks += [rank.compress(rank >= least)] * pages
    return np.concatenate(ranks)


def _following(values: np.ndarray, count: int) -> float:
    """The value that follows the ``count`` largest; 0 if there are no more."""
    if count >= values.size:
        return 0.0
    place = values.size - 1 - count
    return float(np.partition(values, place)[place])
