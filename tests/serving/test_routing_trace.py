"""Routing of a served model on file, and what its replay says beside what has happened."""

import numpy as np
import pytest
from serving.conftest import SHAPES
from serving.nano import TEXT

import dynaexq_jax as dx
from dynaexq_jax import InputError
from dynaexq_jax.policy import Hotness, make_policy
from dynaexq_jax.serving.perplexity import load_for_scoring, score_text
from dynaexq_jax.traffic import Ladder, RoutedModel, Trace, simulate

OPTIONS = {"base_bits": 2, "pages": 24, "interval": 2, **SHAPES}


@pytest.mark.parametrize("policy", ["blocking", "dynamic"])
def test_a_trace_holds_what_the_controller_has_learnt(converted, tmp_path, policy):
    path = tmp_path / "routing.trace"
    llm = dx.load(converted, policy=policy, routing_trace=path, **OPTIONS)
    for name in ("python", "fr"):
        llm.generate((TEXT / f"{name}.txt").read_text(encoding="utf-8")[:300], max_tokens=20)
    llm.engine.controller.settle()
    trace = Trace.read(path)
    # the first chunk has tokens enough for an interval, all others take two steps, or as many as it
    # takes until the last one is planned for
    most = 1 + (llm.engine.steps - 1) // 2
    least = most if policy == "blocking" else most // 4
    assert least <= len(trace.records) <= most
    # no token is lost: the last new one of each text is not read
    counters, rest = llm.engine.counters, llm.engine.state.stats.tokens
    read = counters.prompt_tokens + counters.tokens - 2
    assert sum(tokens for _, tokens in trace.intervals()) + rest == read
    hotness = Hotness.cold(3, 32)
    for mass, tokens in trace.intervals():
        hotness = hotness.update(mass, tokens)
        np.testing.assert_allclose(mass.sum(axis=1), tokens, rtol=1e-5)
    np.testing.assert_array_equal(hotness.mean, llm.engine.controller.hotness.mean)
    assert trace.header.model == RoutedModel.of(llm.config)
    assert (trace.header.base_bits, trace.header.pool_pages, trace.header.interval) == (2, 24, 2)

    if policy == "blocking":  # as in a simulation, each plan is carried out at once
        got = simulate(
            trace,
            make_policy(policy),
            ladder=Ladder(base_bits=2, max_bits=8, pool_pages=24),
            interval=2,
        )
        moved = llm.engine.controller.counters
        assert (got.promotions, got.demotions) == (moved.promotions, moved.demotions)
        assert got.pages_moved == moved.pages > 24
        assert got.plans == llm.engine.controller.plans


def test_scores_are_traced_by_chunk(converted, tmp_path):
    path = tmp_path / "routing.trace"
    served = load_for_scoring(converted, precision="dynamic", window=64, routing_trace=path)
    for name in ("go", "ru"):
        score_text(served, TEXT / f"{name}.txt", window=64, max_windows=3)
    assert [tokens for _, tokens in Trace.read(path).intervals()] == [32] * 12


@pytest.mark.parametrize("case", ["exists", "folder", "no pool", "unquantized"])
def test_bad_places_are_refused_before_anything_is_allocated(
    converted, hf_dir, tmp_path, case, monkeypatch
):
    for place in ("ExpertBank.allocate", "plain_experts"):
        monkeypatch.setattr(f"dynaexq_jax.serving.loading.{place}", None)
    path, model, options = tmp_path / "routing.trace", converted, OPTIONS
    if case == "exists":
        path.write_text("something")
    elif case == "folder":
        path.mkdir()
    elif case == "no pool":
        options = {"base_bits": 4, **SHAPES}
    else:
        model, options = hf_dir, SHAPES
    message = {
        "exists": "exists already; give another file, or delete it",
        "folder": "give a file in a directory that exists",
        "no pool": "stays at 4 bits, for the pool has no pages; give it some, or leave the file",
        "unquantized": "one precision; convert the model, or leave the file out",
    }[case]
    with pytest.raises(InputError, match=f"routing_trace {path}: .*{message}"):
        dx.load(model, routing_trace=path, **options)
    assert not path.exists() or case in ("exists", "folder")
