"""What policies share: raising pinned experts, and cutting a target down to one plan.

Axes: L layers, S steps, E experts. An expert's steps are taken from the lowest up, so its level
says which it holds.
"""

import numpy as np

from dynaexq_jax.policy.interface import Plan, PolicyInput


def pages_held(given: PolicyInput, levels: np.ndarray) -> int:
    """Pages of the pool that ``levels`` [L, E] need."""
    return int(np.take(given.pages_of_level, levels).sum())


def steps_held(given: PolicyInput, levels: np.ndarray) -> np.ndarray:
    """Whether each expert holds each step at ``levels`` [L, E]: bool [L, S, E]."""
    return np.arange(given.max_level)[:, None] < levels[:, None, :]


def raise_pinned(given: PolicyInput, levels: np.ndarray) -> np.ndarray:
    """``levels`` with pinned experts as high as the pool allows, in (layer, expert) order."""
    levels = levels.copy()
    room = given.pool_pages - pages_held(given, levels)
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

    ``value`` float [L, S, E]: promotions go by the value of their first step, highest first.
    Nothing is demoted before its pages are needed; then the steps that the target lacks are
    dropped, lowest value first, of one expert the highest first.
    """
    levels = given.levels
    first_step = np.minimum(levels, given.max_level - 1)
    value_up = np.take_along_axis(value, first_step[:, None, :], axis=1)[:, 0]
    up = np.flatnonzero(target > levels)
    up = up[np.argsort(-value_up.ravel()[up], kind="stable")][: given.max_transitions]
    wanted = levels.copy()
    wanted.flat[up] = target.flat[up]

    missing = pages_held(given, wanted) - given.pool_pages
    # Reversed before the stable sort: among equals the highest step and the last expert go first.
    surplus = np.argwhere(steps_held(given, levels) & ~steps_held(given, target))[::-1]
    dropped = []
    for layer, step, expert in surplus[np.argsort(value[tuple(surplus.T)], kind="stable")]:
        if missing <= 0:
            break
        assert wanted[layer, expert] == step + 1, "values must not rise with the step"
        wanted[layer, expert] = step
        missing -= int(given.step_pages[step])
        dropped.append((layer, step, expert))
    assert missing <= 0, "the target needs more pages than the pool has"
    # A step of two pages may have made smaller ones before it needless.
    for layer, step, expert in reversed(dropped):
        if given.step_pages[step] + missing <= 0 and wanted[layer, expert] == step:
            wanted[layer, expert] = step + 1
            missing += int(given.step_pages[step])
    return Plan.between(levels, wanted, value_up)
