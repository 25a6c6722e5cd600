"""The hand-driven loop gives the tokens and levels of the engine under the same settings.

Under ``blocking`` neither depends on when a copy arrives.
"""

import runpy
import sys

import pytest
from serving import nano

import dynaexq_jax as dx
from dynaexq_jax.serving.planning import Planner

SCRIPT = nano.EXAMPLES / "decode_loop.py"
PROMPT = "import numpy as np\n\n\ndef softmax(x, axis=-1):\n" * 3  # more than one prompt chunk
MAX_TOKENS = 40
PAGES = 24
INTERVAL = 4


def run_script(monkeypatch, capsys, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return capsys.readouterr().out


@pytest.fixture
def programs(tmp_path_factory):
    """The script's are the engine's, and are not compiled again."""
    with nano.compiled_programs(nano.shared_folder(tmp_path_factory) / "xla"):
        yield


@pytest.mark.usefixtures("programs")
def test_script_does_what_the_engine_does(tmp_path_factory, monkeypatch, capsys):
    # what memory is planned does not matter here, and compiling to know it takes long
    monkeypatch.setattr(Planner, "temporary_bytes", lambda *_: 0)
    script = runpy.run_path(str(SCRIPT))
    converted = nano.converted_nano(tmp_path_factory)
    llm = dx.load(
        converted,
        base_bits=script["BASE_BITS"],
        pages=PAGES,
        policy="blocking",
        interval=INTERVAL,
        chunk=script["CHUNK"],
        context=script["CONTEXT"],
    )
    pieces = list(llm.stream_generate(PROMPT, max_tokens=MAX_TOKENS, temperature=0))
    levels = llm.residency()
    assert len({token for piece in pieces for token in piece.token_ids}) > MAX_TOKENS // 4
    assert (levels > 0).sum() > PAGES // 2

    printed = run_script(
        monkeypatch,
        capsys,
        *(converted, "--prompt", PROMPT, "--max-tokens", MAX_TOKENS),
        *("--policy", "blocking", "--pages", PAGES, "--interval", INTERVAL),
    )
    ids = " ".join(str(token) for piece in pieces for token in piece.token_ids)
    text = "".join(piece.text for piece in pieces)
    counts = [f"{(levels == i).sum()} experts at {bits} bits" for i, bits in enumerate((2, 4, 8))]
    assert printed == "\n".join([f"token ids: {ids}", PROMPT + text, *counts, ""])
