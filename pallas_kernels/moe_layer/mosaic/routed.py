"""What a block knows of its tokens' experts: the plan of it, and its places in shared memory."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.moe_layer.mosaic.deal import DealPlan


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
    """Of items by cost; None: all experts are at one level."""

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
    """int32 [12]: the first is the number of tiles in use; the rest is scratch."""
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
    """int32 [words]: the layer's page ids, and places at which this block's workers begin and end;
    where there are levels."""


def routed_scratch(plan: ChoosePlan) -> list[Any]:
    """Scratch types of a ``Routed``."""
    types = [
        plgpu.SMEM((12,), jnp.int32),
        plgpu.SMEM((plan.experts,), jnp.int32),
        plgpu.SMEM((plan.tiles,), jnp.int32),
        plgpu.SMEM((plan.tiles, plan.rows), jnp.int32),
        plgpu.SMEM((plan.tokens, plan.top_k), jnp.int32),
        plgpu.SMEM((plan.tokens, plan.top_k), jnp.int32),
        plgpu.SMEM((plan.tokens, plan.top_k), jnp.float32),
        plgpu.SMEM((plan.tokens, plan.words), jnp.uint32),
    ]
    if plan.deal is not None:
        types.append(plgpu.SMEM((plan.deal.words,), jnp.int32))
    return types
