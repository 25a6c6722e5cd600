"""What is asked of the backend before it starts."""

import os
import sys

import jax
import pytest

from dynaexq_jax.cli import device


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in device.FRACTION_VARIABLES:
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)


def test_threads_take_turns_within_a_decode_step():
    device.prepare_device(None)
    assert sys.getswitchinterval() == pytest.approx(device.SWITCH_INTERVAL_S)


@pytest.mark.parametrize(
    ("budget", "total", "fraction"),
    [(20, 80, "0.250000"), (80, 80, None), (90, 80, None), (None, 80, None), (20, None, None)],
)
def test_the_allocator_is_held_to_the_budget(monkeypatch, budget, total, fraction):
    monkeypatch.setattr(device, "gpu_memory_bytes", lambda: total)
    device.prepare_device(budget)
    assert os.environ.get(device.FRACTION_VARIABLE) == fraction


@pytest.mark.parametrize("name", device.FRACTION_VARIABLES)
def test_a_limit_that_the_user_has_set_stays(monkeypatch, name):
    monkeypatch.setattr(device, "gpu_memory_bytes", lambda: 80)
    monkeypatch.setenv(name, "0.9")
    device.prepare_device(20)
    assert [os.environ.get(n) for n in device.FRACTION_VARIABLES if n in os.environ] == ["0.9"]


def test_memory_is_what_the_driver_s_tool_says(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 81559\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert device.gpu_memory_bytes() == 81559 * 2**20
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert device.gpu_memory_bytes() is None
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert device.gpu_memory_bytes() is None


def test_programs_are_not_kept_where_no_folder_can_be(monkeypatch, tmp_path, capsys):
    before = jax.config.jax_compilation_cache_dir
    (tmp_path / "file").touch()
    monkeypatch.setenv(device.CACHE_VARIABLE, str(tmp_path / "file" / "xla"))
    device.prepare_device(None)
    assert jax.config.jax_compilation_cache_dir == before
    told = capsys.readouterr().err
    assert "file/xla: cannot be made (Not a directory), so compiled programs are not kept" in told
    assert told.count("\n") == 1
