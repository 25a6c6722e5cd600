"""``dynaexq eval --tasks``: benchmarks through lm-eval."""

import argparse
import gc
import importlib.util
import json
from pathlib import Path
from typing import Any

from dynaexq_jax.cli.device import prepare_device
from dynaexq_jax.cli.options import WITH_PAGES
from dynaexq_jax.errors import InputError
from dynaexq_jax.serving.config import DEFAULT_CONTEXT

BATCH = 8


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Flags of this kind of evaluation."""
    group.add_argument(
        "--include-path",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders of further task files (YAML)",
    )
    group.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="data of task files that read local files"
    )
    group.add_argument("--limit", type=int, metavar="N", help="items of each task, the first ones")
    group.add_argument("--fewshot", type=int, metavar="N", help="examples before each item")
    group.add_argument("--chat", action="store_true", help="ask in the model's chat template")
    group.add_argument(
        "--allow-code",
        action="store_true",
        help="run tasks that execute code which the model has written",
    )
    group.add_argument(
        "--pages",
        type=int,
        metavar="N",
        help="pages above 2 bits for dynamic and static-mixed; default: one for a quarter of the "
        "experts",
    )
    group.add_argument(
        "--batch",
        type=int,
        default=BATCH,
        metavar="N",
        help=f"requests computed together; default: {BATCH}",
    )
    group.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens of a request, new ones included; what is longer loses its beginning; "
        f"default: {DEFAULT_CONTEXT}, or fewer if the model has fewer positions",
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs every task at every precision, each afresh."""
    _check(arguments)
    prepare_device(None)
    from dynaexq_jax.serving.llm import LLM
    from dynaexq_jax.serving.perplexity import load_at_precision
    from dynaexq_jax.tasks.harness import Tasks, evaluate_task
    from dynaexq_jax.tasks.model import TaskModel

    tasks = Tasks(arguments.include_path, arguments.data_dir)
    tasks.check(arguments.tasks)
    results: list[dict[str, Any]] = []
    for precision in arguments.precision:
        gc.collect()  # the split of a model into its parts leaves a cycle that holds dense weights
        served = load_at_precision(
            arguments.model,
            precision=precision,
            policy="blocking" if precision == "dynamic" else None,
            pages=arguments.pages if precision in WITH_PAGES else None,
            map=arguments.map if precision in WITH_PAGES else None,
            batch=arguments.batch,
            context=arguments.context,
        )
        model = TaskModel(LLM(served))
        for name in arguments.tasks:
            result = evaluate_task(
                model,
                name,
                tasks,
                limit=arguments.limit,
                fewshot=arguments.fewshot,
                chat=arguments.chat,
                allow_code=arguments.allow_code,
            )
            results.append({"precision": precision} | result)
            if not arguments.json:
                print("\n".join(lines(results[-1])), flush=True)
        del served, model
    if arguments.json:
        print(json.dumps({"results": results}))
    return 0


def lines(result: dict[str, Any]) -> list[str]:
    """What is printed of one task, or group of tasks, at one precision."""
    found = []
    for task, scores in result["scores"].items():
        for key, value in scores.items():
            metric, _, filtered_by = key.partition(",")
            if not filtered_by or metric.endswith("_stderr"):
                continue
            error = scores.get(f"{metric}_stderr,{filtered_by}")
            error = f" ± {error:.4f}" if isinstance(error, float) else ""
            name = metric if filtered_by == "none" else f"{metric} ({filtered_by})"
            value = f"{value:.4f}" if isinstance(value, float) else value
            found.append(
                f"{task}: {name} {value}{error} at {result['precision']}, {scores['items']} items, "
                f"{scores['fewshot']} shots"
            )
    if result["truncated"]:
        found.append(f"{result['task']}: {result['truncated']} requests were cut to the context")
    return found


def _check(arguments: argparse.Namespace) -> None:
    for name in ("limit", "pages", "batch", "context"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be positive, got {value}")
    if arguments.fewshot is not None and arguments.fewshot < 0:
        raise InputError(f"--fewshot must be 0 or more, got {arguments.fewshot}")
    for folder in [*arguments.include_path, arguments.data_dir]:
        if folder is not None and not folder.is_dir():
            raise InputError(f"{folder} is not a folder; give one that exists")
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            "--tasks needs lm-eval, which is not installed: pip install 'dynaexq-jax[eval]'"
        )
