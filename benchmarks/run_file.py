"""Files of runs: one JSON object a line, appended when a run is done."""

import json
from pathlib import Path
from typing import Any


def read_runs(path: Path) -> list[dict[str, Any]]:
    """All runs of a file, none where there is no file.

    A last line that was cut short is taken off the file, so that a killed benchmark goes on.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]
