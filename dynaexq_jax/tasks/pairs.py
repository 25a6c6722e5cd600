"""Texts to score as token ids: where a continuation begins, and how a long text is cut."""

from collections.abc import Sequence
from typing import NamedTuple

from dynaexq_jax.errors import InputError
from dynaexq_jax.text.tokenizer import Tokenizer


class Pair(NamedTuple):
    """What is read, and what is scored after it: token ids, at least one of each."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def inputs(self) -> int:
        """Tokens that a model reads to predict the continuation: all but the last."""
        return len(self.context) + len(self.continuation) - 1

    def cut(self, context: int) -> "Pair":
        """The pair with so much of its context, from the end, that ``context`` tokens are read.

        Raises InputError if the continuation alone is longer.
        """
        if len(self.continuation) > context:
            raise InputError(
                f"a continuation of {len(self.continuation)} tokens does not fit a context of "
                f"{context}; raise --context"
            )
        return self._replace(context=self.context[max(self.inputs - context, 0) :])


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Tokens of a context and of what comes after it, as they are when read as one text.

    White space at the end of the context belongs to the continuation, for tokenizers join it to
    the word that follows. The continuation's tokens are those beyond as many as the context has on
    its own. An empty context is the token that ends documents. Raises InputError if no token is
    left to be scored.
    """
    kept = context.rstrip()
    if kept:
        continuation = context[len(kept) :] + continuation
        whole, before = tokenizer.encode(kept + continuation), tokenizer.encode(kept)
        pair = Pair(tuple(before), tuple(whole[len(before) :]))
    else:
        ids = tokenizer.encode(context + continuation)
        begun = ids[:1] == [tokenizer.eos_id]
        pair = Pair((tokenizer.eos_id,), tuple(ids[begun:]))
    if not pair.continuation:
        raise InputError(
            f"the continuation {continuation!r} has no token of its own after {context[-40:]!r}; "
            "change the task"
        )
    return pair


def rolling_pairs(tokens: Sequence[int], prefix: int, context: int) -> list[Pair]:
    """Cuts a text into pairs that predict each of its tokens once, after ``prefix``.

    At most ``context`` tokens are read for a pair. The last pair, which has fewer to predict,
    reaches back as far as that goes.
    """
    stream = (prefix, *tokens)
    pairs = []
    for start in range(0, len(tokens), context):
        end = min(start + context, len(tokens))
        first = max(end - context, 0)
        pairs.append(Pair(stream[first : start + 1], stream[start + 1 : end + 1]))
    return pairs
