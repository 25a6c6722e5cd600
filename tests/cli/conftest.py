"""The command line in this process, on the shipped model."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from serving import nano
from traffic.conftest import header, recorded, traffic

from dynaexq_jax.cli import device, main

__all__ = ["header", "recorded", "traffic"]
"""Fixtures of the traces' own tests."""


class Outcome(NamedTuple):
    """What a command left."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        """What stdout says, which must be one line of it; the command must have succeeded."""
        assert self.status == 0, self.err
        assert self.out.count("\n") == 1
        return json.loads(self.out)


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> Path:
    return nano.converted_nano(tmp_path_factory)


@pytest.fixture(scope="session")
def hf_dir() -> Path:
    return nano.NANO


@pytest.fixture(scope="session")
def text_dir() -> Path:
    return nano.TEXT


@pytest.fixture(scope="module", autouse=True)
def cache_dir(tmp_path_factory):
    """Commands keep compiled programs here, and JAX's configuration is as before afterwards."""
    folder = nano.shared_folder(tmp_path_factory) / "xla"
    with pytest.MonkeyPatch.context() as patch, nano.compiled_programs(folder):
        patch.setenv(device.CACHE_VARIABLE, str(folder))
        yield folder


@pytest.fixture
def no_plans(monkeypatch):
    """Plans would compile programs that scoring does not run."""
    monkeypatch.setattr("dynaexq_jax.serving.planning.Planner.temporary_bytes", lambda *_: 0)


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command; the status that the process would exit with, stdout and stderr."""
    for name in device.FRACTION_VARIABLES:  # not to be left behind where there is a GPU
        monkeypatch.setitem(os.environ, name, os.environ.get(name, "0.75"))

    def run(*arguments) -> Outcome:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            status = stop.code
        return Outcome(status, *capsys.readouterr())

    return run
