"""How a model is served: one frozen configuration, whose defaults are those of the command line."""

import dataclasses
from pathlib import Path
from typing import Literal

from dynaexq_jax.errors import InputError
from dynaexq_jax.policy import MAP_MISSING, POLICY_NAMES, StaticMixed
from dynaexq_jax.units import parse_bytes
from pallas_kernels.levels import LEVEL_BITS, Bits

POLICIES = (*POLICY_NAMES, StaticMixed.name)
DEFAULT_CONTEXT = 1024
"""Tokens of a sequence where nothing is said, or fewer if the model has fewer positions."""
DTYPES = ("auto", "float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Budget, base, pool, policy and shapes.

    With a budget, base and pool are chosen by the planner (``base_bits`` may fix the base). With
    ``base_bits`` alone or with ``pages``, they are as given. With neither, a GPU's whole memory
    is the budget, and a CPU holds every expert at the highest level.
    """

    hbm_budget: str | int | None = None
    """Device memory, "24GiB" or bytes."""
    base_bits: Bits | None = None
    pages: int | None = None
    """Pages of the pool."""
    policy: str = "dynamic"
    interval: int = 16
    """Steps between two looks at the routing."""
    map: str | Path | None = None
    """File of a calibrated map: what static-mixed holds, and what other policies begin with, unless
    there is a hotness profile."""
    hotness_profile: str | Path | None = None
    """File of the hotness to begin with, as an earlier run left it; cold if there is none yet."""
    routing_trace: str | Path | None = None
    """New file to record the routing of every interval in."""
    batch: int = 1
    """Sequences decoded together."""
    context: int | None = None
    """Tokens of a sequence; None: ``DEFAULT_CONTEXT``."""
    chunk: int | None = None
    """Prompt tokens of one prefill call; None: 512 on a GPU, 32 on a CPU."""
    implementation: str = "auto"
    """Of the expert kernels."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations and cache; auto: bfloat16 on a GPU, float32 on a CPU."""

    def __post_init__(self) -> None:
        if self.hbm_budget is not None and self.pages is not None:
            raise InputError(
                f"give either a budget ({self.hbm_budget}) or pages ({self.pages}), not both: "
                "the budget chooses the pages"
            )
        if self.pages is not None and self.base_bits is None:
            raise InputError(f"--pages {self.pages} needs --base-bits: pages lie above a base")
        if self.base_bits is not None and self.base_bits not in LEVEL_BITS:
            raise InputError(f"base_bits must be one of {LEVEL_BITS}, got {self.base_bits}")
        if self.policy not in POLICIES:
            raise InputError(f"policy must be one of {POLICIES}, got {self.policy!r}")
        if self.policy == StaticMixed.name and self.map is None:
            raise InputError(MAP_MISSING)
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {DTYPES}, got {self.dtype!r}")
        for name in ("interval", "batch", "context", "chunk"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 2**31:
                raise InputError(f"{name} must be positive and below 2^31, got {value}")
        if not isinstance(self.hbm_budget, str | int | None):
            raise InputError(f"hbm_budget must be text or whole bytes, got {self.hbm_budget!r}")
        if self.budget_bytes is not None and self.budget_bytes < 1:
            raise InputError(f"hbm_budget must be positive, got {self.budget_bytes}")

    @property
    def budget_bytes(self) -> int | None:
        """The budget in bytes. Raises InputError if it cannot be read."""
        if isinstance(self.hbm_budget, str):
            return parse_bytes(self.hbm_budget)
        return self.hbm_budget
