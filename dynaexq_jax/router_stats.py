"""Routing statistics that the device gathers and the controller reads."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float32, Int32

from dynaexq_jax.config import ModelConfig
from dynaexq_jax.trees import abstract_array


class RouterStats(NamedTuple):
    """Routing since the statistics were last taken; a pytree."""

    mass: Float32[jax.Array, "L E"]
    """Expert weights summed over tokens."""
    tokens: Int32[jax.Array, ""]

    @staticmethod
    def abstract(config: ModelConfig) -> "RouterStats":
        """Shapes and dtypes, nothing allocated."""
        shape = (len(config.sparse_layers), config.num_experts)
        return RouterStats(abstract_array(shape, jnp.float32), abstract_array((), jnp.int32))
