"""Space on the disk: checked ahead, enough, and what happens when it ends."""

import shutil

import pytest
from checkpoint.conversion import assert_holds, converted

import convert.layers
import convert.pipeline
import convert.plan
from convert import convert as run_convert
from dynaexq_jax.errors import InputError
from dynaexq_jax.hf import HfDirectory


def test_is_checked_before_anything_is_written(tmp_path, tiny_hf_dir, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(convert.plan.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"needs [\d,]+ bytes of disk, 1,000 are available"):
        run_convert(tiny_hf_dir, tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dense_bits", [16, 8])
def test_asked_for_suffices_and_is_not_much_more(tmp_path, tiny_hf_dir, monkeypatch, dense_bits):
    needed = []
    monkeypatch.setattr(
        convert.pipeline, "check_free_space", lambda _, nbytes: needed.append(nbytes)
    )
    _, summary = converted(tiny_hf_dir, tmp_path / "out", dense_bits=dense_bits)
    assert summary.nbytes <= needed[0] <= summary.nbytes + 2**20


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), None])
def test_that_ends_meanwhile_leaves_work_to_resume(tmp_path, tiny_hf_dir, monkeypatch, error):
    """The disk fills up at the third unit of the second layer, by Orbax's error or by ours."""
    error = error or ValueError(
        "RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']"
    )
    save_unit = convert.layers.save_unit

    def full(root, unit, arrays):
        if unit == "level8/layer_001":
            raise error
        return save_unit(root, unit, arrays)

    with monkeypatch.context() as patch:
        patch.setattr(convert.layers, "save_unit", full)
        with pytest.raises(InputError, match=r"level8/layer_001.*No space left.*repeat"):
            run_convert(tiny_hf_dir, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    checkpoint, summary = converted(tiny_hf_dir, tmp_path / "out")
    assert summary.resumed_steps == 2
    assert_holds(checkpoint, HfDirectory.open(tiny_hf_dir))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
