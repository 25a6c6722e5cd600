"""Scores windows of text with any map of levels: all pages are on the device, a map is a table.

Axes: D domains, n windows of a domain, W tokens of a window, R rows read together, L layers with
experts, E experts.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dynaexq_jax.bank import ExpertBank, HostPages
from dynaexq_jax.checkpoint import Checkpoint
from dynaexq_jax.engine.divergence import Divergence
from dynaexq_jax.engine.engine import Engine, EngineConfig
from dynaexq_jax.engine.programs import Programs, split_params
from dynaexq_jax.models.qwen3_moe import Qwen3Moe
from dynaexq_jax.serving.config import ServeConfig
from dynaexq_jax.serving.loading import load_served
from dynaexq_jax.serving.planning import engine_config
from pallas_kernels.levels import LEVEL_BITS, Bits, level_of_bits

BASE_BITS: Bits = 2
"""Of the arrays on the device; any other base is a map."""


class Scorer:
    """A converted checkpoint with all of its pages, beside the model that it was made from."""

    def __init__(self, source: Path, converted: Path, windows: np.ndarray, *, rows: int) -> None:
        """``windows`` int32 [D, n, W + 1]; ``rows`` windows are read at once, of ``n`` a part."""
        self.windows = windows
        self.rows = rows
        context = windows.shape[2] - 1
        slots = max(rows, len(windows))
        serve = ServeConfig(context=context, chunk=context, batch=slots)
        reference = load_served(source, serve).engine
        self.checkpoint = Checkpoint.open(converted)
        self.engine = _engine(self.checkpoint, engine_config(self.checkpoint.config, serve))
        self.shape = len(self.checkpoint.layers), self.checkpoint.experts
        self._levels: np.ndarray | None = None
        self._divergence = Divergence(reference, self.engine)
        self._reference = [self._read_all(reference, rows) for rows in windows]
        itself = Divergence(reference, reference)
        self.reference_nll = np.stack(
            [
                _by_window(itself.compare(hidden, hidden, texts[:, 1:].ravel())[0], len(texts))
                for hidden, texts in zip(self._reference, windows, strict=True)
            ]
        )
        """float64 [D, n]: mean loss of the unquantized model, in nats a token."""

    def set_levels(self, levels: np.ndarray) -> None:
        """What the next chunk reads: int [L, E]."""
        if self._levels is not None and np.array_equal(levels, self._levels):
            return
        rungs = self.engine.experts.table.shape[0]
        place = np.arange(rungs * levels.size, dtype=np.int32).reshape(rungs, *levels.shape)
        held = np.array([0, 1, 3])[levels]
        self.engine.bank.publish(np.where(np.arange(rungs)[:, None, None] < held, place, -1))
        self._levels = levels.copy()

    def read(self, tokens: np.ndarray, start: int) -> jax.Array:
        """Hidden states [R, T, H] of ``tokens`` int32 [R, T], each row in a slot of its own."""
        return self.engine.read(tokens, start)

    def score_maps(self, maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Loss and divergence of every window, float64 [D, n], at levels int [D, parts, L, E]."""
        scores = []
        for domain, texts in enumerate(self.windows):
            scores.append(self.compare(domain, self._read_all(self.engine, texts, maps[domain])))
        nll, kl = zip(*scores, strict=True)
        return np.stack(nll), np.stack(kl)

    def compare(self, domain: int, hidden: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        """Loss and divergence of a domain's windows, float64 [n].

        ``hidden`` [n * W, H] is what the engine gave for them.
        """
        texts = self.windows[domain]
        losses, kl = self._divergence.compare(self._reference[domain], hidden, texts[:, 1:].ravel())
        return _by_window(losses, len(texts)), _by_window(kl, len(texts))

    def take_mass(self) -> tuple[np.ndarray, int]:
        """Router mass float64 [L, E] and tokens read since it was last taken."""
        mass, tokens = jax.device_get(self.engine.take_stats())
        return mass.astype(np.float64), int(tokens)

    def routing(self, windows: np.ndarray) -> np.ndarray:
        """Router mass a token at the base by part of ``rows`` windows: float64 [D, parts, L, E]."""
        self.set_levels(np.zeros(self.shape, np.int32))
        self.take_mass()
        found = []
        for texts in windows:
            for first in range(0, len(texts), self.rows):
                self.engine.read(texts[first : first + self.rows, :-1], 0)
                mass, tokens = self.take_mass()
                found.append(mass / tokens)
        return np.stack(found).reshape(len(windows), -1, *self.shape)

    def bits_per_weight(self, base_bits: Bits, pages: int) -> float:
        """Resident bits of an expert's weight, scales counted, with ``pages`` above the base."""
        fmt = self.checkpoint.format
        weights = 3 * fmt.hidden * fmt.width
        layers, experts = self.shape
        return base_bits + 8 * fmt.scale_bytes / weights + 2 * pages / (layers * experts)

    def _read_all(
        self, engine: Engine, texts: np.ndarray, maps: np.ndarray | None = None
    ) -> jax.Array:
        """Hidden states [n * W, H] of all windows of a domain, part by part."""
        found = []
        for part, first in enumerate(range(0, len(texts), self.rows)):
            if maps is not None:
                self.set_levels(maps[part])
            found.append(engine.read(texts[first : first + self.rows, :-1], 0))
        return jnp.concatenate(found).reshape(-1, found[0].shape[-1])


def _by_window(values: np.ndarray, windows: int) -> np.ndarray:
    return values.astype(np.float64).reshape(windows, -1).mean(axis=1)


def _engine(checkpoint: Checkpoint, shapes: EngineConfig) -> Engine:
    """An engine whose pool holds every page above the base, in the order of rung, layer, expert."""
    host = HostPages.read(checkpoint, LEVEL_BITS[level_of_bits(BASE_BITS) + 1 :])
    experts = len(checkpoint.layers) * checkpoint.experts
    bank = ExpertBank.allocate(
        checkpoint, base_bits=BASE_BITS, pool_pages=len(host.rungs) * experts
    )
    table = np.asarray(bank.experts.table)
    places = np.arange(len(host.rungs) * experts, dtype=np.int32)
    pages = [page.ravel() for rungs in zip(*host.rungs, strict=True) for page in rungs]
    words = np.concatenate([part.ravel().view(np.uint32) for part in (table, places, *pages)])
    bank.commit(jax.device_put(words, bank.device))
    model = Qwen3Moe(
        checkpoint.config, checkpoint.dense_weights(), bank.experts, dtype=shapes.dtype
    )
    return Engine(
        programs=Programs(model),
        params=split_params(model),
        config=shapes,
        model_config=checkpoint.config,
        experts=bank,
    )
