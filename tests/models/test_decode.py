"""The decode step against the model: same logits, same cache, same routing; and how it lowers.

Tolerance: 2e-5 of the largest value. Both compute in float32; what differs is the order of sums.
"""

import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import weights

from dynaexq_jax.config import ModelConfig
from dynaexq_jax.engine.programs import Programs, split_params
from dynaexq_jax.engine.state import EngineState
from dynaexq_jax.hf import HfDirectory
from dynaexq_jax.hf.plain import plain_experts
from dynaexq_jax.models.cache import KVCache
from dynaexq_jax.models.decode import DecodeState
from dynaexq_jax.models.names import dense_shapes
from dynaexq_jax.models.qwen3_moe import Qwen3Moe
from dynaexq_jax.models.weights import DenseWeights
from pallas_kernels.levels import DEFAULT_TABLE
from pallas_kernels.pages import ExpertFormat, abstract_experts

TOLERANCE = 2e-5
CONTEXT = 24
LENGTHS = (9, 0, 17, 1)
"""Tokens before the step, by slot; a slot without any is idle."""


def build(name: str, path: Path, dtype: str = "float32") -> Qwen3Moe:
    config = weights.CONFIGS[name]
    source = HfDirectory.open(weights.write_directory(config, weights.tensors(config), path))
    dense = DenseWeights.load(source.config, source.dense())
    return Qwen3Moe(source.config, dense, plain_experts(source), dtype=jnp.dtype(dtype))


def filled_cache(model: Qwen3Moe, tokens: np.ndarray) -> KVCache:
    """After ``LENGTHS`` of the tokens; random where nothing was written."""
    shapes = KVCache.abstract(model.config, batch=len(LENGTHS), context=CONTEXT, dtype=jnp.float32)
    rng = np.random.default_rng(1)
    cache = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)
    index = np.arange(tokens.shape[1])
    positions = np.where(index < np.asarray(LENGTHS)[:, None], index, -1).astype(np.int32)
    return jax.jit(model.__call__)(jnp.asarray(tokens), jnp.asarray(positions), cache).cache


def assert_close(ours, theirs):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


@pytest.mark.parametrize(
    "name", ["plain", "unnormalized_tied", "bias", "sparse_step", "dense_first", "yarn_explicit"]
)
def test_decode_step_is_the_model(name, tmp_path):
    """All kinds of layers; decode steps of all kinds of rotations are in ``test_parity``."""
    model = build(name, tmp_path)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (len(LENGTHS), max(LENGTHS) + 1)).astype(np.int32)
    cache = filled_cache(model, tokens[:, :-1])
    lengths = np.asarray(LENGTHS, np.int32)
    next_tokens = jnp.asarray(tokens[np.arange(len(LENGTHS)), lengths])
    positions = jnp.asarray(np.where(lengths > 0, lengths, -1))
    active = lengths > 0

    expected = jax.jit(model.__call__)(next_tokens[:, None], positions[:, None], cache)
    mass = jnp.asarray(rng.uniform(size=expected.router_mass.shape), jnp.float32)
    state = DecodeState(cache, mass, jnp.zeros(1, jnp.int32))
    logits, after = jax.jit(model.decode)(next_tokens, positions, state)

    assert (logits.shape, logits.dtype) == ((len(LENGTHS), 256), jnp.float32)
    assert_close(logits[active], model.logits(expected.hidden[active, 0]))
    assert_close(after.router_mass, mass + expected.router_mass)
    for ours, theirs, before in zip(after.cache, expected.cache, cache, strict=True):
        assert_close(ours, theirs)
        where = jnp.arange(CONTEXT) == jnp.asarray(positions)[:, None]
        np.testing.assert_array_equal(ours[:, ~where], before[:, ~where])


def test_activations_may_be_bfloat16(tmp_path):
    model = build("bias", tmp_path, "bfloat16")
    shapes = KVCache.abstract(model.config, batch=2, context=8, dtype=jnp.bfloat16)
    cache = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    tokens, positions = jnp.asarray([3, 5]), jnp.zeros(2, jnp.int32)
    expected = jax.jit(model.__call__)(tokens[:, None], positions[:, None], cache)
    state = DecodeState(cache, jnp.zeros_like(expected.router_mass), jnp.zeros(1, jnp.int32))
    logits, after = jax.jit(model.decode)(tokens, positions, state)
    wanted = model.logits(expected.hidden[:, 0])
    assert logits.dtype == jnp.float32
    assert after.cache.keys.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits, wanted, atol=0.05 * float(jnp.abs(wanted).max()))


def functions_and_calls(text: str) -> tuple[Counter, Counter]:
    functions = Counter(re.findall(r"func\.func private @([a-z_]+?)(?:_\d+)?\(", text))
    return functions, Counter(re.findall(r"call @([a-z_]+?)(?:_\d+)?\(", text))


def test_layers_of_a_kind_share_one_trace(tmp_path):
    model = build("sparse_step", tmp_path)
    state = DecodeState(
        KVCache.abstract(model.config, batch=2, context=8, dtype=jnp.float32),
        jax.ShapeDtypeStruct((2, 8), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    slots = jax.ShapeDtypeStruct((2,), jnp.int32)
    functions, calls = functions_and_calls(
        jax.jit(model.decode).lower(slots, slots, state).as_text()
    )
    for name, layers in (("_attention", 4), ("_sparse_mlp", 2), ("_dense_mlp", 2)):
        assert (functions[name], calls[name]) == (1, layers)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need jax 0.11")
@pytest.mark.parametrize(("batch", "layers", "kernels"), [(1, 0, 2), (8, 0, 2), (64, 48, 5)])
def test_step_of_30b_is_few_kernels_over_whole_arrays(batch, layers, kernels):
    """For few slots all layers and the head; for many, layer by layer, kernels that layers share:
    norm and qkv, attention, output, experts; and the head."""
    from pallas_kernels.mosaic.target import assume_compute_capability

    raw = weights.CONFIGS["plain"] | {
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "vocab_size": 151936,
    }
    config = ModelConfig.from_hf(raw)
    bfloat16 = jnp.dtype("bfloat16")
    shapes = dense_shapes(config).items()
    dense = DenseWeights.abstract(
        config, {name: jax.ShapeDtypeStruct(shape, bfloat16) for name, shape in shapes}
    )
    fmt = ExpertFormat(
        hidden=2048, width=768, group_size=64, scale_encoding="log8", table=DEFAULT_TABLE
    )
    experts = abstract_experts(fmt, layers=48, experts=128, base_bits=2, pool_pages=64)
    model = Qwen3Moe(config, dense, experts, dtype=bfloat16, implementation="mosaic")
    state = EngineState.abstract(config, batch=batch, context=1024, dtype=bfloat16)
    with assume_compute_capability((9, 0)):
        programs = Programs(model, [1, 2])
        traced = programs.decode.trace(split_params(model), experts, state, draws=False)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()

    functions, calls = functions_and_calls(text)
    for name in ("_attention", "_sparse_mlp"):
        assert (functions[name], calls[name]) == (min(layers, 1), layers)
    assert text.count("custom_call @mosaic_gpu") == kernels
    assert "stablehlo.sort" not in text
    whole = ("48x", "151936x2048x")  # what is stacked over layers, embedding, head
    touched = {
        op
        for op, operands in re.findall(r"stablehlo\.(\w+)[^\n]*:[^\n]*?(tensor<[^\n]*)", text)
        if any(f"tensor<{shape}" in operands for shape in whole)
    }
    assert touched <= {"custom_call", "reshape", "broadcast_in_dim", "gather", "return"}
