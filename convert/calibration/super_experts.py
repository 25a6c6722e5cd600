"""Super Experts: the few whose outputs dwarf all others, and without which a model breaks down.

After "Unveiling Super Experts in Mixture-of-Experts Large Language Models" (arXiv 2507.23279): an
expert is super if the largest magnitude in its output exceeds that of 99.5 % of all experts and a
tenth of the largest of all. In a model that has none, the first rule alone would still find some,
so here such an expert must also be far above what is usual.
"""

from typing import Final

import numpy as np
from jaxtyping import Float

_PERCENTILE: Final = 99.5
_OF_LARGEST: Final = 0.1
_OF_MEDIAN: Final = 20.0
"""Far above what models without such experts have between their largest and their median."""


def find_super_experts(largest: Float[np.ndarray, "L E"]) -> list[tuple[int, int]]:
    """(row, expert) of the super experts, ascending.

    ``largest`` is the largest magnitude in each expert's output over the calibration text; 0 for an
    expert that saw none of it.
    """
    seen = largest[largest > 0]
    if not seen.size:
        return []
    threshold = max(
        float(np.percentile(seen, _PERCENTILE)) * (1 - 1e-9),
        _OF_LARGEST * float(seen.max()),
        _OF_MEDIAN * float(np.median(seen)),
    )
    return [(int(row), int(expert)) for row, expert in np.argwhere(largest >= threshold)]
