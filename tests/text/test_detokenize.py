import random
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaexq_jax.text import StreamDetokenizer, load_tokenizer

SCRIPTS = (
    "def main():\n    return  'tabs\tand  spaces'\n",
    "Ça coûte 12 € — n'est-ce pas ? Œuvre, naïf.",
    "Глава первая. В буре и грозе",
    "吾輩は猫である。名前はまだ無い。",
    "人工智能，机器学习与深度学习",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "안녕하세요 세계",
    "👩‍👩‍👧‍👦 👍🏽 🇫🇷 ☃️ 𝕏",
    "e\u0301 a\u0300\u0301 \u200b\u200d \ufffd literal \ufffd",
    "  leading and trailing  ",
)


def stream(tokenizer, ids):
    detokenizer = StreamDetokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in ids]
    return [*pieces, detokenizer.finish()]


@pytest.mark.parametrize("text", SCRIPTS)
def test_real_text_of_many_scripts(tokenizer, text):
    pieces = stream(tokenizer, tokenizer.encode(text))
    # The tokenizer composes characters, as the model was trained.
    assert "".join(pieces) == unicodedata.normalize("NFC", text)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_characters_that_come_in_several_tokens_wait_until_they_are_whole(tokenizer):
    ids = tokenizer.encode("𝕏")
    assert len(ids) > 1
    assert stream(tokenizer, ids) == [""] * (len(ids) - 1) + ["𝕏", ""]


def test_a_character_cut_off_by_the_end_is_flushed(tokenizer):
    ids = tokenizer.encode("ok 𝕏")[:-1]
    pieces = stream(tokenizer, ids)
    assert "".join(pieces[:-1]).rstrip() == "ok"
    assert pieces[-1] == "\ufffd"


def test_text_comes_without_delay(tokenizer):
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog")
    assert stream(tokenizer, ids)[:-1] == [tokenizer.decode([token]) for token in ids]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_ids(nano_tokenizer_ids, data):
    tokenizer, halves = nano_tokenizer_ids
    token = st.one_of(st.integers(0, tokenizer.vocab_size - 1), st.sampled_from(halves))
    ids = data.draw(st.lists(token, max_size=40))
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.fixture(scope="module")
def nano_tokenizer_ids(nano_dir):
    """The tokenizer and the ids whose bytes are no UTF-8 by themselves, or no text at all."""
    tokenizer = load_tokenizer(nano_dir)
    texts = {token: tokenizer.decode([token]) for token in range(tokenizer.vocab_size)}
    halves = [token for token, text in texts.items() if "\ufffd" in text or not text]
    assert len(halves) > 100
    return tokenizer, halves


class Counting:
    """Counts the tokens that are decoded."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoded = tokenizer, 0

    def decode(self, ids):
        self.decoded += len(ids)
        return self.tokenizer.decode(ids)


def test_cost_is_linear_even_for_bytes_that_never_become_text(nano_tokenizer_ids):
    tokenizer, halves = nano_tokenizer_ids
    rng = random.Random(0)
    for ids in (
        tokenizer.encode("".join(SCRIPTS) * 4),
        [rng.choice(halves) for _ in range(600)],
        [next(t for t in halves if tokenizer.decode([t, t]) == "\ufffd\ufffd")] * 600,
    ):
        counting = Counting(tokenizer)
        assert "".join(stream(counting, ids)) == tokenizer.decode(ids)
        assert counting.decoded < 25 * len(ids)
