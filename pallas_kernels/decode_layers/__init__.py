"""All layers of a decode step as one kernel, where they suit it."""

from pallas_kernels.decode_layers.api import decode_layers, obstacle
from pallas_kernels.decode_layers.shapes import LayerWeights

__all__ = ["LayerWeights", "decode_layers", "obstacle"]
