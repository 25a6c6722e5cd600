"""The policy that holds the best fixed map for traffic that is known beforehand."""

import dataclasses
from typing import Final

import numpy as np

from dynaexq_jax.policy.dynamic import DynamicConfig, greedy_target
from dynaexq_jax.policy.interface import Plan, PolicyInput
from dynaexq_jax.policy.ladder import plan_towards

MAP_MISSING: Final = (
    "static-mixed holds a calibrated map: give one with --map, made by dynaexq calibrate-map"
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StaticMixed:
    """Baseline: what a map gives that was chosen once, from recorded or calibrated hotness.

    The map is the one that ``Dynamic`` would choose for this hotness with an empty pool. Pinned
    experts come first. Raises ValueError for hotness that is not [L, E], finite and not negative.
    """

    hotness: np.ndarray
    """float [L, E]: router mass a token, in any unit."""
    name: str = "static-mixed"
    waits_for_copies: bool = False

    def __post_init__(self) -> None:
        hotness = np.asarray(self.hotness)
        if hotness.ndim != 2 or not np.all(np.isfinite(hotness) & (hotness >= 0)):
            raise ValueError(
                "hotness must be finite and not negative, by layer and expert; got shape "
                f"{hotness.shape}"
            )

    def plan(self, given: PolicyInput, /) -> Plan:
        """What is still missing of the map; once it is there, nothing moves."""
        if given.max_level == given.base_level:
            return Plan.between(given.levels, given.levels, self.hotness)
        empty = dataclasses.replace(
            given, hotness=self.hotness, levels=np.full_like(given.levels, given.base_level)
        )
        target, value = greedy_target(empty, DynamicConfig(margin=0, dwell=0))
        return plan_towards(given, target, value)
