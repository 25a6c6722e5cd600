"""Where continuations begin, and how texts are cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving.nano import NANO

from dynaexq_jax.errors import InputError
from dynaexq_jax.tasks.pairs import Pair, encode_pair, rolling_pairs
from dynaexq_jax.text import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(NANO)


def test_a_continuation_has_the_tokens_that_it_has_in_the_whole_text(tokenizer):
    context, continuation = "Question: is it so?\nAnswer:", " yes, indeed"
    pair = encode_pair(tokenizer, context, continuation)
    assert list(pair.context) == tokenizer.encode(context)
    assert list(pair.context + pair.continuation) == tokenizer.encode(context + continuation)
    assert tokenizer.decode(pair.continuation) == continuation


def test_white_space_before_a_continuation_belongs_to_it(tokenizer):
    moved = encode_pair(tokenizer, "Answer:\n ", "yes")
    assert moved == encode_pair(tokenizer, "Answer:", "\n yes")
    assert list(moved.context) == tokenizer.encode("Answer:")


def test_a_token_across_the_boundary_counts_as_the_contexts(tokenizer):
    """Alone the context has other tokens than in the whole text, but as many are not scored."""
    context, continuation = "import uni", "ttest\n"
    whole, alone = tokenizer.encode(context + continuation), tokenizer.encode(context)
    assert whole[: len(alone)] != alone
    pair = encode_pair(tokenizer, context, continuation)
    assert pair == (tuple(alone), tuple(whole[len(alone) :]))


@pytest.mark.parametrize("context", ["", "  "])
def test_without_a_context_a_document_begins(tokenizer, context):
    pair = encode_pair(tokenizer, context, "def main")
    assert pair.context == (tokenizer.eos_id,)
    assert list(pair.continuation) == tokenizer.encode(context + "def main")
    assert encode_pair(tokenizer, "", "<|endoftext|>def main") == encode_pair(
        tokenizer, "", "def main"
    )


@pytest.mark.parametrize("texts", [("Answer:", ""), ("", ""), ("", "<|endoftext|>")])
def test_something_has_to_be_scored(tokenizer, texts):
    with pytest.raises(InputError, match="has no token of its own after"):
        encode_pair(tokenizer, *texts)


def test_a_long_context_loses_its_beginning():
    pair = Pair((1, 2, 3, 4), (5, 6))
    assert pair.inputs == 5
    assert pair.cut(5) is pair or pair.cut(5) == pair
    assert pair.cut(3) == Pair((3, 4), (5, 6))
    assert pair.cut(2) == Pair((4,), (5, 6))
    with pytest.raises(InputError, match="continuation of 2 tokens does not fit a context of 1"):
        pair.cut(1)


def test_windows_of_a_text():
    assert rolling_pairs(range(10), prefix=-1, context=4) == [
        Pair((-1,), (0, 1, 2, 3)),
        Pair((3,), (4, 5, 6, 7)),
        Pair((5, 6, 7), (8, 9)),
    ]
    assert rolling_pairs([], prefix=-1, context=4) == []


@given(st.integers(0, 40), st.integers(1, 12))
def test_windows_predict_each_token_once_with_all_that_fits_before_it(count, context):
    pairs = rolling_pairs(range(count), prefix=-1, context=context)
    assert [token for pair in pairs for token in pair.continuation] == list(range(count))
    for pair in pairs:
        ids = pair.context + pair.continuation
        assert list(ids) == list(range(ids[0], ids[-1] + 1))
        assert pair.inputs <= context
        assert pair.inputs == min(context, ids[-1] + 1)
