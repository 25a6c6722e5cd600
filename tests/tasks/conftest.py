"""The shipped model as benchmarks see it."""

import pytest
from serving.conftest import SHAPES, converted, hf_dir, programs

import dynaexq_jax as dx
from dynaexq_jax.tasks.model import TaskModel

__all__ = ["converted", "hf_dir", "programs"]


@pytest.fixture(scope="module")
def model(converted) -> TaskModel:
    """Everything at 8 bits, in the shapes of the tests of serving: programs are shared."""
    return TaskModel(dx.load(converted, base_bits=8, batch=3, **SHAPES))
