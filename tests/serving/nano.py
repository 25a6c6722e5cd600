"""The shipped model, converted once for all workers, and compiled programs that tests share."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from convert import convert

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NANO = EXAMPLES / "nano-moe"
TEXT = EXAMPLES / "text"

CACHE_SETTINGS = {
    "jax_compilation_cache_dir": "",
    "jax_persistent_cache_min_compile_time_secs": 0.2,
}


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A temporary folder that all workers of this run share."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def converted_nano(factory: pytest.TempPathFactory, dense_bits: int = 16) -> Path:
    """The converted checkpoint; read-only."""
    folder = shared_folder(factory)
    output = folder / f"nano-converted-{dense_bits}"
    with output.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            convert(NANO, output, dense_bits=dense_bits, progress=False)
    return output


@contextlib.contextmanager
def compiled_programs(folder: Path) -> Iterator[None]:
    """Keeps compiled programs in ``folder`` meanwhile: a test does not compile them again."""
    before = {name: getattr(jax.config, name) for name in CACHE_SETTINGS}
    compilation_cache.reset_cache()
    for name, value in CACHE_SETTINGS.items():
        jax.config.update(name, value or str(folder))
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
