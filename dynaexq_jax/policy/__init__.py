"""Precision policy: traffic in, wanted levels out. Pure functions on numpy, no device."""

import numpy as np

from dynaexq_jax.errors import InputError
from dynaexq_jax.policy.dynamic import Dynamic, DynamicConfig
from dynaexq_jax.policy.hotness import Hotness
from dynaexq_jax.policy.interface import Change, Changes, Plan, Policy, PolicyInput
from dynaexq_jax.policy.off import Off
from dynaexq_jax.policy.replay import ReplayStep, replay
from dynaexq_jax.policy.static_high import StaticHigh
from dynaexq_jax.policy.static_mixed import MAP_MISSING, StaticMixed

POLICY_NAMES = ("dynamic", "off", "static-high", "blocking")
"""Those that a name alone makes; static-mixed has to be told its hotness."""

__all__ = [
    "MAP_MISSING",
    "POLICY_NAMES",
    "Change",
    "Changes",
    "Dynamic",
    "DynamicConfig",
    "Hotness",
    "Off",
    "Plan",
    "Policy",
    "PolicyInput",
    "ReplayStep",
    "StaticHigh",
    "StaticMixed",
    "make_policy",
    "replay",
]


def make_policy(name: str, mixed: np.ndarray | None = None) -> Policy:
    """The policy of that name with its defaults; ``mixed`` is the hotness of static-mixed, [L, E].

    Raises InputError for other names, and for static-mixed without hotness.
    """
    match name:
        case "dynamic":
            return Dynamic()
        case "blocking":
            return Dynamic(name="blocking", waits_for_copies=True)
        case "off":
            return Off()
        case "static-high":
            return StaticHigh()
        case StaticMixed.name:
            if mixed is None:
                raise InputError(MAP_MISSING)
            return StaticMixed(hotness=mixed)
    known = ", ".join((*POLICY_NAMES, StaticMixed.name))
    raise InputError(f"no policy {name!r}: choose one of {known}")
