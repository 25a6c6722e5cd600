"""Scores of texts: the definition, the reference, and precisions in order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from serving.nano import NANO, TEXT
from tokenizers import Tokenizer

from dynaexq_jax.errors import InputError
from dynaexq_jax.hf import HfDirectory
from dynaexq_jax.hf.plain import plain_experts
from dynaexq_jax.models.cache import KVCache
from dynaexq_jax.models.qwen3_moe import Qwen3Moe
from dynaexq_jax.models.weights import DenseWeights
from dynaexq_jax.serving.perplexity import load_for_scoring, score_text

WINDOW = 512
TRANSFORMERS = {"python": 2.096793518885697, "fr": 2.8930053111159677}
"""Mean loss of the first 8 windows of 512 tokens of examples/text, by transformers in float32."""


@pytest.fixture(scope="module")
def unquantized(hf_dir):
    return load_for_scoring(hf_dir, precision="bf16", window=WINDOW)


SHORT = 160
"""Tokens of a window where levels change: five chunks, each with a plan of its own."""


@pytest.fixture(scope="module")
def dynamic(converted):
    return load_for_scoring(converted, precision="dynamic", window=SHORT)


def score(served, name, windows, window=SHORT):
    return score_text(served, TEXT / f"{name}.txt", window=window, max_windows=windows)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_unquantized_experts_score_as_transformers(unquantized, name):
    got = score(unquantized, name, 8, WINDOW)
    assert got.tokens == 8 * WINDOW
    assert got.nll == pytest.approx(TRANSFORMERS[name], rel=1e-3)
    assert got.perplexity == pytest.approx(np.exp(got.nll))


def test_scores_are_the_definition_s(unquantized, hf_dir, tmp_path):
    """The same from the definition, the tokenizer's own library and the bare model."""
    documents = ["def f(x):\n    return x\n" * 20, "Il était une fois\n\n" * 25]
    text = "\n<|endoftext|>\n".join(documents) + "\n<|endoftext|>\n"
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    got = score_text(unquantized, path, window=64)

    tokenizer = Tokenizer.from_file(str(NANO / "tokenizer.json"))
    eos = tokenizer.token_to_id("<|endoftext|>")
    ids = []
    for document in documents:
        ids += [*tokenizer.encode(document, add_special_tokens=False).ids, eos]
    windows = [ids[at : at + 65] for at in range(0, len(ids) - 64, 64)]
    assert len(windows) >= 3

    source = HfDirectory.open(hf_dir)
    model = Qwen3Moe(
        source.config,
        DenseWeights.load(source.config, source.dense()),
        plain_experts(source),
        dtype=jnp.dtype("float32"),
    )
    graph, state = nnx.split(model)

    @jax.jit
    def logits(state, tokens):
        model = nnx.merge(graph, state)
        cache = KVCache.abstract(source.config, batch=1, context=64, dtype=jnp.dtype("float32"))
        cache = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), cache)
        return model.logits(model(tokens[None], jnp.arange(64)[None], cache).hidden[0])

    losses = []
    for window in windows:
        values = np.asarray(logits(state, jnp.asarray(window[:-1], jnp.int32)), np.float64)
        values -= values.max(axis=1, keepdims=True)
        losses += list(
            np.log(np.exp(values).sum(axis=1)) - values[np.arange(64), np.asarray(window[1:])]
        )
    assert got.tokens == len(losses)
    assert got.nll == pytest.approx(np.mean(losses), rel=1e-5)


def test_dynamic_lies_between_its_base_and_one_level_more(converted, dynamic):
    at = {
        bits: score(load_for_scoring(converted, precision=bits, window=SHORT), "fr", 3).nll
        for bits in ("2", "4")
    }
    assert at["4"] < score(dynamic, "fr", 3).nll < at["2"]
    assert (dynamic.engine.controller.levels() > 0).sum() > 12  # of 24 that have a page


def test_a_text_is_scored_afresh_whatever_came_before(converted, dynamic):
    fresh = load_for_scoring(converted, precision="dynamic", window=SHORT)
    alone = score(fresh, "python", 2)
    score(dynamic, "fr", 1)
    assert score(dynamic, "python", 2) == alone
    assert score(dynamic, "python", 2) == alone


def test_progress_is_told(unquantized):
    told = []
    score_text(
        unquantized,
        TEXT / "go.txt",
        window=32,
        max_windows=2,
        on_window=lambda: told.append("done"),
    )
    assert told == ["done", "done"]


def test_precisions_need_their_directory(converted, hf_dir):
    with pytest.raises(InputError, match="does not hold the unquantized experts; give the Hugging"):
        load_for_scoring(converted, precision="bf16", window=WINDOW)
    with pytest.raises(InputError, match="is not a converted checkpoint"):
        load_for_scoring(hf_dir, precision="4", window=WINDOW)


def test_windows_that_do_not_fit(unquantized, hf_dir, tmp_path):
    with pytest.raises(InputError, match="a window of 600 tokens does not fit a context of 512"):
        score_text(unquantized, TEXT / "go.txt", window=600, max_windows=1)
    with pytest.raises(InputError, match=r"a window of 5000 .* 4096 positions .* --window"):
        load_for_scoring(hf_dir, precision="bf16", window=5000)
    short = tmp_path / "short.txt"
    short.write_text("few words", encoding="utf-8")
    with pytest.raises(InputError, match=r"one window of 512 needs 513"):
        score_text(unquantized, short, window=WINDOW)
