"""Which rows a tile works on, and where they are."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.mosaic import emit


class Share(NamedTuple):
    """Of the work of a block's warpgroups."""

    warpgroup: Any
    warpgroups: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSource:
    """Row of the input for each row of a tile.

    ``divisor``: experts a token where the input is that of the tokens; None where the input has
    the order of the tiles, as what gate_up gives has.
    """

    divisor: int | None

    def twin(self, assignment: Any, tile: Any) -> tuple[jax.Array, jax.Array]:
        """(row, whether there is one) of each row of a tile: int32 and bool [M]."""
        count = assignment.shape[1]
        mine = assignment[tile, :]
        here = tile * count + lax.broadcasted_iota(jnp.int32, (count,), 0)
        row = here if self.divisor is None else mine // self.divisor
        return jnp.where(mine < 0, 0, row), mine >= 0

    def emit(self, assignment: Any, tile: Any, m: Any) -> tuple[Any, Any]:
        """(row, whether there is one), in registers; ``m`` may differ between threads."""
        count = ir.MemRefType(assignment.type).shape[1]
        here = emit.add(emit.mul(tile, count), m)
        (mine,) = emit.load_words(emit.pointer(assignment, emit.mul(here, 4)), 1)
        present = arith.cmpi(arith.CmpIPredicate.sge, mine, emit.const(0))
        row = here if self.divisor is None else arith.divui(mine, emit.const(self.divisor))
        return arith.select(present, row, emit.const(0)), present
