"""Dense weights: few arrays, stacked over layers, and how a checkpoint's tensors fill them.

A checkpoint holds about nine tensors a layer (``names``). A step takes them as one array a kind,
with the layers along the first axis: few arguments, and a kernel gets a whole array and the
number of a layer, for a slice that is cut out for it would be a copy.
"""

import functools
from collections.abc import Mapping
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dynaexq_jax.config import ModelConfig
from dynaexq_jax.models.names import EMBEDDING, FINAL_NORM, HEAD, dense_shapes, layer_prefix
from dynaexq_jax.trees import abstract_array

_OUTER: Final = {"embedding": EMBEDDING, "final_norm": FINAL_NORM, "head": HEAD}
_STACKED: Final = {
    "attention_norm": ("input_layernorm.weight",),
    "qkv": tuple(f"self_attn.{name}_proj.weight" for name in "qkv"),
    "qkv_bias": tuple(f"self_attn.{name}_proj.bias" for name in "qkv"),
    "q_norm": ("self_attn.q_norm.weight",),
    "k_norm": ("self_attn.k_norm.weight",),
    "o": ("self_attn.o_proj.weight",),
    "o_bias": ("self_attn.o_proj.bias",),
    "mlp_norm": ("post_attention_layernorm.weight",),
    "router": ("mlp.gate.weight",),
    "gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "down": ("mlp.down_proj.weight",),
}
"""Tensors of a layer whose rows lie below one another in each array."""


class DenseWeights(NamedTuple):
    """Every weight that is not an expert's; a pytree.

    Matrices keep the orientation of the hub, [outputs, inputs], and arrays the dtype of the
    checkpoint: one that holds the values of all of an array's tensors, where these differ.

    Axes: ``layers`` all layers, ``sparse`` those with experts, ``dense`` those without, both in
    the order of their numbers; V vocabulary, H hidden, D head size, E experts, I width of the MLP
    of a layer without experts; Q = query heads * D, R = (query heads + 2 * key-value heads) * D.
    """

    embedding: Float[jax.Array, "V H"]
    final_norm: Float[jax.Array, " H"]
    attention_norm: Float[jax.Array, "layers H"]
    qkv: Float[jax.Array, "layers R H"]
    """Rows of the queries, then of the keys, then of the values."""
    q_norm: Float[jax.Array, "layers D"]
    k_norm: Float[jax.Array, "layers D"]
    o: Float[jax.Array, "layers H Q"]
    mlp_norm: Float[jax.Array, "layers H"]
    router: Float[jax.Array, "sparse E H"]
    head: Float[jax.Array, "V H"] | None = None
    """None where the embedding is the head, too."""
    qkv_bias: Float[jax.Array, "layers R"] | None = None
    o_bias: Float[jax.Array, "layers H"] | None = None
    gate_up: Float[jax.Array, "dense I2 H"] | None = None
    """Rows of gate, then of up; None, like ``down``, where every layer has experts."""
    down: Float[jax.Array, "dense H I"] | None = None

    @staticmethod
    def abstract(
        config: ModelConfig, tensors: Mapping[str, np.ndarray | jax.Array]
    ) -> "DenseWeights":
        """Shapes and dtypes, nothing allocated.

        ``tensors`` are those of ``names.dense_shapes`` by name; only their shapes and dtypes are
        read, so abstract ones do. Raises ValueError if one is missing, unknown or of another shape.
        """
        _check(config, tensors)
        arrays = {
            field: abstract_array(tensors[name].shape, tensors[name].dtype)
            for field, name in _outer(config).items()
        }
        for field, rows in _stacks(config).items():
            first = [tensors[name].shape for name in rows[0]]
            shape = (len(rows), sum(shape[0] for shape in first), *first[0][1:])
            dtypes = (tensors[name].dtype for names in rows for name in names)
            arrays[field] = abstract_array(shape, functools.reduce(jnp.promote_types, dtypes))
        return DenseWeights(**arrays)

    @staticmethod
    def load(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> "DenseWeights":
        """Fills the arrays from numpy and puts them on the device.

        Beside ``tensors``, host memory holds one stacked array at a time. Raises ValueError as
        ``abstract`` does.
        """
        shapes = DenseWeights.abstract(config, tensors)
        arrays = {field: jnp.asarray(tensors[name]) for field, name in _outer(config).items()}
        for field, rows in _stacks(config).items():
            arrays[field] = _stack(rows, tensors, getattr(shapes, field))
        return DenseWeights(**arrays)


def _outer(config: ModelConfig) -> dict[str, str]:
    """Tensor outside the layers of each field that the model has."""
    shapes = dense_shapes(config)
    return {field: name for field, name in _OUTER.items() if name in shapes}


def _stacks(config: ModelConfig) -> dict[str, list[list[str]]]:
    """Tensors of each stacked field that the model has, layer by layer."""
    shapes = dense_shapes(config)
    prefixes = [layer_prefix(layer) for layer in range(config.num_hidden_layers)]
    stacks = {
        field: [
            [prefix + part for part in parts] for prefix in prefixes if prefix + parts[0] in shapes
        ]
        for field, parts in _STACKED.items()
    }
    return {field: rows for field, rows in stacks.items() if rows}


def _stack(
    rows: list[list[str]], tensors: Mapping[str, np.ndarray], target: jax.Array
) -> jax.Array:
    """One stacked array of the shape and dtype of ``target``, on the device."""
    stacked = np.empty(target.shape, target.dtype)
    for row, names in zip(stacked, rows, strict=True):
        np.concatenate([tensors[name] for name in names], out=row)
    # the copy to the device is over before the next array is made
    return jnp.asarray(stacked).block_until_ready()


def _check(config: ModelConfig, tensors: Mapping[str, np.ndarray | jax.Array]) -> None:
    shapes = dense_shapes(config)
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise ValueError(f"dense weights lack {len(missing)} tensors, the first is {missing[0]}")
    if extra := sorted(tensors.keys() - shapes.keys()):
        raise ValueError(f"dense weights hold {len(extra)} unknown tensors, e.g. {extra[0]}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tensors[name].shape}")
