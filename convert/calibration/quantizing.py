"""Quantizes one of the two matrices of all experts of a layer, and packs it."""

from collections.abc import Callable
from typing import Any, Final, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32

from convert.calibration.experts import QuantizedMatrices
from convert.encode import encode_matrix, interleaved
from convert.expert_units import ExpertUnits
from convert.quantize import Quantized
from pallas_kernels.pages import ExpertFormat

BATCH_BYTES: Final = 2**32
"""Of device memory for the experts that are quantized at a time."""
_BYTES_A_WEIGHT: Final = 50
_BYTES_AN_ENTRY: Final = 24
"""Of a Hessian: what ``JointQuantizer`` says that it needs."""


class HessianQuantizer(Protocol):
    """Quantizes matrices of several experts for the inputs they get; it must be deterministic."""

    def describe(self) -> dict[str, Any]:
        """Name and settings as plain JSON data, for the checkpoint's header."""

    def __call__(
        self,
        weights: Float32[Any, "E N K"],
        hessians: Float32[Any, "E K K"],
        fmt: ExpertFormat,
    ) -> Quantized:
        """Codes uint8 [E, N, K] and scales float32 [E, G, N], as their encoding rounds them.

        Takes numpy or jax arrays, returns numpy arrays.
        """


def quantize_experts(
    quantizer: HessianQuantizer,
    fmt: ExpertFormat,
    name: str,
    weights: list[Float[np.ndarray, "N K"]],
    hessians: Float32[jax.Array, "E K K"],
    units: ExpertUnits,
    advance: Callable[[], Any],
) -> QuantizedMatrices:
    """Matrix ``name`` ("gate_up", gate first, or "down") of all experts, a batch at a time.

    It is also packed into ``units``; ``advance`` is called after each expert.
    """
    rows, columns = weights[0].shape
    size = experts_at_a_time(rows, columns, len(weights))
    codes, scales = [], []
    for start in range(0, len(weights), size):
        batch = np.stack(weights[start : start + size]).astype(np.float32)
        quantized = quantizer(batch, hessians[start : start + size], fmt)
        codes.append(quantized.codes)
        scales.append(quantized.scales)
        for offset, matrix in enumerate(batch):
            of_expert = Quantized(quantized.codes[offset], quantized.scales[offset])
            if name == "gate_up":
                matrix = interleaved(matrix)
                of_expert = Quantized(
                    interleaved(of_expert.codes), interleaved(of_expert.scales.T).T
                )
            units.put(name, start + offset, encode_matrix(matrix, of_expert, fmt))
            advance()
    return QuantizedMatrices(
        jnp.asarray(np.concatenate(codes)), jnp.asarray(np.concatenate(scales))
    )


def experts_at_a_time(rows: int, columns: int, experts: int) -> int:
    """Experts of a batch: all batches are of one size, but for the last."""
    of_expert = columns * (_BYTES_A_WEIGHT * rows + _BYTES_AN_ENTRY * columns)
    batches = min(-(-experts * of_expert // BATCH_BYTES), experts)
    return -(-experts // batches)
