"""Unquantized experts, to check and compare with."""

import jax.numpy as jnp
import numpy as np

from dynaexq_jax.hf.directory import HfDirectory
from pallas_kernels.pages import PlainExperts


def plain_experts(source: HfDirectory) -> PlainExperts:
    """The unquantized experts of a Hugging Face directory, on the device, in their own dtype."""
    layers = [
        [source.expert(layer, expert) for expert in range(source.config.num_experts)]
        for layer in source.config.sparse_layers
    ]
    return PlainExperts(
        *(
            jnp.asarray(np.stack([np.stack([expert[i] for expert in layer]) for layer in layers]))
            for i in range(2)
        )
    )
