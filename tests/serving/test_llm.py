"""Text in, text out: streams, stops, batches, seeds, and what is refused."""

import gc

import pytest

import dynaexq_jax as dx
from dynaexq_jax import InputError, SamplingParams

PROMPTS = [
    "def main(",
    "Il était une fois",
    "Октябрь, когда листья",
    "import os\n" * 12,
]


@pytest.fixture(scope="module")
def alone(llm):
    """Each prompt on its own, greedy."""
    return [llm.generate(prompt, max_tokens=24) for prompt in PROMPTS]


def collect(pieces):
    """(text, token ids, last piece) of the pieces of one prompt."""
    pieces = list(pieces)
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    tokens = [token for piece in pieces for token in piece.token_ids]
    return "".join(piece.text for piece in pieces), tokens, pieces[-1]


def test_one_prompt_gives_one_text_and_a_list_a_list(llm, alone):
    assert isinstance(alone[0], str)
    assert all(alone)
    assert llm.generate(PROMPTS[:1], max_tokens=24) == alone[:1]
    assert llm.generate([]) == []


def test_a_batch_of_different_lengths_equals_one_by_one(llm, alone):
    """Four prompts, three slots: one waits for a slot."""
    assert llm.generate(PROMPTS, max_tokens=24) == alone


def test_stream_adds_up_to_generate(llm, alone):
    for prompt, expected in zip(PROMPTS, alone, strict=True):
        text, tokens, last = collect(llm.stream_generate(prompt, max_tokens=24))
        assert text == expected
        assert llm.tokenizer.decode(tokens) == text
        assert len(tokens) == 24
        assert last.finish_reason == "length"
        assert last.stats.tokens == 24
        assert last.stats.prompt_tokens == len(llm.tokenizer.encode(prompt))
        assert 0 < last.stats.first_token_s < last.stats.elapsed_s
        assert last.stats.tokens_per_s > 0
        assert last.stats.pages_moved == last.stats.bytes_moved == 0


def test_pieces_of_a_batch_carry_their_prompt(llm, alone):
    texts = [""] * 3
    for piece in llm.stream_generate(PROMPTS[:3], max_tokens=24):
        texts[piece.index] += piece.text
    assert texts == alone[:3]


def test_two_streams_in_turns(llm, alone):
    first = llm.stream_generate(PROMPTS[0], max_tokens=24)
    second = llm.stream_generate(PROMPTS[1], max_tokens=24)
    texts = ["", ""]
    for one, other in zip(second, first, strict=True):  # the second begins
        texts[1] += one.text
        texts[0] += other.text
    assert texts == alone[:2]


def test_a_stream_that_begins_when_another_has_ended(llm, alone):
    first = llm.stream_generate(PROMPTS[0], max_tokens=24)
    second = llm.stream_generate(PROMPTS[1], max_tokens=24)
    assert collect(second)[0] == alone[1]
    assert collect(first)[0] == alone[0]


def test_more_streams_than_slots(llm, alone):
    streams = [llm.stream_generate(prompt, max_tokens=24) for prompt in PROMPTS]
    assert [collect(stream)[0] for stream in reversed(streams)] == alone[::-1]


@pytest.mark.parametrize("pieces_read", [0, 1, 5])
@pytest.mark.parametrize("leave", ["close", "drop"])
def test_a_stream_that_is_left_frees_its_slot(llm, alone, pieces_read, leave):
    streams = [llm.stream_generate(PROMPTS[3], max_tokens=100) for _ in range(4)]  # one waits
    for stream in streams[:3]:
        for _ in range(pieces_read):
            next(stream)
    if leave == "close":
        for stream in streams:
            stream.close()
    stream = None
    del streams
    gc.collect()
    steps = llm.engine.steps
    assert llm.generate(PROMPTS[0], max_tokens=24) == alone[0]
    assert llm.engine.steps - steps <= 24 + 3  # nothing else was run meanwhile
    assert not llm.engine.busy


@pytest.mark.parametrize("stops", [1, 2])
def test_stop_strings_end_the_text_before_them(llm, alone, stops):
    """Every place of the text can be one, inside tokens and across them."""
    expected = alone[0]
    for start in range(1, len(expected) - 6, 7):
        stop = expected[start : start + 6]
        given = [stop, "\0never\0"][:stops] if stops > 1 else stop
        stream = llm.stream_generate(PROMPTS[0], max_tokens=24, stop=given)
        text, tokens, last = collect(stream)
        assert text == expected[: expected.index(stop)]
        assert last.finish_reason == "stop"
        assert stop in llm.tokenizer.decode(tokens)
        assert stop not in llm.tokenizer.decode(tokens[:-1])  # and the sequence ends there
    assert llm.engine.step() == []  # steps that were under way are void
    assert not llm.engine.busy


def test_a_stop_string_that_never_completes_loses_nothing(llm, alone):
    stop = alone[0][-3:] + "\0"
    text, _, last = collect(llm.stream_generate(PROMPTS[0], max_tokens=24, stop=[stop]))
    assert (text, last.finish_reason) == (alone[0], "length")


def test_the_end_of_sequence_token_ends_and_has_no_text(llm, alone):
    """The model has learnt where a Python file of tests ends."""
    ending = 'if __name__ == "__main__":\n    unittest.main()'
    text, tokens, last = collect(llm.stream_generate(ending, max_tokens=24))
    assert (text, tokens, last.finish_reason) == ("", [llm.tokenizer.eos_id], "eos")
    batch = llm.generate([PROMPTS[0], ending, PROMPTS[2]], max_tokens=24)
    assert batch == [alone[0], "", alone[2]]


@pytest.mark.parametrize("prompt", PROMPTS[1:3])
def test_only_whole_characters_are_streamed(llm, prompt):
    pieces = list(llm.stream_generate(prompt, max_tokens=60))
    assert not any("\ufffd" in piece.text for piece in pieces)
    text = "".join(piece.text for piece in pieces)
    assert any(ord(character) > 127 for character in text)
    assert text == llm.tokenizer.decode([token for piece in pieces for token in piece.token_ids])


def test_characters_of_several_tokens_come_whole(llm):
    """No token holds this character: the model, told to go on with it, writes its bytes."""
    pieces = list(llm.stream_generate("🙂" * 8, max_tokens=32))
    assert [piece.text for piece in pieces] == ["", "", "", "🙂"] * 8


def test_seeds_reproduce(llm):
    def text(prompt=PROMPTS[0], **options):
        return llm.generate(prompt, max_tokens=20, temperature=1.0, **options)

    assert text(seed=5) == text(seed=5)
    assert text(seed=5) != text(seed=6)
    assert text([PROMPTS[1], PROMPTS[0], PROMPTS[2]], seed=5)[1] == text(seed=5)
    params = SamplingParams(temperature=1.0, seed=5)
    assert llm.generate(PROMPTS[0], max_tokens=20, sampling=params) == text(seed=5)


def test_chat_is_the_templated_text(llm):
    messages = [
        {"role": "system", "content": "Short."},
        {"role": "user", "content": "Qui est là ?"},
    ]
    templated = (
        "<|im_start|>system\nShort.<|im_end|>\n<|im_start|>user\nQui est là ?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    text, _, last = collect(llm.stream_chat(messages, max_tokens=16))
    assert text == llm.generate(templated, max_tokens=16)
    assert last.stats.prompt_tokens == len(llm.tokenizer.encode(templated))


def test_unquantized_experts_generate_too(plain, alone):
    text = plain.generate(PROMPTS[0], max_tokens=24)
    assert text[:4] == alone[0][:4]
    assert plain.plan is None
    assert plain.residency() is None


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty"),
        (["def", ""], {}, "the prompt is empty"),
        ("word " * 300, {}, "tokens and 4 new ones do not fit a context of 256"),
        ("def", {"max_tokens": 256}, "and 256 new ones do not fit a context of 256"),
        ("def", {"max_tokens": 0}, "max_tokens must be positive, got 0"),
        ("def", {"stop": ["a", ""]}, "a stop string cannot be empty"),
        ("def", {"stop": ""}, "a stop string cannot be empty"),
        ("def", {"temprature": 1.0}, "unknown option 'temprature'; sampling takes"),
        ("def", {"top_p": 0.0}, "top_p must be in"),
        ("def", {"sampling": SamplingParams(), "seed": 1}, "either sampling or its fields"),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing_behind(llm, prompt, options, message):
    with pytest.raises(InputError, match=message):
        llm.stream_generate(prompt, **({"max_tokens": 4} | options))
    assert not llm.engine.busy


def test_the_package_offers_its_names():
    assert {name for name in dx.__all__ if getattr(dx, name)} == set(dx.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        dx.lod  # noqa: B018
