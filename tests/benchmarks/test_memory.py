"""The memory benchmark: its scheduler, with processes that do nothing, and one process."""

import argparse
import json
import subprocess
import sys

import memory
import pytest


@pytest.fixture
def started(monkeypatch):
    """Cases in the order of their start; a process prints a row, that of 99 GiB fails."""
    cases = []

    def start(case, options):
        cases.append(case)
        fails = case.budget_gib == 99
        code = f"import sys; print({json.dumps(json.dumps(case.name()))}); sys.exit({fails:d})"
        memory._log(case, options).write_text("out of memory")
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(memory, "_start", start)
    return cases


def run(monkeypatch, out, *flags):
    monkeypatch.setattr(sys, "argv", ["memory.py", *map(str, flags), "--out", str(out)])
    memory.main()
    lines = (out / "memory.jsonl").read_text().splitlines()
    return {
        (row["budget_gib"], row["batch"], row["context"]): row for row in map(json.loads, lines)
    }


def test_every_combination_is_run_once_and_kept(monkeypatch, tmp_path, started, capsys):
    rows = run(monkeypatch, tmp_path, "--budgets", 16, 24, "--shapes", "1x2048", "8x512")
    names = {(16, 1, 2048), (16, 8, 512), (24, 1, 2048), (24, 8, 512)}
    assert rows.keys() == names
    assert len(started) == 4
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["benchmark"] == "memory"
    more = run(monkeypatch, tmp_path, "--budgets", 16, 99, "--shapes", "1x2048", "--room", 50)
    assert more.keys() == names | {(99, 1, 2048)}  # alone, though there is no room for it
    assert more[99, 1, 2048]["failed"] == "out of memory"
    run(monkeypatch, tmp_path, "--budgets", 99, "--shapes", "1x2048")
    assert [case.budget_gib for case in started[4:]] == [99, 99]  # what failed is tried again

    file = tmp_path / "memory.jsonl"  # killed in the middle of a line: that one is run again
    *whole, _ = file.read_text().splitlines(keepends=True)
    file.write_text("".join(whole) + whole[0][:9])
    again = run(monkeypatch, tmp_path, "--budgets", 16, "--shapes", "1x2048")
    assert again.keys() == more.keys()
    assert len(started) == 6


def test_a_process_decodes_within_its_budget_or_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "prepare_device", lambda budget_bytes: None)
    shape, options = memory.Shape(1, 64), argparse.Namespace(layers=1, small=True)
    row = memory._one(memory.Case(0.0062, shape), options)
    assert row["pool_pages"] > 0
    assert row["pages_moved"] > 0
    assert 0 < row["planned_gib"] < 0.0062 + 0.0005  # rounded to three places
    assert row["peak_gib"] is row["within_budget"] is None  # a CPU does not say
    refused = memory._one(memory.Case(0.001, shape), options)
    assert "a budget of 1.0 MiB is too small" in refused["refused"]
    assert "planned_gib" not in refused
