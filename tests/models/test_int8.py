"""The model with dense matrices at 8 bits is the model of the values they stand for.

Tolerance: 2e-5 of the largest value. Both compute in float32; what differs is that a row's scale
is multiplied after the sum, and the order of sums.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import weights as golden

from convert.dense import dense_arrays
from dynaexq_jax.hf import HfDirectory
from dynaexq_jax.hf.plain import plain_experts
from dynaexq_jax.models.cache import KVCache
from dynaexq_jax.models.decode import DecodeState
from dynaexq_jax.models.names import dense_shapes
from dynaexq_jax.models.qwen3_moe import Qwen3Moe
from dynaexq_jax.models.weights import DenseWeights
from dynaexq_jax.trees import abstract_array, tree_bytes
from pallas_kernels.linear import Int8Matrix

TOLERANCE = 2e-5
AT_8_BITS = {"qkv", "o", "head", "gate_up", "down"}
CONTEXT = 16


def source_and_tensors(name, path):
    """A Hugging Face directory, and its dense tensors as a checkpoint of 8 dense bits has them."""
    config = golden.CONFIGS[name]
    source = HfDirectory.open(golden.write_directory(config, golden.tensors(config), path))
    return source, dense_arrays(source, dense_shapes(source.config), 8)


def widened(dense):
    """The same values in float32 arrays."""
    return dense._replace(
        **{
            field: jnp.asarray(weight.codes, jnp.float32) * weight.scale[..., None]
            for field, weight in dense._asdict().items()
            if isinstance(weight, Int8Matrix)
        }
    )


def assert_close(ours, theirs):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


@pytest.mark.parametrize("name", ["bias", "dense_first", "unnormalized_tied"])
def test_prefill_and_decode(name, tmp_path):
    source, tensors = source_and_tensors(name, tmp_path)
    config, experts = source.config, plain_experts(source)
    dense = DenseWeights.load(config, tensors)
    float32 = jnp.dtype("float32")
    results = []
    for weights in (dense, widened(dense)):
        model = Qwen3Moe(config, weights, experts, dtype=float32)
        rng = np.random.default_rng(0)
        tokens = jnp.asarray(rng.integers(0, 256, (2, 7)), jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32), (2, 7))
        shapes = KVCache.abstract(config, batch=2, context=CONTEXT, dtype=float32)
        cache = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        output = jax.jit(model.__call__)(tokens, positions, cache)
        state = DecodeState(output.cache, output.router_mass, jnp.zeros(1, jnp.int32))
        logits, state = jax.jit(model.decode)(tokens[:, 0], jnp.asarray([7, 7]), state)
        results.append((model.logits(output.hidden), logits, state.router_mass, *state.cache))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["bias", "dense_first", "unnormalized_tied"])
def test_every_matrix_has_its_rows(name, tmp_path):
    source, tensors = source_and_tensors(name, tmp_path)
    loaded = DenseWeights.load(source.config, tensors)
    values = {
        name: tensor * tensors[f"{name}_scale"][:, None] if tensor.dtype == np.int8 else tensor
        for name, tensor in tensors.items()
        if not name.endswith("_scale")
    }
    expected = DenseWeights.load(source.config, values)
    for field, weight in loaded._asdict().items():
        wanted = getattr(expected, field)
        assert isinstance(weight, Int8Matrix) == (field in AT_8_BITS and wanted is not None)
        if isinstance(weight, Int8Matrix):
            assert (weight.codes.dtype, weight.scale.dtype) == (jnp.int8, jnp.float32)
            weight = np.asarray(weight.codes) * np.asarray(weight.scale)[..., None]
        np.testing.assert_array_equal(weight, wanted, err_msg=field)
    assert tree_bytes(loaded) == sum(tensor.nbytes for tensor in tensors.values())
    abstract = DenseWeights.abstract(source.config, tensors)
    assert abstract == jax.tree.map(lambda a: abstract_array(a.shape, a.dtype), loaded)


@pytest.mark.parametrize("make", [DenseWeights.load, DenseWeights.abstract])
def test_wrong_tensors_are_refused(make, tmp_path):
    source, tensors = source_and_tensors("plain", tmp_path)
    query, router = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.gate.weight"
    without = {name: tensor for name, tensor in tensors.items() if name != f"{query}_scale"}
    with pytest.raises(ValueError, match=f"lack 1 tensors, the first is {query}_scale"):
        make(source.config, without)
    mixed = tensors | {query: source.tensor(query)}
    with pytest.raises(ValueError, match=rf"{query} must be int8 .* 8 bits, got bfloat16"):
        make(source.config, mixed)
    with pytest.raises(ValueError, match=rf"{router} must be a float .* 8 bits, got int8"):
        make(source.config, tensors | {router: tensors[router].astype(np.int8)})
    with pytest.raises(ValueError, match=r"hold 1 unknown tensors, e\.g\. .*embed_tokens"):
        make(source.config, tensors | {"model.embed_tokens.weight_scale": np.ones(256)})
