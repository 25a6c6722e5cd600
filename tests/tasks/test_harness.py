"""The adapter of lm-eval, on the task files in examples/ and data made here."""

import json

import pytest
from cli.conftest import cache_dir, run, text_dir
from serving.nano import EXAMPLES

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")

__all__ = ["cache_dir", "run", "text_dir"]
TASKS = EXAMPLES / "tasks"
ARC = (
    "Please choose the correct answer to the question: {}\n\n"
    "Answer1: {} Answer2: {}\n\nAnswer format: answer1/answer2"
)


@pytest.fixture
def data_dir(tmp_path):
    """Questions whose answers a model of Python knows."""
    questions = [
        (("import os\nimport", "sys", "der Hund mag keine Katze"), "answer1"),
        (("def main", "Il fait beau à Paris", "():"), "answer2"),
        (("class A", "Октябрь", "(object):"), "answer2"),
    ]
    arc = [{"instruction": ARC.format(*asked), "answer": answer} for asked, answer in questions]
    (tmp_path / "ARC-Easy_test.json").write_text(json.dumps(arc))
    (tmp_path / "wikitext2_test.txt").write_text(
        " \n = One = \n \n Some words here . \n = = Part = = \n more \n = Two = \n \n Others . \n"
    )
    gsm = [{"question": f"What is 1 + {n}?", "answer": f"{1 + n}\n#### {1 + n}"} for n in (1, 2)]
    (tmp_path / "gsm8k_test.jsonl").write_text("\n".join(map(json.dumps, gsm)))
    return tmp_path


def test_three_kinds_of_tasks(run, converted, data_dir):
    names = ("local_arc_easy", "local_wikitext2", "local_gsm8k")
    arguments = ("eval", converted, "--tasks", *names, "--include-path", TASKS)
    arguments += ("--data-dir", data_dir, "--context", 320, "--batch", 2)
    result = run(*arguments, "--precision", 4, "dynamic", "--json")
    assert result.status == 0, result.err
    results = json.loads(result.out)["results"]
    assert [(it["precision"], it["task"]) for it in results] == [
        (precision, name) for precision in ("4", "dynamic") for name in names
    ]
    for it in results:
        (scores,) = it["scores"].values()
        assert scores["items"] == {"local_arc_easy": 3}.get(it["task"], 2)
        assert scores["fewshot"] == it["truncated"] == 0
        if it["task"] == "local_arc_easy":
            assert scores["acc,none"] == pytest.approx(1)
        elif it["task"] == "local_wikitext2":
            assert 1 < scores["bits_per_byte,none"] < 8
        else:
            assert scores["exact_match,final"] == 0

    result = run(*arguments, "--precision", 8, "--limit", 1, "--fewshot", 1)
    assert result.status == 0
    first = result.out.splitlines()[0]
    assert first.startswith("local_arc_easy: acc 1.0000")
    assert first.endswith(" at 8, 1 items, 1 shots")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "no_such"], "there is no task 'no_such': lm-eval lists its own"),
        (["--tasks", "local_boolq", "--data-dir", TASKS], "task ['local_boolq'] cannot be loaded"),
        (["--tasks", "local_boolq"], "looked for in a folder that was not given; its data must be"),
    ],
)
def test_what_cannot_be_asked(run, converted, arguments, message):
    result = run("eval", converted, *arguments, "--precision", 4, "--include-path", TASKS)
    assert (result.status, result.out) == (2, "")
    assert message in result.err
