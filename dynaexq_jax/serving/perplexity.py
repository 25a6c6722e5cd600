"""Perplexity of a served model on text: the loss of every token of windows of a fixed length."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dynaexq_jax.checkpoint import Checkpoint, is_converted
from dynaexq_jax.config import ModelConfig
from dynaexq_jax.engine.divergence import Divergence
from dynaexq_jax.errors import InputError
from dynaexq_jax.hf import HfDirectory
from dynaexq_jax.serving.config import ServeConfig
from dynaexq_jax.serving.loading import Served, load_served
from dynaexq_jax.text.documents import read_windows
from pallas_kernels.levels import Bits

Precision = Literal["2", "4", "8", "bf16", "dynamic", "static-mixed"]

DYNAMIC_CHUNK = 32
"""Tokens between two plans while a text is scored under "dynamic"."""
BITS_OF_PRECISION: dict[str, Bits] = {"2": 2, "4": 4, "8": 8}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextScore:
    """Mean loss over all predicted tokens of a text."""

    nll: float
    """Nats a token."""
    tokens: int
    kl: float | None = None
    """Nats a token: mean KL(reference || model); None without a reference."""

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll)


def load_at_precision(
    path: Path,
    *,
    precision: Precision,
    policy: str | None = None,
    pages: int | None = None,
    map: Path | None = None,
    **fields: Any,
) -> Served:
    """Loads a model at one precision; ``fields`` are others of ``ServeConfig``.

    "dynamic" is a base of 2 bits and ``pages`` pages, by default one for a quarter of the experts,
    whose owners follow the traffic, beginning with the hotness of ``map``, if one is given;
    ``policy`` names another policy than "dynamic" for it. "static-mixed" holds ``map`` in as many
    pages. Raises InputError if the directory does not hold what the precision needs.
    """
    if precision == "bf16":
        if is_converted(path):
            raise InputError(
                f"{path}: a converted checkpoint does not hold the unquantized experts; give the "
                "Hugging Face directory for --precision bf16"
            )
        return load_served(path, ServeConfig(**fields))
    checkpoint = Checkpoint.open(path)
    if precision in BITS_OF_PRECISION:
        return load_served(path, ServeConfig(base_bits=BITS_OF_PRECISION[precision], **fields))
    if pages is None:
        pages = len(checkpoint.layers) * checkpoint.experts // 4
    return load_served(
        path,
        ServeConfig(base_bits=2, pages=pages, map=map, policy=policy or precision, **fields),
    )


def load_for_scoring(
    path: Path,
    *,
    precision: Precision,
    window: int,
    pages: int | None = None,
    map: Path | None = None,
    routing_trace: Path | None = None,
) -> Served:
    """Loads a model to be scored at one precision, in windows.

    "dynamic" follows the text in intervals of ``DYNAMIC_CHUNK`` tokens, with the routing of each
    in ``routing_trace``, if given; every chunk waits for its pages, so a score does not depend on
    the machine's speed. Raises InputError as ``load_at_precision`` does.
    """
    plain = precision == "bf16" and not is_converted(path)
    check_window(window, (HfDirectory if plain else Checkpoint).open(path).config)
    follows = precision == "dynamic"
    return load_at_precision(
        path,
        precision=precision,
        policy="blocking" if follows else None,
        pages=pages,
        map=map,
        context=window,
        chunk=min(window, DYNAMIC_CHUNK) if follows else window,
        interval=1,
        routing_trace=routing_trace,
    )


def check_window(window: int, config: ModelConfig) -> None:
    """Raises InputError for a window that the model has no positions for."""
    if window > config.max_position_embeddings:
        raise InputError(
            f"a window of {window} is longer than the {config.max_position_embeddings} positions "
            "of this model (max_position_embeddings); lower --window"
        )


def score_text(
    served: Served,
    path: Path,
    *,
    window: int,
    max_windows: int | None = None,
    on_window: Callable[[], object] = lambda: None,
) -> TextScore:
    """Scores windows of ``window`` + 1 tokens that start every ``window`` tokens.

    ``on_window`` is told when one is done. Raises InputError for a file that is missing, not
    UTF-8, or shorter than one window.
    """
    windows = read_windows(path, served.tokenizer, window, max_windows)
    return score_windows(served, windows, on_window=on_window)


def score_windows(
    served: Served,
    windows: np.ndarray,
    *,
    divergence: Divergence | None = None,
    on_window: Callable[[], object] = lambda: None,
) -> TextScore:
    """Scores the windows of one text, int32 [n, W + 1], with ``divergence`` against its reference.

    A model with a controller begins anew; each chunk is scored at the levels that the chunks
    before it have led to. ``divergence`` is one of ``served.engine``.
    ``on_window`` is told when a window is done.
    """
    controller = served.engine.controller
    if controller is not None:
        controller.restart()
    losses, kls = [], []
    for row in windows:
        if divergence is None:
            losses.append(served.engine.score(row))
        else:
            loss, kl = divergence.score(row)
            losses.append(loss)
            kls.append(kl)
        if controller is not None:
            controller.settle()
        on_window()
    tokens = sum(loss.size for loss in losses)
    return TextScore(nll=_mean(losses), tokens=tokens, kl=_mean(kls) if kls else None)


def _mean(values: list[np.ndarray]) -> float:
    return float(np.concatenate(values).astype(np.float64).mean())
