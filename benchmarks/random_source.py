"""A full-size model without a checkpoint: what loading asks of a model, made of random numbers.

    source = RandomSource.make(full_size.config(), {"a": share_a, "b": share_b})
    engine, plan = build_engine(source, ServeConfig(hbm_budget="24GiB", context=2304))

Pages and scales are made in host memory, on as many threads as there are cores; dense weights on
the device.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, Self

import full_size
import ml_dtypes
import numpy as np

from dynaexq_jax.config import ModelConfig
from dynaexq_jax.models.weights import DenseWeights
from pallas_kernels.layout import page_shape
from pallas_kernels.levels import LEVEL_BITS, PAGES_OF_BITS, Bits, level_of_bits
from pallas_kernels.pages import ExpertFormat, Matrices
from pallas_kernels.scales import Scales

BENEFIT = (0.1, 0.01)
"""Of the steps from 2 to 4 and from 4 to 8 bits, the same in all layers."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RandomSource:
    """Routes the tokens of a domain by its own popularity of experts; see ``full_size``."""

    config: ModelConfig
    format: ExpertFormat
    domains: tuple[str, ...]
    """Token v belongs to ``domains[v % D]``."""
    shares: np.ndarray
    """float64 [D, L, E]: how popular experts are in each domain."""
    dense_bits: int = 16
    seed: int = 0
    name: str = "random weights"
    available_bits: tuple[Bits, ...] = LEVEL_BITS
    pinned: tuple[tuple[int, int], ...] = ()

    @classmethod
    def make(cls, config: ModelConfig, shares: Mapping[str, np.ndarray], **options: Any) -> Self:
        """A source whose domains have ``shares`` [L, E] by name. Options are the other fields."""
        fields = {"format": full_size.expert_format(config), **options}
        return cls(
            config=config,
            domains=tuple(shares),
            shares=np.stack(list(shares.values())),
            **fields,
        )

    def __post_init__(self) -> None:
        full_size.check_domains(len(self.domains))
        wanted = (len(self.domains), len(self.layers), self.experts)
        if self.shares.shape != wanted:
            raise ValueError(f"shares must be {wanted}, got {self.shares.shape}")

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that hold experts."""
        return self.config.sparse_layers

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return self.config.num_experts

    @property
    def benefit(self) -> np.ndarray:
        """float64 [L, S]: what each step of the ladder gains."""
        return np.tile(BENEFIT, (len(self.layers), 1))

    def scales(self) -> Matrices:
        """``Scales`` of [L, E, B, G, 64], numpy.

        Rows of ``down`` that write a domain's channel have the least (``full_size.least_code``).
        """
        gain = full_size.residual_gain(self.config, len(self.domains))
        is_log8 = self.format.scale_encoding == "log8"
        fill = _fill_codes if is_log8 else _fill_scales
        gate_up, down = (
            self._by_layer((self.experts, *self.format.scale_shape(*shape)), fill, index)
            for index, shape in enumerate(self.format.matrix_shapes.values())
        )
        if is_log8:
            base = np.full(down.shape[:2], full_size.EXPERT_SCALES[1], np.float32)
            scales = Matrices(Scales(gate_up, base), Scales(down, base * np.float32(gain)))
        else:
            down *= np.asarray(gain, down.dtype)
            scales = Matrices(Scales(gate_up, None), Scales(down, None))
        least = full_size.least_code(self.format.scale_encoding)
        scales.down.codes[:, :, 0, :, : len(self.domains)] = least
        return scales

    def level(self, bits: Bits) -> tuple[Matrices, ...]:
        """Pages that a level adds, each uint32 [L, E, B, 2C, 256], numpy."""
        level = level_of_bits(bits)
        below = PAGES_OF_BITS[LEVEL_BITS[level - 1]] if level else 0
        return tuple(self._page(rung) for rung in range(below, PAGES_OF_BITS[bits]))

    def abstract_dense(self) -> DenseWeights:
        """Shapes and dtypes of the dense weights; nothing is allocated."""
        return full_size.abstract_dense(self.config, self.dense_bits)

    def dense_weights(self) -> DenseWeights:
        """The dense weights, on the device."""
        return full_size.random_dense(self.config, self.shares, self.dense_bits)

    def _page(self, rung: int) -> Matrices:
        shapes = self.format.matrix_shapes.values()
        return Matrices(
            *(
                self._by_layer((self.experts, *page_shape(*shape)), _fill_words, 8 + 2 * rung + n)
                for n, shape in enumerate(shapes)
            )
        )

    def _by_layer(
        self, shape: tuple[int, ...], fill: Callable[..., np.ndarray], stream: int
    ) -> np.ndarray:
        """Random arrays of one layer each, stacked; ``stream`` tells arrays apart."""
        layers = len(self.layers)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
            first = fill(np.random.Generator(np.random.SFC64((self.seed, stream))), shape)
            stacked = np.empty((layers, *shape), first.dtype)
            stacked[0] = first

            def one(layer: int) -> None:
                rng = np.random.Generator(np.random.SFC64((self.seed, stream, layer)))
                stacked[layer] = fill(rng, shape)

            list(threads.map(one, range(1, layers)))
        return stacked


class BlankSource(RandomSource):
    """Its pages and scales are zero, which takes no time and hardly any memory of the host."""

    def _by_layer(
        self, shape: tuple[int, ...], fill: Callable[..., np.ndarray], stream: int
    ) -> np.ndarray:
        dtype = fill(np.random.Generator(np.random.SFC64(0)), (1, 2)).dtype
        return np.zeros((len(self.layers), *shape), dtype)  # memory is taken when it is written


def _fill_words(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    words = rng.integers(0, 2**64, int(np.prod(shape)) // 2, dtype=np.uint64)
    return words.view(np.uint32).reshape(shape)


def _fill_codes(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(0, full_size.LOG8_CODES, shape, np.uint8)


def _fill_scales(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    least, most = full_size.EXPERT_SCALES
    scales = rng.random(shape, np.float32) * np.float32(most - least) + np.float32(least)
    return scales.astype(ml_dtypes.bfloat16)
