"""The model against transformers: logits and greedy tokens of the golden files.

Tolerance: 1e-4 of the largest logit. Both sides compute in float32 on the same bfloat16 weights;
what remains is the order of sums.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import weights

from dynaexq_jax.engine.engine import Engine, EngineConfig
from dynaexq_jax.engine.programs import Programs, split_params
from dynaexq_jax.hf import HfDirectory
from dynaexq_jax.hf.plain import plain_experts
from dynaexq_jax.models.cache import KVCache
from dynaexq_jax.models.qwen3_moe import Qwen3Moe
from dynaexq_jax.models.weights import DenseWeights

GOLDEN = Path(weights.__file__).parent
NANO = Path(__file__).parents[2] / "examples" / "nano-moe"
TOLERANCE = 1e-4


def build(path: Path) -> Qwen3Moe:
    source = HfDirectory.open(path)
    return Qwen3Moe(
        source.config,
        DenseWeights.load(source.config, source.dense()),
        plain_experts(source),
        dtype=jnp.dtype("float32"),
    )


def logits_at(model: Qwen3Moe, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    rows, length = tokens.shape
    cache = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype),
        KVCache.abstract(model.config, batch=rows, context=length, dtype=jnp.float32),
    )
    where = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    output = model(jnp.asarray(tokens, jnp.int32), where, cache)
    return np.asarray(model.logits(output.hidden[:, positions]))


def greedy(model: Qwen3Moe, prompts: np.ndarray, count: int, chunk: int) -> list[list[int]]:
    """Through the engine: prompts in chunks, both in one batch."""
    engine = Engine(
        programs=Programs(model),
        params=split_params(model),
        config=EngineConfig(
            batch=2, context=prompts.shape[1] + count, chunk=chunk, dtype=np.dtype("float32")
        ),
        model_config=model.config,
        experts=model.experts.get_value(),
    )
    for prompt in prompts:
        engine.add(prompt, max_tokens=count)
    tokens: list[list[int]] = [[], []]
    for event in engine.run():
        tokens[event.sequence].append(event.token)
    return tokens


def assert_matches(model: Qwen3Moe, golden, chunk: int) -> None:
    expected = golden["logits"]
    logits = logits_at(model, golden["tokens"], golden["positions"])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
    count = golden["greedy"].shape[1]
    assert greedy(model, golden["tokens"], count, chunk) == golden["greedy"].tolist()


@pytest.mark.parametrize("name", sorted(weights.CONFIGS))
def test_random_models(name, tmp_path):
    config = weights.CONFIGS[name]
    tensors = weights.tensors(config)
    golden = np.load(GOLDEN / f"{name}.npz")
    assert weights.digest(tensors) == str(golden["weights_sha256"]), (
        "numpy draws other weights than those of the golden file: make the goldens again"
    )
    model = build(weights.write_directory(config, tensors, tmp_path / name))
    assert_matches(model, golden, chunk=48)


def test_trained_model():
    assert_matches(build(NANO), np.load(GOLDEN / "nano.npz"), chunk=24)
