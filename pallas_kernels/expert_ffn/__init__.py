"""Mixture-of-experts feed-forward over pages, in every implementation there is.

``expert_ffn`` is the one entry; ``xla`` is its specification.
"""

from pallas_kernels.expert_ffn.api import IMPLEMENTATIONS, expert_ffn, resolve_implementation

__all__ = ["IMPLEMENTATIONS", "expert_ffn", "resolve_implementation"]
