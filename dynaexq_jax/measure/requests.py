"""What is asked of an engine that is measured."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One prompt and how much is wanted after it."""

    prompt: np.ndarray
    """Token ids, int32."""
    max_tokens: int
    phase: int
    """Which stretch of the traffic it belongs to, ascending from 0."""
    arrival_s: float | None
    """Seconds after the start; None: as soon as a slot is free, and not before."""
