"""Linear layer over stacked weights, with the norm before and the residual after, for few tokens.

``linear`` is the one entry; ``xla`` is its specification.
"""

from pallas_kernels.linear.api import linear
from pallas_kernels.linear.config import LinearConfig, default_config

__all__ = [
    "LinearConfig",
    "default_config",
    "linear",
]
