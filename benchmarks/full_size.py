"""Qwen3-30B-A3B with random weights, made on the device: its shape without its checkpoint.

Routing is steered through the router itself. Channel 0 of the residual stream is kept constant
(no layer writes it), so column 0 of the router's weights is a bias by expert.
"""

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from dynaexq_jax.config import ModelConfig
from dynaexq_jax.models.names import dense_shapes, has_8_bits, scale_name
from dynaexq_jax.models.qwen3_moe import Qwen3Moe
from dynaexq_jax.models.weights import DenseWeights
from pallas_kernels.levels import DEFAULT_TABLE, PAGES_OF_BITS, Bits
from pallas_kernels.linear.weights import LARGEST_CODE, Int8Matrix, Weight
from pallas_kernels.pages import ExpertFormat, PagedExperts, abstract_experts

QWEN3_30B: Final[dict[str, Any]] = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "hidden_act": "silu",
    "eos_token_id": 151645,
}
"""Its config.json, as far as it matters here."""

CONSTANT_CHANNEL: Final = 0
CONSTANT: Final = 8.0
"""Of the constant channel; the others start near 1."""


def config(layers: int = QWEN3_30B["num_hidden_layers"]) -> ModelConfig:
    """The model's config, with fewer layers if wanted."""
    return ModelConfig.from_hf({**QWEN3_30B, "num_hidden_layers": layers})


def popularity(routing: str, layers: int, experts: int) -> np.ndarray:
    """Share of each expert [L, E]: "random" (even), "zipf" (1 / rank) or a file of statistics.

    A file holds {domain: shares [layers][experts]}; the mean over domains is used, its layers over
    and over, its experts repeated to as many as are wanted, each time a little less.
    """
    rng = np.random.default_rng(0)
    if routing == "random":
        share = np.ones((layers, experts))
    elif routing == "zipf":
        share = np.stack([1 / (1 + rng.permutation(experts)) for _ in range(layers)])
    else:
        recorded = np.mean(list(json.loads(Path(routing).read_text()).values()), axis=0)
        copies = -(-experts // recorded.shape[1])
        by_layer = [recorded[layer % len(recorded)] for layer in range(layers)]
        repeated = [np.concatenate([row / (1 + n) for n in range(copies)]) for row in by_layer]
        share = np.stack([rng.permutation(row[:experts]) for row in repeated])
    return share / share.sum(axis=1, keepdims=True)


def random_model(options: argparse.Namespace) -> tuple[Qwen3Moe, DenseWeights, PagedExperts]:
    """The model that a benchmark's options ask for, its dense weights and its experts."""
    shape = config(options.layers)
    share = popularity(options.routing, shape.num_hidden_layers, shape.num_experts)
    experts = random_experts(
        shape,
        base_bits=options.expert_bits,
        promoted=options.promoted,
        promoted_bits=options.promoted_bits,
    )
    dense = random_dense(shape, share, options.dense_bits)
    model = Qwen3Moe(
        shape, dense, experts, dtype=jnp.bfloat16, implementation=options.implementation
    )
    return model, dense, experts


def random_dense(config: ModelConfig, share: np.ndarray, dense_bits: int = 16) -> DenseWeights:
    """Weights that keep activations near 1 and route by ``share`` [L, E].

    bfloat16, but for the matrices that a checkpoint of 8 dense bits holds as ``Int8Matrix``.
    """
    tensors = {}
    for name, shape in dense_shapes(config).items():
        dtype = jnp.int8 if has_8_bits(name, dense_bits) else jnp.bfloat16
        tensors[name] = jax.ShapeDtypeStruct(shape, dtype)
        if dtype == jnp.int8:
            tensors[scale_name(name)] = jax.ShapeDtypeStruct(shape[:1], jnp.float32)
    abstract = DenseWeights.abstract(config, tensors)
    arrays = {}
    for index, (name, weight) in enumerate(abstract._asdict().items()):
        if weight is not None:
            make = _random_codes if isinstance(weight, Int8Matrix) else _random_weight
            arrays[name] = make(jax.random.key(index), name, weight.shape)
    dense = DenseWeights(**arrays)
    # a logit is about CONSTANT / rms(x) times column 0, and rms(x) about 1.02 at the start
    bias = np.log(np.maximum(share, 1e-6) * share.shape[1]) / CONSTANT
    router = dense.router.at[:, :, CONSTANT_CHANNEL].set(jnp.asarray(bias, jnp.bfloat16))
    return dense._replace(
        embedding=dense.embedding.at[:, CONSTANT_CHANNEL].set(CONSTANT),
        o=_without_row(dense.o, CONSTANT_CHANNEL),
        router=router,
    )


def _without_row(weight: Weight, row: int) -> Weight:
    if isinstance(weight, Int8Matrix):
        return weight._replace(scale=weight.scale.at[:, row].set(0))
    return weight.at[:, row].set(0)


@partial(jax.jit, static_argnames=("name", "shape"))
def _random_codes(key: jax.Array, name: str, shape: tuple[int, ...]) -> Int8Matrix:
    """Of the same spread as ``_random_weight``, but uniform."""
    del name
    codes = jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), jnp.int8)
    scale = shape[-1] ** -0.5 / (LARGEST_CODE / 3**0.5)
    return Int8Matrix(jnp.maximum(codes, -LARGEST_CODE), jnp.full(shape[:-1], scale, jnp.float32))


@partial(jax.jit, static_argnames=("name", "shape"))
def _random_weight(key: jax.Array, name: str, shape: tuple[int, ...]) -> jax.Array:
    if "norm" in name:
        return jnp.ones(shape, jnp.bfloat16)
    spread = 1.0 if name == "embedding" else shape[-1] ** -0.5
    return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(spread)


def random_experts(
    config: ModelConfig,
    *,
    base_bits: Bits,
    promoted: float = 0.0,
    promoted_bits: Bits = 4,
    group_size: int = 64,
) -> PagedExperts:
    """Random pages; a share ``promoted`` of every layer's experts is at ``promoted_bits``."""
    layers, experts = len(config.sparse_layers), config.num_experts
    fmt = ExpertFormat(
        hidden=config.hidden_size,
        width=config.moe_intermediate_size,
        group_size=group_size,
        scale_encoding="bf16",
        table=DEFAULT_TABLE,
    )
    above = max(0, PAGES_OF_BITS[promoted_bits] - PAGES_OF_BITS[base_bits])
    chosen = round(promoted * experts) if above else 0
    pool_pages = layers * chosen * above
    shapes = abstract_experts(
        fmt, layers=layers, experts=experts, base_bits=base_bits, pool_pages=pool_pages
    )
    table = np.full(shapes.table.shape, -1, np.int32)
    rng = np.random.default_rng(0)
    pages = iter(rng.permutation(pool_pages))
    for layer in range(layers):
        for expert in rng.permutation(experts)[:chosen]:
            for rung in range(above):
                table[rung, layer, expert] = next(pages)
    leaves, tree = jax.tree.flatten(dataclasses.replace(shapes, table=None))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    filled = [_random_pages(key, s.shape, s.dtype) for key, s in zip(keys, leaves, strict=True)]
    arrays = jax.tree.unflatten(tree, filled)
    # the first row of the first tile of down is channel 0, which must stay constant
    down = arrays.scales.down
    down = down._replace(codes=down.codes.at[:, :, 0, :, CONSTANT_CHANNEL].set(0))
    scales = arrays.scales._replace(down=down)
    return dataclasses.replace(arrays, scales=scales, table=jnp.asarray(table))


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _random_pages(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if dtype == jnp.uint32:
        return jax.random.bits(key, shape, jnp.uint32)
    return (jax.random.uniform(key, shape, jnp.float32, 0.5, 1.5) * 0.02).astype(dtype)
