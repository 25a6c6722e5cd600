"""``inspect``, ``plan``, ``perplexity``, ``eval``, ``convert``, and the process around them."""

import json
import os
import re
import subprocess
import sys

import pytest
from serving.nano import EXAMPLES

import convert.__main__
import dynaexq_jax.cli
from dynaexq_jax.checkpoint.header import Header
from dynaexq_jax.cli import COMMANDS, device

ROOT = EXAMPLES.parent


def only_json(result):
    assert result.status == 0, result.err
    assert result.out.count("\n") == 1
    return json.loads(result.out)


def test_inspect_a_converted_checkpoint(run, converted):
    facts = only_json(run("inspect", converted, "--json"))
    assert facts["kind"] == "converted checkpoint"
    assert facts["model"]["experts of a layer"] == 32
    assert facts["levels"]["bits"] == [2, 4, 8]
    errors = facts["levels"]["mean squared error"]
    assert errors["2"] > errors["4"] > errors["8"] > 0
    assert facts["format"]["dense bits"] == 16
    assert facts["bytes"]["page of an expert"] == 16384
    assert facts["bytes"]["all experts at 2 bits"] == 96 * (16384 + 2048)
    result = run("inspect", converted)
    assert result.status == 0
    assert "experts of a layer" in result.out
    assert "16,384" in result.out


def test_inspect_a_hugging_face_directory(run, hf_dir):
    facts = only_json(run("inspect", hf_dir, "--json"))
    assert facts["kind"] == "Hugging Face model directory"
    assert facts["bytes"] == {
        "weights": (hf_dir / "model.safetensors").stat().st_size,
        "files": 1,
    }
    assert "positions" in run("inspect", hf_dir).out


def test_plan_adds_up(run, converted):
    budget = ("--hbm-budget", "13.6MiB", "--base-bits", 4)
    arguments = ("plan", converted, *budget, "--context", 256, "--chunk", 32)
    plan = only_json(run(*arguments, "--json"))
    assert plan["total_bytes"] == sum(plan["bytes"].values()) <= plan["budget_bytes"]
    assert plan["budget_bytes"] == int(13.6 * 2**20)
    assert plan["base_bits"] == 4
    assert plan["bytes"]["page pool"] == plan["pool_pages"] * 16384 > 0
    assert plan["temporaries_of"] == "cpu"

    table = run(*arguments)
    assert table.status == 0
    assert table.out.startswith(f"base 4 bits for every expert, {plan['pool_pages']} pages of 192")
    rows = dict(re.findall(r"^([a-z ]+?) {2,}([\d,]+) ", table.out, re.MULTILINE))
    rows = {name: int(size.replace(",", "")) for name, size in rows.items()}
    assert rows.pop("total") == plan["total_bytes"]
    assert rows.pop("budget") == plan["budget_bytes"]
    assert rows == plan["bytes"]


@pytest.fixture
def no_plans(monkeypatch):
    """Plans would compile programs that scoring does not run."""
    monkeypatch.setattr("dynaexq_jax.serving.planning.Planner.temporary_bytes", lambda *_: 0)


@pytest.mark.usefixtures("no_plans")
@pytest.mark.parametrize("precision", ["4", "bf16", "dynamic"])
def test_perplexity(run, converted, hf_dir, text_dir, precision):
    model = hf_dir if precision == "bf16" else converted
    files = [str(text_dir / "python.txt"), str(text_dir / "fr.txt")]
    arguments = ("perplexity", model, "--text", *files, "--precision", precision)
    arguments += ("--window", 64, "--max-windows", 3)
    found = only_json(run(*arguments, "--json"))
    assert list(found) == ["results"]
    assert [result["text"] for result in found["results"]] == files
    for result in found["results"]:
        assert result.keys() == {"text", "precision", "nll", "perplexity", "tokens"}
        assert result["precision"] == precision
        assert result["tokens"] == 192
        assert 1 < result["nll"] < 6
    if precision == "dynamic":  # the default, and every file afresh
        swapped = ("perplexity", model, "--text", *files[::-1], "--window", 64, "--max-windows", 3)
        assert only_json(run(*swapped, "--json"))["results"] == found["results"][::-1]
    if precision == "4":
        lines = run(*arguments).out.splitlines()
        assert len(lines) == 2
        assert lines[0].startswith(f"{files[0]}: perplexity ")


@pytest.mark.usefixtures("no_plans")
def test_eval(run, converted, hf_dir, text_dir):
    files = [str(text_dir / "python.txt"), str(text_dir / "fr.txt")]
    shapes = ("--window", 64, "--max-windows", 3)
    arguments = ("eval", converted, "--reference", hf_dir, "--text", *files, *shapes)
    found = only_json(run(*arguments, "--precision", "dynamic", "4", "--json"))
    assert list(found) == ["results"]
    results = found["results"]
    assert [(result["precision"], result["text"]) for result in results] == [
        (precision, path) for precision in ("dynamic", "4") for path in files
    ]
    for precision in ("dynamic", "4"):
        alone = ("perplexity", converted, "--text", *files, *shapes, "--precision", precision)
        for wanted in only_json(run(*alone, "--json"))["results"]:
            result = next(r for r in results if all(r[k] == wanted[k] for k in SAME))
            assert result.keys() == {*wanted, "kl"}
            assert result["nll"] == pytest.approx(wanted["nll"], rel=1e-6)
            assert result["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-6)
    for dynamic, at_4 in zip(results[:2], results[2:], strict=True):
        assert dynamic["kl"] > at_4["kl"] > 0
    lines = run(*arguments, "--precision", "4").out.splitlines()
    assert len(lines) == 2
    assert f", kl {results[2]['kl']:.5f}, 192 tokens" in lines[0]


SAME = ("text", "precision", "tokens")


def test_convert_is_one_command_under_two_names(run, tiny_hf_dir, tmp_path, monkeypatch, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    options = ("--group-size", "64", "--dense-bits", "8")
    result = run("convert", tiny_hf_dir, first, *options)
    assert result.status == 0
    assert str(first) in result.out
    assert only_json(run("inspect", first, "--json"))["format"]["dense bits"] == 8
    arguments = [str(tiny_hf_dir), str(second), *options]
    monkeypatch.setattr(sys, "argv", ["convert", *arguments])
    assert convert.__main__.main() == 0
    headers = [Header.read(path) for path in (first, second)]
    arrays = [{unit: it.arrays for unit, it in header.units.items()} for header in headers]
    assert arrays[0] == arrays[1]
    assert headers[0].group_size == headers[1].group_size == 64

    capsys.readouterr()
    assert convert.__main__.main() == 2  # the output exists now
    message = capsys.readouterr().err.removeprefix("convert: error: ")
    again = run("convert", tiny_hf_dir, second, "--group-size", 32)
    assert again.status == 2
    assert again.err.removeprefix("dynaexq: error: ") == message
    assert run("convert", tiny_hf_dir, second, "--group-size", 16, "--force").status == 0
    assert Header.read(second).group_size == 16


BAD = {
    "no such model": ("generate {tmp}/none --prompt a", "neither a converted checkpoint nor"),
    "not a model": ("perplexity {tmp} --precision 4 --text {py}", "not a converted checkpoint"),
    "inspect nothing": ("inspect {tmp}", "config.json"),
    "plan for bf16": ("plan {hf} --hbm-budget 1GiB", "is not a converted checkpoint"),
    "bf16 of converted": (
        "perplexity {nano} --precision bf16 --text {py}",
        "does not hold the unquantized experts",
    ),
    "text missing": ("perplexity {nano} --precision 4 --text {tmp}/none", "cannot read text file"),
    "text not UTF-8": ("perplexity {nano} --precision 4 --text {latin}", "is not UTF-8: byte 0xe9"),
    "text missing beside another": (
        "perplexity {nano} --precision 4 --text {py} {tmp}/none",
        "cannot read text file",
    ),
    "text too short": ("perplexity {nano} --precision 4 --text {short}", "512 needs 513: give a"),
    "eval without a model": (
        "eval {hf} --reference {hf} --text {py} --precision 4",
        "not a converted checkpoint",
    ),
    "eval against itself": (
        "eval {nano} --reference {nano} --text {py} --precision 4",
        "so it cannot be the reference; give the directory that the checkpoint was",
    ),
    "eval text missing": (
        "eval {nano} --reference {hf} --text {py} {tmp}/none --precision 4",
        "cannot read text file",
    ),
    "eval text too short": (
        "eval {nano} --reference {hf} --text {short} --precision 4",
        "512 needs 513: give a",
    ),
    "eval window": (
        "eval {nano} --reference {hf} --text {py} --precision 4 --window 0",
        "--window must be positive, got 0",
    ),
    "eval window too long": (
        "eval {nano} --reference {hf} --text {py} --precision 4 --window 5000",
        "lower --window",
    ),
    "window": ("perplexity {nano} --text {py} --window 0", "--window must be positive, got 0"),
    "window too long": ("perplexity {nano} --text {py} --window 5000", "lower --window"),
    "windows": ("perplexity {nano} --text {py} --max-windows 0", "--max-windows must be positive"),
    "pages at 4": (
        "perplexity {nano} --text {py} --precision 4 --pages 3",
        "--pages is for --precision dynamic, got 4",
    ),
    "prompt missing": ("generate {nano} --prompt-file {tmp}/none", "cannot read text file"),
    "prompt not UTF-8": ("generate {nano} --prompt-file {latin}", "is not UTF-8"),
    "budget 0": ("generate {nano} --prompt a --hbm-budget 0", "at least 1 byte, got '0'"),
    "budget in words": ("plan {nano} --hbm-budget lots", "cannot read 'lots' as an amount"),
    "budget below 0": ("plan {nano} --hbm-budget=-1GiB", "cannot read '-1GiB'"),
    "budget and pages": (
        "generate {nano} --prompt a --hbm-budget 1GiB --base-bits 2 --pages 3",
        "give either a budget (1GiB) or pages (3), not both",
    ),
    "pages alone": ("chat {nano} --pages 3", "--pages 3 needs --base-bits"),
    "context": ("plan {nano} --hbm-budget 1GiB --context 9999", "context of 9999 is longer than"),
    "bf16 budget": ("generate {hf} --prompt a --hbm-budget 1GiB", "takes no budget and no base"),
    "temperature": ("generate {nano} --prompt a --temperature -1", "temperature must be 0 or more"),
    "no place for stats": (
        "generate {nano} --prompt a --stats-json {tmp}/no/stats.json",
        "stats.json: give a file in a directory that exists",
    ),
    "no place for hotness": (
        "generate {nano} --prompt a --base-bits 2 --pages 3 --hotness-profile {tmp}/no/hot.json",
        "hot.json: give a file in a directory that exists",
    ),
    "hotness without pages": (
        "chat {nano} --base-bits 4 --hotness-profile {tmp}/hot.json",
        "every expert stays at 4 bits, for the pool has no pages; give it some, or leave",
    ),
    "hotness of something else": (
        "chat {nano} --base-bits 2 --pages 3 --hotness-profile {short}",
        "generation_config.json: is not a hotness profile; give another file, or delete",
    ),
    "trace exists": (
        "generate {nano} --prompt a --base-bits 2 --pages 3 --routing-trace {latin}",
        "latin.txt: exists already; give another file, or delete it",
    ),
    "trace at 4": (
        "perplexity {nano} --text {py} --precision 4 --routing-trace {tmp}/trace",
        "--routing-trace is for --precision dynamic, got 4",
    ),
    "no trace": ("simulate {tmp}/none", "none: cannot be read (No such file"),
    "trace of something else": ("simulate {short}", "not valid JSON"),
    "share": ("simulate {trace} --pages-share -1", "--pages-share must be 0 or more, like 0.25"),
    "share that is none": ("simulate {trace} --pages-share nan", "--pages-share must be 0 or"),
    "share of more": ("simulate {trace} --pages-share 9", "--pages must be in 0..72"),
    "interval of less": ("simulate {trace} --interval 3", "a multiple of the 4 steps"),
    "hotness to simulate with missing": (
        "simulate {trace} --hotness-profile {tmp}/none",
        "none: cannot be read (No such file",
    ),
    "convert nothing": ("convert {tmp}/none {tmp}/out", "none"),
}


@pytest.fixture
def places(converted, hf_dir, text_dir, tmp_path, recorded):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("été".encode("latin-1"))
    return {
        "nano": converted,
        "hf": hf_dir,
        "py": text_dir / "python.txt",
        "tmp": tmp_path,
        "trace": recorded,
        "latin": latin,
        "short": hf_dir / "generation_config.json",
    }


@pytest.mark.usefixtures("no_plans")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(run, places, case):
    command, message = BAD[case]
    result = run(*command.format(**places).split(" "))
    assert result.status == 2
    assert result.out == ""
    assert result.err.startswith("dynaexq: error: ")
    assert result.err.count("\n") == 1
    assert message in result.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "a " * 300), "do not fit a context of 256"),
        (("--prompt", "a", "--max-tokens", "0"), "max_tokens must be positive, got 0"),
        (("--prompt", "a", "--stop", ""), "a stop string cannot be empty"),
    ],
)
def test_bad_prompts(run, converted, options, message):
    shapes = ("--base-bits", 8, "--context", 256, "--chunk", 32)
    result = run("generate", converted, *options, *shapes)
    assert (result.status, result.out) == (2, "")
    assert result.err.count("\n") == 1
    assert message in result.err


@pytest.mark.parametrize(
    "command",
    [
        "",
        "decode",
        "generate {nano}",
        "generate {nano} --prompt a --prompt-file b",
        "perplexity {nano} --text f --precision 3",
        "eval {nano} --text f --precision 4",
        "eval {nano} --reference {hf} --text f",
        "eval {nano} --reference {hf} --text f --precision bf16",
        "plan {nano}",
        "plan {nano} --hbm-budget 1GiB --base-bits 3",
        "convert {hf} {tmp}/out --dense-bits 4",
        "simulate {trace} --pages 3 --pages-share 0.25",
        "simulate {trace} --policy static",
        "simulate",
    ],
)
def test_unknown_flags_and_values_are_usage_errors(run, places, command):
    result = run(*command.format(**places).split())
    assert result.status == 2
    assert result.out == ""
    assert "usage: dynaexq" in result.err


def test_unexpected_errors_keep_their_traceback(run, converted, monkeypatch):
    """Only what a user can mend is reduced to a line."""

    def fail(path):
        raise ValueError("a bug")

    monkeypatch.setattr("dynaexq_jax.cli.inspect.is_converted", fail)
    with pytest.raises(ValueError, match="a bug"):
        run("inspect", converted)


def python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
        **options,
    )


def test_help_names_every_command():
    result = python("-m", "dynaexq_jax", "--help")
    assert result.returncode == 0
    assert all(re.search(rf"^ +{name}\b", result.stdout, re.MULTILINE) for name in COMMANDS)


def test_help_and_wrong_commands_import_no_jax():
    probe = (
        "import sys; from dynaexq_jax.cli import main\n"
        "for arguments in (['--help'], ['decode']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit: pass\n"
        "print(sorted({'jax', 'flax', 'transformers', 'orbax', 'numpy'} & set(sys.modules)))"
    )
    assert python("-c", probe).stdout.splitlines()[-1] == "[]"


def test_a_reader_that_leaves_ends_the_command_quietly(converted):
    command = [sys.executable, "-u", "-m", "dynaexq_jax", "inspect", str(converted)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(timeout=60) == 1
    assert b"Traceback" not in error


class TestDevice:
    """What is asked of the backend before it starts."""

    @pytest.fixture(autouse=True)
    def clean(self, monkeypatch):
        for name in device.FRACTION_VARIABLES:
            monkeypatch.setenv(name, "")  # restored afterwards
            monkeypatch.delenv(name)

    @pytest.mark.parametrize(
        ("budget", "total", "fraction"),
        [(20, 80, "0.250000"), (80, 80, None), (90, 80, None), (None, 80, None), (20, None, None)],
    )
    def test_the_allocator_is_held_to_the_budget(self, monkeypatch, budget, total, fraction):
        monkeypatch.setattr(device, "gpu_memory_bytes", lambda: total)
        device.prepare_device(budget)
        assert os.environ.get(device.FRACTION_VARIABLE) == fraction

    @pytest.mark.parametrize("name", device.FRACTION_VARIABLES)
    def test_a_limit_that_the_user_has_set_stays(self, monkeypatch, name):
        monkeypatch.setattr(device, "gpu_memory_bytes", lambda: 80)
        monkeypatch.setenv(name, "0.9")
        device.prepare_device(20)
        assert [os.environ.get(n) for n in device.FRACTION_VARIABLES if n in os.environ] == ["0.9"]

    def test_memory_is_what_the_driver_s_tool_says(self, monkeypatch, tmp_path):
        tool = tmp_path / "nvidia-smi"
        tool.write_text("#!/bin/sh\necho 81559\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        assert device.gpu_memory_bytes() == 81559 * 2**20
        tool.write_text("#!/bin/sh\nexit 9\n")
        assert device.gpu_memory_bytes() is None
        monkeypatch.setenv("PATH", str(tmp_path / "none"))
        assert device.gpu_memory_bytes() is None


def test_the_console_script_is_this_main():
    assert callable(dynaexq_jax.cli.main)
    assert 'dynaexq = "dynaexq_jax.cli:main"' in (ROOT / "pyproject.toml").read_text()
