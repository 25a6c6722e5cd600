"""``dynaexq bench`` on the shipped model."""

import json

import pytest


def test_bench_compares_policies_on_shifting_text(run, converted, text_dir):
    files = (text_dir / "python.txt", text_dir / "fr.txt")
    size = ("--requests", 3, "--prompt-tokens", 32, "--max-tokens", 8, "--batch", 2)
    result = run("bench", converted, "--text", *files, *size, "--interval", 4)
    assert result.status == 0, result.err
    *table, last = result.out.splitlines()
    assert [line.split()[0] for line in table] == [
        "policy", table[1].split()[0], "off", "dynamic", "blocking",
    ]  # fmt: skip
    data = json.loads(last)
    assert data["plan"]["pool_pages"] == 24  # for a quarter of the experts
    off, dynamic, blocking = data["policies"]
    assert off["policy"] == "off"
    assert off["moved"]["pages"] == off["hit_share"] == 0
    for figures in (dynamic, blocking):
        assert figures["requests"] == 6
        assert figures["tokens"] > 6
        assert figures["moved"]["pages"] > 0
        assert 0 < figures["hit_share"] < 1
        assert 0 < figures["tpot_p50_ms"] <= figures["tpot_p99_ms"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--requests", 0), "--requests must be positive, got 0"),
        (("--base-bits", 8), "there is no pool of pages"),
        (("--prompt-tokens", 4090), "are 4122 together, more than the 4096 positions"),
        (("--pages", 5), "--pages 5 needs --base-bits"),
    ],
)
def test_bench_refuses_what_cannot_be(run, converted, text_dir, flags, message):
    result = run("bench", converted, "--text", text_dir / "go.txt", *flags)
    assert result.status == 2
    assert message in result.err
    assert result.out == ""
