"""A conversion that was interrupted goes on where it was."""

import numpy as np
import pytest
from checkpoint.conversion import assert_holds, converted, hashes

import convert.pipeline
from convert import convert as run_convert
from dynaexq_jax.errors import InputError
from dynaexq_jax.hf import HfDirectory


def interrupt_after_first_layer(source, output, monkeypatch, **options):
    """Leaves an unfinished conversion behind: the second layer raises."""
    original = convert.pipeline.LayerConverter.convert

    def stop(self, layer, advance):
        if layer == 1:
            raise KeyboardInterrupt
        return original(self, layer, advance)

    with monkeypatch.context() as patch:
        patch.setattr(convert.pipeline.LayerConverter, "convert", stop)
        with pytest.raises(KeyboardInterrupt):
            run_convert(source, output, progress=False, **options)


def test_skips_what_is_finished(tmp_path, tiny_hf_dir, monkeypatch):
    expected, _ = converted(tiny_hf_dir, tmp_path / "whole")
    interrupt_after_first_layer(tiny_hf_dir, tmp_path / "out", monkeypatch)
    checkpoint, summary = converted(tiny_hf_dir, tmp_path / "out")
    assert summary.resumed_steps == 2
    assert hashes(checkpoint) == hashes(expected)


def test_redoes_what_was_damaged_meanwhile(tmp_path, tiny_hf_dir, monkeypatch):
    expected, _ = converted(tiny_hf_dir, tmp_path / "whole")
    interrupt_after_first_layer(tiny_hf_dir, tmp_path / "out", monkeypatch)
    unit = tmp_path / "out.partial" / "checkpoint" / "level4" / "layer_000"
    data = next(path for path in (unit / "down" / "c").rglob("*") if path.is_file())
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    checkpoint, summary = converted(tiny_hf_dir, tmp_path / "out")
    assert summary.resumed_steps == 1
    assert hashes(checkpoint) == hashes(expected)


def test_of_other_options_needs_force(tmp_path, tiny_hf_dir, monkeypatch):
    interrupt_after_first_layer(tiny_hf_dir, tmp_path / "out", monkeypatch)
    with pytest.raises(InputError, match=r"group size was 32, is 64.*--force"):
        run_convert(tiny_hf_dir, tmp_path / "out", group_size=64, progress=False)
    checkpoint, summary = converted(tiny_hf_dir, tmp_path / "out", group_size=64, force=True)
    assert summary.resumed_steps == 0
    assert checkpoint.format.group_size == 64


def test_of_other_dense_bits_needs_force(tmp_path, tiny_hf_dir, monkeypatch):
    interrupt_after_first_layer(tiny_hf_dir, tmp_path / "out", monkeypatch, dense_bits=8)
    with pytest.raises(InputError, match=r"dense bits was 8, is 16.*--force"):
        run_convert(tiny_hf_dir, tmp_path / "out", progress=False)
    checkpoint, summary = converted(tiny_hf_dir, tmp_path / "out", dense_bits=8)
    assert summary.resumed_steps == 2
    assert_holds(checkpoint, HfDirectory.open(tiny_hf_dir))


def test_of_another_source_needs_force(tmp_path, make_tiny_model, monkeypatch):
    """Also of one that differs in nothing but its weights."""
    for seed in (0, 1):
        make_tiny_model(tmp_path / f"hf{seed}", seed=seed)
    interrupt_after_first_layer(tmp_path / "hf0", tmp_path / "out", monkeypatch)
    with pytest.raises(InputError, match=r"modification time of model\.safetensors was"):
        run_convert(tmp_path / "hf1", tmp_path / "out", progress=False)
    checkpoint, _ = converted(tmp_path / "hf1", tmp_path / "out", force=True)
    assert_holds(checkpoint, HfDirectory.open(tmp_path / "hf1"))


def test_after_a_kill_between_the_two_renames(tmp_path, tiny_hf_dir, monkeypatch):
    """The old checkpoint was moved aside, the new one was not yet in its place."""
    converted(tiny_hf_dir, tmp_path / "out", group_size=64)
    (tmp_path / "out").rename(tmp_path / "old")
    interrupt_after_first_layer(tiny_hf_dir, tmp_path / "out", monkeypatch)
    (tmp_path / "old").rename(tmp_path / "out.partial" / "replaced")
    checkpoint, _ = converted(tiny_hf_dir, tmp_path / "out")
    assert checkpoint.format.group_size == 32
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_failure_before_the_first_step_leaves_nothing(tmp_path, tiny_model):
    tensors = tiny_model.make_tiny_model(tmp_path / "hf")
    tensors["model.embed_tokens.weight"][0, 0] = np.inf
    tiny_model.write_weights(tmp_path / "hf", tensors)
    with pytest.raises(InputError, match=r"embed_tokens.*1 NaN or inf"):
        run_convert(tmp_path / "hf", tmp_path / "out", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
