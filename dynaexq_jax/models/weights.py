"""Dense weights: few arrays, stacked over layers, and how a checkpoint's tensors fill them.

A checkpoint holds about nine tensors a layer (``names``). A step takes them as one array a kind,
with the layers along the first axis: few arguments, and a kernel gets a whole array and the
number of a layer, for a slice that is cut out for it would be a copy.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dynaexq_jax.config import ModelConfig
from dynaexq_jax.models.names import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    dense_shapes,
    has_8_bits,
    layer_prefix,
    scale_name,
    with_scales,
)
from dynaexq_jax.trees import abstract_array
from pallas_kernels.linear import Int8Matrix, Weight

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

Tensors = Mapping[str, np.ndarray]
Rows = list[list[str]]
"""Names of the tensors of a stacked array, layer by layer."""


class DenseWeights(NamedTuple):
    """Every weight that is not an expert's; a pytree.

    Matrices keep the orientation of the hub, [outputs, inputs], and arrays the dtype of the
    checkpoint: one that holds the values of all of an array's tensors, where these differ. What is
    a ``Weight`` may be at 8 bits; then all of them are.

    Axes: ``layers`` all layers, ``sparse`` those with experts, ``dense`` those without, both in
    the order of their numbers; V vocabulary, H hidden, D head size, E experts, I width of the MLP
    of a layer without experts; Q = query heads * D, R = (query heads + 2 * key-value heads) * D.
    """

    embedding: Float[jax.Array, "V H"]
    final_norm: Float[jax.Array, " H"]
    attention_norm: Float[jax.Array, "layers H"]
    qkv: Weight
    """[layers, R, H]: rows of the queries, then of the keys, then of the values."""
    q_norm: Float[jax.Array, "layers D"]
    k_norm: Float[jax.Array, "layers D"]
    o: Weight
    """[layers, H, Q]"""
    mlp_norm: Float[jax.Array, "layers H"]
    router: Float[jax.Array, "sparse E H"]
    head: Weight | None = None
    """[V, H]; None where the embedding is the head, too."""
    qkv_bias: Float[jax.Array, "layers R"] | None = None
    o_bias: Float[jax.Array, "layers H"] | None = None
    gate_up: Weight | None = None
    """[dense, 2 I, H]: rows of gate, then of up.

    None, like ``down``, where every layer has experts.
    """
    down: Weight | None = None
    """[dense, H, I]"""

    @staticmethod
    def abstract(
        config: ModelConfig, tensors: Mapping[str, np.ndarray | jax.Array]
    ) -> "DenseWeights":
        """Shapes and dtypes, nothing allocated.

        ``tensors`` are those of ``names.dense_shapes`` by name, at 8 bits with their scales; only
        their shapes and dtypes are read, so abstract ones do. Raises ValueError if one is missing,
        unknown or of another shape, or if only some matrices are at 8 bits.
        """

        def one(name: str) -> jax.Array:
            return abstract_array(tensors[name].shape, tensors[name].dtype)

        return _fill(config, tensors, one, lambda rows: _abstract_stack(rows, tensors))

    @staticmethod
    def load(config: ModelConfig, tensors: Tensors) -> "DenseWeights":
        """Fills the arrays from numpy and puts them on the device.

        Beside ``tensors``, host memory holds one stacked array at a time. Raises ValueError as
        ``abstract`` does.
        """

        def one(name: str) -> jax.Array:
            return jnp.asarray(tensors[name])

        return _fill(config, tensors, one, lambda rows: _stack(rows, tensors))


def _fill(
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray | jax.Array],
    one: Callable[[str], jax.Array],
    stack: Callable[[Rows], jax.Array],
) -> DenseWeights:
    """Weights of arrays that are made from one tensor, or from the stacked tensors of layers."""
    bits = _check(config, tensors)
    fields: dict[str, Any] = {}
    for field, name in _outer(config).items():
        fields[field] = one(name)
        if has_8_bits(name, bits):
            fields[field] = Int8Matrix(fields[field], one(scale_name(name)))
    for field, rows in _stacks(config).items():
        fields[field] = stack(rows)
        if has_8_bits(rows[0][0], bits):
            scales = stack([list(map(scale_name, names)) for names in rows])
            fields[field] = Int8Matrix(fields[field], scales)
    return DenseWeights(**fields)


def _outer(config: ModelConfig) -> dict[str, str]:
    """Tensor outside the layers of each field that the model has."""
    shapes = dense_shapes(config)
    return {field: name for field, name in _OUTER.items() if name in shapes}


def _stacks(config: ModelConfig) -> dict[str, Rows]:
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


def _abstract_stack(rows: Rows, tensors: Mapping[str, np.ndarray | jax.Array]) -> jax.Array:
    first = [tensors[name].shape for name in rows[0]]
    shape = (len(rows), sum(shape[0] for shape in first), *first[0][1:])
    dtypes = (tensors[name].dtype for names in rows for name in names)
    return abstract_array(shape, functools.reduce(jnp.promote_types, dtypes))


def _stack(rows: Rows, tensors: Tensors) -> jax.Array:
    """One stacked array on the device."""
    target = _abstract_stack(rows, tensors)
    stacked = np.empty(target.shape, target.dtype)
    for row, names in zip(stacked, rows, strict=True):
        np.concatenate([tensors[name] for name in names], out=row)
    # the copy to the device is over before the next array is made
    return jnp.asarray(stacked).block_until_ready()


def _check(config: ModelConfig, tensors: Mapping[str, np.ndarray | jax.Array]) -> int:
    """The bits of dense matrices."""
    bits = 8 if any(tensor.dtype == np.int8 for tensor in tensors.values()) else 16
    shapes = with_scales(dense_shapes(config), bits)
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise ValueError(f"dense weights lack {len(missing)} tensors, the first is {missing[0]}")
    if extra := sorted(tensors.keys() - shapes.keys()):
        raise ValueError(f"dense weights hold {len(extra)} unknown tensors, e.g. {extra[0]}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tensors[name].shape}")
        if has_8_bits(name, bits) != (tensors[name].dtype == np.int8):
            wanted = "int8" if has_8_bits(name, bits) else "a float"
            raise ValueError(
                f"{name} must be {wanted} where dense matrices have {bits} bits, "
                f"got {tensors[name].dtype}"
            )
    return bits
