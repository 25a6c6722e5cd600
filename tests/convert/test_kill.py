"""A conversion that is killed at any moment is finished by running it again."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from convert import convert as run_convert
from dynaexq_jax.checkpoint import Checkpoint

LAYERS = 24
KILLS = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_tiny_model):
    """Many small layers, so that kills hit every kind of work."""
    path = tmp_path_factory.mktemp("kill") / "hf"
    make_tiny_model(path, num_hidden_layers=LAYERS, num_experts=2, mlp_only_layers=[3])
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("undisturbed") / "out"
    run_convert(model, path, dense_bits=8, progress=False)
    return hashes(path)


def hashes(path):
    units = Checkpoint.open(path).header.units
    return {name: unit.arrays for name, unit in units.items()}


def start(model, output):
    """Starts a conversion; compiled code is kept, so that little of its time is compilation."""
    cache = output.with_name("cache")
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    command = [sys.executable, "-m", "convert", str(model), str(output), "--dense-bits", "8"]
    with output.with_name("log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def finished_steps(output):
    return len(list(output.with_name("out.partial").glob("done/layer_*")))


def test_killed_at_random_times(tmp_path, model, undisturbed):
    rng = random.Random(0)
    output = tmp_path / "out"
    steps = [0]
    for _ in range(KILLS):
        process = start(model, output)
        # Wait for a step of this run, then for any moment of the steps that follow.
        while finished_steps(output) == steps[-1] and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.12))
        process.send_signal(signal.SIGKILL)
        process.wait()
        steps.append(finished_steps(output))
        assert process.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()
        assert not output.exists()
    assert sum(b > a for a, b in itertools.pairwise(steps)) >= 3, steps
    status = start(model, output).wait()
    text = (tmp_path / "log").read_text()
    assert status == 0, text
    assert "steps resumed" in text
    assert hashes(output) == undisturbed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "log", "out"]


def test_killed_while_it_starts(tmp_path, model):
    """Before there is any work to keep: the next run begins afresh and is not confused."""
    output = tmp_path / "out"
    rng = random.Random(1)
    for _ in range(3):
        process = start(model, output)
        while not output.with_name("out.partial").exists() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not output.exists()
    summary = run_convert(model, output, dense_bits=8, progress=False)
    assert summary.resumed_steps <= 1
