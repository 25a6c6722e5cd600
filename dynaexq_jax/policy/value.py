"""What steps and maps are worth.

Axes: L layers, S steps of the ladder, E experts.
"""

import numpy as np

from dynaexq_jax.policy.interface import PolicyInput
from dynaexq_jax.policy.ladder import raise_pinned, steps_held


def step_values(given: PolicyInput) -> np.ndarray:
    """Hotness x benefit for each page: float [L, S, E], never rising with the step.

    A step that is worth more than the one below it counts as much as that one, because it cannot
    be had without; a good ladder has none. Steps below the base are infinitely valuable: everybody
    has them.
    """
    above = slice(given.base_level, None)
    layers, experts = given.levels.shape
    benefit = np.asarray(given.benefit, np.float64)
    if benefit.ndim < 3:
        benefit = benefit[..., None]
    per_page = benefit[..., above, :] / given.step_pages[above, None]
    for step in range(1, per_page.shape[-2]):
        per_page[..., step, :] = np.minimum(per_page[..., step, :], per_page[..., step - 1, :])
    value = np.empty((layers, given.max_level, experts))
    value[:, : given.base_level] = np.inf
    np.multiply(per_page, given.hotness[:, None, :], out=value[:, above])
    return value


def map_value(given: PolicyInput, levels: np.ndarray) -> float:
    """Value of all pages above the base at ``levels`` int [L, E]."""
    held = steps_held(given, levels)[:, given.base_level :]
    worth = _step_worth(given)
    return float(worth[held].sum())


def value_bound(given: PolicyInput) -> float:
    """What the value of no map exceeds that the pool can hold with all pinned experts as high as
    it allows.

    The best map if parts of steps could be had: pages go to the most valuable steps, the last of
    which may get fewer than it costs. It lies above the best whole map by less than one step.
    """
    base = np.full_like(given.levels, given.base_level)
    pinned = raise_pinned(given, base)
    left = given.pool_pages - given.pages_held(pinned)
    free = ~steps_held(given, pinned)[:, given.base_level :]
    worth = _step_worth(given)[free]
    pages = np.broadcast_to(given.step_pages[given.base_level :, None], free.shape)[free]
    order = np.argsort(-worth / pages, kind="stable")
    before = np.cumsum(pages[order]) - pages[order]
    part = np.clip((left - before) / pages[order], 0, 1)
    return map_value(given, pinned) + float(worth[order] @ part)


def _step_worth(given: PolicyInput) -> np.ndarray:
    """Value of all pages of each step above the base: float [L, S', E]."""
    above = slice(given.base_level, None)
    return step_values(given)[:, above] * given.step_pages[above, None]
