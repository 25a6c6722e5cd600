"""Carries the hidden states of all rows from layer to layer, through files and in batches."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int32

from convert.calibration.block import Block, attend
from convert.calibration.rows import RowPlan, Run
from convert.calibration.states import HiddenStates
from dynaexq_jax.config import ModelConfig
from pallas_kernels.levels import Bits

TOKENS_PER_BATCH: Final = 8192
"""Of hidden states on the device at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """One file in ``folder`` for what goes into each layer; a layer's is removed behind it."""

    config: ModelConfig
    tokens: Int32[np.ndarray, "R W"]
    folder: Path

    @property
    def plan(self) -> RowPlan:
        """Which rows there are."""
        return RowPlan(text=len(self.tokens))

    def index(self, layer: int) -> int:
        """Layers with experts before this one."""
        return sum(map(self.config.is_sparse, range(layer)))

    def states(self, layer: int) -> HiddenStates:
        """What goes into a layer; after the last, what comes out of it."""
        return HiddenStates(
            self.folder / f"layer_{layer:03d}",
            rows=self.plan.rows(self.index(layer)),
            window=self.tokens.shape[1],
            hidden=self.config.hidden_size,
        )

    def most_bytes(self) -> int:
        """Bytes of the files that are there at a time, at most."""
        layers = self.config.num_hidden_layers
        return self.states(layers - 1).nbytes + self.states(layers).nbytes

    def begin(self, embedding: Float[np.ndarray, "V H"]) -> None:
        """Writes what goes into the first layer."""
        self.folder.mkdir(exist_ok=True)
        states = self.states(0)
        states.create()
        tokens = np.concatenate([self.tokens, self.tokens[: self.plan.probes]])
        for start, stop in self._pieces(0, len(tokens)):
            states.write(start, embedding[tokens[start:stop]].astype(np.float32))
        states.sync()

    def attend(self, layer: int, block: Block) -> None:
        """Begins what comes out of a layer with what is there before its experts.

        A layer with experts begins a stream of its own, as a copy of the reference.
        """
        before, after = self.states(layer), self.states(layer + 1)
        after.create()
        for start, stop in self._pieces(0, before.rows):
            x = attend(block, self._padded(before.read(start, stop)))
            after.write(start, np.asarray(x)[: stop - start])
        if after.rows > before.rows:
            first = self.plan.text
            after.write(before.rows, after.read(first, first + self.plan.probes))

    def batches(
        self, states: HiddenStates, runs: Iterable[Run]
    ) -> Iterator[tuple[int, Float32[jax.Array, "B W H"], int, Bits]]:
        """(first row, rows padded to a full batch, how many are none, bits of their experts)."""
        for first, last, bits in runs:
            for start, stop in self._pieces(first, last):
                yield start, self._padded(states.read(start, stop)), stop - start, bits

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Successive rows that are on the device at a time."""
        for first in range(start, stop, self._batch_rows):
            yield first, min(first + self._batch_rows, stop)

    @property
    def _batch_rows(self) -> int:
        rows, window = self.tokens.shape
        return max(1, min(TOKENS_PER_BATCH // window, rows))

    def _padded(self, rows: Float32[np.ndarray, "n W H"]) -> Float32[jax.Array, "B W H"]:
        missing = self._batch_rows - len(rows)
        return jnp.asarray(np.pad(rows, ((0, missing), (0, 0), (0, 0))) if missing else rows)
