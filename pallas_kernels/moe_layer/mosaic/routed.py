"""What a block knows of the tokens' experts: its shapes, and where it lies in shared memory."""

import dataclasses
from typing import Any, Final, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.moe_layer.mosaic.deal import DealPlan, dealt_scratch

USED_WORDS: Final = 12
"""Of ``Routed.used``: the number of tiles, and from the fifth on scratch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoosePlan:
    """Shapes; hashable. Axis letters: I tiles of M rows, k experts a token."""

    tokens: int
    experts: int
    top_k: int
    normalize: bool
    tiles: int
    rows: int
    deal: DealPlan | None = None
    """Of items to workers; None: all experts are at one level."""

    @property
    def words(self) -> int:
        """32-bit words that hold one bit for each expert."""
        return -(-self.experts // 32)

    @property
    def most_rows(self) -> int:
        """Of a tile that hold a token: each token chooses an expert once."""
        return min(self.tokens, self.rows)


class Routed(NamedTuple):
    """Shared memory of a block."""

    used: Any
    """int32 [USED_WORDS]: the first is the number of tiles in use; the rest is scratch."""
    first: Any
    """int32 [E]: first tile of each expert."""
    expert: Any
    """int32 [I]."""
    assignment: Any
    """int32 [I, M]: token * k + j, or -1."""
    ids: Any
    """int32 [T, k], or -1."""
    place: Any
    """int32 [T, k]: tile * M + row, or -1."""
    weights: Any
    """float32 [T, k]."""
    masks: Any
    """uint32 [T, words]: which experts a token chose."""
    dealt: Any = None
    """int32: page ids of the layer's experts and bounds of the block's workers (``DealPlan``); None
    if all experts are at one level."""


def routed_scratch(plan: ChoosePlan) -> list[Any]:
    """Scratch types of a ``Routed``."""
    types = [
        plgpu.SMEM((USED_WORDS,), jnp.int32),
        plgpu.SMEM((plan.experts,), jnp.int32),
        plgpu.SMEM((plan.tiles,), jnp.int32),
        plgpu.SMEM((plan.tiles, plan.rows), jnp.int32),
        plgpu.SMEM((plan.tokens, plan.top_k), jnp.int32),
        plgpu.SMEM((plan.tokens, plan.top_k), jnp.int32),
        plgpu.SMEM((plan.tokens, plan.top_k), jnp.float32),
        plgpu.SMEM((plan.tokens, plan.words), jnp.uint32),
    ]
    if plan.deal is not None:
        types.append(dealt_scratch(plan.deal))
    return types
