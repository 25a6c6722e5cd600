"""The experiment on quality: its traffic, its arithmetic, and a small run."""

import itertools
import json
import sys

import numpy as np
import pytest
import quality
import quality_report
from quality_traffic import KINDS, Pool, stretches
from serving.nano import NANO, TEXT, converted_nano

ROW = {
    "model", "method", "policy", "traffic", "base_bits", "promoted", "bits_per_weight",
    "perplexity_increase_percent", "kl", "gap_recovered_percent",
}  # fmt: skip
NAMES = ("fr", "go", "python")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("domains", "windows"), [(10, 12), (3, 3), (4, 6)])
def test_every_window_is_read_once(kind, domains, windows):
    batches = [
        batch for stretch in stretches(kind, domains, windows, 32) for batch in stretch.batches
    ]
    read = list(itertools.chain(*batches))
    assert sorted(read) == [(d, w) for d in range(domains) for w in range(windows)]
    assert len({len(batch) for batch in batches}) == 1


def test_traffic_is_what_its_name_says():
    one = stretches("one domain", 10, 12, 32)
    assert [{d for ((d, _),) in stretch.batches} for stretch in one] == [{d} for d in range(10)]
    assert one[0].tokens == 32
    three = stretches("three domains", 10, 12, 32)
    assert [sorted({d for batch in s.batches for d, _ in batch}) for s in three[:2]] == [
        [0, 3, 6],
        [1, 4, 7],
    ]
    assert (len(three), len(three[0].batches), three[0].tokens) == (10, 4, 8)
    (mixed,) = stretches("mixed", 10, 12, 32)
    assert {len({d for d, _ in batch}) for batch in mixed.batches} == {10}
    assert mixed.tokens == 8
    (shifting,) = stretches("shifting", 10, 12, 32)
    domains = [batch[0][0] for batch in shifting.batches]
    assert domains[:12] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert len(domains) == 120
    with pytest.raises(ValueError, match="no traffic 'none': choose one of one domain"):
        stretches("none", 10, 12, 32)


def test_a_pool_has_pages_for_its_share():
    assert Pool(base_bits=2, promoted=0.25).pages(256) == 64
    assert Pool(base_bits=4, promoted=0.25).pages(256) == 128
    assert Pool(base_bits=4, promoted=0.25).residency((4, 64)).pool_pages == 128


def lines_of(increase_by_policy):
    """Runs whose every window is ``increase`` nats above the reference."""
    reference = np.random.default_rng(0).random((2, 3))
    facts = {"model": "m", "method": "grid", "domains": ["a", "b"], "window": 8}
    made = {"device": "some device", "jax": "0.11", "date": "2026-01-01"}
    yield {"key": ["reference"], **facts, **made, "nll": reference.tolist()}
    for (policy, promoted), increase in increase_by_policy.items():
        yield {
            "key": [policy, "mixed", 2, promoted],
            **facts,
            "bits_per_weight": 2.25 + 2 * promoted,
            "nll": (reference + increase).tolist(),
            "kl": np.full((2, 3), increase).tolist(),
        }


def test_rows_are_those_of_the_definition(tmp_path):
    runs = tmp_path / "m-grid.jsonl"
    losses = {("all-low", 0.0): 0.2, ("dynamic", 0.25): 0.05, ("all-high", 1.0): 0.01}
    runs.write_text("".join(json.dumps(line) + "\n" for line in lines_of(losses)))
    quality_report.write_report([runs], tmp_path / "report")
    rows = json.loads((tmp_path / "report" / "quality.json").read_text())
    assert [row["policy"] for row in rows] == ["all-low", "dynamic", "all-high"]
    assert all(row.keys() == ROW for row in rows)
    dynamic = rows[1]
    low, here, high = (100 * np.expm1(nats) for nats in losses.values())
    assert dynamic["perplexity_increase_percent"] == pytest.approx(here, abs=1e-4)
    assert dynamic["gap_recovered_percent"] == pytest.approx(
        100 * (low - here) / (low - high), abs=0.01
    )
    assert (dynamic["kl"], dynamic["bits_per_weight"]) == (0.05, 2.75)
    text = (tmp_path / "report" / "quality_tables.md").read_text()
    assert "3 windows of 8 tokens of each; some device, jax 0.11, 2026-01-01" in text
    share = 100 * (low - here) / (low - high)  # all windows lose the same: no doubt about it
    assert "| promoted | bits a weight | dynamic |" in text
    of_kl = 100 * (0.2 - 0.05) / (0.2 - 0.01)
    assert (
        f"| 25 % | 2.75 | +{here:.2f} % / 0.0500; **{share:.1f}** ({share:.1f} to {share:.1f}) / "
        f"{of_kl:.1f} |" in text
    )
    assert (tmp_path / "report" / "quality_m_grid.png").stat().st_size > 1000


@pytest.fixture
def texts(tmp_path):
    """Halves of the shipped texts to calibrate with and to score."""
    for name in NAMES:
        text = (TEXT / f"{name}.txt").read_text(encoding="utf-8")
        half = len(text) // 2
        (tmp_path / f"{name}.calib.txt").write_text(text[:half], encoding="utf-8")
        (tmp_path / f"{name}.valid.txt").write_text(text[half:], encoding="utf-8")
    return tmp_path


def test_a_small_run_and_its_continuation(tmp_path, texts, tmp_path_factory, monkeypatch, capsys):
    converted = converted_nano(tmp_path_factory)
    flags = ["--texts", str(texts), "--converted", str(converted), "--domains", *NAMES, "--quick"]
    flags += ["--window", "32", "--interval", "16"]
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["quality.py", str(NANO), *flags, "--out", str(out)])
    monkeypatch.setattr(quality, "prepare_device", lambda budget_bytes: None)
    made = []
    experiment = quality.Experiment
    monkeypatch.setattr(
        quality, "Experiment", lambda *given: made.append(experiment(*given)) or made[0]
    )
    quality.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["benchmark"] == "quality"
    runs = out / f"{NANO.name}-grid.jsonl"
    whole = runs.read_text()
    rows = {(r["policy"], r["traffic"]): r for r in json.loads((out / "quality.json").read_text())}
    for kind in ("one domain", "mixed"):
        kl = {policy: rows[policy, kind]["kl"] for policy in quality.POLICIES[:-1]}
        assert kl["all-high"] < kl["oracle"] < kl["static-wrong"] < kl["all-low"]
        assert kl["all-high"] < kl["dynamic"] < kl["all-low"]
    one = {policy: rows[policy, "one domain"]["kl"] for policy in quality.POLICIES}
    assert one["oracle"] < one["static-mixed"] < one["static-wrong"]
    assert one["dynamic"] < one["static-mixed"]
    fixed = ("all-low", "static-mixed", "all-high")
    assert all(one[policy] == rows[policy, "mixed"]["kl"] for policy in fixed)

    # killed in the middle of a line: what is whole stays, the rest is run again
    monkeypatch.setattr(quality, "Experiment", lambda *_: made[0])  # compiled already
    lines = whole.splitlines(keepends=True)
    runs.write_text("".join(lines[:-2]) + lines[-2][:40])
    quality.main()
    again = [json.loads(line) for line in runs.read_text().splitlines()]
    assert [line["key"] for line in again] == [json.loads(line)["key"] for line in lines]
    assert [line["nll"] for line in again] == [json.loads(line)["nll"] for line in lines]
