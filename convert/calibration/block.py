"""A decoder layer without its experts: the runtime's own functions on a model of one layer."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32

from dynaexq_jax.checkpoint.units import Arrays
from dynaexq_jax.config import ModelConfig
from dynaexq_jax.models.attend import Chunk
from dynaexq_jax.models.cache import KVCache
from dynaexq_jax.models.layers import attention, dense_mlp, rms_norm, route
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
from dynaexq_jax.models.rope import rotation
from dynaexq_jax.models.weights import DenseWeights
from pallas_kernels.linear import Int8Matrix, Weight, product


@partial(jax.tree_util.register_dataclass, data_fields=["weights"], meta_fields=["config"])
@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Dense weights of one layer, on the device; a pytree whose config is static."""

    weights: DenseWeights
    config: ModelConfig
    """Of the smallest model that has this layer, as its first."""

    @staticmethod
    def load(config: ModelConfig, layer: int, dense: Arrays) -> "Block":
        """``dense`` are the layer's tensors, as the checkpoint stores them."""
        sparse = config.is_sparse(layer)
        smallest = dataclasses.replace(
            config,
            num_hidden_layers=1 if sparse else 2,  # there is no model without any experts
            mlp_only_layers=() if sparse else (0,),
            decoder_sparse_step=1,
            vocab_size=1,
            tie_word_embeddings=True,
        )
        bits = 8 if any(array.dtype == np.int8 for array in dense.values()) else 16
        tensors = {
            name: np.zeros(shape, np.int8 if has_8_bits(name, bits) else np.float32)
            for name, shape in with_scales(dense_shapes(smallest), bits).items()
        }
        for name, array in dense.items():
            tensors[name.replace(layer_prefix(layer), layer_prefix(0), 1)] = array
        return Block(weights=DenseWeights.load(smallest, tensors), config=smallest)


class Routed(NamedTuple):
    """What the experts of a layer are given; a pytree. T tokens, k experts of each."""

    x: Float32[jax.Array, "T H"]
    ids: Int32[jax.Array, "T k"]
    """-1 for the tokens of rows that are padding."""
    weights: Float32[jax.Array, "T k"]


@partial(jax.jit, donate_argnames="x")
def attend(block: Block, x: Float32[jax.Array, "B W H"]) -> Float32[jax.Array, "B W H"]:
    """Adds what attention gives, and in a layer without experts its MLP."""
    config, weights = block.config, block.weights
    rows, window, _ = x.shape
    positions = jnp.broadcast_to(jnp.arange(window, dtype=jnp.int32), (rows, window))
    turn = rotation(config.rope, config.head_dim, positions)
    of_layer = (1, rows, window, config.num_key_value_heads, config.head_dim)
    cache = KVCache(*(jnp.zeros(of_layer) for _ in range(2)))
    y = rms_norm(x, weights.attention_norm[0], config.rms_norm_eps)
    chunk = Chunk.of(positions, None, turn)
    y, _ = attention(weights, 0, config, y, chunk, cache, "xla")
    x = x + y
    if not config.is_sparse(0):
        x = x + dense_mlp(weights, 0, rms_norm(x, weights.mlp_norm[0], config.rms_norm_eps))
    return x


def routed(block: Block, x: Float32[jax.Array, "B W H"], count: jax.Array) -> Routed:
    """Inputs and experts of all tokens; rows from ``count`` on are padding."""
    config = block.config
    flat = x.reshape(-1, x.shape[-1])
    y = rms_norm(flat, block.weights.mlp_norm[0], config.rms_norm_eps)
    ids, weights = route(block.weights, 0, config, y)
    valid = jnp.arange(len(flat)) < count * x.shape[1]
    return Routed(y, jnp.where(valid[:, None], ids, -1), weights)


class Head(NamedTuple):
    """What turns hidden states into logits; a pytree."""

    norm: jax.Array
    matrix: Weight

    @staticmethod
    def load(outer: Arrays) -> "Head":
        """``outer`` are the tensors outside of the layers, as the checkpoint stores them."""
        name = HEAD if HEAD in outer else EMBEDDING
        matrix: Any = jnp.asarray(outer[name])
        if scale_name(name) in outer:
            matrix = Int8Matrix(matrix, jnp.asarray(outer[scale_name(name)]))
        return Head(jnp.asarray(outer[FINAL_NORM]), matrix)


@partial(jax.jit, static_argnames="eps")
def divergence(
    head: Head, p: Float32[jax.Array, "W H"], q: Float32[jax.Array, "W H"], eps: float
) -> Float32[jax.Array, ""]:
    """KL(p || q) in nats, summed over the positions of a row."""
    log_p, log_q = (
        jax.nn.log_softmax(product(rms_norm(x, head.norm, eps), head.matrix)) for x in (p, q)
    )
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q))
