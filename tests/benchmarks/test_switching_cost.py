"""The benchmark of switching itself, at a shape that a CPU runs in seconds."""

import json
import sys

import switching_cost


def test_every_way_of_staging_is_measured(tmp_path, monkeypatch, capsys):
    flags = "--small --layers 2 --pages 24 --batch 2 --steps 24 --interval 6 --staging 4x2 8x1"
    monkeypatch.setattr(sys, "argv", ["switching_cost.py", *flags.split(), "--out", str(tmp_path)])
    monkeypatch.setattr(switching_cost, "PINNED_BYTES", 2**20)
    switching_cost.main()
    result = json.loads((tmp_path / "switching_cost.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert (result["batch"], result["pages"]) == (2, 24)
    assert [rate["staging"] for rate in result["promotion"]] == ["4x2", "8x1"]
    assert all(rate["gb_s"] > 0 and rate["share_of_pinned"] > 0 for rate in result["promotion"])
    assert [row["pages"] for row in result["still"]] == [0, 0]
    rows = result["decode"]
    assert [(row["staging"], row["waits"]) for row in rows] == [
        ("4x2", False), ("8x1", False), ("8x1", True),
    ]  # fmt: skip
    for row in rows:
        assert row["pages"] > 0  # while decoding: the first plan fills the pool before
        assert 0 < row["step_p50_ms"] <= row["step_p99_ms"]
        assert row["tokens_per_s"] > 0
