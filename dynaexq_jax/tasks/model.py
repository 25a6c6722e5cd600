"""A served model as benchmarks see it: text in, log-likelihoods or text out."""

import dataclasses
from collections.abc import Callable, Sequence

from dynaexq_jax.errors import InputError
from dynaexq_jax.serving.llm import LLM, Request
from dynaexq_jax.tasks.generation import Generation
from dynaexq_jax.tasks.pairs import Pair, encode_pair, rolling_pairs
from dynaexq_jax.tasks.scoring import Likelihood, by_length, score_pairs

Told = Callable[[int], object]
"""Is told how many requests are done, again and again."""


class TaskModel:
    """Answers the requests of benchmarks; counts what did not fit the context."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.truncated = 0
        """Requests whose beginning was left out, since ``restart``."""

    def restart(self) -> None:
        """Begins anew: every expert at the base, no traffic seen, nothing counted."""
        self.truncated = 0
        if (controller := self.llm.engine.controller) is not None:
            controller.restart()

    def log_likelihoods(
        self, texts: Sequence[tuple[str, str]], on_done: Told = lambda count: None
    ) -> list[Likelihood]:
        """Scores (context, continuation) pairs of text; see ``encode_pair`` and ``by_length``.

        The beginning of a context that is too long is left out.
        """
        pairs = [encode_pair(self.llm.tokenizer, *text) for text in texts]
        order = by_length(pairs)
        scored = score_pairs(self.llm.engine, [self._cut(pairs[i]) for i in order], on_done)
        of_index = dict(zip(order, scored, strict=True))
        return [of_index[index] for index in range(len(pairs))]

    def log_likelihoods_of_texts(
        self, texts: Sequence[str], on_done: Told = lambda count: None
    ) -> list[float]:
        """Natural logarithm of the probability of each text, in their order.

        A text begins after the token that ends documents and is read in windows
        (``rolling_pairs``), so that none is too long; an empty one has probability 1.
        """
        tokenizer, context = self.llm.tokenizer, self.llm.engine.config.context
        cut = [rolling_pairs(tokenizer.encode(t), tokenizer.eos_id, context) for t in texts]
        scores = iter(score_pairs(self.llm.engine, [pair for pairs in cut for pair in pairs]))
        found = []
        for pairs in cut:
            found.append(sum(next(scores).log for _ in pairs))
            on_done(1)
        return found

    def generate(
        self, prompts: Sequence[tuple[str, Generation]], on_done: Told = lambda count: None
    ) -> list[str]:
        """Continues prompts, in all slots of the engine; the text ends before a stop string.

        The beginning of a prompt that leaves no room for its new tokens is left out. Where tokens
        are drawn, prompt i of the list draws by seed + i: equal ones differ. Raises InputError if
        the new tokens alone do not fit.
        """
        requests = [self._request(i, *prompt) for i, prompt in enumerate(prompts)]
        texts = [""] * len(requests)
        for piece in self.llm.stream_requests(requests):
            texts[piece.index] += piece.text
            if piece.finish_reason is not None:
                on_done(1)
        return texts

    def _cut(self, pair: Pair) -> Pair:
        cut = pair.cut(self.llm.engine.config.context)
        self.truncated += cut != pair
        return cut

    def _request(self, index: int, prompt: str, generation: Generation) -> Request:
        context = self.llm.engine.config.context
        room = context - generation.max_tokens
        if room < 1:
            raise InputError(
                f"{generation.max_tokens} new tokens leave no room for a prompt in a context of "
                f"{context}; raise --context"
            )
        ids = self.llm.tokenizer.encode(prompt) or [self.llm.tokenizer.eos_id]
        self.truncated += len(ids) > room
        seed = (generation.sampling.seed + index) % 2**32
        return Request(
            prompt=ids[-room:],
            max_tokens=generation.max_tokens,
            sampling=dataclasses.replace(generation.sampling, seed=seed),
            stop=generation.stop,
        )
