"""Linear layer over stacked weights, with the norm before and the residual after, for few tokens.

``linear`` is the one entry; ``xla`` is its specification, ``weights`` says what a matrix may be.
"""

from pallas_kernels.linear.api import linear
from pallas_kernels.linear.config import LinearConfig, default_config
from pallas_kernels.linear.weights import Int8Matrix, Weight, as_stack, layer_of, product

__all__ = [
    "Int8Matrix",
    "LinearConfig",
    "Weight",
    "as_stack",
    "default_config",
    "layer_of",
    "linear",
    "product",
]
