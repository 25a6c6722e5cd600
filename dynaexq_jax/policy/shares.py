"""Dividing the pool among layers."""

import numpy as np


def even_shares(total: int, at_least: np.ndarray, at_most: np.ndarray) -> np.ndarray:
    """Divides ``total`` as evenly as the bounds allow: int64 [L], what nobody can take is left.

    Every share is max(at_least, min(at_most, t)) for one t, the largest that fits; what remains
    goes one each to the first that can still take one.

    Raises ValueError unless 0 <= at_least <= at_most and the lower bounds fit into the total.
    """
    at_least, at_most = np.asarray(at_least, np.int64), np.asarray(at_most, np.int64)
    if np.any(at_least < 0) or np.any(at_least > at_most) or at_least.sum() > total:
        raise ValueError(
            f"cannot divide {total} with at least {at_least.tolist()}, at most {at_most.tolist()}"
        )
    # The sum of shares is linear in t between any two bounds: find the last bound that fits.
    bounds = np.sort(np.concatenate([at_least, at_most]))
    sums = np.clip(bounds[:, None], at_least, at_most).sum(axis=1)
    last = int(np.searchsorted(sums, total, side="right")) - 1
    rising = np.count_nonzero((at_least <= bounds[last]) & (bounds[last] < at_most))
    level = bounds[last] + (total - sums[last]) // max(rising, 1)
    shares = np.clip(level, at_least, at_most)
    next_one = np.flatnonzero((shares <= level) & (shares < at_most))
    shares[next_one[: total - int(shares.sum())]] += 1
    return shares
