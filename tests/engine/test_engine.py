"""Batch slots, run-ahead, ends of sequences, and what is refused."""

import jax
import numpy as np
import pytest
from engine.small import CONFIG, EOS

from dynaexq_jax.engine.engine import STEPS_IN_FLIGHT
from dynaexq_jax.engine.prompt import Prompt
from dynaexq_jax.engine.sampling import SamplingParams
from dynaexq_jax.errors import InputError

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(8, 250, n).tolist() for n in (1, 5, 17, 33)]


def run(engine, prompts, **options):
    numbers = [engine.add(prompt, **options) for prompt in prompts]
    tokens = {number: [] for number in numbers}
    for event in engine.run():
        tokens[event.sequence].append(event.token)
    return [tokens[number] for number in numbers]


@pytest.fixture(scope="module")
def bank(small):
    return small.bank(base_bits=4, pool_pages=0)


@pytest.fixture(scope="module")
def alone(small, bank):
    """Each prompt on its own, greedy."""
    engine = small.engine(bank)
    return [run(engine, [prompt], max_tokens=12)[0] for prompt in PROMPTS]


def test_lengths(alone):
    for tokens in alone:
        assert len(tokens) == 12 or tokens[-1] == EOS


@pytest.mark.parametrize("batch", [2, 3, 4])
def test_prompts_of_different_lengths_share_a_batch(small, bank, alone, batch):
    assert run(small.engine(bank, batch=batch), PROMPTS, max_tokens=12) == alone


@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_chunks_do_not_matter(small, bank, alone, chunk):
    assert run(small.engine(bank, chunk=chunk), PROMPTS, max_tokens=12) == alone


def test_slots_are_reused_and_void_steps_are_few(small, bank, alone):
    engine = small.engine(bank, chunk=64)
    for prompt, expected in zip(PROMPTS, alone, strict=True):
        before = engine.steps
        assert run(engine, [prompt], max_tokens=12)[0] == expected
        # one prompt chunk, one decode step for each token after the first, run-ahead after an eos
        assert engine.steps - before <= len(expected) + 2
    assert not engine.busy


def test_the_last_tokens_come_one_a_call_like_all_others(small, bank):
    engine = small.engine(bank)
    engine.add(PROMPTS[0], max_tokens=8)
    counts = []
    while engine.busy:
        counts.append(len(engine.step()))
    assert sum(counts) == 8
    assert max(counts) == 1


def test_seeds_reproduce_whatever_shares_the_batch(small, bank):
    warm = {"max_tokens": 20, "sampling": SamplingParams(temperature=1.0, seed=11)}
    first = run(small.engine(bank), PROMPTS[2:3], **warm)[0]
    assert run(small.engine(bank), PROMPTS[2:3], **warm)[0] == first
    engine = small.engine(bank, batch=3)
    assert run(engine, [PROMPTS[0], PROMPTS[2], PROMPTS[1]], **warm)[1] == first
    other = {"max_tokens": 20, "sampling": SamplingParams(temperature=1.0, seed=12)}
    assert run(small.engine(bank), PROMPTS[2:3], **other)[0] != first


def test_greedy_tokens_do_not_depend_on_a_slot_that_draws(small, bank, alone):
    engine = small.engine(bank, batch=2)
    greedy = engine.add(PROMPTS[1], max_tokens=12)
    engine.add(PROMPTS[2], max_tokens=6, sampling=SamplingParams(temperature=1.0, seed=3))
    assert [event.token for event in engine.run() if event.sequence == greedy] == alone[1]


def test_only_a_step_that_draws_sorts_the_vocabulary(small, bank):
    engine = small.engine(bank)
    arguments = engine.params, engine.experts, engine.state
    greedy, draws = (
        small.programs.decode.lower(*arguments, draws=draws).as_text().count("stablehlo.sort")
        for draws in (False, True)
    )
    assert draws == greedy + 1  # that of the router's tiles is in both


def test_few_results_are_under_way_while_a_long_prompt_is_read(small, bank):
    engine = small.engine(bank, batch=2, chunk=4)
    engine.add(PROMPTS[3], max_tokens=8)
    engine.add(PROMPTS[1], max_tokens=20)
    under_way = []
    while engine.busy:
        engine.step()
        under_way.append(len(engine._in_flight))
    assert max(under_way) == STEPS_IN_FLIGHT


def test_only_prompts_are_sent_each_once_and_ahead_of_its_turn(small, bank, alone, monkeypatch):
    """Whatever else a step sent would wait for the pages that are on their way."""
    engine = small.engine(bank, batch=2)
    run(engine, PROMPTS, max_tokens=12, sampling=SamplingParams(temperature=1))
    run(engine, PROMPTS, max_tokens=12)  # all programs are compiled, what is constant is there
    send, sent = Prompt.send, []

    def allowed(tokens, **options):
        sent.append(tokens.tolist())
        with jax.transfer_guard_host_to_device("allow"):
            return send(tokens, **options)

    monkeypatch.setattr(Prompt, "send", allowed)
    with jax.transfer_guard_host_to_device("disallow_explicit"):
        with pytest.raises(jax.errors.JaxRuntimeError, match="isallowed"):
            jax.device_put(np.zeros(3))
        numbers = [engine.add(prompt, max_tokens=12) for prompt in PROMPTS]
        assert sent == PROMPTS[:1]
        tokens = {number: [] for number in numbers}
        while engine.busy:
            for event in engine.step():
                tokens[event.sequence].append(event.token)
            assert len(sent) <= len(PROMPTS) - len(engine._waiting) + 1
    assert sent == PROMPTS
    assert list(tokens.values()) == alone


def test_a_prompt_that_moves_up_is_sent(small, bank, alone):
    engine = small.engine(bank)
    first, second, third = (engine.add(prompt, max_tokens=12) for prompt in PROMPTS[1:])
    engine.step()
    engine.cancel(second)
    tokens = {first: [], third: []}
    for event in engine.run():
        tokens[event.sequence].append(event.token)
    assert tokens == {first: alone[1], third: alone[3]}


def test_end_of_sequence_token_ends(small, bank):
    """Drawn at a high temperature, some sequence meets the eos token early."""
    engine = small.engine(bank, batch=4, context=64)
    found = {
        engine.add(
            PROMPTS[0], max_tokens=60, sampling=SamplingParams(temperature=3.0, seed=seed)
        ): []
        for seed in range(24)
    }
    for event in engine.run():
        found[event.sequence].append(event.token)
    for tokens in found.values():
        assert EOS not in tokens[:-1]
        assert len(tokens) == 60 or tokens[-1] == EOS
    assert min(map(len, found.values())) < 60


def test_last_event_says_so(small, bank):
    engine = small.engine(bank)
    engine.add(PROMPTS[1], max_tokens=5)
    events = list(engine.run())
    assert [event.last for event in events] == [False] * (len(events) - 1) + [True]


def test_cancel_frees_the_slot(small, bank, alone):
    engine = small.engine(bank)
    first = engine.add(PROMPTS[3], max_tokens=30)
    waiting = engine.add(PROMPTS[2], max_tokens=30)
    events = []
    while len(events) < 3:
        events += engine.step()
    engine.cancel(first)
    engine.cancel(waiting)
    assert run(engine, PROMPTS[1:2], max_tokens=12)[0] == alone[1]
    assert not engine.busy


def test_router_statistics_count_every_valid_token(small, bank):
    engine = small.engine(bank, batch=2, chunk=16)
    tokens = run(engine, PROMPTS[1:3], max_tokens=9)
    stats = engine.state.stats
    # the last token of a sequence is never read
    read = sum(len(p) for p in PROMPTS[1:3]) + sum(len(t) - 1 for t in tokens)
    assert int(stats.tokens) == read
    # normalised expert weights of a token sum to 1 in every layer
    np.testing.assert_allclose(np.asarray(stats.mass).sum(axis=1), read, rtol=1e-5)


def test_scores_are_the_losses_of_the_logits(small, bank):
    window = np.asarray(PROMPTS[3][:21], np.int32)
    engine = small.engine(bank)
    losses = engine.score(window)
    assert losses.shape == (20,)
    np.testing.assert_allclose(engine.score(window), losses, rtol=1e-6)
    shorter = engine.score(window[:11])
    np.testing.assert_allclose(shorter, losses[:10], rtol=1e-4)  # causal


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 4, "the prompt is empty"),
        ([3, CONFIG.vocab_size], 4, "token id 256 is out of range; the vocabulary has ids 0..255"),
        ([-1], 4, "token id -1 is out of range"),
        ([3], 0, "max_tokens must be positive, got 0"),
        ([3] * 60, 5, "60 tokens and 5 new ones do not fit a context of 64"),
    ],
)
def test_bad_requests_are_refused(small, bank, prompt, max_tokens, message):
    with pytest.raises(InputError, match=message):
        small.engine(bank).add(prompt, max_tokens=max_tokens)


def test_context_can_be_filled_to_the_last_token(small, bank):
    (tokens,) = run(small.engine(bank), [[9] * 60], max_tokens=4)
    assert len(tokens) == 4 or tokens[-1] == EOS
