"""The MoE block of a decode layer: norm, router, experts and residual, for few tokens.

``moe_layer`` is the one entry; ``xla`` is its specification.
"""

from pallas_kernels.moe_layer.api import MOST_EXPERTS, Norm, moe_layer

__all__ = ["MOST_EXPERTS", "Norm", "moe_layer"]
