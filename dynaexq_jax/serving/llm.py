"""The Python interface: load a model, generate text, watch the precision of its experts."""

import collections
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dynaexq_jax.budget import MemoryPlan
from dynaexq_jax.config import ModelConfig
from dynaexq_jax.engine.engine import Engine, TokenEvent
from dynaexq_jax.engine.sampling import SamplingParams
from dynaexq_jax.errors import InputError
from dynaexq_jax.metrics import Metrics
from dynaexq_jax.serving.config import ServeConfig
from dynaexq_jax.serving.loading import Served, load_served
from dynaexq_jax.text.detokenize import StreamDetokenizer
from dynaexq_jax.text.stops import StopMatcher
from dynaexq_jax.text.tokenizer import Message, Tokenizer
from dynaexq_jax.traffic import RoutedModel, write_profile

FinishReason = Literal["eos", "stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamStats:
    """Where a sequence stands. Times in seconds since its prompt was queued."""

    prompt_tokens: int
    tokens: int
    first_token_s: float
    elapsed_s: float
    pages_moved: int
    """By the engine, since it was loaded."""
    bytes_moved: int

    @property
    def tokens_per_s(self) -> float | None:
        """Decoding speed after the first token; None before there are two."""
        seconds = self.elapsed_s - self.first_token_s
        return (self.tokens - 1) / seconds if self.tokens > 1 and seconds > 0 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Text that a sequence has gained; may be empty while a character or a stop is undecided."""

    index: int
    """Which of the prompts."""
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    """None until the last piece."""
    stats: StreamStats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to be continued, and how."""

    prompt: Sequence[int]
    """Token ids."""
    max_tokens: int
    sampling: SamplingParams
    stop: Sequence[str] = ()
    """Strings that end the text before them."""


class LLM:
    """A loaded model."""

    def __init__(self, served: Served) -> None:
        self.engine: Engine = served.engine
        self.tokenizer: Tokenizer = served.tokenizer
        self.config: ModelConfig = served.config
        self.plan: MemoryPlan | None = served.plan
        """Bytes by what they hold; None for unquantized experts."""
        self._mail: dict[int, collections.deque[TokenEvent]] = {}
        """By sequence; those that are followed together have one."""

    @property
    def metrics(self) -> Metrics:
        """The engine's counters and histograms."""
        return self.engine.metrics

    def generate(
        self, prompt: str | Sequence[str], *, max_tokens: int = 128, **options: Any
    ) -> str | list[str]:
        """Continues one prompt, or several in a batch; returns the new text of each.

        Options as of ``stream_generate``.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        texts = [""] * len(prompts)
        for piece in self.stream_generate(prompts, max_tokens=max_tokens, **options):
            texts[piece.index] += piece.text
        return texts[0] if isinstance(prompt, str) else texts

    def stream_generate(
        self, prompt: str | Sequence[str], *, max_tokens: int = 128, **options: Any
    ) -> Iterator[Piece]:
        """Yields text as it is decided: whole characters, nothing of a stop string.

        Options: ``stop`` (a string, or several, that end the text before them), and ``sampling``
        (``SamplingParams``) or its fields temperature, top_k, top_p, min_p, seed. Raises
        InputError, before anything runs, for bad options, an empty prompt, or one too long.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        return self._stream(
            [self.tokenizer.encode(text) for text in prompts], max_tokens=max_tokens, **options
        )

    def stream_chat(
        self, messages: Sequence[Message], *, max_tokens: int = 128, **options: Any
    ) -> Iterator[Piece]:
        """The same for the model's reply to messages, in the form of its chat template.

        Raises InputError if it has none.
        """
        ids = self.tokenizer.apply_chat_template(messages)
        return self._stream([ids], max_tokens=max_tokens, **options)

    def stream_requests(self, requests: Sequence[Request]) -> Iterator[Piece]:
        """The same for prompts of token ids, each with options of its own."""
        streams: dict[int, _Stream] = {}
        try:
            for index, request in enumerate(requests):
                stream = _Stream(index, len(request.prompt), self.tokenizer, request.stop)
                number = self.engine.add(
                    request.prompt, max_tokens=request.max_tokens, sampling=request.sampling
                )
                streams[number] = stream
        except InputError:
            for number in streams:
                self.engine.cancel(number)
            raise
        mail: collections.deque[TokenEvent] = collections.deque()
        self._mail |= dict.fromkeys(streams, mail)
        pieces = self._follow(streams, mail)
        next(pieces)
        return pieces

    def _stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: SamplingParams | None = None,
        stop: str | Sequence[str] = (),
        **sampling_fields: Any,
    ) -> Iterator[Piece]:
        if sampling is not None and sampling_fields:
            raise InputError(f"give either sampling or its fields, not both: {sampling_fields}")
        params = sampling or _sampling_params(sampling_fields)
        stops = [stop] if isinstance(stop, str) else stop
        return self.stream_requests(
            [
                Request(prompt=ids, max_tokens=max_tokens, sampling=params, stop=stops)
                for ids in prompts
            ]
        )

    def residency(self) -> np.ndarray | None:
        """Level (0: 2 bits, 1: 4, 2: 8) of each expert, int32 [L, E]; None if unquantized."""
        if self.plan is None:
            return None
        if self.engine.controller is None:
            base = (2, 4, 8).index(self.plan.base_bits)
            shape = (len(self.config.sparse_layers), self.config.num_experts)
            return np.full(shape, base, np.int32)
        return self.engine.controller.levels()

    def save_hotness(self, path: str | Path) -> None:
        """Writes a profile of the traffic so far, for ``load(..., hotness_profile=path)``.

        An interval that is not over does not count. Raises InputError if the file cannot be
        written, or if the model has no pages to promote with.
        """
        controller = self.engine.controller
        if controller is None:
            raise InputError(
                f"{path}: there is no hotness to save, for this model was loaded without pages "
                "above its base; load it with a budget or pages"
            )
        write_profile(Path(path), RoutedModel.of(self.config), controller.hotness)

    def _follow(
        self, streams: dict[int, "_Stream"], mail: collections.deque[TokenEvent]
    ) -> Iterator[Any]:
        """Steps the engine until these sequences are done; others' tokens are kept for them.

        The first value is void: a generator that has begun frees its slots however it is left.
        """
        pending = dict(streams)
        try:
            yield
            while pending:
                while not mail:
                    for event in self.engine.step():
                        if event.sequence in self._mail:
                            self._mail[event.sequence].append(event)
                event = mail.popleft()
                number = event.sequence
                if number not in pending:
                    continue  # a token after a stop string
                text, reason = streams[number].take(event, self.engine.programs.eos_token_ids)
                if reason is not None:
                    self.engine.cancel(number)
                    del pending[number]
                yield streams[number].piece(text, event.token, reason, self.engine)
        finally:
            for number in streams:
                self.engine.cancel(number)
                del self._mail[number]


class _Stream:
    """Text of one sequence on its way out."""

    def __init__(
        self, index: int, prompt_tokens: int, tokenizer: Tokenizer, stop: Sequence[str]
    ) -> None:
        self._index = index
        self._prompt_tokens = prompt_tokens
        self._detokenizer = StreamDetokenizer(tokenizer)
        self._stops = StopMatcher(stop)
        self._start = time.perf_counter()
        self._first: float | None = None
        self._tokens = 0

    def take(
        self, event: TokenEvent, eos_token_ids: tuple[int, ...]
    ) -> tuple[str, FinishReason | None]:
        """Text that the event decides, and why the sequence ends, if it does."""
        self._tokens += 1
        if self._first is None:
            self._first = time.perf_counter() - self._start
        reason: FinishReason | None
        if event.token in eos_token_ids:
            text, reason = self._detokenizer.finish(), "eos"
        else:
            text = self._detokenizer.add(event.token)
            reason = "length" if event.last else None
            if event.last:
                text += self._detokenizer.finish()
        text = self._stops.feed(text)
        if self._stops.hit:
            return text, "stop"
        return (text, None) if reason is None else (text + self._stops.flush(), reason)

    def piece(self, text: str, token: int, reason: FinishReason | None, engine: Engine) -> Piece:
        counters = engine.controller.counters if engine.controller else None
        assert self._first is not None
        return Piece(
            index=self._index,
            text=text,
            token_ids=(token,),
            finish_reason=reason,
            stats=StreamStats(
                prompt_tokens=self._prompt_tokens,
                tokens=self._tokens,
                first_token_s=self._first,
                elapsed_s=time.perf_counter() - self._start,
                pages_moved=counters.pages if counters else 0,
                bytes_moved=counters.bytes if counters else 0,
            ),
        )


def _sampling_params(options: dict[str, Any]) -> SamplingParams:
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    if unknown := sorted(options.keys() - known):
        raise InputError(f"unknown option {unknown[0]!r}; sampling takes {sorted(known)}")
    return SamplingParams(**options)


def load(path: str | Path, **options: Any) -> LLM:
    """Loads a converted checkpoint, or a Hugging Face directory with its experts unquantized.

    ``options`` are the fields of ``ServeConfig``: hbm_budget ("24GiB" or bytes), base_bits, pages,
    policy, interval, map, hotness_profile, routing_trace, batch, context, chunk, implementation,
    dtype. Raises InputError for bad options or files, and for a budget too small, before anything
    is allocated.
    """
    known = {field.name for field in dataclasses.fields(ServeConfig)}
    if unknown := sorted(options.keys() - known):
        raise InputError(f"unknown option {unknown[0]!r}; load takes {sorted(known)}")
    return LLM(load_served(Path(path), ServeConfig(**options)))
