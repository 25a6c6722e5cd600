"""The stacked dense weights against the tensors of a checkpoint, by names spelled out here."""

import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden import weights as golden

from dynaexq_jax.config import ModelConfig
from dynaexq_jax.models.layers import linear
from dynaexq_jax.models.names import dense_shapes
from dynaexq_jax.models.weights import DenseWeights
from dynaexq_jax.trees import abstract_array, tree_bytes
from pallas_kernels.linear import Int8Matrix

ATTENTION = {
    "attention_norm": ["input_layernorm.weight"],
    "qkv": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "q_norm": ["self_attn.q_norm.weight"],
    "k_norm": ["self_attn.k_norm.weight"],
    "o": ["self_attn.o_proj.weight"],
    "mlp_norm": ["post_attention_layernorm.weight"],
}
BIASES = {
    "qkv_bias": ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"],
    "o_bias": ["self_attn.o_proj.bias"],
}
ROUTER = {"router": ["mlp.gate.weight"]}
MLP = {
    "gate_up": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "down": ["mlp.down_proj.weight"],
}


def tensors_of(name):
    config = ModelConfig.from_hf(golden.CONFIGS[name])
    tensors = golden.tensors(golden.CONFIGS[name])
    return config, {name: tensors[name] for name in dense_shapes(config)}


@pytest.mark.parametrize(
    ("name", "sparse", "dense"),
    [
        ("bias", [0, 1], []),
        ("unnormalized_tied", [0, 1, 2], []),
        ("sparse_step", [1, 3], [0, 2]),
        ("dense_first", [1, 2], [0]),
    ],
)
def test_every_tensor_has_its_rows(name, sparse, dense):
    config, tensors = tensors_of(name)
    weights = DenseWeights.load(config, tensors)
    expected = {"embedding": tensors["model.embed_tokens.weight"]}
    expected["final_norm"] = tensors["model.norm.weight"]
    if not config.tie_word_embeddings:
        expected["head"] = tensors["lm_head.weight"]
    every = range(config.num_hidden_layers)
    stacks = [(ATTENTION, every), (ROUTER, sparse), (MLP, dense)]
    if config.attention_bias:
        stacks.append((BIASES, every))
    for parts, layers in stacks:
        for field, names in parts.items() if layers else ():
            rows = [[tensors[f"model.layers.{n}.{part}"] for part in names] for n in layers]
            expected[field] = np.stack([np.concatenate(row) for row in rows])
    for field in DenseWeights._fields:
        got = getattr(weights, field)
        if field not in expected:
            assert got is None
            continue
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(got), expected[field], err_msg=field)
    assert tree_bytes(weights) == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("name", ["bias", "dense_first"])
def test_abstract_weights_are_those_that_are_loaded(name):
    config, tensors = tensors_of(name)
    shapes = {name: abstract_array(t.shape, t.dtype) for name, t in tensors.items()}
    before = len(jax.live_arrays())
    abstract = DenseWeights.abstract(config, shapes)
    assert len(jax.live_arrays()) == before
    loaded = DenseWeights.load(config, tensors)
    assert abstract == jax.tree.map(lambda a: abstract_array(a.shape, a.dtype), loaded)


def test_an_array_holds_the_values_of_tensors_of_other_types():
    config, tensors = tensors_of("plain")
    norm, query = "model.layers.1.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight"
    tensors[norm] = tensors[norm].astype(np.float32) + np.float32(2**-20)
    tensors[query] = tensors[query].astype(np.float16)
    weights = DenseWeights.load(config, tensors)
    assert weights.attention_norm.dtype == weights.qkv.dtype == jnp.float32
    np.testing.assert_array_equal(weights.attention_norm[1], tensors[norm])
    rows = len(tensors[query])
    np.testing.assert_array_equal(weights.qkv[0, :rows], tensors[query].astype(np.float32))
    assert weights.o.dtype == jnp.bfloat16
    abstract = DenseWeights.abstract(config, tensors)
    assert tree_bytes(abstract) == tree_bytes(weights)


def test_host_memory_holds_one_stacked_array_at_a_time(monkeypatch):
    config = ModelConfig.from_hf(golden.CONFIGS["sparse_step"] | {"intermediate_size": 4096})
    tensors = {
        name: np.zeros(shape, ml_dtypes.bfloat16) for name, shape in dense_shapes(config).items()
    }
    largest = DenseWeights.abstract(config, tensors).gate_up.size * 2
    # as on a GPU: nothing on the device shares memory with the host
    on_device = jnp.zeros(())
    monkeypatch.setattr(jnp, "asarray", lambda _: on_device)
    tracemalloc.start()
    try:
        DenseWeights.load(config, tensors)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert largest <= peak < 1.25 * largest


@pytest.mark.parametrize("make", [DenseWeights.load, DenseWeights.abstract])
def test_wrong_tensors_are_refused(make):
    config, tensors = tensors_of("plain")
    router = "model.layers.1.mlp.gate.weight"
    without = {name: tensor for name, tensor in tensors.items() if name != router}
    with pytest.raises(ValueError, match=f"lack 1 tensors, the first is {router}"):
        make(config, without)
    with pytest.raises(ValueError, match=r"hold 1 unknown tensors, e\.g\. surprise"):
        make(config, tensors | {"surprise": tensors[router]})
    with pytest.raises(ValueError, match=rf"{router} must be \(8, 64\), got \(64, 8\)"):
        make(config, tensors | {router: tensors[router].T})


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA's compiler for CPUs")
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, np.int8])
def test_one_row_reads_a_layer_where_it_lies(dtype):
    layers, size = 6, 256
    stacked = abstract_array((layers, size, size), dtype)
    if dtype == np.int8:
        stacked = Int8Matrix(stacked, abstract_array((layers, size), np.float32))

    def chain(x, weight):
        for layer in range(layers):
            x = linear(x, weight, layer)
        return x

    row = abstract_array((1, 1, size), np.float32)
    memory = jax.jit(chain).lower(row, stacked).compile().memory_analysis()
    assert memory.temp_size_in_bytes < size * size
