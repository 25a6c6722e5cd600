"""Benchmarks by our adapter and by lm-eval's own Hugging Face backend, compared item by item.

    python benchmarks/tasks.py HF_DIR --data-dir DIR [--limit 100] [--texts 8] [--prompts 16]

Both on the CPU in float32, with the unquantized weights and the same batch. Needs the extra
``eval``, torch and accelerate. Ends with one line of JSON.
"""

import argparse
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from environment import describe
from lm_eval.models.huggingface import HFLM

from dynaexq_jax.report.table import text_table
from dynaexq_jax.serving.llm import LLM
from dynaexq_jax.serving.perplexity import load_at_precision
from dynaexq_jax.tasks.harness import HarnessModel, Tasks, run_harness
from dynaexq_jax.tasks.model import TaskModel

FILES = Path(__file__).parents[1] / "examples" / "tasks"
BATCH = 8


def main() -> None:
    """Runs three kinds of tasks with both and prints what differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="HF_DIR")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=100, help="questions of ARC-Easy")
    parser.add_argument("--texts", type=int, default=8, help="articles of WikiText-2")
    parser.add_argument("--prompts", type=int, default=16, help="problems of GSM8K, one shot")
    parser.add_argument("--context", type=int, default=1024)
    arguments = parser.parse_args()

    tasks = Tasks([FILES], arguments.data_dir)
    served = load_at_precision(
        arguments.source,
        precision="bf16",
        dtype="float32",
        batch=BATCH,
        context=arguments.context,
    )
    models = {
        "ours": HarnessModel(TaskModel(LLM(served))),
        "theirs": HFLM(
            pretrained=str(arguments.source),
            dtype="float32",
            device="cpu",
            batch_size=BATCH,
            max_length=arguments.context,
        ),
    }
    rows, facts = [], []
    plan: list[tuple[str, int, int, Callable[..., dict[str, Any]]]] = [
        ("local_arc_easy", arguments.limit, 0, _likelihoods),
        ("local_wikitext2", arguments.texts, 0, _likelihoods),
        ("local_gsm8k", arguments.prompts, 1, _texts),
    ]
    for name, limit, fewshot, compare in plan:
        found = {
            who: run_harness(model, name, tasks, limit=limit, fewshot=fewshot, items=True)
            for who, model in models.items()
        }
        answers = {who: _answers(it["samples"][name]) for who, it in found.items()}
        fact: dict[str, Any] = {"task": name, "items": limit, "fewshot": fewshot}
        for who, it in found.items():
            scores = it["results"][name]
            fact |= {
                f"{key.partition(',')[0]}_{who}": float(value)
                for key, value in scores.items()
                if "," in key and "stderr" not in key
            }
        fact |= compare(answers["ours"], answers["theirs"])
        facts.append(fact)
        rows += [[name, key, _short(value)] for key, value in fact.items() if key != "task"]
    print(text_table(["task", "what", "value"], rows))
    software = {name: metadata.version(name) for name in ("lm_eval", "torch", "transformers")}
    print(json.dumps({"environment": describe() | software, "results": facts}))


def _short(value: float) -> str:
    return f"{value:.6g}"


def _answers(samples: list[dict[str, Any]]) -> list[Any]:
    """The model's answers to all requests, in the order of the items."""
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    return [answer for sample in samples for (answer,) in sample["resps"]]


def _likelihoods(ours: list[Any], theirs: list[Any]) -> dict[str, Any]:
    """Answers are (log-likelihood, greedy) for continuations, a log-likelihood for texts."""
    a, b = (np.array([np.atleast_1d(it)[0] for it in them], np.float64) for them in (ours, theirs))
    differ = np.abs(a - b)
    fact: dict[str, Any] = {
        "requests": len(ours),
        "largest_difference_nats": float(differ.max()),
        "largest_relative_difference": float((differ / np.abs(b)).max()),
        "mean_nats": float(-b.mean()),
    }
    if isinstance(theirs[0], tuple):
        flags = [it[1] != other[1] for it, other in zip(ours, theirs, strict=True)]
        fact["greedy_flags_that_differ"] = sum(flags)
    return fact


def _texts(ours: list[Any], theirs: list[Any]) -> dict[str, Any]:
    return {
        "requests": len(ours),
        "equal_texts": sum(a == b for a, b in zip(ours, theirs, strict=True)),
        "characters": sum(len(text) for text in theirs),
    }


if __name__ == "__main__":
    main()
