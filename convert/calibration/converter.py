"""Converts layers one after another, each quantized for the text that reaches it."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.calibration.benefit import LayerErrors, benefit_of
from convert.calibration.block import Block, Head
from convert.calibration.experts import (
    InputSums,
    add_activations,
    add_inputs,
    run_experts,
    values_of_levels,
)
from convert.calibration.hessians import shrunk_to_mean
from convert.calibration.measure import divergences, output_errors
from convert.calibration.quantizing import HessianQuantizer, quantize_experts
from convert.calibration.super_experts import find_super_experts
from convert.calibration.text import CalibrationText
from convert.calibration.walk import Walk
from convert.dense import dense_arrays
from convert.expert_units import ExpertUnits
from convert.layers import Advance, Knowledge, Record, read_expert, save_units
from convert.workdir import reporting_write_errors
from dynaexq_jax.checkpoint.units import Arrays, dense_unit
from dynaexq_jax.hf import HfDirectory
from dynaexq_jax.models.names import EMBEDDING, dense_shapes_of_layer, dense_shapes_outer
from pallas_kernels.levels import level_of_bits
from pallas_kernels.pages import ExpertFormat, Matrices


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibratedConverter:
    """A ``convert.layers.Converter`` that carries text through the layers it has quantized.

    The hidden states lie in ``folder`` until the next layer is finished, so that a killed run goes
    on where it was.
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
        return list(range(first if self._walk.states(first).is_whole() else 0, layers))

    def extra_bytes(self) -> int:
        """Of the hidden states."""
        return self._walk.most_bytes()

    def convert(self, layer: int, advance: Advance) -> Record:
        """Both matrices of an expert are quantized before it counts."""
        config, walk = self.source.config, self._walk
        names = dense_shapes_of_layer(config, layer)
        dense = dense_arrays(self.source, names, self.dense_bits)
        block = Block.load(config, layer, dense)
        units: dict[str, Arrays] = {dense_unit(layer): dense}
        record: Record = {"errors": None}
        with reporting_write_errors(self.folder):
            if layer == 0:
                walk.begin(self.source.tensor(EMBEDDING))
            walk.attend(layer, block)
            if config.is_sparse(layer):
                experts, record["calibration"] = self._experts(layer, block, advance)
                units |= experts.units(layer)
                record["errors"] = experts.errors()
            walk.states(layer + 1).sync()
        return {"units": save_units(self.output, units), **record}

    def finished(self, layer: int) -> None:
        """What went into the layer is not needed any more."""
        self._walk.states(layer).remove()

    def knowledge(self, records: list[Record]) -> Knowledge:
        """Benefits and super experts."""
        found = [record["calibration"] for record in records]
        outer = dense_arrays(self.source, dense_shapes_outer(self.source.config), self.dense_bits)
        benefit = []
        for layer, kl in zip(found, divergences(self._walk, Head.load(outer)), strict=True):
            errors = LayerErrors(
                np.array(layer["errors"]), np.array(layer["mass"]), layer["tokens"]
            )
            benefit.append([[float(f"{b:.6g}") for b in step] for step in benefit_of(errors, kl)])
        largest = np.array([layer["largest"] for layer in found])
        layers = self.source.config.sparse_layers
        pinned = [(layers[row], expert) for row, expert in find_super_experts(largest)]
        return Knowledge(benefit=benefit, pinned=pinned)

    @property
    def _walk(self) -> Walk:
        return Walk(config=self.source.config, tokens=self.text.tokens, folder=self.folder)

    def _experts(
        self, layer: int, block: Block, advance: Advance
    ) -> tuple[ExpertUnits, dict[str, Any]]:
        """Quantizes the experts of a layer, then carries all rows through them.

        Hessians of down are those of the activations that the quantized gate_up gives.
        """
        count, width = self.source.config.num_experts, self.source.config.moe_intermediate_size
        walk, group = self._walk, self.fmt.group_size
        plan, states = walk.plan, walk.states(layer + 1)
        values = values_of_levels(self.fmt.table)
        experts = (read_expert(self.source, layer, expert) for expert in range(count))
        plain = Matrices(*map(list, zip(*experts, strict=True)))
        job, units = (self.quantizer, self.fmt), ExpertUnits(self.fmt, count)

        inputs = InputSums.zeros(count, self.fmt.hidden)
        for _, x, rows, _ in walk.batches(states, plan.text_runs()):
            inputs = add_inputs(block, x, rows, inputs)
        squared = inputs.squared
        hessians = shrunk_to_mean(inputs.hessian, squared)
        del inputs
        gate_up = quantize_experts(*job, "gate_up", plain.gate_up, hessians, units, lambda: None)

        hessians = jnp.zeros((count, width, width))
        for _, x, rows, bits in walk.batches(states, plan.text_runs()):
            of_level = values[level_of_bits(bits)]
            hessians = add_activations(block, x, rows, gate_up, of_level, group, hessians)
        hessians = shrunk_to_mean(hessians, squared)
        down = quantize_experts(*job, "down", plain.down, hessians, units, advance)
        del hessians

        quantized = Matrices(gate_up, down)
        errors = output_errors(walk, layer, block, plain, quantized, values, group)
        largest = jnp.zeros(count)
        for start, x, rows, bits in walk.batches(states, plan.all_runs(walk.index(layer))):
            of_level = values[level_of_bits(bits)]
            y, largest = run_experts(block, x, rows, quantized, of_level, group, largest)
            states.write(start, np.asarray(y)[:rows])
        return units, {**errors, "largest": np.asarray(largest).tolist()}
