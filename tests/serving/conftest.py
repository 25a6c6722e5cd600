"""The shipped model and what is loaded of it."""

from pathlib import Path

import pytest
from serving import nano

import dynaexq_jax as dx

SHAPES = {"context": 256, "chunk": 32}


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> Path:
    return nano.converted_nano(tmp_path_factory)


@pytest.fixture(scope="session")
def hf_dir() -> Path:
    return nano.NANO


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    with nano.compiled_programs(nano.shared_folder(tmp_path_factory) / "xla"):
        yield


@pytest.fixture(scope="module")
def llm(converted) -> dx.LLM:
    """Everything at 8 bits, three slots."""
    return dx.load(converted, base_bits=8, batch=3, **SHAPES)


@pytest.fixture(scope="module")
def plain(hf_dir) -> dx.LLM:
    """Unquantized experts, one slot."""
    return dx.load(hf_dir, **SHAPES)
