"""The jitted functions of the engine, each a pure function of state.

The model is split once; every program merges it inside, where it costs nothing at run time. Steps
donate the engine's state; the experts are only read (the bank alone writes them, between steps).
"""

from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.stages import Wrapped
from jaxtyping import Bool, Float, Float32, Int32

from dynaexq_jax.compiled import IN_GRAPHS, bytes_beside_arguments
from dynaexq_jax.engine.prompt import Prompt
from dynaexq_jax.engine.sampling import likeliest, sample
from dynaexq_jax.engine.state import EngineState
from dynaexq_jax.models.decode import DecodeState
from dynaexq_jax.models.qwen3_moe import ExpertState, ModelOutput, Qwen3Moe
from dynaexq_jax.router_stats import RouterStats
from pallas_kernels.pages import PagedExperts, PlainExperts

SCORE_ROWS = 128
"""Positions whose logits are held at once when scoring."""


Experts = PagedExperts | PlainExperts


class Programs:
    """Jitted prefill, decode step and scoring of one model, real or abstract.

    Every program takes the dense weights first (``split_params``), then the experts' arrays as
    their owner has them, then the engine's state. ``decode`` and ``admit`` have a static argument
    ``draws``: False where the caller knows that all slots it asks about have temperature 0. Then
    they sort no logits. Inside another ``jax.jit``, which takes no programs that have compiler
    options of their own, a program's ``__wrapped__`` is the same function without.
    """

    def __init__(self, model: Qwen3Moe, eos_token_ids: Iterable[int] = ()) -> None:
        self.eos_token_ids = tuple(eos_token_ids)
        self._graph: nnx.GraphDef[Qwen3Moe] = nnx.split(model, nnx.Param, ExpertState)[0]
        jit: Callable[..., Wrapped] = partial(jax.jit, compiler_options=IN_GRAPHS)
        self.decode = jit(self._decode, donate_argnums=2, static_argnames="draws")
        self.prefill = jit(self._prefill, donate_argnums=(2, 3), static_argnames="chunk")
        self.hidden = jit(self._hidden, donate_argnums=2)
        self.judge = jit(self._judge)
        self.admit = jit(self._admit, donate_argnums=0, static_argnames="draws")
        self.release = jit(_release, donate_argnums=0)
        self.take_stats = jit(_take_stats, donate_argnums=0)

    def temporary_bytes(
        self,
        params: nnx.State,
        experts: Experts,
        state: EngineState,
        prompt: Prompt,
        slot: Int32[jax.Array, ""],
        *,
        chunk: int,
    ) -> int:
        """Bytes that prefill and decode need beside their arguments; compiles, allocates nothing.

        All arguments may be abstract. What is called later with arrays like them is not compiled
        again.
        """
        lowered = (
            *(self.decode.lower(params, experts, state, draws=draws) for draws in (False, True)),
            self.prefill.lower(params, experts, state, prompt, slot, chunk=chunk),
        )
        return max(map(bytes_beside_arguments, lowered))

    def temporary_bytes_between_steps(
        self,
        state: EngineState,
        logits: Float32[jax.Array, " V"],
        prompt: Prompt,
        slot: Int32[jax.Array, ""],
    ) -> int:
        """The same of admissions, releases and statistics, none of which reads the experts."""
        lowered = (
            *(
                self.admit.lower(state, logits, prompt, slot, draws=draws)
                for draws in (False, True)
            ),
            self.release.lower(state, slot),
            self.take_stats.lower(state.stats),
        )
        return max(map(bytes_beside_arguments, lowered))

    def logits(
        self, params: nnx.State, experts: Experts, hidden: Float[jax.Array, "... H"]
    ) -> Float32[jax.Array, "... V"]:
        """Next-token logits of what ``hidden`` gave; not jitted, for use in other programs."""
        return self._model(params, experts).logits(hidden)

    def _model(self, params: nnx.State, experts: Experts) -> Qwen3Moe:
        return nnx.merge(self._graph, params, nnx.State({"experts": ExpertState(experts)}))

    def _decode(
        self, params: nnx.State, experts: Experts, state: EngineState, *, draws: bool = True
    ) -> tuple[EngineState, Int32[jax.Array, " B"]]:
        """One step of all active slots. Returns the sampled tokens, -1 for idle slots."""
        batch = state.batch
        logits, after = self._model(params, experts).decode(
            batch.token,
            batch.position,
            DecodeState(state.cache, state.stats.mass, state.counter),
        )
        tokens = sample(logits, batch.sampling, batch.position) if draws else likeliest(logits)
        active = batch.position >= 0
        seen = jnp.where(active, tokens, -1)
        # what is seen, not tokens: so both come out of one kernel
        goes_on = (seen >= 0) & (batch.position < batch.end) & ~self._is_eos(seen)
        batch = batch._replace(token=tokens, position=jnp.where(goes_on, batch.position + 1, -1))
        tokens_read = state.stats.tokens + jnp.sum(active, dtype=jnp.int32)
        stats = RouterStats(after.router_mass, tokens_read)
        return EngineState(after.cache, batch, stats, after.counter), seen

    def _prefill(
        self,
        params: nnx.State,
        experts: Experts,
        state: EngineState,
        prompt: Prompt,
        slot: Int32[jax.Array, ""],
        *,
        chunk: int,
    ) -> tuple[EngineState, Prompt, Float32[jax.Array, " V"]]:
        """Reads the next ``chunk`` tokens of a prompt, or those that are left, into a slot's cache.

        Returns the logits after the last of them.
        """
        model = self._model(params, experts)
        tokens = lax.dynamic_slice(prompt.tokens, (prompt.read,), (chunk,))
        length = jnp.minimum(prompt.length - prompt.read, chunk)
        index = jnp.arange(chunk, dtype=jnp.int32)
        positions = jnp.where(index < length, prompt.read + index, -1)
        output = model(tokens[None], positions[None], state.cache, slot[None])
        logits = model.logits(output.hidden[0, length - 1])
        stats = _with_output(state.stats, output, positions >= 0)
        state = state._replace(cache=output.cache, stats=stats)
        return state, prompt._replace(read=prompt.read + length), logits

    def _hidden(
        self,
        params: nnx.State,
        experts: Experts,
        state: EngineState,
        tokens: Int32[jax.Array, "R T"],
        start: Int32[jax.Array, ""],
        ends: Int32[jax.Array, " R"],
    ) -> tuple[EngineState, Float[jax.Array, "R T H"]]:
        """Hidden states of tokens at positions from ``start`` of slots 0 to R - 1, normed.

        Positions from ``ends`` on are padding.
        """
        rows, width = tokens.shape
        index = start + jnp.arange(width, dtype=jnp.int32)
        positions = jnp.where(index < ends[:, None], index, -1)
        slots = jnp.arange(rows, dtype=jnp.int32)
        output = self._model(params, experts)(tokens, positions, state.cache, slots)
        stats = _with_output(state.stats, output, positions >= 0)
        return state._replace(cache=output.cache, stats=stats), output.hidden

    def _judge(
        self,
        params: nnx.State,
        experts: Experts,
        hidden: Float[jax.Array, "R W H"],
        targets: Int32[jax.Array, "R W"],
    ) -> tuple[Float32[jax.Array, "R W"], Bool[jax.Array, "R W"]]:
        """Of the token that comes after each hidden state: its negative log-likelihood (nats), and
        whether it is the likeliest."""

        def judge(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            at, target = pair
            logits = self.logits(params, experts, at)
            return jax.nn.logsumexp(logits) - logits[target], likeliest(logits) == target

        flat = hidden.reshape(-1, hidden.shape[-1]), targets.ravel()
        losses, greedy = lax.map(judge, flat, batch_size=SCORE_ROWS)
        return losses.reshape(targets.shape), greedy.reshape(targets.shape)

    def _admit(
        self,
        state: EngineState,
        logits: Float32[jax.Array, " V"],
        prompt: Prompt,
        slot: Int32[jax.Array, ""],
        *,
        draws: bool = True,
    ) -> tuple[EngineState, Int32[jax.Array, ""]]:
        """Samples the first token after a prompt that was read and starts its slot."""
        length, end, settings = prompt.length, prompt.end, prompt.sampling
        if draws:
            one = jax.tree.map(lambda value: value[None], settings)
            token = sample(logits[None], one, (length - 1)[None])[0]
        else:
            token = likeliest(logits)
        position = jnp.where((length <= end) & ~self._is_eos(token), length, -1)
        batch = state.batch._replace(
            token=state.batch.token.at[slot].set(token),
            position=state.batch.position.at[slot].set(position),
            end=state.batch.end.at[slot].set(end),
            sampling=jax.tree.map(
                lambda all_, value: all_.at[slot].set(value), state.batch.sampling, settings
            ),
        )
        return state._replace(batch=batch), token

    def _is_eos(self, tokens: jax.Array) -> jax.Array:
        # one by one: over an array of them it would be a reduction, which is a kernel of its own
        found = jnp.zeros_like(tokens, jnp.bool_)
        for token in self.eos_token_ids:
            found |= tokens == token
        return found


def split_params(model: Qwen3Moe) -> nnx.State:
    """The dense weights of a model, as the programs take them."""
    return nnx.state(model, nnx.Param)


def _release(state: EngineState, slot: Int32[jax.Array, ""]) -> EngineState:
    """Makes a slot idle."""
    position = state.batch.position.at[slot].set(-1)
    return state._replace(batch=state.batch._replace(position=position))


def _take_stats(stats: RouterStats) -> tuple[RouterStats, RouterStats]:
    """(zeroed statistics to go on with, those gathered so far)."""
    return jax.tree.map(jnp.zeros_like, stats), jax.tree.map(lambda a: a + 0, stats)


def _with_output(stats: RouterStats, output: ModelOutput, valid: jax.Array) -> RouterStats:
    tokens = stats.tokens + jnp.sum(valid, dtype=jnp.int32)
    return RouterStats(stats.mass + output.router_mass, tokens)
