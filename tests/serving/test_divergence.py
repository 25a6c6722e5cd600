"""KL divergence from the unquantized model: the definition, zero, order, and models that differ."""

import gc
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from serving.nano import NANO, TEXT

from dynaexq_jax.checkpoint import Checkpoint
from dynaexq_jax.engine.divergence import Divergence
from dynaexq_jax.engine.programs import SCORE_ROWS
from dynaexq_jax.errors import InputError
from dynaexq_jax.hf import HfDirectory
from dynaexq_jax.models.cache import KVCache
from dynaexq_jax.models.qwen3_moe import Qwen3Moe
from dynaexq_jax.models.weights import DenseWeights
from dynaexq_jax.serving.perplexity import load_for_scoring, score_text, score_windows
from dynaexq_jax.serving.reference import shared_windows

WINDOW = SCORE_ROWS + 32
"""More than one piece, the last of them shorter."""
WINDOWS = 4
FRENCH = TEXT / "fr.txt"


@pytest.fixture(scope="module")
def reference(hf_dir):
    return load_for_scoring(hf_dir, precision="bf16", window=WINDOW)


@pytest.fixture(scope="module")
def served(converted):
    """The model by precision, loaded once."""
    return {
        precision: load_for_scoring(converted, precision=precision, window=WINDOW)
        for precision in ("2", "4", "8", "dynamic")
    }


@pytest.fixture(scope="module")
def windows(converted, hf_dir):
    return shared_windows(converted, hf_dir, [FRENCH], window=WINDOW, max_windows=WINDOWS)[0]


@pytest.fixture(scope="module")
def scores(served, reference, windows):
    return {
        precision: score_windows(
            model, windows, divergence=Divergence(reference.engine, model.engine)
        )
        for precision, model in served.items()
    }


def log_softmax_of(config, dense, experts, tokens) -> np.ndarray:
    """By the bare model in float32, and numpy in float64: [W, V]."""
    graph, state = nnx.split(Qwen3Moe(config, dense, experts, dtype=jnp.dtype("float32")))

    @jax.jit
    def logits(state, tokens):
        model = nnx.merge(graph, state)
        cache = KVCache.abstract(config, batch=1, context=WINDOW, dtype=jnp.dtype("float32"))
        cache = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), cache)
        return model.logits(model(tokens[None], jnp.arange(WINDOW)[None], cache).hidden[0])

    values = np.asarray(logits(state, jnp.asarray(tokens, jnp.int32)), np.float64)
    values -= values.max(axis=1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("precision", ["2", "8"])
def test_every_position_has_the_divergence_of_the_definition(
    reference, served, windows, converted, hf_dir, precision
):
    window, engine = windows[0], served[precision].engine
    losses, kl = Divergence(reference.engine, engine).score(window)
    source, checkpoint = HfDirectory.open(hf_dir), Checkpoint.open(converted)
    dense = DenseWeights.load(source.config, source.dense())
    log_p = log_softmax_of(source.config, dense, reference.engine.experts, window[:-1])
    dense = checkpoint.dense_weights()
    log_q = log_softmax_of(checkpoint.config, dense, engine.experts, window[:-1])
    assert kl.shape == losses.shape == (WINDOW,)
    expected = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    np.testing.assert_allclose(kl, expected, rtol=1e-4, atol=1e-6)
    assert kl.mean() == pytest.approx(expected.mean(), rel=1e-4)
    np.testing.assert_allclose(losses, -log_q[np.arange(WINDOW), window[1:]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["unquantized", "8"])
def test_a_model_does_not_diverge_from_itself(reference, served, windows, precision):
    engine = reference.engine if precision == "unquantized" else served[precision].engine
    _, kl = Divergence(engine, engine).score(windows[0])
    assert abs(kl).max() < 1e-6


def test_fewer_bits_diverge_more(scores):
    kl = {precision: score.kl for precision, score in scores.items()}
    assert kl["2"] > 5 * kl["4"] > 25 * kl["8"] > 0
    assert kl["4"] < kl["dynamic"] < kl["2"]


@pytest.mark.parametrize("precision", ["4", "dynamic"])
def test_losses_are_those_without_a_reference(scores, served, precision):
    """The controller sees the same traffic, whatever the windows are compared with."""
    alone = score_text(served[precision], FRENCH, window=WINDOW, max_windows=WINDOWS)
    assert alone.kl is None
    assert alone.tokens == scores[precision].tokens == WINDOWS * WINDOW
    assert scores[precision].nll == pytest.approx(alone.nll, rel=1e-6)


def test_windows_are_counted_and_have_to_fit(reference, served, windows):
    model = served["4"].engine
    before = reference.engine.counters.window_chunks, model.counters.window_chunks
    divergence = Divergence(reference.engine, model)
    divergence.score(windows[0][: WINDOW // 2])
    assert (reference.engine.counters.window_chunks, model.counters.window_chunks) == (
        before[0] + 1,
        before[1] + 1,
    )
    with pytest.raises(InputError, match=f"{WINDOW + 1} tokens does not fit a context of {WINDOW}"):
        divergence.score(np.zeros(WINDOW + 2, np.int32))


def test_an_engine_that_was_compared_can_be_freed(converted, reference, windows):
    def held() -> int:
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    before = held()
    model = load_for_scoring(converted, precision="2", window=WINDOW)
    divergence = Divergence(reference.engine, model.engine)
    divergence.score(windows[0])
    assert held() > before + 2**20
    del model, divergence
    assert held() <= before


@pytest.fixture
def altered(tmp_path):
    """The directory of the shipped model, to be changed."""
    path = tmp_path / "altered"
    shutil.copytree(NANO, path)
    return path


def refuses(converted, reference, message):
    with pytest.raises(InputError, match=message) as caught:
        shared_windows(converted, reference, [FRENCH], window=64, max_windows=2)
    assert "give the directory that the checkpoint was converted from" in str(caught.value)


def test_a_reference_is_not_converted(converted):
    refuses(converted, converted, "does not hold the unquantized experts, so it cannot be")


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [(64, "vocab_size is 8192, and 64 in"), (8192, "hidden_size is 256, and 96 in")],
)
def test_models_of_another_shape(converted, make_tiny_model, tmp_path, vocabulary, message):
    make_tiny_model(tmp_path / "other", vocab_size=vocabulary)
    refuses(converted, tmp_path / "other", message)


def test_tokenizers_that_differ(converted, altered):
    """Merges are left out, and the same text falls into more tokens."""
    path = altered / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = merges[: len(merges) // 2]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    refuses(converted, altered, r"different tokenizers: token \d+ of .* is \d+, and \d+ to the ref")


def test_texts_are_read_before_anything_is_loaded(converted, hf_dir, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("few words", encoding="utf-8")
    with pytest.raises(InputError, match="one window of 64 needs 65"):
        shared_windows(converted, hf_dir, [FRENCH, short], window=64, max_windows=2)
