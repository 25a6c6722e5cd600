"""Which steps of the ladder a pool pays for, in the order of their rank.

Axes: L layers, S steps above the base, E experts. Of equal rank, the step that is held comes first,
then the lower step, then the lower expert.
"""

from typing import NamedTuple

import numpy as np


class Steps(NamedTuple):
    """The steps above the base that can be taken."""

    rank: np.ndarray
    """float [L, S, E]; what is not wanted ranks behind all that is."""
    held: np.ndarray
    """bool [L, S, E]."""
    wanted: np.ndarray
    """bool [L, S, E]: all that are held, and others."""
    pages: np.ndarray
    """int [S]: what each costs."""

    def of_layers(self, layers: np.ndarray) -> "Steps":
        """Those of some layers, bool [L]."""
        return self._replace(
            rank=self.rank[layers], held=self.held[layers], wanted=self.wanted[layers]
        )


def fill(steps: Steps, shares: np.ndarray, pool_pages: int) -> np.ndarray:
    """Takes steps while each layer's share, int [L], lasts: bool [L, S, E].

    What shares leave over, because the next step costs more, goes round the layers in order, each
    with its next step, first for steps that are held.
    """
    stays = _stays(steps, shares)
    if 2 * np.count_nonzero(stays) <= stays.size:
        return _in_order(steps, shares, pool_pages)
    # Little has changed: sort the other layers, among which is all that shares do not keep.
    taken = steps.held.copy()
    if not stays.all():
        room = pool_pages - _pages(taken[stays], steps)
        taken[~stays] = _in_order(steps.of_layers(~stays), shares[~stays], room, only_held=True)
    room = pool_pages - _pages(taken, steps)
    if np.any((steps.wanted & ~taken)[:, steps.pages <= room]):  # whose turn is it? sort all
        return _in_order(steps, shares, pool_pages)
    return taken


def _stays(steps: Steps, shares: np.ndarray) -> np.ndarray:
    """Layers whose share is for just what they hold: bool [L]; found without sorting.

    All that is held ranks before the others, and the share does not pay for the first of those.
    """
    layers, _, experts = steps.rank.shape
    rank_of_others = np.where(steps.wanted & ~steps.held, steps.rank, -1).reshape(layers, -1)
    first = rank_of_others.argmax(axis=1)
    first_rank = rank_of_others[np.arange(layers), first]
    last_held_rank = np.where(steps.held, steps.rank, np.inf).min(axis=(1, 2))
    left = shares - np.count_nonzero(steps.held, axis=2) @ steps.pages
    pays = (first_rank >= 0) & (steps.pages[first // experts] <= left)
    return (first_rank <= last_held_rank) & (left >= 0) & ~pays


def _in_order(
    steps: Steps, shares: np.ndarray, pool_pages: int, *, only_held: bool = False
) -> np.ndarray:
    """``fill`` by sorting; with ``only_held``, what is left over goes to held steps alone."""
    layers, number, experts = steps.rank.shape
    order = np.lexsort((~steps.held.reshape(layers, -1), -steps.rank.reshape(layers, -1)))
    place = order + np.arange(0, steps.held.size, number * experts)[:, None]  # in a flat [L, S, E]
    cost = np.repeat(steps.pages, experts)[order]
    held = steps.held.ravel()[place]
    wanted = np.arange(number * experts) < np.count_nonzero(steps.wanted, axis=(1, 2))[:, None]
    taken = wanted & (np.cumsum(cost, axis=1) <= shares[:, None])
    room = pool_pages - int(cost[taken].sum())
    if room:
        can = held if only_held else wanted
        _hand_round(room, cost=cost, held=held, waits=can & ~taken, taken=taken)
    result = np.zeros(steps.held.size, np.bool_)
    result[place[taken]] = True
    return result.reshape(steps.held.shape)


def _hand_round(
    room: int, *, cost: np.ndarray, held: np.ndarray, waits: np.ndarray, taken: np.ndarray
) -> None:
    """Gives ``room`` pages to steps that wait, one after the other; changes ``taken``.

    All arrays are sorted, [L, S x E].
    """
    layers, steps = cost.shape
    rounds = np.arange(steps) - np.count_nonzero(taken, axis=1)[:, None]
    queue = (rounds + steps * ~held) * layers + np.arange(layers)[:, None]
    end = queue.max() + 1
    queue[~waits] = end
    while True:
        queue[cost > room] = end
        first = queue.argmin()
        if queue.flat[first] == end:
            return
        taken.flat[first] = True
        queue.flat[first] = end
        room -= int(cost.flat[first])


def _pages(taken: np.ndarray, steps: Steps) -> int:
    """Pages of the steps taken, bool [L, S, E]."""
    return int(np.count_nonzero(taken, axis=(0, 2)) @ steps.pages)
