"""Two runs of a calibrated conversion must find the same products, on a GPU, too."""

import argparse
import os

import pytest

from convert import cli


class _Asked(Exception):
    """The conversion would begin."""


def _flags_when_work_begins(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    def begin(*args: object, **options: object) -> None:
        raise _Asked

    monkeypatch.setattr(cli, "convert", begin)
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    with pytest.raises(_Asked):
        cli.run(parser.parse_args(["model", "out", *arguments]))
    return os.environ.get("XLA_FLAGS", "")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "--xla_gpu_autotune_level=0"),
        ("--xla_a=1", "--xla_a=1 --xla_gpu_autotune_level=0"),
        ("--xla_gpu_autotune_level=4", "--xla_gpu_autotune_level=4"),
    ],
)
def test_calibration_does_not_tune(
    monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    monkeypatch.setenv("XLA_FLAGS", before)
    assert _flags_when_work_begins(monkeypatch, "--calibration", "text") == after
