"""The policy that promotes nothing: every expert at the base, all the time."""

import dataclasses

import numpy as np

from dynaexq_jax.policy.interface import Plan, PolicyInput


@dataclasses.dataclass(frozen=True, kw_only=True)
class Off:
    """Baseline: what the base alone gives."""

    name: str = "off"
    waits_for_copies: bool = False

    def plan(self, given: PolicyInput, /) -> Plan:
        """Everything at the base, pinned experts too."""
        wanted = np.full_like(given.levels, given.base_level)
        return Plan.between(given.levels, wanted, np.zeros(wanted.shape))
