"""``convert``, as a command of ``dynaexq`` and by the name of its package."""

import runpy
import sys

import pytest

from dynaexq_jax.checkpoint.header import Header


def run_package(monkeypatch, *arguments):
    """``python -m convert`` in this process: its exit status."""
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("convert", run_name="__main__")
    return stop.value.code


def test_convert_is_one_command_under_two_names(run, tiny_hf_dir, tmp_path, monkeypatch, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    options = ("--group-size", "64", "--dense-bits", "8")
    result = run("convert", tiny_hf_dir, first, *options)
    assert result.status == 0
    assert str(first) in result.out
    assert run("inspect", first, "--json").json()["format"]["dense bits"] == 8
    assert run_package(monkeypatch, tiny_hf_dir, second, *options) == 0
    headers = [Header.read(path) for path in (first, second)]
    arrays = [{unit: it.arrays for unit, it in header.units.items()} for header in headers]
    assert arrays[0] == arrays[1]
    assert headers[0].group_size == headers[1].group_size == 64

    capsys.readouterr()
    assert run_package(monkeypatch, tiny_hf_dir, second, *options) == 2  # the output exists now
    message = capsys.readouterr().err
    again = run("convert", tiny_hf_dir, second, "--group-size", 32)
    assert again.status == 2
    assert again.err == message
    assert run("convert", tiny_hf_dir, second, "--group-size", 16, "--force").status == 0
    assert Header.read(second).group_size == 16
