"""``convert``, as a command of its own and of ``dynaexq``."""

import sys

import convert.__main__
from dynaexq_jax.checkpoint.header import Header


def test_convert_is_one_command_under_two_names(run, tiny_hf_dir, tmp_path, monkeypatch, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    options = ("--group-size", "64", "--dense-bits", "8")
    result = run("convert", tiny_hf_dir, first, *options)
    assert result.status == 0
    assert str(first) in result.out
    assert run("inspect", first, "--json").json()["format"]["dense bits"] == 8
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
