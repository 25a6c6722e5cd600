"""Benchmark data in local files, as the task files beside this one read it.

Every function takes ``data_dir``, the folder, and ``file``, a name in it, and returns lm-eval's
form of a data set: {"test": rows}.
"""

import json
import re
from pathlib import Path
from typing import Any

from datasets import Dataset

_CHOICES = re.compile(r"\s*Answer\d: ")
_HEADING = re.compile(r"^ = (?!=).*(?<!=) = $", re.MULTILINE)


def multiple_choice(**place: Any) -> dict[str, Dataset]:
    """Rows of question, choices and answer, the number of the right choice.

    The file's questions read "...question: QUESTION", an empty line, "Answer1: ... Answer2: ...",
    an empty line, "Answer format: ...".
    """
    rows = []
    for item in json.loads(_read(**place)):
        asked, _, rest = item["instruction"].partition("\n\nAnswer1: ")
        choices = _CHOICES.split("Answer1: " + rest.partition("\n\nAnswer format:")[0])[1:]
        rows.append(
            {
                "question": asked.partition("question: ")[2].strip(),
                "choices": [choice.strip() for choice in choices],
                "answer": int(item["answer"].removeprefix("answer")) - 1,
            }
        )
    return {"test": Dataset.from_list(rows)}


def yes_or_no(**place: Any) -> dict[str, Dataset]:
    """Rows of question and answer, 0 for no and 1 for yes."""
    rows = []
    for item in json.loads(_read(**place)):
        asked = item["instruction"].partition("\n\nAnswer format:")[0]
        question = asked.partition("question: ")[2].strip()
        rows.append({"question": question, "answer": int(item["answer"] == "true")})
    return {"test": Dataset.from_list(rows)}


def json_lines(**place: Any) -> dict[str, Dataset]:
    """Rows as they are, one JSON object a line."""
    rows = [json.loads(line) for line in _read(**place).splitlines()]
    return {"test": Dataset.from_list(rows)}


def articles(**place: Any) -> dict[str, Dataset]:
    """Rows of text, one an article of WikiText, which begins with a line `` = Title = ``."""
    text = _read(**place)
    starts = [match.start() for match in _HEADING.finditer(text)]
    ends = [*starts[1:], len(text)]
    rows = [{"text": text[a:b].strip()} for a, b in zip(starts, ends, strict=True)]
    return {"test": Dataset.from_list(rows)}


def _read(*, file: str, data_dir: str | None = None, **_: Any) -> str:
    if data_dir is None:
        raise ValueError(f"{file} is looked for in a folder that was not given")
    return (Path(data_dir) / file).read_text(encoding="utf-8")
