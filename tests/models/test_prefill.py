"""Chunks of tokens: layers as loops, in place, whatever their mix; and attention by cuDNN.

There is no cuDNN on a CPU: a stand-in shows what would be asked of it. Tolerances: 2e-5 of the
largest value between float32 and float32 in another order of sums, 2e-2 in bfloat16.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import weights

from dynaexq_jax.config import ModelConfig
from dynaexq_jax.engine.programs import Programs, split_params
from dynaexq_jax.engine.prompt import Prompt
from dynaexq_jax.engine.state import EngineState
from dynaexq_jax.hf import HfDirectory
from dynaexq_jax.hf.plain import plain_experts
from dynaexq_jax.models.attend import Chunk, attend
from dynaexq_jax.models.cache import KVCache
from dynaexq_jax.models.decode import DecodeState
from dynaexq_jax.models.names import dense_shapes
from dynaexq_jax.models.qwen3_moe import Qwen3Moe
from dynaexq_jax.models.weights import DenseWeights
from dynaexq_jax.trees import abstract_array, tree_bytes
from pallas_kernels.pages import PlainExperts

FLOAT32 = jnp.dtype("float32")
TOKENS = 6
MIXES = {
    "sparse, dense, sparse": {"num_hidden_layers": 6, "mlp_only_layers": [1, 2]},
    "dense, sparse": {"num_hidden_layers": 5, "mlp_only_layers": [0, 1]},
    "sparse, dense": {"num_hidden_layers": 4, "mlp_only_layers": [2, 3]},
    "every second": {"num_hidden_layers": 5, "decoder_sparse_step": 2},
    "both": {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
}


def assert_close(ours, theirs, tolerance=2e-5):
    ours, theirs = (np.asarray(array, np.float32) for array in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def zeros(shapes):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


@pytest.mark.parametrize("mix", MIXES)
def test_a_chunk_is_its_tokens_one_by_one(mix, tmp_path):
    raw = weights.CONFIGS["plain"] | MIXES[mix]
    source = HfDirectory.open(weights.write_directory(raw, weights.tensors(raw), tmp_path))
    config, experts = source.config, plain_experts(source)
    dense = DenseWeights.load(config, source.dense())
    model = Qwen3Moe(config, dense, experts, dtype=FLOAT32)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, TOKENS)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32), tokens.shape)
    empty = zeros(KVCache.abstract(config, batch=2, context=TOKENS + 1, dtype=FLOAT32))
    output = jax.jit(model.__call__)(tokens, positions, empty)

    mass = jnp.zeros_like(output.router_mass)
    state = DecodeState(empty, mass, jnp.zeros(1, jnp.int32))
    logits = []
    step = jax.jit(model.decode)
    for token, position in zip(tokens.T, positions.T, strict=True):
        of_token, state = step(token, position, state)
        logits.append(of_token)
    assert_close(model.logits(output.hidden), jnp.stack(logits, axis=1))
    assert_close(output.router_mass, state.router_mass)
    jax.tree.map(assert_close, output.cache, state.cache)


def abstract_prefill(layers: int):
    """The jitted program of a model of so many layers, lowered; and its state."""
    raw = weights.CONFIGS["plain"] | {"num_hidden_layers": layers, "hidden_size": 256}
    config = ModelConfig.from_hf(raw)
    tensors = {name: abstract_array(s, FLOAT32) for name, s in dense_shapes(config).items()}
    shape = (layers, config.num_experts)
    experts = PlainExperts(
        abstract_array((*shape, 2 * 48, 256), FLOAT32), abstract_array((*shape, 256, 48), FLOAT32)
    )
    dense = DenseWeights.abstract(config, tensors)
    model = Qwen3Moe(config, dense, experts, dtype=FLOAT32)
    state = EngineState.abstract(config, batch=2, context=256, dtype=FLOAT32)
    prompt, slot = Prompt.abstract(256), abstract_array((), jnp.int32)
    programs, params = Programs(model), split_params(model)
    return programs.prefill.lower(params, experts, state, prompt, slot, chunk=32), state


def test_layers_are_compiled_once_and_run_in_place():
    few, _ = abstract_prefill(2)
    many, state = abstract_prefill(12)
    products = [len(re.findall(r"stablehlo\.dot_general", p.as_text())) for p in (few, many)]
    assert products[0] == products[1]
    few, many = (program.compile().memory_analysis() for program in (few, many))
    assert many.alias_size_in_bytes >= tree_bytes(state.cache)
    # neither the cache nor a stack of weights is copied
    assert many.temp_size_in_bytes <= 1.1 * few.temp_size_in_bytes


ROWS = {
    "from 0": ([0, 1, 2, 3, 4], True),
    "from 0, padded": ([0, 1, -1, -1, -1], True),
    "all padding": ([-1] * 5, True),
    "later": ([3, 4, 5, 6, 7], False),
    "later, padded": ([2, 3, 4, -1, -1], False),
    "with a gap": ([0, -1, 1, 2, 3], False),
    "one that is later": ([1, -1, -1, -1, -1], False),
}


@pytest.mark.parametrize("rows", ROWS)
def test_chunks_that_begin_slots_are_known(rows):
    positions, begins = ROWS[rows]
    both = jnp.asarray([positions, range(5)], jnp.int32)
    assert bool(Chunk.of(both, None, (both, both)).begins) == begins
    assert bool(Chunk.of(both[::-1], None, (both, both)).begins) == begins


def attended(rows, implementation, slots=(2, 0)):
    """Of bfloat16 queries at ``rows`` and at positions from 0 on; and which are not padding."""
    rng = np.random.default_rng(0)
    positions = jnp.asarray([ROWS[rows][0], range(5)], jnp.int32)
    shapes = [(2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8), (3, 3, 9, 2, 8), (3, 3, 9, 2, 8)]
    q, k, v, *cache = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    slots = jnp.asarray(slots)
    chunk = Chunk.of(positions, slots, (q, q))

    @jax.jit
    def run(layer):
        written = KVCache(*cache).write(layer, slots, positions, k, v)
        return attend(q, k, v, chunk, written, layer, implementation)

    return run(jnp.int32(1)), positions >= 0


@pytest.mark.parametrize("rows", ROWS)
def test_attention_by_cudnn(rows, monkeypatch):
    expected, valid = attended(rows, "xla")
    attention, asked = jax.nn.dot_product_attention, []

    def stand_in(*args, implementation, **kwargs):
        asked.append((implementation, *kwargs))
        return attention(*args, **kwargs)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    result, _ = attended(rows, "auto")
    assert set(asked) == {("cudnn", "is_causal"), ("cudnn", "mask")}
    assert_close(result[valid], expected[valid], 2e-2)
    assert np.isfinite(np.asarray(result, np.float32)).all()


@pytest.mark.parametrize("rows", ["from 0, padded", "later"])
def test_attention_without_cudnn(rows, monkeypatch):
    expected, _ = attended(rows, "xla")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # but none that has cuDNN
    result, _ = attended(rows, "auto")
    np.testing.assert_array_equal(result, expected)
