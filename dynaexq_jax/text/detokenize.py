"""Token ids to text while they arrive, never half a character."""

from typing import Final

from dynaexq_jax.text.tokenizer import Tokenizer

_REPLACEMENT: Final = "\ufffd"
_MAX_WINDOW: Final = 8


class StreamDetokenizer:
    """Turns the ids of one sequence into text, piece by piece, for byte-level tokenizers.

    The pieces of ``add`` and the last one of ``finish`` add up to ``decode`` of all ids. Each
    call decodes a few tokens, not the whole text.

    A character whose bytes come with several tokens decodes to U+FFFD until it is whole, and an
    incomplete one is a single U+FFFD at the end. So only that one is held back: the next byte
    completes it or shows that it stands for bytes that are no UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text that were given out

    def add(self, token: int) -> str:
        """Text that is certain now that this id has come; may be empty."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        certain = len(text) - text.endswith(_REPLACEMENT)
        piece = text[self._shown : certain]
        self._shown = max(self._shown, certain)
        if certain == len(text):
            self._keep_last()
        elif len(self._window) > _MAX_WINDOW:
            self._cut(text)
        return piece

    def finish(self) -> str:
        """What was held back; the sequence ends here."""
        rest = self._tokenizer.decode(self._window)[self._shown :]
        self._window, self._shown = [], 0
        return rest

    def _keep_last(self) -> None:
        """Starts a new window at a whole character, with one token of context.

        Some tokenizers write a token differently at the start of a text.
        """
        del self._window[:-1]
        self._shown = len(self._tokenizer.decode(self._window))

    def _cut(self, text: str) -> None:
        """Shortens a window that ends in bytes that never became a character.

        Where both sides of a cut decode to the same text as the whole, the cut splits no
        character, and no later byte can change that.
        """
        for cut in range(len(self._window) - 1, 0, -1):
            before = self._tokenizer.decode(self._window[:cut])
            after = self._tokenizer.decode(self._window[cut:])
            if after and before + after == text:
                del self._window[:cut]
                self._shown -= len(before)
                return
