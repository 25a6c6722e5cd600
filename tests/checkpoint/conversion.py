"""Conversions in tests, and what must come out of them."""

import numpy as np

from convert import convert as run_convert
from convert.dense import quantize_rows
from convert.encode import encode_expert
from convert.quantize import GridQuantizer
from dynaexq_jax.checkpoint import Checkpoint
from pallas_kernels.levels import LEVEL_BITS
from pallas_kernels.pages import Matrices

AT_8_BITS = tuple(
    f"{name}.weight"
    for name in (
        "lm_head",
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    )
)


def converted(source, output, **options):
    summary = run_convert(source, output, progress=False, **options)
    return Checkpoint.open(output), summary


def hashes(checkpoint):
    """sha256 of every array."""
    return {
        (unit, name): record.sha256
        for unit, units in checkpoint.header.units.items()
        for name, record in units.arrays.items()
    }


def assert_holds(checkpoint, source):
    """The checkpoint holds what its source means: dense arrays by its header, experts encoded."""
    wanted = source.dense()
    if checkpoint.header.dense_bits == 8:
        for name in [name for name in wanted if name.endswith(AT_8_BITS)]:
            wanted[name], wanted[f"{name}_scale"] = quantize_rows(wanted[name])
    dense = checkpoint.dense()
    assert set(dense) == set(wanted)
    for name, array in wanted.items():
        assert dense[name].dtype == array.dtype
        np.testing.assert_array_equal(dense[name], array)
    pages = [page for bits in LEVEL_BITS for page in checkpoint.level(bits)]
    scales = checkpoint.scales()
    for row, layer in enumerate(checkpoint.layers):
        for expert in range(checkpoint.experts):
            weights = Matrices(*(w.astype(np.float32) for w in source.expert(layer, expert)))
            encoded = encode_expert(weights, checkpoint.format, GridQuantizer())
            for name, matrix in encoded._asdict().items():
                found = np.stack([getattr(page, name)[row, expert] for page in pages])
                np.testing.assert_array_equal(found, matrix.pages)
                of_all = getattr(scales, name)
                np.testing.assert_array_equal(of_all.codes[row, expert], matrix.scales.codes)
                if matrix.scales.base is not None:
                    np.testing.assert_array_equal(of_all.base[row, expert], matrix.scales.base)
