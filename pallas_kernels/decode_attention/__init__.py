"""One step of attention over a cache: q/k norm, rotation, cache write and softmax.

``decode_attention`` is the one entry; ``xla`` is its specification.
"""

from pallas_kernels.decode_attention.api import decode_attention
from pallas_kernels.decode_attention.shapes import DecodeConfig

__all__ = ["DecodeConfig", "decode_attention"]
