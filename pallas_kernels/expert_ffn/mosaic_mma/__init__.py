"""The expert feed-forward over pages for GPUs whose tensor cores only have ``mma``.

Compute capability 8.x and 12.x; imported only where Mosaic GPU is.
"""

from pallas_kernels.expert_ffn.mosaic_mma.ffn import MmaConfig, default_config, expert_ffn_mma

__all__ = ["MmaConfig", "default_config", "expert_ffn_mma"]
