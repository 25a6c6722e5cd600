"""Hotness of given texts, for a fixed map."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from dynaexq_jax.checkpoint import Checkpoint
from dynaexq_jax.errors import InputError
from dynaexq_jax.serving.config import ServeConfig
from dynaexq_jax.serving.loading import load_served
from dynaexq_jax.serving.perplexity import check_window
from dynaexq_jax.text.documents import read_windows
from dynaexq_jax.traffic import Ladder
from pallas_kernels.levels import Bits


def ladder_of(
    checkpoint: Checkpoint,
    *,
    base_bits: Bits,
    max_bits: Bits | None = None,
    pages: int | None = None,
    share: float | None = None,
) -> Ladder:
    """Base, highest level (None: the checkpoint's) and pool: ``pages``, or those that bring a
    share of all experts one level up.

    Raises InputError for what the checkpoint has no use for.
    """
    available = checkpoint.available_bits
    max_bits = available[-1] if max_bits is None else max_bits
    if max_bits not in available or max_bits <= base_bits:
        raise InputError(
            f"a map needs levels above its base of {base_bits} bits, up to {max_bits}; "
            f"{checkpoint.name} has {available}"
        )
    experts = len(checkpoint.layers) * checkpoint.experts
    ladder = Ladder(base_bits=base_bits, max_bits=max_bits, pool_pages=0)
    if pages is None:
        assert share is not None
        pages = round(share * experts) * ladder.first_step_pages
    if not 0 <= pages <= ladder.pages_of_level[-1] * experts:
        raise InputError(
            f"--pages must be in 0..{ladder.pages_of_level[-1] * experts}, which bring every "
            f"expert from {base_bits} to {max_bits} bits, got {pages}"
        )
    return Ladder(base_bits=base_bits, max_bits=max_bits, pool_pages=pages)


def measure_routing(
    path: Path,
    texts: Sequence[Path],
    *,
    base_bits: Bits,
    window: int,
    max_windows: int | None = None,
    on_window: Callable[[], object] = lambda: None,
) -> tuple[np.ndarray, int]:
    """Router mass a token with every expert at the base, float64 [L, E], and tokens read.

    Every text weighs the same, however long it is. Raises InputError for a text that is missing,
    not UTF-8, or shorter than one window.
    """
    check_window(window, Checkpoint.open(path).config)
    served = load_served(path, ServeConfig(context=window, chunk=window, base_bits=base_bits))
    means, tokens = [], 0
    # all of them before any is run: one that is too short costs no work
    for windows in [read_windows(t, served.tokenizer, window, max_windows) for t in texts]:
        for row in windows:
            served.engine.read(row[None, :-1], 0)
            on_window()
        mass, count = jax.device_get(served.engine.take_stats())
        means.append(mass.astype(np.float64) / count)
        tokens += int(count)
    return np.mean(means, axis=0), tokens
