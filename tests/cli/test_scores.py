"""``perplexity`` and ``eval``."""

import sys

import pytest

SAME = ("text", "precision", "tokens")


@pytest.mark.usefixtures("no_plans")
@pytest.mark.parametrize("precision", ["4", "bf16", "dynamic"])
def test_perplexity(run, converted, hf_dir, text_dir, precision):
    model = hf_dir if precision == "bf16" else converted
    files = [str(text_dir / "python.txt"), str(text_dir / "fr.txt")]
    arguments = ("perplexity", model, "--text", *files, "--precision", precision)
    arguments += ("--window", 64, "--max-windows", 3)
    found = run(*arguments, "--json").json()
    assert list(found) == ["results"]
    assert [result["text"] for result in found["results"]] == files
    for result in found["results"]:
        assert result.keys() == {"text", "precision", "nll", "perplexity", "tokens"}
        assert result["precision"] == precision
        assert result["tokens"] == 192
        assert 1 < result["nll"] < 6
    if precision == "dynamic":  # the default, and every file afresh
        swapped = ("perplexity", model, "--text", *files[::-1], "--window", 64, "--max-windows", 3)
        assert run(*swapped, "--json").json()["results"] == found["results"][::-1]
    if precision == "4":
        lines = run(*arguments).out.splitlines()
        assert len(lines) == 2
        assert lines[0].startswith(f"{files[0]}: perplexity ")


@pytest.mark.usefixtures("no_plans")
def test_eval(run, converted, hf_dir, text_dir):
    files = [str(text_dir / "python.txt"), str(text_dir / "fr.txt")]
    shapes = ("--window", 64, "--max-windows", 3)
    arguments = ("eval", converted, "--reference", hf_dir, "--text", *files, *shapes)
    found = run(*arguments, "--precision", "dynamic", "4", "--json").json()
    assert list(found) == ["results"]
    results = found["results"]
    assert [(result["precision"], result["text"]) for result in results] == [
        (precision, path) for precision in ("dynamic", "4") for path in files
    ]
    for precision in ("dynamic", "4"):
        alone = ("perplexity", converted, "--text", *files, *shapes, "--precision", precision)
        for wanted in run(*alone, "--json").json()["results"]:
            result = next(r for r in results if all(r[k] == wanted[k] for k in SAME))
            assert result.keys() == {*wanted, "kl"}
            assert result["nll"] == pytest.approx(wanted["nll"], rel=1e-6)
            assert result["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-6)
    for dynamic, at_4 in zip(results[:2], results[2:], strict=True):
        assert dynamic["kl"] > at_4["kl"] > 0
    lines = run(*arguments, "--precision", "4").out.splitlines()
    assert len(lines) == 2
    assert f", kl {results[2]['kl']:.5f}, 192 tokens" in lines[0]


def test_eval_tasks_without_lm_eval(run, converted, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = run("eval", converted, "--tasks", "arc_easy", "--precision", 4)
    assert (result.status, result.out) == (2, "")
    assert result.err == (
        "dynaexq: error: --tasks needs lm-eval, which is not installed: "
        "pip install 'dynaexq-jax[eval]'\n"
    )
