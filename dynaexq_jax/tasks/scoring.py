"""Log-likelihoods of continuations, in batches of few shapes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from dynaexq_jax.engine.engine import Engine
from dynaexq_jax.tasks.pairs import Pair

SHORTEST: Final = 32
"""Tokens that the rows of a batch are padded to, at least."""


class Likelihood(NamedTuple):
    """Of a continuation."""

    log: float
    """Natural logarithm of its probability."""
    greedy: bool
    """Whether each of its tokens is the likeliest."""


def score_pairs(
    engine: Engine, pairs: Sequence[Pair], on_scored: Callable[[int], object] = lambda count: None
) -> list[Likelihood]:
    """Scores pairs in their order, as many at once as the engine has slots.

    No pair may read more tokens than the engine's context (``Pair.cut``). Rows are padded to a
    power of two, so there are few programs. A controller follows their routing: each chunk of a
    batch is scored at the levels that those before it have led to. ``on_scored`` is told how many
    are done.
    """
    rows = engine.config.batch
    found: list[Likelihood] = []
    for start in range(0, len(pairs), rows):
        batch = pairs[start : start + rows]
        found += _score_batch(engine, batch)
        on_scored(len(batch))
    return found


def by_length(pairs: Sequence[Pair]) -> list[int]:
    """An order with few pads: contexts by their longest pair, the longest first.

    Pairs of one context stay together, as do the answers to one question: what they are compared
    by should not depend on the batch.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(pair.context, []).append(index)
    longest = sorted(
        groups.values(), key=lambda group: max(pairs[i].inputs for i in group), reverse=True
    )
    return [index for group in longest for index in group]


def padded_length(length: int, context: int) -> int:
    """The next power of two, at least ``SHORTEST`` and at most ``context``."""
    return min(max(SHORTEST, 1 << (length - 1).bit_length()), context)


def _score_batch(engine: Engine, pairs: Sequence[Pair]) -> Iterator[Likelihood]:
    width = padded_length(max(pair.inputs for pair in pairs), engine.config.context)
    windows = np.zeros((engine.config.batch, width + 1), np.int32)
    lengths = np.zeros(engine.config.batch, np.int32)
    for row, pair in enumerate(pairs):
        windows[row, : pair.inputs + 1] = pair.context + pair.continuation
        lengths[row] = pair.inputs
    losses, greedy = engine.score_rows(windows, lengths)
    for row, pair in enumerate(pairs):
        scored = slice(len(pair.context) - 1, pair.inputs)
        log = -float(losses[row, scored].sum(dtype=np.float64))
        yield Likelihood(log, bool(greedy[row, scored].all()))
