"""Perplexity by text at 2, 4 and 8 bits, dynamic, and unquantized, and what they lose.

    python benchmarks/perplexity.py HF_DIR CONVERTED --text FILE [FILE ...] [--max-windows 32]

The ceiling is the unquantized model, run by the same code. If HF_DIR holds a reference.json, its
losses (transformers, float32) are compared too. Ends with one line of JSON.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from environment import describe
from tqdm import tqdm

from dynaexq_jax.report.table import text_table
from dynaexq_jax.serving.perplexity import load_for_scoring, score_text

PRECISIONS = ("bf16", "8", "4", "dynamic", "2")


def main() -> None:
    """Scores every text at every precision and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="HF_DIR")
    parser.add_argument("converted", type=Path, metavar="CONVERTED")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-windows", type=int, default=32)
    arguments = parser.parse_args()

    nll: dict[str, dict[str, float]] = {path.name: {} for path in arguments.text}
    for precision in PRECISIONS:
        served = load_for_scoring(
            arguments.source if precision == "bf16" else arguments.converted,
            precision=precision,
            window=arguments.window,
        )
        for path in tqdm(arguments.text, desc=precision, file=sys.stderr):
            score = score_text(
                served, path, window=arguments.window, max_windows=arguments.max_windows
            )
            nll[path.name][precision] = score.nll

    reference = _reference(arguments.source)
    rows = []
    for name, losses in nll.items():
        base = losses["bf16"]
        known = reference.get(name.split(".")[0])
        compared = arguments.max_windows == 32 and arguments.window == 512 and known is not None
        rows.append(
            [
                name,
                f"{math.exp(base):.3f}",
                f"{_percent(base, known):+.4f} %" if compared else "",
                *(f"{_percent(losses[p], base):+.2f} %" for p in PRECISIONS[1:]),
            ]
        )
    header = ["text", "bf16 perplexity", "to reference", *PRECISIONS[1:]]
    print("perplexity of the unquantized model, and by how much the others are above it")
    print(text_table(header, rows))
    facts = {"benchmark": "perplexity", "model": arguments.source.name, **describe()}
    print(json.dumps({**facts, "nll": nll}))


def _percent(nll: float, base: float) -> float:
    """By how much the perplexity of one loss is above that of another, in percent."""
    return 100 * math.expm1(nll - base)


def _reference(source: Path) -> dict[str, float]:
    path = source / "reference.json"
    if not path.is_file():
        return {}
    domains = json.loads(path.read_text(encoding="utf-8"))["domains"]
    return {name: value["nll"] for name, value in domains.items()}


if __name__ == "__main__":
    main()
