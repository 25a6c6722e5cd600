"""What a model needs on the device, and the plan that follows from a budget."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from dynaexq_jax.bank import commit_temporary_bytes
from dynaexq_jax.budget import Demand, MemoryPlan, plan_budget, plan_fixed
from dynaexq_jax.config import ModelConfig
from dynaexq_jax.engine.engine import EngineConfig
from dynaexq_jax.engine.programs import Programs, split_params
from dynaexq_jax.engine.prompt import Prompt, padded_tokens
from dynaexq_jax.engine.state import EngineState
from dynaexq_jax.errors import InputError
from dynaexq_jax.migration import MigrationConfig
from dynaexq_jax.models.qwen3_moe import Qwen3Moe
from dynaexq_jax.serving.config import DEFAULT_CONTEXT, ServeConfig
from dynaexq_jax.serving.source import ModelSource
from dynaexq_jax.trees import abstract_array, abstract_on, tree_bytes
from pallas_kernels.levels import Bits
from pallas_kernels.pages import PagedExperts, abstract_experts

DEFAULT_CHUNK = 512
DEFAULT_CHUNK_ON_CPU = 32


def engine_config(model: ModelConfig, serve: ServeConfig) -> EngineConfig:
    """Shapes of the engine. Raises InputError for a context that the model was not made for."""
    context = serve.context or min(model.max_position_embeddings, DEFAULT_CONTEXT)
    if context > model.max_position_embeddings:
        raise InputError(
            f"a context of {context} is longer than the {model.max_position_embeddings} positions "
            "of this model (max_position_embeddings); lower --context"
        )
    on_cpu = jax.default_backend() == "cpu"
    dtype = serve.dtype
    if dtype == "auto":
        dtype = "float32" if on_cpu else "bfloat16"
    chunk = serve.chunk or (DEFAULT_CHUNK_ON_CPU if on_cpu else DEFAULT_CHUNK)
    return EngineConfig(
        batch=serve.batch, context=context, chunk=min(chunk, context), dtype=jnp.dtype(dtype)
    )


class Planner:
    """Plans for one model and one configuration; allocates nothing.

    ``eos_token_ids`` are those that the engine will stop at.
    """

    def __init__(
        self, source: ModelSource, serve: ServeConfig, eos_token_ids: Iterable[int] = ()
    ) -> None:
        self._serve = serve
        self._source = source
        self._engine = engine_config(source.config, serve)
        self._dense = source.abstract_dense()
        self._model = Qwen3Moe(
            source.config,
            self._dense,
            abstract_experts(
                source.format,
                layers=len(source.layers),
                experts=source.experts,
                base_bits=source.available_bits[0],
                pool_pages=0,
            ),
            dtype=self._engine.dtype,
            implementation=serve.implementation,
        )
        self.programs = Programs(self._model, eos_token_ids)
        """For the engine, which does not compile again what is compiled here."""
        self._state = EngineState.abstract(
            source.config,
            batch=self._engine.batch,
            context=self._engine.context,
            dtype=self._engine.dtype,
        )
        self.demand = Demand(
            format=source.format,
            layers=len(source.layers),
            experts=source.experts,
            available_bits=source.available_bits,
            dense_bytes=tree_bytes(self._dense),
            state_bytes=tree_bytes(self._state),
            staging_bytes=lambda experts: self._migration(experts.pool_pages).bytes_for(experts),
        )

    def plan(self) -> MemoryPlan:
        """The plan; programs are compiled for it only where there is a budget.

        Raises InputError if the budget is too small.
        """
        serve = self._serve
        budget, limit = serve.budget_bytes, _device_memory_bytes()
        if budget is None and serve.base_bits is None:
            budget = limit
        elif budget is not None and limit is not None:
            budget = min(budget, limit)  # the allocator may round its share of the device down
        if budget is not None:
            return plan_budget(
                self.demand,
                budget,
                base_bits=serve.base_bits,
                temporary_bytes=self.temporary_bytes,
            )
        return plan_fixed(
            self.demand,
            base_bits=serve.base_bits or self.demand.available_bits[-1],
            pool_pages=serve.pages or 0,
        )

    def compile(self, plan: MemoryPlan) -> None:
        """Compiles the programs for a plan within a budget, while nothing is allocated.

        For the compiler takes memory of the device, too, to tune them.
        """
        if plan.budget_bytes is not None:
            self.temporary_bytes(plan.base_bits, plan.pool_pages)

    def temporary_bytes(self, base_bits: Bits, pool_pages: int) -> int:
        """Bytes of temporaries of all programs that serve, which are compiled here.

        Raises InputError if a GPU, limited to the budget, has no room to compile them.
        """
        experts = abstract_on(self._device, self._abstract_experts(base_bits, pool_pages))
        params = split_params(self._model)
        try:
            steps = self.programs.temporary_bytes(
                params, experts, *self._arguments, chunk=self._engine.chunk
            )
            steps = max(steps, self._between_steps)
            if not pool_pages:
                return steps
            pages = self._migration(pool_pages).staging_pages
            return max(steps, commit_temporary_bytes(experts, self._device, staged_pages=pages))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise InputError(
                f"a budget of {self._serve.hbm_budget} leaves the compiler no memory to tune its "
                "programs on the device; raise --hbm-budget, or lower --batch"
            ) from error

    @functools.cached_property
    def _between_steps(self) -> int:
        """Of what runs between steps, whatever the experts are."""
        state, prompt, slot = self._arguments
        logits = abstract_array((self._source.config.vocab_size,), jnp.float32)
        logits = abstract_on(self._device, logits)
        return self.programs.temporary_bytes_between_steps(state, logits, prompt, slot)

    @property
    def _arguments(self) -> tuple[EngineState, Prompt, jax.Array]:
        """What programs are given beside weights, where the engine has committed it to be.

        Were it elsewhere, they would be compiled again.
        """
        prompt = Prompt.abstract(padded_tokens(self._engine.context, self._engine.chunk))
        slot = abstract_array((), jnp.int32)
        return abstract_on(self._device, (self._state, prompt, slot))

    @property
    def _device(self) -> jax.Device:
        return jax.devices()[0]

    def _migration(self, pool_pages: int) -> MigrationConfig:
        return MigrationConfig.of(page_bytes=self._source.format.page_bytes, pool_pages=pool_pages)

    def _abstract_experts(self, base_bits: Bits, pool_pages: int) -> PagedExperts:
        return abstract_experts(
            self.demand.format,
            layers=self.demand.layers,
            experts=self.demand.experts,
            base_bits=base_bits,
            pool_pages=pool_pages,
        )


def _device_memory_bytes() -> int | None:
    """What the allocator of a GPU may use; None on a CPU, whose memory is not a budget."""
    if jax.default_backend() == "cpu":
        return None
    stats = jax.devices()[0].memory_stats()
    return int(stats["bytes_limit"]) if stats else None
