"""What a model must offer to be served: a converted checkpoint does, and so may anything else."""

from typing import Protocol

import numpy as np

from dynaexq_jax.bank import PageSource
from dynaexq_jax.config import ModelConfig
from dynaexq_jax.models.weights import DenseWeights
from pallas_kernels.levels import Bits


class ModelSource(PageSource, Protocol):
    """Packed experts, dense weights, and what the policy knows beforehand."""

    @property
    def name(self) -> str:
        """What messages call it, such as its path."""

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""

    @property
    def available_bits(self) -> tuple[Bits, ...]:
        """Levels that ``level`` can read, ascending from 2."""

    @property
    def pinned(self) -> tuple[tuple[int, int], ...]:
        """(row of axis L, expert) of the experts that are never demoted."""

    @property
    def benefit(self) -> np.ndarray:
        """float64 [L, S] or [L, S, E]: what each step of the ladder gains."""

    def abstract_dense(self) -> DenseWeights:
        """Shapes and dtypes of the dense weights; nothing is read or allocated."""

    def dense_weights(self) -> DenseWeights:
        """The dense weights, on the device."""
