"""``generate`` and ``chat``."""

import io
import json
import os
import subprocess
import sys

import pytest

SHAPES = ("--context", 256, "--chunk", 32)
EIGHT = ("--base-bits", 8, *SHAPES)


@pytest.fixture
def text(run, converted):
    result = run("generate", converted, "--prompt", "def main(", "--max-tokens", 16, *EIGHT)
    assert result.status == 0
    return result.out.removesuffix("\n")


def test_text_on_stdout_and_a_summary_on_stderr(run, converted, text, tmp_path):
    assert text
    file = tmp_path / "prompt.txt"
    file.write_text("def main(", encoding="utf-8")
    result = run("generate", converted, "--prompt-file", file, "--max-tokens", 16, *EIGHT)
    assert result.out == text + "\n"
    (line,) = result.err.strip().splitlines()
    assert line.startswith("[16 tokens, ")
    assert "96 experts at 8 bits" in line

    stop = text[5:8]
    result = run(
        *("generate", converted, "--prompt", "def main(", "--max-tokens", 16, *EIGHT),
        *("--stop", "\0", "--stop", stop),
    )
    assert result.out == text[: text.index(stop)] + "\n"


def test_json_is_one_object_and_nothing_else(run, converted, tmp_path):
    stats_file = tmp_path / "stats.json"
    result = run(
        *("generate", converted, "--prompt", "def main(\n", "--max-tokens", 24, "--json"),
        *("--base-bits", 2, "--pages", 24, "--interval", 4, *SHAPES, "--stats-json", stats_file),
        *("--temperature", 0.7, "--top-k", 40, "--top-p", 0.9, "--min-p", 0.05, "--seed", 3),
    )
    assert result.status == 0
    assert result.out.count("\n") == 1
    found = json.loads(result.out)
    assert found.keys() == {"text", "token_ids", "finish_reason", "stats"}
    assert found["text"] in result.err  # streams there
    assert len(found["token_ids"]) == found["stats"]["tokens"] <= 24
    assert found["finish_reason"] in ("length", "eos")

    stats = json.loads(stats_file.read_text(encoding="utf-8"))
    assert stats == found["stats"]
    assert stats["plan"]["total_bytes"] == sum(stats["plan"]["bytes"].values())
    assert stats["plan"]["pool_pages"] == 24
    assert sum(stats["experts_by_bits"].values()) == 96
    levels = [level for layer in stats["levels"] for level in layer]
    for level, bits in enumerate("248"):
        assert stats["experts_by_bits"][bits] == levels.count(level)
    moved = stats["moved"]
    assert moved["bytes"] == moved["pages"] * 16384
    assert moved["promotions"] > 0


def test_stats_that_cannot_be_written_cost_no_text(run, converted, text):
    arguments = ("generate", converted, "--prompt", "def main(", "--max-tokens", 16, *EIGHT)
    result = run(*arguments, "--stats-json", "/proc/stats.json")
    assert (result.status, result.out) == (2, text + "\n")
    last = result.err.splitlines()[-1]
    assert last.startswith("dynaexq: error: /proc/stats.json: cannot be written (")


def test_characters_that_a_terminal_lacks_end_nothing(run, converted, monkeypatch):
    arguments = ("generate", converted, "--prompt", "Октябрь, ", "--max-tokens", 16, *EIGHT)
    text = run(*arguments).out
    assert not text.isascii()
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert run(*arguments).status == 0
    assert shown.getvalue() == text.encode("ascii", errors="replace")


def test_unquantized_experts(run, hf_dir):
    result = run("generate", hf_dir, "--prompt", "def", "--max-tokens", 4, *SHAPES, "--json")
    found = json.loads(result.out)
    assert result.status == 0
    assert found["stats"]["plan"] is None
    assert found["stats"]["levels"] is None


def test_chat_templates_the_prompt(run, converted):
    templated = "<|im_start|>user\nBonjour<|im_end|>\n<|im_start|>assistant\n"
    options = ("--max-tokens", 12, *EIGHT)
    chat = run("generate", converted, "--chat", "--prompt", "Bonjour", *options)
    plain = run("generate", converted, "--prompt", templated, *options)
    assert chat.status == plain.status == 0
    assert chat.out == plain.out


def chat_lines(result):
    assert result.status == 0
    return result.out.splitlines()


def test_chat_goes_on_resets_and_ends(run, converted, monkeypatch):
    def talk(*lines, options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run("chat", converted, "--max-tokens", 8, "--stop", "\n", *EIGHT, *options)

    alone = talk("Bonjour")
    assert chat_lines(alone)
    twice = talk("Bonjour", "/reset", "Bonjour")
    assert chat_lines(twice) == chat_lines(alone) * 2
    both = talk("Bonjour", "Et toi ?", "", "never read")
    assert chat_lines(both)[0] == chat_lines(alone)[0]
    assert len(chat_lines(both)) == 2
    reply = run(
        *("generate", converted, "--max-tokens", 8, "--stop", "\n", *EIGHT, "--prompt"),
        "<|im_start|>user\nBonjour<|im_end|>\n<|im_start|>assistant\n"
        f"{chat_lines(alone)[0]}<|im_end|>\n<|im_start|>user\nEt toi ?<|im_end|>\n"
        "<|im_start|>assistant\n",
    )
    assert chat_lines(both)[1] == reply.out.removesuffix("\n")

    with_system = talk("Bonjour", options=("--system", "Répondez."))
    assert with_system.status == 0

    too_long = talk("mot " * 400, "Bonjour")
    assert "do not fit a context of 256" in too_long.err
    assert chat_lines(too_long) == chat_lines(alone)


def test_chat_ends_at_bytes_that_are_no_text(run, converted, monkeypatch):
    lines = io.TextIOWrapper(io.BytesIO(b"Bonjour\xff\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", lines)
    result = run("chat", converted, *EIGHT)
    assert (result.status, result.out) == (2, "")
    assert "error: the message is not UTF-8 (invalid start byte); give it" in result.err


def test_chat_through_a_pipe(converted, cache_dir):
    result = subprocess.run(
        [
            *(sys.executable, "-m", "dynaexq_jax", "chat", str(converted), "--max-tokens", "6"),
            *map(str, EIGHT),
        ],
        input="Bonjour, ça va ?\n",
        env={**os.environ, "JAX_PLATFORMS": "cpu", "DYNAEXQ_CACHE_DIR": str(cache_dir)},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert "Ctrl-D" in result.stderr


PROMOTING = ("--base-bits", 2, "--pages", 24, "--interval", 4, *SHAPES)


def test_a_second_run_begins_where_the_first_has_left(run, converted, tmp_path):
    profile = tmp_path / "hot.json"
    arguments = ("generate", converted, "--prompt", "def main(", "--max-tokens", 24, "--json")
    cold, warm = (
        run(*arguments, *PROMOTING, "--hotness-profile", profile, "--policy", policy)
        for policy in ("blocking", "dynamic")
    )
    assert cold.status == warm.status == 0
    once = json.loads(profile.read_text(encoding="utf-8"))
    assert once["model"]["experts"] == 32
    assert once["tokens"]

    # one token: nothing but what the profile promotes
    short = (*arguments[:3], "def main(", "--max-tokens", 1, "--json")
    found = json.loads(run(*short, *PROMOTING, "--hotness-profile", profile).out)
    assert found["stats"]["moved"]["pages"] == 24
    assert json.loads(run(*short, *PROMOTING).out)["stats"]["moved"]["pages"] == 0


def test_chat_leaves_its_hotness_when_it_is_interrupted(run, converted, monkeypatch, tmp_path):
    profile = tmp_path / "hot.json"

    class Interrupted(io.StringIO):
        def readline(self, *_):
            return super().readline() or self.interrupt()

        def interrupt(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Interrupted("Bonjour\n"))
    result = run(*("chat", converted, "--max-tokens", 24, *PROMOTING, "--hotness-profile", profile))
    assert result.status == 130
    assert result.err.endswith("dynaexq: interrupted\n")
    assert json.loads(profile.read_text(encoding="utf-8"))["tokens"]
