"""Sampling on the device: each batch slot has its own settings and its own seed."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32, UInt32

from dynaexq_jax.errors import InputError
from dynaexq_jax.trees import abstract_array


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. Filters apply in this order: temperature, top-k, top-p, min-p.

    The same seed, prompt and expert levels give the same tokens, whatever shares the batch.
    """

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Keeps the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keeps the likeliest tokens that together reach this probability."""
    min_p: float = 0.0
    """Drops tokens less likely than this share of the likeliest one."""
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "temperature": (0 <= self.temperature < math.inf, "0 or more, and finite"),
            "top_k": (0 <= self.top_k < 2**31, "in 0..2^31-1, where 0 is off"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p < 1, "in [0, 1)"),
            "seed": (0 <= self.seed < 2**32, "in 0..2^32-1"),
        }
        for name, (holds, range_) in checks.items():
            if not holds:
                raise InputError(f"{name} must be {range_}, got {getattr(self, name)}")

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn at all, and not just the likeliest taken."""
        return self.temperature > 0


class SamplingArrays(NamedTuple):
    """``SamplingParams`` of every batch slot; a pytree."""

    temperature: Float32[jax.Array, " B"]
    top_k: Int32[jax.Array, " B"]
    top_p: Float32[jax.Array, " B"]
    min_p: Float32[jax.Array, " B"]
    seed: UInt32[jax.Array, " B"]

    @staticmethod
    def of(params: SamplingParams) -> "SamplingArrays":
        """One slot's settings, as scalars of numpy."""
        return SamplingArrays._make(
            (
                np.float32(params.temperature),
                np.int32(params.top_k),
                np.float32(params.top_p),
                np.float32(params.min_p),
                np.uint32(params.seed),
            )
        )

    @staticmethod
    def abstract(*batch: int) -> "SamplingArrays":
        """Shapes and dtypes, of so many slots or of scalars; nothing allocated."""
        dtypes = (jnp.float32, jnp.int32, jnp.float32, jnp.float32, jnp.uint32)
        return SamplingArrays(*(abstract_array(batch, dtype) for dtype in dtypes))


def likeliest(logits: Float32[jax.Array, "*B V"]) -> Int32[jax.Array, "*B"]:
    """The token with the largest logit, the first of equals."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def sample(
    logits: Float32[jax.Array, "B V"],
    settings: SamplingArrays,
    positions: Int32[jax.Array, " B"],
) -> Int32[jax.Array, " B"]:
    """One token a slot; the randomness depends on the slot's seed and the token's position.

    Sorts the vocabulary, also for slots of temperature 0. Whether any slot draws at all is for
    the caller to know: a condition on the device would make the host wait for it.
    """
    drawn = jax.vmap(_draw)(logits, settings, positions)
    return jnp.where(settings.temperature > 0, drawn, likeliest(logits))


def _draw(
    logits: Float32[jax.Array, " V"], settings: SamplingArrays, position: Int32[jax.Array, ""]
) -> Int32[jax.Array, ""]:
    scaled = logits / jnp.maximum(settings.temperature, 1e-6)
    order = jnp.argsort(-scaled, stable=True)
    ranked = scaled[order]
    rank = jnp.arange(ranked.size)
    ranked = jnp.where((settings.top_k == 0) | (rank < settings.top_k), ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked)
    before = jnp.cumsum(probability) - probability
    kept = (before < settings.top_p) | (rank == 0)
    kept &= probability >= settings.min_p * probability[0]
    key = jax.random.fold_in(jax.random.key(settings.seed), position)
    choice = jax.random.categorical(key, jnp.where(kept, ranked, -jnp.inf))
    return order[choice].astype(jnp.int32)
