"""The MoE block of a decode layer: norm, router, experts and residual, for few tokens.

``moe_layer`` is the one entry; ``xla`` is its specification.
"""

from pallas_kernels.moe_layer.api import Norm, experts_obstacle, moe_layer

__all__ = ["Norm", "experts_obstacle", "moe_layer"]
