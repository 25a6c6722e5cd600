"""The scheduler of the memory benchmark, with processes that do nothing."""

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
