"""Experts of a checkpoint as rows and columns again, straight from the definition of the format."""

from typing import NamedTuple

import numpy as np

from dynaexq_jax.checkpoint import Checkpoint
from pallas_kernels.layout import unpack_pages, untile_scales
from pallas_kernels.levels import LEVEL_BITS
from pallas_kernels.pages import Matrices
from pallas_kernels.scales import Scales, decode_scales


class StoredMatrix(NamedTuple):
    """One matrix, without padding; gate_up with gate first, as in its source."""

    codes: np.ndarray
    """uint8 [N, K]."""
    scale: np.ndarray
    """float32 [N, K]."""


class StoredExperts:
    """Reads a checkpoint's levels and scales once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._format = checkpoint.format
        self._pages = [page for bits in LEVEL_BITS for page in checkpoint.level(bits)]
        self._scales = Matrices(
            *(
                decode_scales(Scales(untile_scales(scales.codes), scales.base))
                for scales in checkpoint.scales()
            )
        )

    def expert(self, row: int, expert: int) -> Matrices:
        """``StoredMatrix`` of both matrices of an expert; ``row`` is that of axis L."""
        return Matrices(*(self._matrix(name, row, expert) for name in Matrices._fields))

    def _matrix(self, name: str, row: int, expert: int) -> StoredMatrix:
        rows, columns = self._format.matrix_shapes[name]
        pages = np.stack([getattr(page, name)[row, expert] for page in self._pages])
        codes = unpack_pages(pages, rows, columns)
        groups = getattr(self._scales, name)[row, expert].T[:rows]
        scale = np.repeat(groups, self._format.group_size, axis=1)[:, :columns]
        if name == "gate_up":  # eights of gate and up alternate
            eights = np.arange(rows).reshape(-1, 2, 8)
            order = np.concatenate([eights[:, 0].reshape(-1), eights[:, 1].reshape(-1)])
            codes, scale = codes[order], scale[order]
        return StoredMatrix(codes, scale)
