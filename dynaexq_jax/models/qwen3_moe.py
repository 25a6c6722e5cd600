"""Qwen3-MoE as a Flax NNX model whose expert weights are page buffers.

The model reads weights, experts and cache and returns hidden states, the new cache and the router
mass; it decides nothing. Split it once, jit a pure function of its state, merge inside:

    graph, params, experts = nnx.split(model, nnx.Param, ExpertState)
"""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Float, Float32, Int32

from dynaexq_jax.config import ModelConfig
from dynaexq_jax.models.attend import Chunk
from dynaexq_jax.models.cache import KVCache
from dynaexq_jax.models.decode import DecodeState, decode
from dynaexq_jax.models.layers import attention, dense_mlp, rms_norm, sparse_mlp
from dynaexq_jax.models.rope import rotation
from dynaexq_jax.models.weights import DenseWeights
from pallas_kernels.linear import product
from pallas_kernels.pages import PagedExperts, PlainExperts


class ExpertState(nnx.Variable):
    """Holds the experts (``PagedExperts`` or ``PlainExperts``), apart from ``nnx.Param``."""


class ModelOutput(NamedTuple):
    """What one forward pass returns; a pytree."""

    hidden: Float[jax.Array, "B T H"]
    """After the final norm; ``Qwen3Moe.logits`` turns what is needed of it into logits."""
    cache: KVCache
    router_mass: Float32[jax.Array, "L E"]
    """Expert weights summed over the valid tokens, by layer with experts and expert."""


class _Run(NamedTuple):
    """Successive layers of one kind."""

    sparse: bool
    """Whether they have experts."""
    layers: int
    first: int
    """Number of the first of them among all layers."""
    first_of_kind: int
    """And among those of its kind."""


_Carry = tuple[Float[jax.Array, "B T H"], KVCache, Float32[jax.Array, "L E"]]
"""From layer to layer: activations, cache, router mass."""


class Qwen3Moe(nnx.Module):
    """The whole model.

    ``dense`` and ``experts`` may be abstract, to plan without allocating. Activations have
    ``dtype``. Raises ValueError if the experts are not this model's.
    """

    def __init__(
        self,
        config: ModelConfig,
        dense: DenseWeights,
        experts: PagedExperts | PlainExperts,
        *,
        dtype: jnp.dtype,
        implementation: str = "auto",
    ) -> None:
        _check_experts(config, experts)
        self.config = config
        self.dtype = dtype
        self.implementation = implementation
        self.dense = nnx.Dict(
            {name: nnx.Param(array) for name, array in dense._asdict().items() if array is not None}
        )
        self.experts = ExpertState(experts)

    @property
    def weights(self) -> DenseWeights:
        """The arrays of the dense weights."""
        return DenseWeights(**{name: param.get_value() for name, param in self.dense.items()})

    def __call__(
        self,
        tokens: Int32[jax.Array, "B T"],
        positions: Int32[jax.Array, "B T"],
        cache: KVCache,
        slots: Int32[jax.Array, " B"] | None = None,
    ) -> ModelOutput:
        """Runs ``tokens`` at ``positions`` of their cache slots (all slots, if None).

        A position of -1 is padding: it writes nothing, routes nowhere and its output is void.
        """
        config, weights = self.config, self.weights
        x = weights.embedding[tokens].astype(self.dtype)
        turn = rotation(config.rope, config.head_dim, positions)
        chunk = Chunk.of(positions, slots, turn)
        mass = jnp.zeros((len(config.sparse_layers), config.num_experts), jnp.float32)
        carry = (x, cache, mass)
        for run in _runs(config):
            # not unrolled: a layer is compiled once, and its matmuls are tuned once
            carry = lax.fori_loop(0, run.layers, partial(self._layer, run, weights, chunk), carry)
        x, cache, mass = carry
        return ModelOutput(rms_norm(x, weights.final_norm, config.rms_norm_eps), cache, mass)

    def _layer(
        self, run: _Run, weights: DenseWeights, chunk: Chunk, number: jax.Array, carry: _Carry
    ) -> _Carry:
        """Layer ``number`` of a run."""
        x, cache, mass = carry
        layer, index = run.first + number, run.first_of_kind + number
        config, implementation = self.config, self.implementation
        y = rms_norm(x, weights.attention_norm[layer], config.rms_norm_eps)
        y, cache = attention(weights, layer, config, y, chunk, cache, implementation)
        x = x + y
        y = rms_norm(x, weights.mlp_norm[layer], config.rms_norm_eps)
        if run.sparse:
            experts, valid = self.experts.get_value(), chunk.positions >= 0
            y, of_layer = sparse_mlp(weights, index, config, y, valid, experts, implementation)
            mass = mass.at[index].set(of_layer)
        else:
            y = dense_mlp(weights, index, y)
        return x + y, cache, mass

    def decode(
        self,
        tokens: Int32[jax.Array, " B"],
        positions: Int32[jax.Array, " B"],
        state: DecodeState,
    ) -> tuple[Float32[jax.Array, "B V"], DecodeState]:
        """Logits after one token of every cache slot: as ``__call__`` does, in few kernels.

        A position of -1 is an idle slot: it writes nothing, routes nowhere and its logits are
        void. Raises ValueError if ``implementation`` cannot run one of the operations.
        """
        return decode(
            self.weights,
            self.experts.get_value(),
            tokens,
            positions,
            state,
            config=self.config,
            dtype=self.dtype,
            implementation=self.implementation,
        )

    def logits(self, hidden: Float[jax.Array, "... H"]) -> Float32[jax.Array, "... V"]:
        """Next-token logits, in float32."""
        weights = self.weights
        return product(hidden, weights.embedding if weights.head is None else weights.head)


def _runs(config: ModelConfig) -> Iterator[_Run]:
    """All layers, in order; each run is as long as can be."""
    before = {True: 0, False: 0}  # layers so far, with experts and without
    for sparse, layers in itertools.groupby(range(config.num_hidden_layers), config.is_sparse):
        run = _Run(sparse, len(list(layers)), sum(before.values()), before[sparse])
        before[sparse] += run.layers
        yield run


def _check_experts(config: ModelConfig, experts: PagedExperts | PlainExperts) -> None:
    wanted = (len(config.sparse_layers), config.num_experts, config.hidden_size)
    given = (experts.layers, experts.experts, experts.hidden)
    if given != wanted:
        raise ValueError(f"experts (layers, experts, hidden) must be {wanted}, got {given}")
