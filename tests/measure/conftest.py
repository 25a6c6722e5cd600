"""The small model of the engine's tests."""

import pytest
from engine.small import Small, make_small


@pytest.fixture(scope="session")
def small() -> Small:
    return make_small()
