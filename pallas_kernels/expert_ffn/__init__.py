"""Mixture-of-experts feed-forward over pages, in every implementation there is.

``expert_ffn`` is the one entry; ``xla`` is its specification.
"""

from pallas_kernels.expert_ffn.api import expert_ffn

__all__ = ["expert_ffn"]
