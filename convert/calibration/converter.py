"""Converts layers one after another, each quantized for the text that reaches it."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from convert.calibration import experts as sums
from convert.calibration.benefit import LayerErrors, benefit_of
from convert.calibration.block import Block, Head, attend, divergence
from convert.calibration.hessians import shrunk_to_mean
from convert.calibration.rows import RowPlan, Run
from convert.calibration.states import HiddenStates
from convert.calibration.super_experts import find_super_experts
from convert.calibration.text import CalibrationText
from convert.dense import dense_arrays
from convert.encode import encode_matrix, interleaved
from convert.expert_units import ExpertUnits
from convert.layers import Advance, Knowledge, Record, read_expert, save_units
from convert.quantize import Quantized
from convert.workdir import reporting_write_errors
from dynaexq_jax.checkpoint.units import Arrays, dense_unit
from dynaexq_jax.hf import HfDirectory
from dynaexq_jax.models.names import EMBEDDING, dense_shapes_of_layer, dense_shapes_outer
from pallas_kernels.levels import LEVEL_BITS, level_of_bits
from pallas_kernels.pages import ExpertFormat, Matrices

TOKENS_PER_BATCH: Final = 8192
"""Of hidden states on the device at a time."""
BATCH_BYTES: Final = 2**29
"""Weights and Hessians of the experts that are quantized at a time."""


class HessianQuantizer(Protocol):
    """Quantizes matrices of several experts for the inputs they get; it must be deterministic."""

    def describe(self) -> dict[str, Any]:
        """Name and settings as plain JSON data, for the checkpoint's header."""

    def __call__(
        self,
        weights: Float32[jax.Array, "E N K"],
        hessians: Float32[jax.Array, "E K K"],
        fmt: ExpertFormat,
    ) -> Quantized:
        """Codes uint8 [E, N, K] and scales float32 [E, G, N], as their encoding rounds them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibratedConverter:
    """Carries the hidden states of the text through the layers that it has quantized.

    They lie in ``folder``, one file for what goes into each layer; a layer's is removed when the
    layer is finished. So a killed run goes on where it was.
    """

    source: HfDirectory
    fmt: ExpertFormat
    quantizer: HessianQuantizer
    dense_bits: int
    output: Path
    text: CalibrationText
    folder: Path

    def describe_quantizer(self) -> dict[str, Any]:
        """The quantizer, and the text that it was calibrated with."""
        return {**self.quantizer.describe(), "calibration": self.text.describe()}

    def todo(self, unfinished: list[int]) -> list[int]:
        """From the first unfinished layer on; from the start, if what goes into it is gone."""
        layers = self.source.config.num_hidden_layers
        first = min(unfinished, default=layers)
        if not self._states(first).is_whole():
            first = 0
        return list(range(first, layers))

    def extra_bytes(self) -> int:
        """Of the two largest files of hidden states."""
        layers = self.source.config.num_hidden_layers
        return self._states(layers - 1).nbytes + self._states(layers).nbytes

    def convert(self, layer: int, advance: Advance) -> Record:
        """As ``convert.layers.Converter`` says; both matrices of an expert before it counts."""
        config = self.source.config
        names = dense_shapes_of_layer(config, layer)
        dense = dense_arrays(self.source, names, self.dense_bits)
        block = Block.load(config, layer, dense)
        units: dict[str, Arrays] = {dense_unit(layer): dense}
        record: Record = {"errors": None}
        with reporting_write_errors(self.folder):
            if layer == 0:
                self._embed()
            self._attend(layer, block)
            if config.is_sparse(layer):
                experts, record["calibration"] = self._experts(layer, block, advance)
                units |= experts.units(layer)
                record["errors"] = experts.errors()
            self._states(layer + 1).sync()
        return {"units": save_units(self.output, units), **record}

    def finished(self, layer: int) -> None:
        """What went into the layer is not needed any more."""
        self._states(layer).remove()

    def knowledge(self, records: list[Record]) -> Knowledge:
        """Benefits and super experts."""
        found = [record["calibration"] for record in records]
        divergences = self._divergences()
        benefit = []
        for of_layer, kl in zip(found, divergences, strict=True):
            errors = LayerErrors(
                np.array(of_layer["errors"]), np.array(of_layer["mass"]), of_layer["tokens"]
            )
            benefit.append([[float(f"{b:.6g}") for b in step] for step in benefit_of(errors, kl)])
        layers = self.source.config.sparse_layers
        largest = np.array([of_layer["largest"] for of_layer in found])
        pinned = [(layers[row], expert) for row, expert in find_super_experts(largest)]
        return Knowledge(benefit=benefit, pinned=pinned)

    @property
    def _plan(self) -> RowPlan:
        return RowPlan(text=len(self.text.tokens))

    def _index(self, layer: int) -> int:
        """Layers with experts before this one."""
        return sum(map(self.source.config.is_sparse, range(layer)))

    def _states(self, layer: int) -> HiddenStates:
        """What goes into a layer; after the last, what comes out of it."""
        return HiddenStates(
            self.folder / f"layer_{layer:03d}",
            rows=self._plan.rows(self._index(layer)),
            window=self.text.tokens.shape[1],
            hidden=self.source.config.hidden_size,
        )

    def _embed(self) -> None:
        """Writes what goes into the first layer."""
        self.folder.mkdir(exist_ok=True)
        plan, states = self._plan, self._states(0)
        embedding = self.source.tensor(EMBEDDING)
        states.create()
        tokens = np.concatenate([self.text.tokens, self.text.tokens[: plan.probes]])
        for start, stop, _ in self._batches([Run(0, len(tokens), LEVEL_BITS[0])]):
            states.write(start, embedding[tokens[start:stop]].astype(np.float32))
        states.sync()

    def _batches(self, runs: Iterable[Run]) -> Iterator[Run]:
        """Runs, cut into what is on the device at a time."""
        rows = self._batch_rows
        for start, stop, bits in runs:
            for first in range(start, stop, rows):
                yield Run(first, min(first + rows, stop), bits)

    @property
    def _batch_rows(self) -> int:
        return max(1, TOKENS_PER_BATCH // self.text.tokens.shape[1])

    def _read(self, states: HiddenStates, run: Run) -> tuple[jax.Array, jax.Array]:
        """A batch, padded to its full size with zeros, and how many rows are none."""
        rows = states.read(run.start, run.stop)
        padding = ((0, self._batch_rows - len(rows)), (0, 0), (0, 0))
        return jnp.asarray(np.pad(rows, padding)), jnp.int32(len(rows))

    def _attend(self, layer: int, block: Block) -> None:
        """Begins the states after the layer with what they are before its experts."""
        before, after = self._states(layer), self._states(layer + 1)
        after.create()
        for run in self._batches([Run(0, before.rows, LEVEL_BITS[0])]):
            x, count = self._read(before, run)
            after.write(run.start, np.asarray(attend(block, x))[: int(count)])
        if after.rows > before.rows:  # a stream of its own begins as the reference
            plan = self._plan
            reference = after.read(plan.text, plan.text + plan.probes)
            after.write(before.rows, reference)

    def _experts(
        self, layer: int, block: Block, advance: Advance
    ) -> tuple[ExpertUnits, dict[str, Any]]:
        """Quantizes the experts of a layer and carries all rows through them."""
        config, plan, states = self.source.config, self._plan, self._states(layer + 1)
        plain = [read_expert(self.source, layer, e) for e in range(config.num_experts)]
        values = sums.values_of_levels(self.fmt.table)
        group, index = self.fmt.group_size, self._index(layer)
        units = ExpertUnits(self.fmt, config.num_experts)

        inputs = sums.InputSums.zeros(config.num_experts, config.hidden_size)
        for run in self._batches(plan.text_runs()):
            inputs = sums.add_inputs(block, *self._read(states, run), inputs)
        squared = inputs.squared
        hessians = shrunk_to_mean(inputs.hessian, squared)
        del inputs
        gate_up = self._quantize("gate_up", plain, hessians, units, lambda: None)

        width = config.moe_intermediate_size
        hessians = jnp.zeros((config.num_experts, width, width))
        for run in self._batches(plan.text_runs()):
            of_level = values[level_of_bits(run.bits)]
            x, count = self._read(states, run)
            hessians = sums.add_activations(block, x, count, gate_up, of_level, group, hessians)
        hessians = shrunk_to_mean(hessians, squared)
        down = self._quantize("down", plain, hessians, units, advance)
        del hessians
        experts = Matrices(gate_up, down)

        errors = self._errors(states, block, plain, experts, values)
        largest = jnp.zeros(config.num_experts)
        for run in self._batches(plan.all_runs(index)):
            of_level = values[level_of_bits(run.bits)]
            x, count = self._read(states, run)
            y, largest = sums.run_experts(block, x, count, experts, of_level, group, largest)
            states.write(run.start, np.asarray(y)[: int(count)])
        return units, {**errors, "largest": np.asarray(largest).tolist()}

    def _quantize(
        self,
        name: str,
        plain: list[Matrices],
        hessians: jax.Array,
        units: ExpertUnits,
        advance: Advance,
    ) -> sums.QuantizedMatrices:
        """Matrix ``name`` of all experts, a batch at a time; also packed into ``units``."""
        rows, columns = self.fmt.matrix_shapes[name]
        most = max(1, BATCH_BYTES // (4 * columns * (rows + columns)))
        batches = -(-len(plain) // most)
        size = -(-len(plain) // batches)
        codes, scales = [], []
        for start in range(0, len(plain), size):
            batch = [getattr(w, name).astype(np.float32) for w in plain[start : start + size]]
            quantized = self.quantizer(
                jnp.asarray(np.stack(batch)), hessians[start : start + size], self.fmt
            )
            codes.append(np.asarray(quantized.codes))
            scales.append(np.asarray(quantized.scales))
            for offset, weights in enumerate(batch):
                matrix = Quantized(codes[-1][offset], scales[-1][offset])
                if name == "gate_up":
                    weights = interleaved(weights)
                    matrix = Quantized(interleaved(matrix.codes), interleaved(matrix.scales.T).T)
                units.put(name, start + offset, encode_matrix(weights, matrix, self.fmt))
                advance()
        return sums.QuantizedMatrices(
            jnp.asarray(np.concatenate(codes)), jnp.asarray(np.concatenate(scales))
        )

    def _errors(
        self,
        states: HiddenStates,
        block: Block,
        plain: list[Matrices],
        experts: Matrices,
        values: jax.Array,
    ) -> dict[str, Any]:
        """Output errors on a share of the text, as ``LayerErrors``."""
        stacked = Matrices(*(jnp.asarray(np.stack(part)) for part in zip(*plain, strict=True)))
        total, rows = sums.ErrorSums.zeros(len(plain)), 0
        for run in self._batches(self._plan.measured_runs()):
            x, count = self._read(states, run)
            total = sums.add_errors(
                block, x, count, stacked, experts, values, self.fmt.group_size, total
            )
            rows += int(count)
        return {
            "errors": np.asarray(total.errors).tolist(),
            "mass": np.asarray(total.mass).tolist(),
            "tokens": rows * self.text.tokens.shape[1],
        }

    def _divergences(self) -> list[float]:
        """KL(reference || stream) of every layer with experts, in nats a token."""
        config, plan = self.source.config, self._plan
        states = self._states(config.num_hidden_layers)
        names = dense_shapes_outer(config)
        head = Head.load(dense_arrays(self.source, names, self.dense_bits))
        found = np.zeros(len(config.sparse_layers))
        for row in range(plan.probes):
            reference = jnp.asarray(states.read(plan.text + row, plan.text + row + 1)[0])
            for index in range(len(found)):
                start = plan.stream(index) + row
                stream = jnp.asarray(states.read(start, start + 1)[0])
                found[index] += divergence(head, reference, stream, config.rms_norm_eps)
        return (found / (plan.probes * self.text.tokens.shape[1])).tolist()
