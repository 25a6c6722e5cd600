"""What policies share: raising pinned experts, and cutting a target down to one plan.

Axes: L layers, S steps, E experts. An expert's steps are taken from the lowest up, so its level
says which it holds.
"""

import numpy as np

from dynaexq_jax.policy.interface import Plan, PolicyInput


def steps_held(given: PolicyInput, levels: np.ndarray) -> np.ndarray:
    """Whether each expert holds each step at ``levels`` [L, E]: bool [L, S, E]."""
    return np.arange(given.max_level, dtype=levels.dtype)[:, None] < levels[:, None, :]


def raise_pinned(given: PolicyInput, levels: np.ndarray) -> np.ndarray:
    """``levels`` with pinned experts as high as the pool allows, in (layer, expert) order."""
    levels = levels.copy()
    room = given.pool_pages - given.pages_held(levels)
    for layer, expert in sorted(set(given.pinned)):
        for step in range(int(levels[layer, expert]), given.max_level):
            cost = int(given.step_pages[step])
            if cost > room:
                break
            levels[layer, expert] = step + 1
            room -= cost
    return levels


def plan_towards(given: PolicyInput, target: np.ndarray, value: np.ndarray) -> Plan:
    """The plan that goes as far to ``target`` [L, E] as ``max_transitions`` lets it.

    ``value`` float [L, S, E]: promotions go by the value of their first step, highest first,
    demotions by that of the highest step that they lose, lowest first.
    Nothing is demoted before its pages are needed; then the steps that the target lacks are
    dropped, lowest value first, of one expert the highest first.
    """
    levels = given.levels
    up = np.flatnonzero(target > levels)
    if not up.size:
        return Plan.unchanged(levels)
    layer, expert = np.unravel_index(up, levels.shape)
    order = np.argsort(-value[layer, levels.flat[up], expert], kind="stable")
    promoted = up[order[: given.max_transitions]]
    wanted = target
    left = given.pool_pages - given.pages_held(target)
    if promoted.size < up.size or left >= given.step_pages[given.base_level]:
        # some step that the target lacks might stay
        wanted = levels.copy()
        wanted.flat[promoted] = target.flat[promoted]
        _drop(given, target, value, wanted)
    demoted = np.flatnonzero(wanted < levels)
    layer, expert = np.unravel_index(demoted, levels.shape)
    order = np.argsort(value[layer, levels.flat[demoted] - 1, expert], kind="stable")
    return Plan.of(levels, wanted, demoted=demoted[order], promoted=promoted)


def _drop(given: PolicyInput, target: np.ndarray, value: np.ndarray, wanted: np.ndarray) -> None:
    """Takes steps that ``target`` lacks off ``wanted``, until the pool has pages for it."""
    missing = given.pages_held(wanted) - given.pool_pages
    if missing <= 0:
        return
    surplus = steps_held(given, given.levels) > steps_held(given, target)
    # Reversed before the stable sort: among equals the highest step and the last expert go first.
    places = np.flatnonzero(surplus)[::-1]
    layer, step, expert = np.unravel_index(places, surplus.shape)
    order = np.argsort(value.flat[places], kind="stable")
    free = np.cumsum(given.step_pages[step[order]])
    assert free[-1] >= missing, "the target needs more pages than the pool has"
    dropped = order[: np.searchsorted(free, missing) + 1]
    layer, step, expert = layer[dropped], step[dropped], expert[dropped]
    wanted[layer, expert] = step  # of one expert's steps the lowest comes last, and stays
    # A step of two pages may have made smaller ones before it needless.
    spare = int(free[dropped.size - 1]) - missing
    for i in reversed(range(dropped.size)):
        if spare == 0:
            break
        cost = int(given.step_pages[step[i]])
        if cost <= spare and wanted[layer[i], expert[i]] == step[i]:
            wanted[layer[i], expert[i]] = step[i] + 1
            spare -= cost
