"""``calibrate-map``, and the commands that take its map."""

import json

import numpy as np
import pytest

from dynaexq_jax.checkpoint import Checkpoint
from dynaexq_jax.policy import Hotness, StaticMixed, make_policy
from dynaexq_jax.traffic import (
    Ladder,
    RoutedModel,
    Trace,
    TraceHeader,
    TraceWriter,
    read_map,
    simulate,
)

SHAPES = ("--context", 256, "--chunk", 32)  # as in test_generate: compiled once for both
SIZES = ("--window", 64, "--max-windows", 2)


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    """Where the maps of this module are."""
    return tmp_path_factory.mktemp("maps")


@pytest.fixture
def french(run, converted, text_dir, maps):
    """A map for French with 24 pages, made once."""
    path = maps / "french.json"
    if not path.exists():
        text = text_dir / "fr.txt"
        facts = run("calibrate-map", converted, "--text", text, *SIZES, "--json", "-o", path).json()
        assert facts["tokens"] == 128
        assert facts["pool_pages"] == 24  # a quarter of 96
        assert 0 <= facts["gap"] < 0.01
        assert facts["value"] <= facts["bound"] * (1 + 1e-12)
    return path


def test_a_map_weighs_texts_alike_and_holds_its_pages(run, converted, text_dir, french, maps):
    path = maps / "both.json"
    texts = [text_dir / f"{name}.txt" for name in ("fr", "go")]
    result = run(
        "calibrate-map", converted, "--text", *texts, *SIZES, "--max-bits", 4,
        "--promoted", "0.5", "--output", path,
    )  # fmt: skip
    assert result.status == 0
    assert "48 experts above 2 bits with 48 pages, for 256 tokens" in result.out
    checkpoint = Checkpoint.open(converted)
    model = RoutedModel.of(checkpoint.config)
    both, alone = read_map(path, model), read_map(french, model)
    assert both.ladder == Ladder(base_bits=2, max_bits=4, pool_pages=48)
    assert (both.levels == 1).sum() == 48
    np.testing.assert_allclose(both.hotness.sum(axis=1), 1, rtol=1e-5)
    assert abs(both.hotness - alone.hotness).max() > 0.01
    pages = np.array([0, 1, 3])[alone.levels].sum()
    assert pages == 24


def test_served_levels_are_those_of_the_map(run, converted, french):
    code = "def main(self, *args):\n    return [x for x in args if x is not None]\n"
    arguments = ("generate", converted, "--prompt", code, "--max-tokens", 24, "--json")
    arguments += ("--base-bits", 2, "--pages", 24, "--interval", 4, *SHAPES)
    held = run(*arguments, "--policy", "static-mixed", "--map", french).json()["stats"]
    wanted = read_map(french, RoutedModel.of(Checkpoint.open(converted).config)).levels
    np.testing.assert_array_equal(held["levels"], wanted)
    assert held["moved"]["demotions"] == 0
    followed = run(*arguments, "--policy", "blocking", "--map", french).json()["stats"]
    assert followed["moved"]["pages"] > held["moved"]["pages"] == 24  # there first, then on
    result = run(*arguments, "--policy", "static-mixed")
    assert result.status == 2
    assert "static-mixed holds a calibrated map: give one with --map" in result.err


def test_texts_are_scored_with_a_map(run, converted, hf_dir, text_dir, french):
    texts = ("--text", text_dir / "fr.txt", *SIZES, "--json", "--map", french)
    (held,) = run("perplexity", converted, *texts, "--precision", "static-mixed").json()["results"]
    precisions = ("--precision", "2", "static-mixed", "dynamic")
    compared = run("eval", converted, "--reference", hf_dir, *texts, *precisions).json()
    low, mixed, dynamic = compared["results"]
    assert mixed["nll"] == pytest.approx(held["nll"], rel=1e-6)
    assert mixed["kl"] < low["kl"]
    assert dynamic["kl"] < low["kl"]
    assert [result["precision"] for result in (low, mixed, dynamic)] == list(precisions[1:])
    result = run("perplexity", converted, *texts, "--precision", "4")
    assert result.status == 2
    assert "--map is for --precision dynamic or static-mixed, got 4" in result.err


def test_bench_adds_static_mixed_where_there_is_a_map(run, converted, text_dir, french):
    arguments = ("--requests", 1, "--prompt-tokens", 32, "--max-tokens", 8, "--batch", 2)
    result = run(
        "bench", converted, "--text", text_dir / "fr.txt", *arguments, "--map", french,
        "--interval", 4, "--base-bits", 2, "--pages", 24,
    )  # fmt: skip
    assert result.status == 0, result.err
    found = json.loads(result.out.splitlines()[-1])["policies"]
    assert [one["policy"] for one in found] == ["off", "dynamic", "blocking", "static-mixed"]


@pytest.mark.parametrize("policy", ["static-mixed", "dynamic"])
def test_simulate_takes_a_map(run, converted, french, tmp_path, policy):
    checkpoint = Checkpoint.open(converted)
    model = RoutedModel.of(checkpoint.config)
    by_expert = np.repeat(checkpoint.benefit[:, :, None], 32, axis=2)
    header = TraceHeader(
        model=model,
        bits=(2, 4, 8),
        benefit=by_expert,
        pinned=(),
        base_bits=2,
        pool_pages=24,
        interval=4,
        max_transitions=99,
    )
    path = tmp_path / "routing.trace"
    writer = TraceWriter(path, header)
    shares = np.random.default_rng(0).dirichlet(np.full(32, 0.2), 3)
    for _ in range(4):
        writer.add((shares * 16).astype(np.float32), 16)
    found = run("simulate", path, "--json", "--policy", policy, "--map", french).json()
    mixed = read_map(french, model).hotness
    expected = simulate(
        Trace.read(path),
        make_policy(policy, mixed),
        ladder=Ladder(base_bits=2, max_bits=8, pool_pages=24),
        interval=4,
        hotness=Hotness.calibrated(mixed),
    )
    assert found["hit_share"] == expected.hit_share
    assert found["promotions"] == expected.promotions
    assert (found["demotions"] == 0) == (policy == StaticMixed.name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--promoted", "lots"), "cannot read 'lots' as a share: give one like 25% or 0.25"),
        (("--promoted", "120%"), "cannot read '120%' as a share"),
        (("--pages", "-1"), "--pages must be in 0..288, which bring every expert from 2 to 8 bits"),
        (("--base-bits", "4", "--max-bits", "4"), "a map needs levels above its base of 4 bits"),
        (("--window", "0"), "--window must be positive, got 0"),
    ],
)
def test_bad_input(run, converted, text_dir, tmp_path, flags, message):
    path = tmp_path / "map.json"
    result = run("calibrate-map", converted, "--text", text_dir / "fr.txt", *flags, "-o", path)
    assert result.status == 2
    assert message in result.err
    assert not path.exists()
