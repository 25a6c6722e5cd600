"""The MoE block of a decode layer as one kernel on Hopper."""

from pallas_kernels.moe_layer.mosaic.kernel import MoeConfig, moe_layer_kernel

__all__ = ["MoeConfig", "moe_layer_kernel"]
