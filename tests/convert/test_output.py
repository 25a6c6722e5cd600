"""The output folder: kept, replaced, or never there in part."""

import numpy as np
import pytest
from checkpoint.conversion import assert_holds, converted, hashes

import convert.workdir
from convert import convert as run_convert
from dynaexq_jax.checkpoint import Checkpoint
from dynaexq_jax.errors import InputError
from dynaexq_jax.hf import HfDirectory


def test_that_exists_is_kept(tmp_path, tiny_hf_dir):
    checkpoint, _ = converted(tiny_hf_dir, tmp_path / "out")
    before = (tmp_path / "out" / "dynaexq.json").read_bytes()
    with pytest.raises(InputError, match=r"out: output exists.*--force"):
        run_convert(tiny_hf_dir, tmp_path / "out", progress=False)
    assert (checkpoint.path / "dynaexq.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_that_exists_is_replaced_with_force(tmp_path, tiny_hf_dir):
    converted(tiny_hf_dir, tmp_path / "out")
    checkpoint, _ = converted(tiny_hf_dir, tmp_path / "out", group_size=64, force=True)
    assert checkpoint.format.group_size == 64
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_that_exists_survives_a_failure_under_force(tmp_path, tiny_model, tiny_hf_dir):
    before, _ = converted(tiny_hf_dir, tmp_path / "out")
    tensors = tiny_model.make_tiny_model(tmp_path / "bad")
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"][0, 0] = np.nan
    tiny_model.write_weights(tmp_path / "bad", tensors)
    with pytest.raises(InputError, match="NaN"):
        run_convert(tmp_path / "bad", tmp_path / "out", force=True, progress=False)
    assert_holds(Checkpoint.open(tmp_path / "out"), HfDirectory.open(tiny_hf_dir))
    assert hashes(Checkpoint.open(tmp_path / "out")) == hashes(before)


def test_force_does_not_replace_what_is_no_checkpoint(tmp_path, tiny_hf_dir):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="not a converted checkpoint"):
        run_convert(tiny_hf_dir, tmp_path / "out", force=True, progress=False)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


def test_foreign_partial_folder_is_kept(tmp_path, tiny_hf_dir):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"thesis\.txt"):
        run_convert(tiny_hf_dir, tmp_path / "out", force=True, progress=False)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "precious"
    assert len(list((tmp_path / "out.partial").iterdir())) == 1


def test_whose_parent_is_a_file(tmp_path, tiny_hf_dir):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        run_convert(tiny_hf_dir, tmp_path / "file" / "out", progress=False)


def test_whose_parents_are_missing(tmp_path, tiny_hf_dir):
    assert converted(tiny_hf_dir, tmp_path / "a" / "b" / "out")[0].experts == 4


def test_appears_whole_by_one_rename(tmp_path, tiny_hf_dir, monkeypatch):
    publish, before = convert.workdir.WorkDir.publish, []

    def watch(work):
        assert not (tmp_path / "out").exists()
        assert Checkpoint.open(work.checkpoint).dense()
        before.append(work.checkpoint.stat().st_ino)
        publish(work)

    monkeypatch.setattr(convert.workdir.WorkDir, "publish", watch)
    converted(tiny_hf_dir, tmp_path / "out")
    assert before == [(tmp_path / "out").stat().st_ino]


def test_two_at_once(tmp_path, tiny_hf_dir):
    with (
        convert.workdir.WorkDir(tmp_path / "out", force=False),
        pytest.raises(InputError, match="another process"),
    ):
        run_convert(tiny_hf_dir, tmp_path / "out", progress=False)
    assert converted(tiny_hf_dir, tmp_path / "out")[0].experts == 4
