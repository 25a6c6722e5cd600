"""The benchmark of loading, at a shape that a CPU runs in seconds."""

import json
import sys

import checkpoint_loading


def test_a_random_checkpoint_is_written_read_and_decoded_from(tmp_path, monkeypatch, capsys):
    flags = "--small --layers 2 --budget 64MiB --context 64"
    argv = ["checkpoint_loading.py", *flags.split(), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    checkpoint_loading.main()
    result = json.loads((tmp_path / "checkpoint_loading.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    rows = {row["what"]: row for row in result["rows"]}
    parts = ["dense", "scales", "level2", "level4", "level8"]
    assert list(rows) == [
        "written", "ceiling: files read", *parts, "engine built", "first 8 tokens",
    ]  # fmt: skip
    read = sum(rows[part]["gb"] for part in parts)
    assert 0.9 * rows["written"]["gb"] < read < rows["written"]["gb"]  # the rest is the header
    assert result["pool_pages"] > 0 or result["base_bits"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_loading.json"]
