"""lm-eval: a model for it, and its tasks. Importing this needs the extra ``eval``."""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from dynaexq_jax.environ import environment_variable
from dynaexq_jax.errors import InputError
from dynaexq_jax.tasks.generation import Generation
from dynaexq_jax.tasks.model import TaskModel, Told

BOOTSTRAPS: Final = 1000
"""Resamplings for the standard error of metrics that have no formula for it."""


class HarnessModel(LM):
    """Hands lm-eval's requests on to a ``TaskModel``."""

    tokenizer_name = "dynaexq"

    def __init__(self, model: TaskModel) -> None:
        super().__init__()
        self._model = model

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding would give it) of continuations."""
        with _bar(requests, "log-likelihoods") as told:
            scored = self._model.log_likelihoods([it.args for it in requests], told)
        return [(log, greedy) for log, greedy in scored]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Log-likelihood of whole texts."""
        with _bar(requests, "texts") as told:
            return self._model.log_likelihoods_of_texts([it.args[0] for it in requests], told)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Text up to a stop string or the most tokens."""
        prompts = [(it.args[0], Generation.of(it.args[1])) for it in requests]
        with _bar(requests, "generation") as told:
            return self._model.generate(prompts, told)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Text of a chat, by the model's own template."""
        tokenizer = self._model.llm.tokenizer
        return tokenizer.chat_text(chat_history, open_answer=add_generation_prompt)


class Tasks(TaskManager):
    """lm-eval's own tasks and those of further folders, which come first where names are equal.

    Folders hold task files (YAML), whose functions may ask for ``data_dir``.
    """

    def __init__(self, folders: Iterable[Path] = (), data_dir: Path | None = None) -> None:
        metadata = {} if data_dir is None else {"data_dir": str(data_dir)}
        super().__init__(include_path=[str(folder) for folder in folders], metadata=metadata)

    def check(self, names: Iterable[str]) -> None:
        """Raises InputError for a name that is not a task's, a group's or a tag's."""
        for name in names:
            if name not in self.task_index:
                raise InputError(
                    f"there is no task {name!r}: lm-eval lists its own with `lm-eval ls tasks`, "
                    "folders of further ones are given by --include-path"
                )

    def load(self, spec: Any) -> Any:
        """As lm-eval does. Raises InputError if a task's data cannot be had."""
        try:
            return super().load(spec)
        except Exception as error:  # whatever data sets raise for a network or a file
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"task {spec} cannot be loaded: {reason}; its data must be in reach, or in "
                "--data-dir for tasks that read it"
            ) from error


def evaluate_task(model: TaskModel, name: str, tasks: Tasks, **options: Any) -> dict[str, Any]:
    """Runs one task, or the tasks of a group or tag, afresh; options as of ``run_harness``.

    Returns {"task", "truncated": requests cut, "scores": {task: {"items", "fewshot", metric:
    value}}}, with metrics as lm-eval names them, "acc,none".
    """
    model.restart()
    found = run_harness(HarnessModel(model), name, tasks, **options)
    scores = {}
    for task, metrics in found["results"].items():
        counts = found["n-samples"].get(task)  # of a group there are none
        scores[task] = {
            "items": counts["effective"] if counts else None,
            "fewshot": found["n-shot"].get(task),
            **{key: value for key, value in metrics.items() if "," in key},
        }
    return {"task": name, "truncated": model.truncated, "scores": scores}


def run_harness(
    model: LM,
    name: str,
    tasks: Tasks,
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    chat: bool = False,
    allow_code: bool = False,
    items: bool = False,
) -> dict[str, Any]:
    """What lm-eval finds for one task, group or tag, with any model of its interface.

    ``limit`` is the number of items of each task, ``fewshot`` that of examples before each, where
    a task does not insist. ``chat`` asks in the model's chat template, ``allow_code`` runs tasks
    that execute what the model writes, ``items`` adds every request and answer as "samples".
    """
    with _alone():
        found = simple_evaluate(
            model=model,
            tasks=[name],
            task_manager=tasks,
            limit=limit,
            num_fewshot=fewshot,
            apply_chat_template=chat,
            confirm_run_unsafe_code=allow_code,
            log_samples=items,
            bootstrap_iters=BOOTSTRAPS,
        )
    assert found is not None  # it is for other processes than the first
    return found


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Keeps lm-eval off our stdout, and from forking a process that has threads of JAX's."""
    with (
        environment_variable("DISABLE_MULTIPROC", "1"),
        contextlib.redirect_stdout(sys.stderr),
    ):
        yield


@contextlib.contextmanager
def _bar(requests: Sequence[Instance], name: str) -> Iterator[Told]:
    with tqdm(total=len(requests), desc=name, delay=1, file=sys.stderr, leave=False) as bar:
        yield bar.update
