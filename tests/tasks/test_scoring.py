"""Batches of continuations against windows of their own."""

import numpy as np
import pytest
from controller.test_with_model import Setup
from engine.small import CONFIG

from dynaexq_jax.errors import InputError
from dynaexq_jax.tasks.pairs import Pair
from dynaexq_jax.tasks.scoring import by_length, padded_length, score_pairs

CONTEXT = 64


def random_pairs(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, CONFIG.vocab_size, sum(size)).tolist() for size in sizes]
    return [Pair(tuple(i[:c]), tuple(i[c:])) for i, (c, _) in zip(ids, sizes, strict=True)]


@pytest.fixture(scope="module")
def bank(small):
    return small.bank(base_bits=8, pool_pages=0)


def test_pairs_score_as_windows_of_their_own(small, bank):
    pairs = random_pairs((5, 1), (1, 7), (40, 20), (60, 5), (33, 1))
    alone, together = small.engine(bank), small.engine(bank, batch=3)
    told = []
    found = score_pairs(together, pairs, told.append)
    assert told == [3, 2]
    assert together.steps == 4 + 4  # chunks of 16 tokens
    assert len(found) == len(pairs)
    for pair, likelihood in list(zip(pairs, found, strict=True))[1:4]:
        losses = alone.score(np.asarray(pair.context + pair.continuation))
        expected = -losses[len(pair.context) - 1 :].sum(dtype=np.float64)
        assert likelihood.log == pytest.approx(expected, rel=1e-5)


def test_greedy_is_what_greedy_decoding_gives(small, bank):
    engine = small.engine(bank, batch=2)
    prompt = [3, 14, 15, 92, 65]
    engine.add(prompt, max_tokens=6)
    tokens = tuple(event.token for event in engine.run())
    other = (*tokens[:-1], (tokens[-1] + 1) % CONFIG.vocab_size)
    before = (tuple(prompt) + tokens)[: len(prompt) + 3]
    pairs = [Pair(tuple(prompt), tokens), Pair(tuple(prompt), other), Pair(before, tokens[3:])]
    assert [it.greedy for it in score_pairs(engine, pairs)] == [True, False, True]


def test_few_shapes(small, bank, monkeypatch):
    engine = small.engine(bank, batch=2)
    shapes = []
    score_rows = engine.score_rows

    def note(windows, lengths):
        shapes.append(windows.shape)
        return score_rows(windows, lengths)

    monkeypatch.setattr(engine, "score_rows", note)
    score_pairs(engine, random_pairs(*((length, 1) for length in range(1, 65, 4))))
    assert set(shapes) == {(2, 33), (2, 65)}
    assert [padded_length(n, 1000) for n in (1, 32, 33, 64, 65, 600)] == [32, 32, 64, 64, 128, 1000]
    assert padded_length(5, 16) == 16


def test_what_does_not_fit_is_refused(small, bank):
    with pytest.raises(InputError, match="a window of 65 tokens does not fit a context of 64"):
        small.engine(bank).score_rows(np.zeros((1, 66), np.int32), np.full(1, 65))
    with pytest.raises(InputError, match="3 windows at once need as many slots, and there are 2"):
        small.engine(bank, batch=2).score_rows(np.zeros((3, 9), np.int32), np.full(3, 8))


def test_order_keeps_contexts_together_and_lengths_near():
    a, b, c = (1, 2, 3), (4, 5), (6,) * 9
    pairs = [Pair(a, (1,)), Pair(b, (1,)), Pair(a, (1,) * 5), Pair(c, (1,)), Pair(b, (2,))]
    assert by_length(pairs) == [3, 0, 2, 1, 4]


def test_levels_follow_the_batches_and_a_restart_repeats(small):
    setup = Setup(small, "blocking", interval=2)
    pairs = random_pairs((30, 4), (30, 4), (30, 4))

    def run():
        levels = []
        scores = score_pairs(setup.engine, pairs, lambda _: levels.append(setup.device_levels()))
        return scores, np.stack(levels)

    first, levels = run()
    assert levels.any()
    assert setup.engine.steps == 3 * 3  # chunks of 16, of 33 tokens each
    setup.controller.restart()
    again, levels_again = run()
    assert again == first
    np.testing.assert_array_equal(levels_again, levels)
