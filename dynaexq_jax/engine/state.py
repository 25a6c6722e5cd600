"""What the device keeps between steps, besides weights and experts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Int32

from dynaexq_jax.config import ModelConfig
from dynaexq_jax.engine.sampling import SamplingArrays
from dynaexq_jax.models.cache import KVCache
from dynaexq_jax.router_stats import RouterStats
from dynaexq_jax.trees import abstract_array


class BatchState(NamedTuple):
    """Every batch slot's place in its sequence; a pytree."""

    token: Int32[jax.Array, " B"]
    """Token that the next step reads."""
    position: Int32[jax.Array, " B"]
    """Its position, or -1 in an idle slot."""
    end: Int32[jax.Array, " B"]
    """Position of the last token that may be read: the slot goes idle there."""
    sampling: SamplingArrays


class EngineState(NamedTuple):
    """Donated to every step and returned by it; a pytree."""

    cache: KVCache
    batch: BatchState
    stats: RouterStats
    counter: Int32[jax.Array, " 1"]
    """Of the decode step's kernels (``DecodeState``)."""

    @staticmethod
    def abstract(
        config: ModelConfig, *, batch: int, context: int, dtype: jnp.dtype
    ) -> "EngineState":
        """Shapes and dtypes, nothing allocated."""

        def per_slot() -> jax.Array:
            return abstract_array((batch,), jnp.int32)

        return EngineState(
            cache=KVCache.abstract(config, batch=batch, context=context, dtype=dtype),
            batch=BatchState(per_slot(), per_slot(), per_slot(), SamplingArrays.abstract(batch)),
            stats=RouterStats.abstract(config),
            counter=abstract_array((1,), jnp.int32),
        )

    @staticmethod
    def allocate(
        config: ModelConfig, *, batch: int, context: int, dtype: jnp.dtype
    ) -> "EngineState":
        """All slots idle, nothing cached; committed to the device, as what programs return is."""
        shapes = EngineState.abstract(config, batch=batch, context=context, dtype=dtype)
        (device,) = jnp.zeros(()).devices()
        state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=device), shapes)
        idle = jnp.full(batch, -1, jnp.int32, device=device)
        return state._replace(batch=state.batch._replace(position=idle))
