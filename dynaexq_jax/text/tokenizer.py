"""The tokenizer that travels with a model, reduced to what we use of it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dynaexq_jax.environ import environment_variable
from dynaexq_jax.errors import InputError

Message = Mapping[str, str]
"""One turn of a chat: {"role": "user", "content": "..."}."""


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """Ids are below it, those of special tokens included."""

    @property
    def eos_id(self) -> int:
        """What ends a document."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """What ends a generation, ascending; ``eos_id`` is among them."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no special token is added, those written in it are read."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids without special tokens; bytes that are no UTF-8 become U+FFFD."""

    def chat_text(self, messages: Sequence[Message], *, open_answer: bool = True) -> str:
        """Text of a chat, which ends inside its last message, or where the next answer starts."""

    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a chat up to where the assistant's next answer starts."""


class HfTokenizer:
    """A Hugging Face fast tokenizer. Build it with ``load_tokenizer``."""

    def __init__(self, tokenizer: Any, *, eos_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.vocab_size: int = len(tokenizer)
        self.eos_id: int = tokenizer.eos_token_id
        self.eos_ids: tuple[int, ...] = tuple(sorted({*eos_ids, self.eos_id}))

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no special token is added, those written in it are read.

        Raises InputError for lone surrogates, as which Python reads bytes that are not UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text is not Unicode: lone surrogate {text[error.start]!a} at character "
                f"{error.start}; give it as UTF-8"
            ) from error
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def chat_text(self, messages: Sequence[Message], *, open_answer: bool = True) -> str:
        """Text of a chat up to where the assistant's next answer starts.

        Without ``open_answer`` it ends with the last message, which may be gone on with. Raises
        InputError where the tokenizer has no chat template or the template refuses.
        """
        if not self._tokenizer.chat_template:
            raise InputError("the model's tokenizer has no chat template: use a plain prompt")
        from jinja2.exceptions import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                list(messages),
                add_generation_prompt=open_answer,
                continue_final_message=not open_answer,
                tokenize=False,
            )
        except TemplateError as error:
            raise InputError(f"the model's chat template refuses the messages: {error}") from error

    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a chat up to where the assistant's next answer starts.

        Raises InputError where the tokenizer has no chat template or the template refuses.
        """
        return self.encode(self.chat_text(messages))


def load_tokenizer(directory: Path | str) -> HfTokenizer:
    """The tokenizer in a directory with tokenizer.json and the files that go with it.

    Raises InputError if files are missing or damaged. Never reaches for the network.
    """
    directory = Path(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (directory / name).is_file():
            raise InputError(
                f"no tokenizer in {directory}: {name} is missing; copy it from the model's source"
            )
    # or transformers announces that torch is missing, which we do not use
    with environment_variable("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"):
        # Half the import time of AutoTokenizer, and it takes tokenizer.json as it is.
        from transformers import PreTrainedTokenizerFast
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the Rust side raises bare Exception for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"cannot read the tokenizer in {directory}: {reason}; copy its files again from the "
            "model's source"
        ) from error
    if not isinstance(tokenizer.eos_token_id, int):
        raise InputError(f"{directory / 'tokenizer_config.json'} names no eos_token: add it")
    return HfTokenizer(tokenizer, eos_ids=_generation_eos_ids(directory))


def _generation_eos_ids(directory: Path) -> list[int]:
    path = directory / "generation_config.json"
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_bytes()).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a JSON object ({error}): copy it again") from error
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise InputError(f"{path}: eos_token_id must be a token id or a list of them, got {found}")
    return ids
