"""Metrics: what they say beside what was seen from outside."""

import time

import numpy as np
import prometheus_client
import pytest
from engine.small import EOS

from dynaexq_jax import metrics
from dynaexq_jax.engine.sampling import SamplingParams

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(8, 250, n).tolist() for n in (1, 5, 17, 33)]
CHUNK = 16


@pytest.fixture(scope="module")
def bank(small):
    return small.bank(base_bits=4, pool_pages=0)


def samples(engine):
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in engine.metrics.registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


class Clock:
    """Stands for the module ``time``: a step is a second."""

    def __init__(self):
        self.steps = 0

    def perf_counter(self):
        return float(self.steps)


def test_counters_are_what_was_dispatched_and_received(small, bank, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("dynaexq_jax.engine.engine.time", clock)
    engine = small.engine(bank, batch=2, chunk=CHUNK)
    assert not any(samples(engine).values())
    for prompt in PROMPTS:
        engine.add(prompt, max_tokens=9)
    received = {}
    while engine.busy:
        clock.steps += 1
        for event in engine.step():
            received.setdefault(event.sequence, []).append(clock.steps)

    value = engine.metrics.value
    assert value("dynaexq_prompt_tokens_total") == sum(map(len, PROMPTS))
    chunks = sum(-(-len(prompt) // CHUNK) for prompt in PROMPTS)
    assert value("dynaexq_prompt_chunks_total") == chunks
    assert value("dynaexq_generated_tokens_total") == sum(map(len, received.values()))
    assert value("dynaexq_decode_steps_total") == engine.steps - chunks > 8
    assert value("dynaexq_window_chunks_total") == 0

    first = value("dynaexq_time_to_first_token_seconds_sum")
    assert value("dynaexq_time_to_first_token_seconds_count") == len(PROMPTS)
    assert first == sum(steps[0] for steps in received.values())
    longer = [steps for steps in received.values() if len(steps) > 1]
    each = [(steps[-1] - steps[0]) / (len(steps) - 1) for steps in longer]
    assert value("dynaexq_time_per_output_token_seconds_count") == len(longer) > 0
    assert value("dynaexq_time_per_output_token_seconds_sum") == pytest.approx(sum(each))


def test_dispatching_is_timed_for_every_decode_step(small, bank):
    engine = small.engine(bank)
    engine.add(PROMPTS[1], max_tokens=9)
    before = time.perf_counter()
    list(engine.run())
    elapsed = time.perf_counter() - before
    value = engine.metrics.value
    count = value("dynaexq_step_dispatch_seconds_count")
    assert count == value("dynaexq_decode_steps_total") > 1
    assert 0 < value("dynaexq_step_dispatch_seconds_sum") < elapsed


def test_a_sequence_that_is_cancelled_counts_as_far_as_it_came(small, bank):
    engine = small.engine(bank)
    number = engine.add(PROMPTS[1], max_tokens=40)
    waiting = engine.add(PROMPTS[2], max_tokens=40)
    events = []
    while len(events) < 3:
        events += engine.step()
    assert EOS not in [event.token for event in events]
    engine.cancel(number)
    engine.cancel(waiting)
    while engine.step():
        pass
    value = engine.metrics.value
    assert value("dynaexq_generated_tokens_total") == len(events)
    assert value("dynaexq_time_to_first_token_seconds_count") == 1
    assert value("dynaexq_time_per_output_token_seconds_count") == 1


def test_chunks_of_windows_are_counted(small, bank):
    engine = small.engine(bank, chunk=8)
    for _ in range(3):
        engine.score(np.asarray(PROMPTS[3][:9], np.int32))
    assert engine.metrics.value("dynaexq_window_chunks_total") == engine.steps == 3
    assert engine.metrics.value("dynaexq_decode_steps_total") == 0


def test_engines_do_not_share(small, bank):
    one, other = small.engine(bank), small.engine(bank)
    one.add(PROMPTS[0], max_tokens=4, sampling=SamplingParams(temperature=1.0, seed=1))
    list(one.run())
    assert one.metrics.value("dynaexq_generated_tokens_total") > 0
    assert not any(samples(other).values())
    names = {family.name for family in prometheus_client.REGISTRY.collect()}
    assert not any(name.startswith(metrics.PREFIX) for name in names)


def test_the_text_form_explains_every_metric(small, bank):
    engine = small.engine(bank)
    text = prometheus_client.generate_latest(engine.metrics.registry).decode()
    for name, _, help_text in metrics.ENGINE:
        assert f"# HELP dynaexq_{name}_total {help_text}\n" in text
        assert f"\ndynaexq_{name}_total 0.0\n" in text
    for name, help_text, buckets in (
        metrics.TIME_TO_FIRST_TOKEN,
        metrics.TIME_PER_OUTPUT_TOKEN,
        metrics.STEP_DISPATCH,
    ):
        assert f"# HELP dynaexq_{name} {help_text}\n" in text
        assert text.count(f"\ndynaexq_{name}_bucket") == len(buckets) + 1
    assert "pool_pages" not in text  # nothing is ever promoted here
    with pytest.raises(KeyError, match="no sample dynaexq_promotions_total"):
        engine.metrics.value("dynaexq_promotions_total")


def test_helps_are_sentences_and_names_are_used_once():
    tables = (*metrics.ENGINE, *metrics.MIGRATION, *metrics.ROUTING)
    single = (metrics.IN_FLIGHT, metrics.POOL_PAGES)
    histograms = (metrics.TIME_TO_FIRST_TOKEN, metrics.TIME_PER_OUTPUT_TOKEN, metrics.STEP_DISPATCH)
    names = [entry[0] for entry in (*tables, *single, *histograms)]
    assert len(set(names)) == len(names)
    helps = [entry[-1] for entry in (*tables, *single)] + [entry[1] for entry in histograms]
    assert all(text[0].isupper() and text.endswith(".") for text in helps)
