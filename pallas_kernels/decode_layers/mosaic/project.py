"""Projections of a decode step by ``mma``: a block owns rows of the weights, its warps share K.

A warp takes units of 64 columns. Weights do not depend on the input: ``emit_fetch`` brings them to
shared memory while phases before run. Sums of the warps meet where the weights were.
"""

from collections.abc import Callable
from typing import Any

from pallas_kernels.decode_layers.mosaic.project_bf16 import multiply_bf16
from pallas_kernels.decode_layers.mosaic.project_int8 import multiply_int8
from pallas_kernels.decode_layers.mosaic.project_plan import ProjectPlan, Threads, Weight
from pallas_kernels.decode_layers.mosaic.project_sums import finish, places_of


def emit_project(
    plan: ProjectPlan, threads: Threads, weight: Weight, shared: Any, stage: Any,
    wait_for_tile: Callable[[Any], None], wait: Callable[[], None], x: Any, norm: Any,
    residual: Any, store: Callable[[Any, Any, Any], None],
) -> None:  # fmt: skip
    """Projects with weights that ``emit_fetch`` brings to shared memory, a pointer.

    stage: pointer to ``plan.stage_bytes`` more of shared memory. x, norm, residual: pointers to
    bfloat16 [T, K], [K] and [T, N], the last two or None. x is there after ``wait``, and the stage
    is free then.
    """
    places = places_of(plan, threads, weight, residual)
    given = x, norm, wait_for_tile, wait
    if plan.bits == 8:
        sums, squares = multiply_int8(plan, threads, shared, stage, *given)
    else:
        sums, squares = multiply_bf16(plan, threads, shared, *given)
    finish(plan, threads, sums, squares, places, shared, store)
