"""A prompt on the device, while it is read in chunks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from dynaexq_jax.engine.sampling import SamplingArrays, SamplingParams
from dynaexq_jax.trees import abstract_array


class Prompt(NamedTuple):
    """Donated to every chunk and returned by it; a pytree.

    It is sent once, ahead of its turn. A chunk that sent its own tokens would wait for the pages
    that are on their way, because the device copies from the host in turn.
    """

    tokens: Int32[jax.Array, " P"]
    """Padded to ``padded_tokens``."""
    length: Int32[jax.Array, ""]
    read: Int32[jax.Array, ""]
    """Tokens that chunks have read so far."""
    end: Int32[jax.Array, ""]
    """Position of the last token that may be read: the slot goes idle there."""
    sampling: SamplingArrays
    """Of scalars."""

    @staticmethod
    def send(
        tokens: np.ndarray,
        *,
        padded: int,
        max_tokens: int,
        sampling: SamplingParams,
        device: jax.Device,
    ) -> "Prompt":
        """Starts to copy a prompt, int32 [N], none of which is read yet.

        ``max_tokens`` are those that may follow it.
        """
        on_host: dict[str, Any] = {
            "tokens": np.pad(tokens, (0, padded - tokens.size)),
            "length": np.int32(tokens.size),
            "read": np.int32(0),
            "end": np.int32(tokens.size + max_tokens - 2),
            "sampling": SamplingArrays.of(sampling),
        }
        return jax.device_put(Prompt(**on_host), device)

    @staticmethod
    def abstract(padded: int) -> "Prompt":
        """Shapes and dtypes, nothing allocated."""
        scalar = abstract_array((), jnp.int32)
        tokens = abstract_array((padded,), jnp.int32)
        return Prompt(tokens, scalar, scalar, scalar, SamplingArrays.abstract())


def padded_tokens(context: int, chunk: int) -> int:
    """Tokens of the chunks that the longest prompt takes."""
    return -(-context // chunk) * chunk
