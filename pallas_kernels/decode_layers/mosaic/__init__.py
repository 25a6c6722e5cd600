"""The layers of a decode step as one kernel on Hopper."""

from pallas_kernels.decode_layers.mosaic.kernel import decode_layers_kernel

__all__ = ["decode_layers_kernel"]
