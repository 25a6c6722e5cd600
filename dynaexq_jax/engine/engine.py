"""The engine: batch slots, chunked prefill and a decode loop that runs ahead of its results.

The host dispatches step k + 1 before it has read the tokens of step k: a sampled token feeds the
next step on the device, and comes back by an asynchronous copy. The device itself idles a slot at
an end-of-sequence token or at its last token, so running ahead costs at most a void step.
"""

import collections
import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynaexq_jax.bank import ExpertBank
from dynaexq_jax.config import ModelConfig
from dynaexq_jax.controller import Controller
from dynaexq_jax.engine.programs import Experts, Programs
from dynaexq_jax.engine.prompt import padded_tokens
from dynaexq_jax.engine.sampling import SamplingParams
from dynaexq_jax.engine.sequence import EngineSequence
from dynaexq_jax.engine.state import EngineState
from dynaexq_jax.errors import InputError
from dynaexq_jax.metrics import EngineCounters, Metrics
from dynaexq_jax.router_stats import RouterStats
from pallas_kernels.pages import PlainExperts

STEPS_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Shapes that the device is asked for once."""

    batch: int
    """Sequences decoded together."""
    context: int
    """Tokens of a sequence, prompt included."""
    chunk: int
    """Prompt tokens of one prefill call."""
    dtype: np.dtype
    """Of activations and cache."""

    def __post_init__(self) -> None:
        for name in ("batch", "context", "chunk"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}")


class TokenEvent(NamedTuple):
    """A token that a sequence has gained."""

    sequence: int
    token: int
    last: bool
    """Whether it is an end-of-sequence token or the last one asked for."""


class _InFlight(NamedTuple):
    result: jax.Array
    """Tokens int32 [B] of a decode step, or a scalar of an admission, or a chunk's logits."""
    of_slot: tuple[EngineSequence | None, ...]
    """Whose the tokens are; empty for a chunk that is not a prompt's last."""


class Engine:
    """Runs sequences of token ids. One thread; ``step`` until ``events`` are what is wanted."""

    def __init__(
        self,
        *,
        programs: Programs,
        params: nnx.State,
        config: EngineConfig,
        model_config: ModelConfig,
        experts: ExpertBank | PlainExperts,
        controller: Controller | None = None,
    ) -> None:
        self.config = config
        self.controller = controller
        self.counters = EngineCounters()
        self.metrics = Metrics(self.counters, controller)
        self.programs = programs
        self.params = params
        self.model_config = model_config
        self.bank = experts
        """Owner of the experts' arrays, or unquantized experts, which nobody changes."""
        self.state = EngineState.allocate(
            model_config, batch=config.batch, context=config.context, dtype=config.dtype
        )
        (self._device,) = self.state.counter.devices()
        slots = list(np.arange(config.batch, dtype=np.int32))
        self._slot_numbers: list[jax.Array] = jax.device_put(slots, self._device)
        self._numbers = itertools.count()
        self._waiting: collections.deque[EngineSequence] = collections.deque()
        self._slots: list[EngineSequence | None] = [None] * config.batch
        self._in_flight: collections.deque[_InFlight] = collections.deque()

    def add(
        self,
        prompt: Sequence[int] | np.ndarray,
        *,
        max_tokens: int,
        sampling: SamplingParams | None = None,
    ) -> int:
        """Queues a prompt; returns the number that its events carry.

        Raises InputError for an empty prompt, unknown token ids, or a sequence longer than the
        cache.
        """
        ids = np.asarray(prompt, np.int32)
        vocabulary = self.model_config.vocab_size
        if ids.ndim != 1 or not ids.size:
            raise InputError("the prompt is empty; give at least one token")
        if (outside := ids[(ids < 0) | (ids >= vocabulary)]).size:
            raise InputError(
                f"prompt token id {outside[0]} is out of range; the vocabulary has ids "
                f"0..{vocabulary - 1}"
            )
        if max_tokens < 1:
            raise InputError(f"max_tokens must be positive, got {max_tokens}")
        if ids.size + max_tokens > self.config.context:
            raise InputError(
                f"a prompt of {ids.size} tokens and {max_tokens} new ones do not fit a context of "
                f"{self.config.context}; shorten one of them or raise --context"
            )
        sequence = EngineSequence(
            number=next(self._numbers),
            prompt=ids,
            max_tokens=max_tokens,
            sampling=sampling or SamplingParams(),
            queued_s=time.perf_counter(),
        )
        self._waiting.append(sequence)
        self._send_next()
        return sequence.number

    @property
    def steps(self) -> int:
        """Decode steps and chunks of prompts and scored windows dispatched."""
        counters = self.counters
        return counters.decode_steps + counters.prompt_chunks + counters.window_chunks

    @property
    def experts(self) -> Experts:
        """The experts' arrays that the next step reads; a commit replaces them."""
        return self.bank.experts if isinstance(self.bank, ExpertBank) else self.bank

    @property
    def busy(self) -> bool:
        """Whether any sequence waits or holds a slot, as it does until its last token is here."""
        return bool(self._waiting or any(self._slots))

    def step(self) -> list[TokenEvent]:
        """Dispatches a prompt chunk and a decode step, if there is work; returns what came back."""
        self._advance()
        if self._prefill_chunk():
            self._advance(during_chunk=True)
        self._decode()
        # with nothing left to dispatch the last ones come one a call, as they are there
        limit = STEPS_IN_FLIGHT if self._has_work() else max(len(self._in_flight) - 1, 0)
        events: list[TokenEvent] = []
        while len(self._in_flight) > limit:
            events += self._receive(self._in_flight.popleft())
        return events

    def run(self) -> Iterator[TokenEvent]:
        """Events of all sequences until every one is done."""
        while self.busy:
            yield from self.step()

    def cancel(self, number: int) -> None:
        """Ends a sequence now; its later tokens are dropped."""
        self._waiting = collections.deque(s for s in self._waiting if s.number != number)
        self._send_next()
        for sequence in self._slots:
            if sequence is not None and sequence.number == number:
                slot = self._slot_numbers[sequence.slot]
                self.state = self.programs.release(self.state, slot)
                self._finish(sequence)

    def score(self, window: np.ndarray) -> np.ndarray:
        """Loss (nats) of each token of ``window`` int32 [W + 1] after its first: float32 [W].

        Uses the cache of slot 0; only for an engine that is not busy.
        """
        return self.score_rows(window[None], np.array([window.size - 1]))[0][0]

    def score_rows(self, windows: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same of up to as many windows as there are slots, ``windows`` int32 [R, W + 1].

        Returns losses float32 [R, W], and whether each token is the likeliest, bool [R, W]. Only
        the first ``lengths`` [R] of a row count: what comes after is padding.
        """
        hidden = self._read_rows(windows[:, :-1], lengths)
        targets = jnp.asarray(windows[:, 1:], jnp.int32)
        losses, greedy = self.programs.judge(self.params, self.experts, hidden, targets)
        return np.asarray(losses), np.asarray(greedy)

    def hidden(self, tokens: np.ndarray) -> jax.Array:
        """Hidden states [W, H] of ``tokens`` int32 [W], after the final norm; as ``score``."""
        return self._read_rows(tokens[None], np.array([tokens.size]))[0]

    def read(self, tokens: np.ndarray, start: int, lengths: np.ndarray | None = None) -> jax.Array:
        """Hidden states [R, T, H] of ``tokens`` int32 [R, T] at positions from ``start``: one step.

        Row r goes on with the cache of slot r; only for an engine that is not busy. Positions from
        ``lengths`` [R] on are padding; None: there is none.
        """
        if self.busy:
            raise RuntimeError("the engine is busy with sequences; score with an engine of its own")
        rows, width = tokens.shape
        ends = np.full(rows, start + width) if lengths is None else lengths
        self._check_rows(ends)
        self._advance()
        self.state, hidden = self.programs.hidden(
            self.params,
            self.experts,
            self.state,
            jnp.asarray(tokens, jnp.int32),
            jnp.int32(start),
            jnp.asarray(ends, jnp.int32),
        )
        self.counters.window_chunks += 1
        self._stepped(int(np.clip(ends - start, 0, width).sum()))
        return hidden

    def take_stats(self) -> RouterStats:
        """Routing statistics since they were last taken, on the device."""
        fresh, gathered = self.programs.take_stats(self.state.stats)
        self.state = self.state._replace(stats=fresh)
        return gathered

    def _read_rows(self, tokens: np.ndarray, lengths: np.ndarray) -> jax.Array:
        """Hidden states [R, W, H], read in chunks, each a step, at the levels that those before it
        have led to. What is padding in every row is read only where it fills a chunk."""
        self._check_rows(lengths)
        chunk = self.config.chunk
        hidden = jnp.concatenate(
            [
                self.read(tokens[:, start : start + chunk], start, lengths)
                for start in range(0, int(lengths.max()), chunk)
            ],
            axis=1,
        )
        return jnp.pad(hidden, ((0, 0), (0, tokens.shape[1] - hidden.shape[1]), (0, 0)))

    def _check_rows(self, lengths: np.ndarray) -> None:
        if len(lengths) > self.config.batch:
            raise InputError(
                f"{len(lengths)} windows at once need as many slots, and there are "
                f"{self.config.batch}; give fewer or raise the batch"
            )
        if lengths.max() > self.config.context:
            raise InputError(
                f"a window of {lengths.max()} tokens does not fit a context of "
                f"{self.config.context}; use a smaller window or raise the context"
            )

    def _advance(self, *, during_chunk: bool = False) -> None:
        """Lets precision move: called ahead of whatever reads the experts."""
        if self.controller is not None:
            self.controller.advance(during_chunk=during_chunk)

    def _stepped(self, tokens: int) -> None:
        if self.controller is not None and self.controller.wants_stats(tokens):
            self.controller.give_stats(self.take_stats())

    def _prefill_chunk(self) -> bool:
        """Dispatches a chunk of a prompt, if one waits. Returns whether it did."""
        sequence = self._next_to_prefill()
        if sequence is None:
            return False
        chunk, slot = self.config.chunk, self._slot_numbers[sequence.slot]
        self.state, prompt, logits = self.programs.prefill(
            self.params, self.experts, self.state, sequence.on_device, slot, chunk=chunk
        )
        size = min(chunk, sequence.unread)
        sequence.prefilled += size
        self.counters.prompt_chunks += 1
        self.counters.prompt_tokens += size
        self._stepped(size)
        if sequence.unread:
            sequence.on_device = prompt
            self._in_flight.append(_InFlight(logits, ()))
        else:
            sequence.on_device = None
            self.state, token = self.programs.admit(
                self.state, logits, prompt, slot, draws=sequence.sampling.draws
            )
            self._dispatched(token, (sequence,))
        self._send_next()
        return True

    def _send_next(self) -> None:
        """Sends the prompt that is to be read next, unless it was sent already."""
        if self._waiting and self._waiting[0].on_device is None:
            padded = padded_tokens(self.config.context, self.config.chunk)
            self._waiting[0].send(padded, self._device)

    def _next_to_prefill(self) -> EngineSequence | None:
        for sequence in self._slots:
            if sequence is not None and sequence.unread:
                return sequence
        if not self._waiting or None not in self._slots:
            return None
        sequence = self._waiting.popleft()
        sequence.slot = self._slots.index(None)
        self._slots[sequence.slot] = sequence
        return sequence

    def _has_work(self) -> bool:
        """Whether the next step has anything to dispatch."""
        held = [s for s in self._slots if s is not None]
        can_admit = bool(self._waiting) and len(held) < len(self._slots)
        return can_admit or any(s.unread or s.decodes for s in held)

    def _decode(self) -> None:
        decoding = [s for s in self._slots if s is not None and s.decodes]
        if not decoding:
            return
        started = time.perf_counter()
        draws = any(s.sampling.draws for s in decoding)
        self.state, tokens = self.programs.decode(
            self.params, self.experts, self.state, draws=draws
        )
        self.counters.decode_steps += 1
        self._stepped(len(decoding))
        self._dispatched(tokens, tuple(self._slots))
        self.metrics.step_dispatch.observe(time.perf_counter() - started)

    def _dispatched(self, tokens: jax.Array, of_slot: tuple[EngineSequence | None, ...]) -> None:
        tokens.copy_to_host_async()
        self._in_flight.append(_InFlight(tokens, of_slot))
        for sequence in of_slot:
            if sequence is not None and not sequence.unread:
                sequence.dispatched += 1

    def _receive(self, in_flight: _InFlight) -> list[TokenEvent]:
        if not in_flight.of_slot:
            in_flight.result.block_until_ready()
            return []
        events = []
        tokens = np.atleast_1d(in_flight.result)
        now = time.perf_counter()
        for sequence, token in zip(in_flight.of_slot, tokens, strict=True):
            if sequence is None or sequence.done or token < 0:
                continue
            sequence.received += 1
            sequence.last_s = now
            if sequence.received == 1:
                sequence.first_s = now
                self.metrics.time_to_first_token.observe(now - sequence.queued_s)
            eos = int(token) in self.programs.eos_token_ids
            last = eos or sequence.received == sequence.max_tokens
            if last:
                self._finish(sequence)
            events.append(TokenEvent(sequence.number, int(token), last))
        self.counters.tokens += len(events)
        return events

    def _finish(self, sequence: EngineSequence) -> None:
        sequence.done = True
        if sequence.received > 1:
            each_s = (sequence.last_s - sequence.first_s) / (sequence.received - 1)
            self.metrics.time_per_output_token.observe(each_s)
        self._slots[sequence.slot] = None
