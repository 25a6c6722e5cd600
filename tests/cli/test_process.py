"""The process around the commands."""

import os
import re
import subprocess
import sys

import pytest
from serving.nano import EXAMPLES

import dynaexq_jax.cli
from dynaexq_jax.cli import COMMANDS

ROOT = EXAMPLES.parent


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


def test_a_full_disk_behind_stdout_is_one_line(converted):
    command = [sys.executable, "-m", "dynaexq_jax", "inspect", str(converted)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, timeout=60)
    message = b"dynaexq: error: the output: No space left on device; free space there\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_the_console_script_is_this_main():
    assert callable(dynaexq_jax.cli.main)
    assert 'dynaexq = "dynaexq_jax.cli:main"' in (ROOT / "pyproject.toml").read_text()
