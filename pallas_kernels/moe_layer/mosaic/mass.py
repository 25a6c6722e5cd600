"""Router mass: what the tokens of a step gave each expert, added to the statistics in place."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels.moe_layer.mosaic.routed import ChoosePlan, Routed
from pallas_kernels.mosaic import emit, shuffle
from pallas_kernels.mosaic.loops import loop, when
from pallas_kernels.mosaic.target import interpreting
from pallas_kernels.mosaic.workers import BLOCK_AXIS, WARPGROUPS, Workers, warpgroup


def add_mass(plan: ChoosePlan, workers: Workers, routed: Routed, mass: Any, layer: Any) -> None:
    """Adds the weights of the tokens, summed by expert, to mass [L, E] at ``layer``.

    A warp of a block for each expert.
    """
    if interpreting():
        first = (lax.axis_index(BLOCK_AXIS) == 0) & (warpgroup() == 0)

        @pl.when(first)
        def _() -> None:
            mass[layer, :] = mass[layer, :] + _mass_twin(plan, routed)

        return
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 3, splat, splat))
    def run(ctx: Any, ids: Any, weights: Any, mass: Any, layer: Any, block: Any) -> None:
        del ctx
        for start in range(0, plan.experts, 4 * workers.blocks):
            task = emit.add(emit.mul(emit.warp(), workers.blocks), emit.scalar(block))
            expert = emit.add(task, start)
            exists = arith.cmpi(arith.CmpIPredicate.ult, expert, emit.const(plan.experts))
            branch = scf.IfOp(exists)
            with ir.InsertionPoint(branch.then_block):
                total = _emit_mass(plan, ids, weights, expert)
                place = emit.add(emit.mul(emit.scalar(layer), plan.experts), expert)
                where = emit.pointer(mass, emit.mul(place, 4))
                # the only one of the step to this place, and nobody waits for what is there
                add = partial(
                    emit.asm, "red.relaxed.gpu.global.add.f32 [$0], $1;", "l,f", [where, total],
                    effects=True,
                )  # fmt: skip
                when(arith.cmpi(arith.CmpIPredicate.eq, emit.lane(), emit.const(0)), add)
                scf.yield_([])

    @pl.when(warpgroup() == WARPGROUPS - 1)
    def _() -> None:
        run(routed.ids, routed.weights, mass, layer, jnp.int32(lax.axis_index(BLOCK_AXIS)))


def _emit_mass(plan: ChoosePlan, ids: Any, weights: Any, expert: Any) -> Any:
    zero = emit.const_f32(0.0)

    def add(number: Any, total: Any) -> list[Any]:
        at = emit.mul(number, 4)
        (chosen,) = emit.load_words(emit.pointer(ids, at), 1)
        (weight,) = emit.load_words(emit.pointer(weights, at), 1)
        counts = arith.cmpi(arith.CmpIPredicate.eq, chosen, expert)
        return [arith.addf(total, arith.select(counts, emit.as_f32(weight), zero))]

    (total,) = loop(emit.lane(), plan.tokens * plan.top_k, 32, add, [zero])
    return shuffle.sum_of_warp(total)


def _mass_twin(plan: ChoosePlan, routed: Routed) -> jax.Array:
    expert = lax.broadcasted_iota(jnp.int32, (plan.tokens, plan.top_k, plan.experts), 2)
    chosen = routed.ids[...][..., None] == expert
    return jnp.sum(jnp.where(chosen, routed.weights[...][..., None], 0.0), axis=(0, 1))
