"""The instructions of a decode step's page matmul, lane by lane on a CPU, against their twin."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from kernels import ptx, warps
from kernels.experts import random_tile
from kernels.targets import needs_mosaic

from pallas_kernels.levels import DEFAULT_TABLE

pytestmark = needs_mosaic


@pytest.mark.parametrize(
    ("bits", "side_by_side", "chunks", "group_size", "encoding", "columns"),
    [
        (2, 4, 4, 64, "bf16", 8),
        (2, 4, 2, 32, "log8", 8),
        (2, 2, 2, 128, "log8", 16),
        (2, 1, 1, 32, "log8", 8),
        (4, 2, 2, 32, "log8", 8),
        (4, 1, 1, 128, "log8", 8),
        (4, 4, 4, 32, "log8", 16),
        (4, 4, 2, 64, "bf16", 16),
        (8, 1, 1, 32, "bf16", 8),
        (8, 4, 2, 32, "log8", 8),
        (8, 2, 1, 128, "log8", 16),
        (8, 2, 2, 64, "log8", 8),
    ],
)
def test_lanes_multiply_a_step(bits, side_by_side, chunks, group_size, encoding, columns):
    """The last chunks of a run."""
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    from pallas_kernels.expert_ffn.mosaic import wgmma_step as module
    from pallas_kernels.mosaic import emit

    rng = np.random.default_rng(bits)
    run, width, log8 = side_by_side * 128, chunks * 128, encoding == "log8"
    first = side_by_side - chunks
    config = module.StepConfig(
        bits=bits,
        side_by_side=side_by_side,
        chunks=chunks,
        group_size=group_size,
        columns=columns,
        table=DEFAULT_TABLE,
        log8=log8,
    )
    pages, scales = random_tile(rng, bits=bits, columns=run, group_size=group_size, log8=log8)
    scales = scales[first * 128 // group_size :]
    x = rng.normal(size=(width // 16, columns, 16)).astype(ml_dtypes.float8_e4m3fn)
    before = rng.normal(size=(64, columns)).astype(np.float32)

    def body(x_ref, scale_ref, *refs):
        *refs, sums = refs[: len(pages)], refs[len(pages) :]
        pair = ir.VectorType.get((2,), emit.f32_type())
        registers = [vector.from_elements(pair, sums[i : i + 2]) for i in range(0, len(sums), 2)]
        layout = module.ACCUMULATORS.to_mgpu()
        y = fa.FragmentedArray(
            _registers=np.array(registers, object).reshape(layout.registers_shape((64, columns))),
            _layout=layout,
            _is_signed=None,
        )
        held = module.held_word(module.ByteTables.of(config.table), bits)
        y = module._emit(config, y, *refs, scale_ref, x_ref, emit.const(first), held)
        return [vector.extract(pair, [], [c]) for pair in y.registers.flat for c in range(2)]

    memory = warps.Memory()
    given = [x.view(np.uint8), scales, *pages]
    kinds = [warps.shared_ref(x.shape, "i8")]
    kinds += [warps.shared_ref(a.shape, f"i{8 * a.itemsize}") for a in given[1:]]
    places = ptx.places_of_sums(columns)
    arguments = [memory.place(array)[0] for array in given] + [before[place] for place in places]
    (sums,) = warps.Kernel(body, *kinds, *[warps.FLOAT] * len(places)).run(
        memory, tuple(arguments), warps=4
    )
    expected = module._twin(config, before, pages, jnp.asarray(scales), jnp.asarray(x), first)
    for value, place in zip(sums, places, strict=True):
        np.testing.assert_allclose(value, expected[place], rtol=1e-5, atol=1e-5)
