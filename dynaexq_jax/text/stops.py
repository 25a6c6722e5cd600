"""Stop strings in streamed text."""

from collections.abc import Sequence

from dynaexq_jax.errors import InputError


class StopMatcher:
    """Lets text through up to the first stop string, however it is cut into pieces.

    The first is the one that is complete first; of those that end together, the longest. The end
    of the text that may still become a stop string is held back. Raises InputError for an empty
    stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise InputError("a stop string cannot be empty: leave it out or give it characters")
        self._stops = tuple(stops)
        self._held = ""
        self._hit: str | None = None

    @property
    def hit(self) -> str | None:
        """The stop string that ended the text, or None so far."""
        return self._hit

    def feed(self, piece: str) -> str:
        """Text that can be shown now; after a stop string nothing more."""
        if self._hit is not None:
            return ""
        text = self._held + piece
        found = [
            (text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text
        ]
        if found:
            end, _, self._hit = min(found)
            self._held = ""
            return text[: end - len(self._hit)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back; the text ends here."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` starts with, short of all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
