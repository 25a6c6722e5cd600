"""The benchmark of shifting traffic, at a shape that a CPU runs in seconds."""

import json
import sys

import pytest
import serve_shift

ROW = {
    "device", "policy", "batch", "budget_gib", "tokens_per_s", "ttft_ms", "tpot_p50_ms",
    "tpot_p99_ms", "pages_moved", "hit_share", "peak_gib",
}  # fmt: skip


def test_all_policies_in_one_run(tmp_path, monkeypatch, capsys):
    flags = "--small --layers 2 --pages 64 --batch 2 --phases 0:4 1+2=2:4 --output 12 --interval 6"
    monkeypatch.setattr(sys, "argv", ["serve_shift.py", *flags.split(), "--out", str(tmp_path)])
    monkeypatch.setattr(serve_shift, "prepare_device", lambda budget_bytes: None)
    serve_shift.main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = json.loads((tmp_path / "switching.json").read_text())
    assert last["switching"] == rows
    assert all(row.keys() == ROW for row in rows)
    moved = {row["policy"]: row["pages_moved"] for row in rows}
    assert tuple(moved) == serve_shift.POLICIES  # a page for every expert, so all of them
    hits = {row["policy"]: row["hit_share"] for row in rows}
    assert moved["off"] == moved["static-high"] == moved["static-mixed"] == hits["off"] == 0
    assert hits["static-high"] == 1
    for policy in ("dynamic", "dynamic-no-hysteresis", serve_shift.UNREAD, "blocking"):
        assert moved[policy] > 0
        assert 0 < hits[policy] < 1
    result = json.loads((tmp_path / "serve_shift.json").read_text())
    assert [run["policy"] for run in result["policies"]] == list(moved)
    assert {run["tokens"] for run in result["policies"]} == {8 * 12}  # nobody stops early
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "hit_share.png", "levels.png", "step_time.png",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--budget 1MiB", "a budget of 1.0 MiB is too small: .* this model needs"),
        ("--base-bits 8 --pages 0", "no pool of pages"),
        ("--phases ru:4", "no domain 'ru': there are 0, 1, 2, 3"),
        ("--rate 0", "the rate must be positive, got 0.0"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(tmp_path, monkeypatch, flags, message):
    flags = f"--small --layers 2 {flags}"
    monkeypatch.setattr(sys, "argv", ["serve_shift.py", *flags.split(), "--out", str(tmp_path)])
    monkeypatch.setattr(serve_shift, "prepare_device", lambda budget_bytes: None)
    with pytest.raises(SystemExit, match=f"serve_shift: error: .*{message}"):
        serve_shift.main()
    assert not list(tmp_path.iterdir())


def test_static_mixed_needs_off_before_it(tmp_path, monkeypatch, capsys):
    flags = ["--policies", "static-mixed", "off", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["serve_shift.py", *flags])
    with pytest.raises(SystemExit):
        serve_shift.main()
    assert "name off before it" in capsys.readouterr().err
