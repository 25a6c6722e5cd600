"""Fewer combinations of parameters than all."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any


def pairwise(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combinations, one value of each factor, in which any two values of two factors occur."""
    combinations = list(itertools.product(*(range(len(values)) for values in factors)))
    pairs = {c: set(itertools.combinations(enumerate(c), 2)) for c in combinations}
    missing, used = set().union(*pairs.values()), Counter[tuple[int, int]]()
    chosen = []
    while missing:  # the most new pairs; of equals, the rarest values
        best = max(
            combinations,
            key=lambda c: (len(pairs[c] & missing), -sum(used[place] for place in enumerate(c))),
        )
        missing -= pairs[best]
        used.update(enumerate(best))
        chosen.append(tuple(values[i] for values, i in zip(factors, best, strict=True)))
    return chosen
