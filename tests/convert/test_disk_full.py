"""A disk that is really full: a small tmpfs in a namespace of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
MOUNT = "mount -t tmpfs -o size={size} tmpfs {folder}"
CONVERT = """
import sys, convert.pipeline
from dynaexq_jax.cli import main
if sys.argv[3] == "unchecked":  # as if another process filled the disk after the check
    convert.pipeline.check_free_space = lambda *_: None
sys.exit(main(["convert", *sys.argv[1:3]]))
"""


def can_mount(folder):
    script = MOUNT.format(size="1m", folder=folder)
    try:
        return subprocess.run([*NAMESPACE, "sh", "-c", script], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def test_full_disk_then_more_room(tmp_path, make_tiny_model):
    folder = tmp_path / "small"
    folder.mkdir()
    if not can_mount(folder):
        pytest.skip("needs user namespaces in which a tmpfs can be mounted")
    make_tiny_model(tmp_path / "hf", num_hidden_layers=8)
    (tmp_path / "run.py").write_text(CONVERT)
    run = f"{sys.executable} {tmp_path}/run.py {tmp_path}/hf {folder}/out"
    script = f"""
        {MOUNT.format(size="1500k", folder=folder)}
        {run} checked;   echo "status $?"; ls {folder}
        {run} unchecked; echo "status $?"; ls {folder}; ls {folder}/out.partial
        mount -o remount,size=16m {folder}
        {run} checked;   echo "status $?"; ls {folder}
    """
    done = subprocess.run(
        [*NAMESPACE, "sh", "-c", script],
        capture_output=True,
        text=True,
        env={
            "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
    )
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 2, done.stderr
    assert "bytes of disk" in errors[0]
    assert "No space left on device" in errors[1]
    # a thread of the library that writes may still report that it was cut off; nothing of ours does
    assert not any(f'File "{ROOT}/{ours}/' in done.stderr for ours in ("convert", "dynaexq_jax"))
    first, second, third = done.stdout.split("status ")[1:]
    assert first.split() == ["2"]
    assert second.split()[:2] == ["2", "out.partial"]
    assert {"checkpoint", "done", "job.json"} <= set(second.split())
    assert "steps resumed" in second + third
    assert third.split() == ["0", "out"]
