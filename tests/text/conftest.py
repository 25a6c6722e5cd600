from pathlib import Path

import pytest

from dynaexq_jax.text import load_tokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="session")
def nano_dir():
    return EXAMPLES / "nano-moe"


@pytest.fixture(scope="session")
def text_dir():
    return EXAMPLES / "text"


@pytest.fixture(scope="session")
def tokenizer(nano_dir):
    return load_tokenizer(nano_dir)
