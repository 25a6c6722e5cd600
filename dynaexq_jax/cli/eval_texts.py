"""``dynaexq eval --text``: loss, and KL divergence from the unquantized model, on text files."""

import argparse
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynaexq_jax.cli.device import prepare_device
from dynaexq_jax.cli.options import WITH_PAGES, check_windows
from dynaexq_jax.cli.perplexity import score_texts
from dynaexq_jax.text.documents import read_text

if TYPE_CHECKING:
    import numpy as np

    from dynaexq_jax.serving.loading import Served
    from dynaexq_jax.serving.perplexity import Precision


def run(arguments: argparse.Namespace) -> int:
    """Scores every file at every precision, each afresh."""
    check_windows(arguments)
    for path in arguments.text:
        read_text(path)
    prepare_device(None)
    from dynaexq_jax.serving.perplexity import load_for_scoring
    from dynaexq_jax.serving.reference import shared_windows

    window = arguments.window
    windows = shared_windows(
        arguments.model,
        arguments.reference,
        arguments.text,
        window=window,
        max_windows=arguments.max_windows,
    )
    texts = list(zip(arguments.text, windows, strict=True))
    reference = load_for_scoring(arguments.reference, precision="bf16", window=window)
    results: list[dict[str, Any]] = []
    for precision in arguments.precision:
        gc.collect()  # the split of a model into its parts leaves a cycle that holds dense weights
        results += _evaluate(arguments, precision, reference, texts)
    if arguments.json:
        print(json.dumps({"results": results}))
    return 0


def _evaluate(
    arguments: argparse.Namespace,
    precision: "Precision",
    reference: "Served",
    texts: list[tuple[Path, "np.ndarray"]],
) -> Iterator[dict[str, Any]]:
    """Loads the model at one precision and scores every text; nothing else holds it."""
    from dynaexq_jax.engine.divergence import Divergence
    from dynaexq_jax.serving.perplexity import load_for_scoring

    served = load_for_scoring(
        arguments.model,
        precision=precision,
        window=reference.engine.config.context,
        map=arguments.map if precision in WITH_PAGES else None,
    )
    divergence = Divergence(reference.engine, served.engine)
    yield from score_texts(
        served, precision, texts, divergence=divergence, lines=not arguments.json
    )
