"""Key-value cache: batch slots of a fixed length, allocated once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int32

from dynaexq_jax.config import ModelConfig
from dynaexq_jax.trees import abstract_array


class KVCache(NamedTuple):
    """Keys and values of every layer and batch slot; a pytree.

    Axis letters: B batch slots, S positions of a slot, N key-value heads, D head size.
    """

    keys: Float[jax.Array, "layers B S N D"]
    values: Float[jax.Array, "layers B S N D"]

    @property
    def context(self) -> int:
        """Positions that a slot holds."""
        return self.keys.shape[2]

    @staticmethod
    def abstract(config: ModelConfig, *, batch: int, context: int, dtype: jnp.dtype) -> "KVCache":
        """Shapes and dtypes, nothing allocated."""
        shape = (
            config.num_hidden_layers,
            batch,
            context,
            config.num_key_value_heads,
            config.head_dim,
        )
        return KVCache(abstract_array(shape, dtype), abstract_array(shape, dtype))

    def write(
        self,
        layer: int | Int32[jax.Array, ""],
        slots: Int32[jax.Array, " R"],
        positions: Int32[jax.Array, "R T"],
        keys: Float[jax.Array, "R T N D"],
        values: Float[jax.Array, "R T N D"],
    ) -> "KVCache":
        """Puts one layer's keys and values of some slots at their positions; -1 writes nothing."""
        where = jnp.where(positions < 0, self.context, positions)
        index = (layer, slots[:, None], where)
        return KVCache(
            self.keys.at[index].set(keys.astype(self.keys.dtype), mode="drop"),
            self.values.at[index].set(values.astype(self.values.dtype), mode="drop"),
        )

    def read(
        self, layer: int | Int32[jax.Array, ""], slots: Int32[jax.Array, " R"] | None
    ) -> tuple[Float[jax.Array, "R S N D"], Float[jax.Array, "R S N D"]]:
        """One layer's keys and values of some slots (all, if None)."""
        index = layer if slots is None else (layer, slots)
        return self.keys[index], self.values[index]
