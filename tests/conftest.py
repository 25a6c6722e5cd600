"""Fixtures that several folders of tests share."""

import gc
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from engine.small import Small

if os.environ.get("JAX_PLATFORMS") == "cpu":
    # What tests run on a CPU takes longer to compile than to run; subprocesses inherit it.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

gc.set_threshold(50_000, 20, 20)
"""Tracing makes many objects that stay: looking through them at every turn takes a tenth."""


@pytest.fixture(scope="session")
def tiny_model() -> ModuleType:
    """The module tiny_model.py."""
    path = Path(__file__).with_name("tiny_model.py")
    spec = importlib.util.spec_from_file_location("tiny_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def make_tiny_model(tiny_model: ModuleType) -> Callable:
    """``make_tiny_model`` of tiny_model.py: writes a small Hugging Face directory."""
    return tiny_model.make_tiny_model


@pytest.fixture(scope="session")
def tiny_hf_dir(tmp_path_factory: pytest.TempPathFactory, make_tiny_model: Callable) -> Path:
    """A small model in one file with a tied head; read-only."""
    path = tmp_path_factory.mktemp("hf") / "tiny"
    make_tiny_model(path)
    return path


@pytest.fixture(scope="session")
def small() -> "Small":
    """The small model of engine/small.py, whose programs all folders share."""
    from engine.small import make_small

    return make_small()
