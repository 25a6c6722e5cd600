"""Qwen3-30B-A3B with random weights, made on the device: its shape without its checkpoint.

Routing is steered through the router itself. Token v belongs to domain v % D. The first D channels
of the residual stream are reserved: the embedding sets the one of the token's domain to a constant
and no layer writes any of them, so column d of the router's weights is a bias by expert for the
tokens of domain d. With several domains the head prefers tokens of the same domain, so that a
sequence stays in its own.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from convert.pipeline import DEFAULT_GROUP_SIZE, DEFAULT_SCALE_ENCODING
from dynaexq_jax.config import ModelConfig
from dynaexq_jax.errors import InputError
from dynaexq_jax.json_file import read_json_object
from dynaexq_jax.models.names import DENSE_BITS, dense_shapes, has_8_bits, scale_name
from dynaexq_jax.models.qwen3_moe import Qwen3Moe
from dynaexq_jax.models.weights import DenseWeights
from pallas_kernels.layout import ROW_TILE
from pallas_kernels.levels import DEFAULT_TABLE, LEVEL_BITS, PAGES_OF_BITS, Bits
from pallas_kernels.linear.weights import LARGEST_CODE, Int8Matrix, Weight
from pallas_kernels.pages import ExpertFormat, PagedExperts, abstract_experts
from pallas_kernels.scales import (
    GROUP_SIZES,
    LOG8_MAX_CODE,
    LOG8_STEPS_PER_OCTAVE,
    SCALE_ENCODINGS,
    ScaleEncoding,
)

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

SMALL: Final[dict[str, Any]] = {
    "hidden_size": 256,
    "moe_intermediate_size": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 4096,
}
"""What of it changes for a tiny model, with which a CPU runs a benchmark in a minute."""

CONSTANT: Final = 8.0
"""Of a token's reserved channel; the channels that are not reserved start near 1."""
EXPERT_SCALES: Final = (0.01, 0.03)
"""Range of the scales of random experts."""
LOG8_CODES: Final = 1 + round(
    LOG8_STEPS_PER_OCTAVE * math.log2(EXPERT_SCALES[1] / EXPERT_SCALES[0])
)
"""Codes of scales in that range, whose base is the largest."""
MAX_DOMAINS: Final = ROW_TILE
"""Rows of ``down`` that write reserved channels lie in its first tile."""
SHARPNESS: Final = 0.65
"""Of the routers with several domains: exponent of the shares in the router's odds.

An expert's share counts twice, when it is chosen and again in its weight, so with odds like the
shares the mass would be far more skewed than they are. With this exponent the shares of a half, a
quarter and an eighth of the experts are those asked for, or a little more (8 of 128 or 4 of 64
experts a token; Zipf and recorded shares).
"""
PARTS: Final = 256
"""Of a random weight, made one after another."""
HEAD_START: Final = 64.0
"""Logits by which tokens of the same domain lead, at an rms of 1; all others are about 1."""


def config(layers: int = QWEN3_30B["num_hidden_layers"], *, small: bool = False) -> ModelConfig:
    """The model's config, with fewer layers or a tiny shape if wanted."""
    changes = SMALL if small else {}
    return ModelConfig.from_hf({**QWEN3_30B, **changes, "num_hidden_layers": layers})


def popularity(routing: str, layers: int, experts: int) -> np.ndarray:
    """Share of each expert [L, E]: "random" (even), "zipf" (1 / rank) or a file of statistics.

    A file holds {domain: shares [layers][experts]}; the mean over domains is used, its layers over
    and over, its experts repeated to as many as are wanted, each time a little less.
    """
    if routing == "random":
        return np.full((layers, experts), 1 / experts)
    if routing == "zipf":
        return _zipf(np.random.default_rng(0), layers, experts)
    return _spread(np.mean(list(_recorded(routing).values()), axis=0), layers, experts)


def popularity_by_domain(
    routing: str, layers: int, experts: int, domains: int = 4
) -> dict[str, np.ndarray]:
    """Share of each expert [L, E] in each domain: "zipf" or a file of statistics.

    Zipf is drawn anew for every domain, "0", "1" and so on. A file has its own domains, all of
    which are used; an expert of the file is the same expert of the model in all of them.
    """
    if routing == "zipf":
        rng = np.random.default_rng(0)
        return {str(domain): _zipf(rng, layers, experts) for domain in range(domains)}
    return {name: _spread(share, layers, experts) for name, share in _recorded(routing).items()}


def _recorded(routing: str) -> dict[str, np.ndarray]:
    """Shares by domain of a file. Raises InputError if it holds none."""
    remedy = "a routing file holds shares [layers][experts] by domain"
    by_domain = read_json_object(Path(routing), remedy)
    try:
        shares = {name: np.array(share, np.float64) for name, share in by_domain.items()}
    except (TypeError, ValueError) as error:
        raise InputError(f"{routing}: {error}; {remedy}") from error
    shapes = [share.shape for share in shares.values()]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2:
        raise InputError(f"{routing}: shapes {shapes}; {remedy}, all alike")
    return shares


def _zipf(rng: np.random.Generator, layers: int, experts: int) -> np.ndarray:
    share = np.stack([1 / (1 + rng.permutation(experts)) for _ in range(layers)])
    return share / share.sum(axis=1, keepdims=True)


def _spread(recorded: np.ndarray, layers: int, experts: int) -> np.ndarray:
    """Shares of another number of layers and experts, permuted in the same way every time."""
    rng = np.random.default_rng(0)
    copies = -(-experts // recorded.shape[1])
    by_layer = [recorded[layer % len(recorded)] for layer in range(layers)]
    repeated = [np.concatenate([row / (1 + n) for n in range(copies)]) for row in by_layer]
    share = np.stack([rng.permutation(row[:experts]) for row in repeated])
    return share / share.sum(axis=1, keepdims=True)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What ``random_model`` reads."""
    add = parser.add_argument
    add("--expert-bits", type=int, choices=LEVEL_BITS, default=4)
    add("--dense-bits", type=int, choices=DENSE_BITS, default=16)
    add("--promoted", type=float, default=0.0, help="share of experts promoted")
    add("--promoted-bits", type=int, choices=LEVEL_BITS, default=4)
    add("--group-size", type=int, choices=GROUP_SIZES, default=DEFAULT_GROUP_SIZE)
    add("--scale-encoding", choices=SCALE_ENCODINGS, default=DEFAULT_SCALE_ENCODING)
    add("--routing", default="random", help="random, zipf, or a JSON file of recorded shares")
    add("--implementation", default="auto")
    add("--layers", type=int, default=QWEN3_30B["num_hidden_layers"])


def random_model(options: argparse.Namespace) -> tuple[Qwen3Moe, DenseWeights, PagedExperts]:
    """The model that a benchmark's options ask for, its dense weights and its experts."""
    shape = config(options.layers)
    share = popularity(options.routing, shape.num_hidden_layers, shape.num_experts)
    experts = random_experts(
        shape,
        base_bits=options.expert_bits,
        promoted=options.promoted,
        promoted_bits=options.promoted_bits,
        group_size=options.group_size,
        scale_encoding=options.scale_encoding,
    )
    dense = random_dense(shape, share[None], options.dense_bits)
    model = Qwen3Moe(
        shape, dense, experts, dtype=jnp.bfloat16, implementation=options.implementation
    )
    return model, dense, experts


def abstract_dense(config: ModelConfig, dense_bits: int = 16) -> DenseWeights:
    """Shapes and dtypes of ``random_dense``, nothing allocated."""
    tensors = {}
    for name, shape in dense_shapes(config).items():
        dtype = jnp.int8 if has_8_bits(name, dense_bits) else jnp.bfloat16
        tensors[name] = jax.ShapeDtypeStruct(shape, dtype)
        if dtype == jnp.int8:
            tensors[scale_name(name)] = jax.ShapeDtypeStruct(shape[:1], jnp.float32)
    return DenseWeights.abstract(config, tensors)


def random_dense(config: ModelConfig, shares: np.ndarray, dense_bits: int = 16) -> DenseWeights:
    """Weights that keep activations near 1 and route tokens of domain d by ``shares`` [D, L, E].

    bfloat16, but for the matrices that a checkpoint of 8 dense bits holds as ``Int8Matrix``. With
    several domains the model must have a head of its own, and layers add little to the residual
    stream (``residual_gain``).
    """
    domains = len(shares)
    check_domains(domains)
    arrays = {}
    for index, (name, weight) in enumerate(abstract_dense(config, dense_bits)._asdict().items()):
        if weight is not None:
            make = _random_codes if isinstance(weight, Int8Matrix) else _random_weight
            arrays[name] = make(jax.random.key(index), name, weight.shape)
    # a logit is about CONSTANT / rms(x) times a column of the router, and rms(x) near 1
    bias = np.log(np.maximum(shares, 1e-6) * shares.shape[2]) / CONSTANT
    if domains > 1:
        bias *= SHARPNESS
    columns = jnp.asarray(np.moveaxis(bias, 0, -1), jnp.bfloat16)
    return _steered(DenseWeights(**arrays), columns, residual_gain(config, domains))


def residual_gain(config: ModelConfig, domains: int) -> float:
    """What outputs of attention and experts are multiplied with: 1 for one domain.

    With several, so little that all layers together do not outgrow the embedding. Otherwise the
    constant loses weight from layer to layer, and what attention finds in all tokens alike becomes
    a bias of the routers, the same for all domains.
    """
    return 1.0 if domains == 1 else (2 * config.num_hidden_layers) ** -0.5


def check_domains(domains: int) -> None:
    """Raises InputError unless so many domains can have a channel each."""
    if not 1 <= domains <= MAX_DOMAINS:
        raise InputError(f"there must be 1 to {MAX_DOMAINS} domains, got {domains}")


@partial(jax.jit, donate_argnums=0, static_argnames="gain")
def _steered(dense: DenseWeights, columns: jax.Array, gain: float) -> DenseWeights:
    """Weights whose first channels are reserved, in place; ``columns`` [L, E, D] of the router."""
    domains = columns.shape[-1]
    domain_of_token = jnp.arange(dense.embedding.shape[0]) % domains
    own = domain_of_token[:, None] == jnp.arange(domains)
    dense = dense._replace(
        embedding=dense.embedding.at[:, :domains].set(own * jnp.bfloat16(CONSTANT)),
        o=_rows_scaled(dense.o, domains, gain),
        router=dense.router.at[:, :, :domains].set(columns),
    )
    if domains == 1:
        return dense
    if dense.head is None:
        raise ValueError("several domains need a model with a head of its own")
    if isinstance(dense.head, Int8Matrix):
        codes = dense.head.codes.at[:, :domains].set(own * jnp.int8(LARGEST_CODE))
        head: Weight = dense.head._replace(codes=codes)
        lead = LARGEST_CODE * dense.head.scale[0]
    else:
        lead = jnp.bfloat16(dense.head.shape[1] ** -0.5)
        head = dense.head.at[:, :domains].set(own * lead)
    # the norm before the head, for int8 weights alone cannot be that large
    norm = dense.final_norm.at[:domains].set((HEAD_START / CONSTANT / lead).astype(jnp.bfloat16))
    return dense._replace(head=head, final_norm=norm)


def _rows_scaled(weight: Weight, reserved: int, gain: float) -> Weight:
    """``weight`` times ``gain``, its first rows zero."""
    if isinstance(weight, Int8Matrix):
        return weight._replace(scale=(weight.scale * gain).at[:, :reserved].set(0))
    return (weight * jnp.bfloat16(gain)).at[:, :reserved].set(0)


@partial(jax.jit, static_argnames=("name", "shape"))
def _random_codes(key: jax.Array, name: str, shape: tuple[int, ...]) -> Int8Matrix:
    """Of the same spread as ``_random_weight``, but uniform."""
    del name

    def part_of(key: jax.Array, part: tuple[int]) -> jax.Array:
        bits = jax.random.bits(key, part, jnp.uint8)
        return jnp.maximum(jax.lax.bitcast_convert_type(bits, jnp.int8), -LARGEST_CODE)

    codes = _in_parts(key, shape, part_of)
    scale = shape[-1] ** -0.5 / (LARGEST_CODE / 3**0.5)
    return Int8Matrix(codes, jnp.full(shape[:-1], scale, jnp.float32))


@partial(jax.jit, static_argnames=("name", "shape"))
def _random_weight(key: jax.Array, name: str, shape: tuple[int, ...]) -> jax.Array:
    if "norm" in name:
        return jnp.ones(shape, jnp.bfloat16)
    spread = jnp.bfloat16(1.0 if name == "embedding" else shape[-1] ** -0.5)
    return _in_parts(
        key, shape, lambda key, part: jax.random.normal(key, part, jnp.bfloat16) * spread
    )


def _in_parts(
    key: jax.Array, shape: tuple[int, ...], make: Callable[[jax.Array, tuple[int]], jax.Array]
) -> jax.Array:
    """``make`` of many parts, one after another: random bits take 16 bytes a number for a while.

    A model must not need more memory while it is made than when it runs.
    """
    size = math.prod(shape)
    parts = math.gcd(size, PARTS)
    made = jax.lax.map(lambda key: make(key, (size // parts,)), jax.random.split(key, parts))
    return made.reshape(shape)


def expert_format(
    config: ModelConfig,
    group_size: int = DEFAULT_GROUP_SIZE,
    scale_encoding: ScaleEncoding = DEFAULT_SCALE_ENCODING,
) -> ExpertFormat:
    """Format of the model's random experts; what a conversion makes if nothing else is asked."""
    return ExpertFormat(
        hidden=config.hidden_size,
        width=config.moe_intermediate_size,
        group_size=group_size,
        scale_encoding=scale_encoding,
        table=DEFAULT_TABLE,
    )


def random_experts(
    config: ModelConfig,
    *,
    base_bits: Bits,
    promoted: float = 0.0,
    promoted_bits: Bits = 4,
    group_size: int = DEFAULT_GROUP_SIZE,
    scale_encoding: ScaleEncoding = DEFAULT_SCALE_ENCODING,
) -> PagedExperts:
    """Random pages; a share ``promoted`` of every layer's experts is at ``promoted_bits``.

    They leave the channel of one domain as it is (``least_code``).
    """
    layers, experts = len(config.sparse_layers), config.num_experts
    fmt = expert_format(config, group_size, scale_encoding)
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
    filled = [_random_array(key, s.shape, s.dtype) for key, s in zip(keys, leaves, strict=True)]
    arrays = jax.tree.unflatten(tree, filled)
    # the first row of the first tile of down is channel 0, which must stay constant
    down = arrays.scales.down
    down = down._replace(codes=down.codes.at[:, :, 0, :, 0].set(least_code(scale_encoding)))
    scales = arrays.scales._replace(down=down)
    return dataclasses.replace(arrays, scales=scales, table=jnp.asarray(table))


def least_code(scale_encoding: ScaleEncoding) -> int:
    """Of rows that write a reserved channel: with log8, which has no scale of zero, hardly."""
    return 0 if scale_encoding == "bf16" else LOG8_MAX_CODE


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _random_array(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Pages, or scales within ``EXPERT_SCALES``: bfloat16, or codes of log8 and their base."""
    least, largest = EXPERT_SCALES
    if dtype == jnp.uint32:
        return jax.random.bits(key, shape, jnp.uint32)
    if dtype == jnp.uint8:
        return jax.random.randint(key, shape, 0, LOG8_CODES).astype(dtype)
    if dtype == jnp.float32:
        return jnp.full(shape, largest, dtype)
    return jax.random.uniform(key, shape, jnp.float32, least, largest).astype(dtype)
