"""Requests of benchmarks on the shipped model."""

import numpy as np
import pytest

from dynaexq_jax import InputError, SamplingParams
from dynaexq_jax.tasks.generation import Generation
from dynaexq_jax.tasks.pairs import encode_pair

CONTEXT = 256
PROMPTS = ["def main(", "Il était une fois", "import os\nimport sys\n", "Октябрь, когда"]


@pytest.fixture(autouse=True)
def fresh(model):
    model.restart()


def losses(model, ids):
    """Of the tokens after the first, scored alone, in a window of one length for all."""
    windows = np.zeros((1, CONTEXT + 1), np.int32)
    windows[0, : len(ids)] = ids
    return model.llm.engine.score_rows(windows, np.array([len(ids) - 1]))[0][0, : len(ids) - 1]


def test_likelihoods_come_in_the_order_of_the_requests(model):
    texts = [("import os\nimport", " sys"), ("", "def main"), *((p, " x") for p in PROMPTS)]
    done = []
    found = model.log_likelihoods(texts, done.append)
    assert sum(done) == len(texts)
    for text, likelihood in zip(texts, found, strict=True):
        pair = encode_pair(model.llm.tokenizer, *text)
        of_tokens = losses(model, pair.context + pair.continuation)
        expected = -of_tokens[len(pair.context) - 1 :].sum(dtype=np.float64)
        assert likelihood.log == pytest.approx(expected, rel=1e-5)
    assert model.truncated == 0


def test_the_end_of_a_long_context_is_what_counts(model):
    tokenizer, long = model.llm.tokenizer, "import unittest\n" * 60 + "import os\nimport"
    assert len(tokenizer.encode(long)) > CONTEXT
    (found,) = model.log_likelihoods([(long, " sys")])
    assert model.truncated == 1
    scored = len(tokenizer.encode(f"{long} sys")) - len(tokenizer.encode(long))
    of_tokens = losses(model, tokenizer.encode(f"{long} sys")[-CONTEXT - 1 :])
    assert found.log == pytest.approx(-of_tokens[-scored:].sum(), rel=1e-5)
    with pytest.raises(InputError, match=f"does not fit a context of {CONTEXT}; raise --context"):
        model.log_likelihoods([("a", long)])


def test_a_text_is_the_sum_of_its_windows(model):
    text = "def main():\n    return 1\n\n\n" * 32
    texts = [text, "", "Il était"]
    done = []
    long, empty, short = model.log_likelihoods_of_texts(texts, done.append)
    assert done == [1, 1, 1]
    assert empty == 0
    tokenizer = model.llm.tokenizer
    ids = [tokenizer.eos_id, *tokenizer.encode(text)]
    size = CONTEXT + 1
    assert size < len(ids) < 2 * size - 1
    first, last = losses(model, ids[:size]), losses(model, ids[-size:])
    expected = -first.sum() - last[-(len(ids) - size) :].sum()
    assert long == pytest.approx(expected, rel=1e-5)
    ids = [tokenizer.eos_id, *tokenizer.encode("Il était")]
    assert short == pytest.approx(-losses(model, ids).sum(), rel=1e-5)
    assert model.truncated == 0


def test_prompts_are_continued_each_in_its_way(model):
    alone = [model.llm.generate(prompt, max_tokens=24) for prompt in PROMPTS]
    stop = alone[0][5:9]
    ways = [
        Generation(stop=(stop,), max_tokens=24),
        *(Generation(max_tokens=n) for n in (4, 24, 9)),
    ]
    done = []
    found = model.generate(list(zip(PROMPTS, ways, strict=True)), done.append)
    assert sum(done) == len(PROMPTS)
    assert found[0] == alone[0][: alone[0].index(stop)]
    assert found[1] == model.llm.generate(PROMPTS[1], max_tokens=4)
    assert found[2] == alone[2]
    assert found[3] == model.llm.generate(PROMPTS[3], max_tokens=9)
    assert not model.llm.engine.busy


def test_a_long_prompt_leaves_room_for_its_tokens(model):
    prompt = "import unittest\n" * 60
    ((text),) = model.generate([(prompt, Generation(max_tokens=32))])
    assert model.truncated == 1
    assert text
    with pytest.raises(InputError, match=r"256 new tokens leave no room .* 256; raise --context"):
        model.generate([("a", Generation(max_tokens=CONTEXT))])
    assert not model.llm.engine.busy


def test_equal_prompts_draw_different_tokens(model):
    way = Generation(max_tokens=12, sampling=SamplingParams(temperature=1.5))
    texts = model.generate([(PROMPTS[0], way)] * 3)
    assert len(set(texts)) == 3
    assert model.generate([(PROMPTS[0], way)] * 3) == texts
