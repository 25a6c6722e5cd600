"""Linear layer over stacked weights, with the norm before and the residual after, for few tokens.

``linear`` is the one entry; ``xla`` is its specification.
"""

from pallas_kernels.linear.api import IMPLEMENTATIONS, linear
from pallas_kernels.linear.config import LinearConfig, default_config

__all__ = [
    "IMPLEMENTATIONS",
    "LinearConfig",
    "default_config",
    "linear",
]
