"""The encoded experts of one layer, gathered matrix by matrix until its units can be written."""

import numpy as np

from convert.encode import EncodedMatrix, Energy
from dynaexq_jax.checkpoint.units import Arrays, level_unit, scales_unit
from pallas_kernels.layout import page_shape
from pallas_kernels.levels import LEVEL_BITS, PAGES_OF_BITS
from pallas_kernels.pages import ExpertFormat
from pallas_kernels.scales import Scales


class ExpertUnits:
    """Pages and scales of all experts of a layer; experts may come from several threads."""

    def __init__(self, fmt: ExpertFormat, experts: int) -> None:
        """The pages are allocated at once."""
        shapes = {name: page_shape(*shape) for name, shape in fmt.matrix_shapes.items()}
        self._pages: dict[int, Arrays] = {
            bits: {
                name: np.empty((experts, span.stop - span.start, *shape), np.uint32)
                for name, shape in shapes.items()
            }
            for bits, span in _page_spans().items()
        }
        self._scales: dict[str, list[Scales | None]] = {name: [None] * experts for name in shapes}
        self._energy: dict[str, list[Energy | None]] = {name: [None] * experts for name in shapes}

    def put(self, name: str, expert: int, matrix: EncodedMatrix) -> None:
        """Takes matrix ``name`` ("gate_up" or "down") of an expert."""
        for bits, span in _page_spans().items():
            self._pages[bits][name][expert] = matrix.pages[span]
        self._scales[name][expert] = matrix.scales
        self._energy[name][expert] = matrix.energy

    def units(self, layer: int) -> dict[str, Arrays]:
        """Units of the layer's experts, once all are there."""
        scales = {}
        for name, of_experts in self._scales.items():
            given = [scale for scale in of_experts if scale is not None]
            assert len(given) == len(of_experts)
            scales[name] = np.stack([scale.codes for scale in given])
            if given[0].base is not None:
                scales[f"{name}_base"] = np.stack([scale.base for scale in given])
        units = {level_unit(bits, layer): arrays for bits, arrays in self._pages.items()}
        return units | {scales_unit(layer): scales}

    def errors(self) -> list[float]:
        """Relative squared error of the weights by level; always summed in the same order."""
        total = Energy(np.zeros(len(LEVEL_BITS)), 0.0)
        for pair in zip(*self._energy.values(), strict=True):
            for energy in pair:
                assert energy is not None
                total += energy
        return total.relative()


def _page_spans() -> dict[int, slice]:
    """Pages that each level adds to the one below, by bits."""
    stops = [PAGES_OF_BITS[bits] for bits in LEVEL_BITS]
    spans = map(slice, [0, *stops[:-1]], stops)
    return dict(zip(LEVEL_BITS, spans, strict=True))
