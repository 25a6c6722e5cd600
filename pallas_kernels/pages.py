"""Packed experts: their static format and the arrays that hold them."""

import dataclasses
from typing import Any, Final, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import PAGES, ROW_TILE, page_shape, row_tiles
from pallas_kernels.levels import LEVEL_BITS, PAGES_OF_BITS, Bits, LevelTable, level_of_bits
from pallas_kernels.scales import SCALE_ENCODINGS, ScaleEncoding, Scales, groups_per_row

GATE_UP_ROWS: Final = 8
"""Rows of gate, then of up, that alternate in the stored matrix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertFormat:
    """Everything about packed experts that is not an array; hashable, so static under jit.

    An expert is ``down @ (silu(gate @ x) * (up @ x))`` with gate and up [F, H] and down [H, F].
    Gate and up are stored as one matrix [2F, H] whose rows alternate in eights: rows 0-7 of gate,
    rows 0-7 of up, rows 8-15 of gate, and so on (``interleave_gate_up``). So the thread that holds
    a value of gate in a tensor core's accumulators holds that of up as well.
    """

    hidden: int
    width: int
    group_size: int
    scale_encoding: ScaleEncoding
    table: LevelTable

    def __post_init__(self) -> None:
        for name in ("hidden", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"expert {name} must be positive, got {getattr(self, name)}")
        if self.width % GATE_UP_ROWS:
            raise ValueError(f"expert width must be a multiple of {GATE_UP_ROWS}, got {self.width}")
        groups_per_row(self.hidden, self.group_size)
        if self.scale_encoding not in SCALE_ENCODINGS:
            raise ValueError(
                f"scale encoding must be one of {SCALE_ENCODINGS}, got {self.scale_encoding!r}"
            )

    @property
    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """(N, K) of the two matrices of an expert."""
        return {"gate_up": (2 * self.width, self.hidden), "down": (self.hidden, self.width)}

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one expert: two planes of both matrices."""
        return 4 * sum(int(np.prod(page_shape(*s))) for s in self.matrix_shapes.values())

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int, int]:
        """[B, G, 64] of a matrix's scales: by tile of rows, group, and row of the tile."""
        return row_tiles(rows), groups_per_row(columns, self.group_size), ROW_TILE

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of one expert."""
        codes = sum(int(np.prod(self.scale_shape(*s))) for s in self.matrix_shapes.values())
        return 2 * codes if self.scale_encoding == "bf16" else codes + 4 * len(self.matrix_shapes)


class Matrices(NamedTuple):
    """The same kind of array for both matrices of an expert; a pytree."""

    gate_up: Any
    down: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedExperts:
    """All experts of a model on the device; a pytree whose format is static.

    The level of an expert is how many rungs of the ladder it holds without a gap: the pages of
    the base, then those that the table gives it.
    """

    format: ExpertFormat = dataclasses.field(metadata={"static": True})
    base: tuple[Matrices, ...]
    """One entry a base page, each uint32 [L, E, B, 2C, 256]."""
    scales: Matrices
    """``Scales`` of [L, E, B, G, 64]."""
    pool: Matrices
    """uint32 [P, B, 2C, 256]: pages above the base, of any expert of any layer."""
    table: jax.Array
    """int32 [R, L, E]: pool page of each rung above the base, or -1."""

    @property
    def layers(self) -> int:
        """Layers that hold experts."""
        return self.table.shape[1]

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return self.table.shape[2]

    @property
    def hidden(self) -> int:
        """Inputs and outputs of an expert."""
        return self.format.hidden

    @property
    def pool_pages(self) -> int:
        """Pages of the pool; without any, every expert is at the base."""
        return self.pool.gate_up.shape[0]

    @property
    def base_bits(self) -> Bits:
        """Precision of the base."""
        return next(bits for bits in LEVEL_BITS if PAGES_OF_BITS[bits] == len(self.base))


class PlainExperts(NamedTuple):
    """All experts of a model unquantized, to check and compare with; a pytree."""

    gate_up: jax.Array
    """[L, E, 2F, H]."""
    down: jax.Array
    """[L, E, H, F]."""

    @property
    def layers(self) -> int:
        """Layers that hold experts."""
        return self.gate_up.shape[0]

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return self.gate_up.shape[1]

    @property
    def hidden(self) -> int:
        """Inputs and outputs of an expert."""
        return self.gate_up.shape[3]


def interleave_gate_up(gate: Any, up: Any) -> Any:
    """Gate and up [*S, F, ...] as the stored matrix [*S, 2F, ...]; numpy or jax, F on axis -2."""
    xp = jnp if isinstance(gate, jax.Array) else np
    *stack, width, columns = gate.shape
    eights = (*stack, width // GATE_UP_ROWS, GATE_UP_ROWS, columns)
    pairs = xp.stack([gate.reshape(eights), up.reshape(eights)], axis=-3)
    return pairs.reshape(*stack, 2 * width, columns)


def base_pages(base_bits: Bits) -> int:
    """Pages of each expert that are always resident."""
    level_of_bits(base_bits)
    return PAGES_OF_BITS[base_bits]


def table_rungs(base_bits: Bits) -> int:
    """Rungs of the page table: pages of the ladder above the base."""
    return PAGES - base_pages(base_bits)


def levels_of_table(table: Any, base_bits: Bits) -> Any:
    """Level of each expert from the page table: int32 [..., L, E] of 0, 1, 2 (numpy or jax).

    A level counts only when all of its pages are held.
    """
    xp = jnp if isinstance(table, jax.Array) else np
    held = xp.cumprod((table >= 0).astype(np.int32), axis=0).sum(axis=0) + base_pages(base_bits)
    level = xp.zeros_like(held)
    for bits in LEVEL_BITS[1:]:
        level = level + (held >= PAGES_OF_BITS[bits]).astype(np.int32)
    return level


def abstract_experts(
    fmt: ExpertFormat, *, layers: int, experts: int, base_bits: Bits, pool_pages: int
) -> PagedExperts:
    """Shapes and dtypes of ``PagedExperts``, nothing allocated."""

    def words(*lead: int) -> Matrices:
        return Matrices(
            *(
                jax.ShapeDtypeStruct((*lead, *page_shape(n, k)), jnp.uint32)
                for n, k in fmt.matrix_shapes.values()
            )
        )

    def scales(n: int, k: int) -> Scales:
        shape = (layers, experts, *fmt.scale_shape(n, k))
        if fmt.scale_encoding == "bf16":
            return Scales(jax.ShapeDtypeStruct(shape, jnp.bfloat16), None)
        return Scales(
            jax.ShapeDtypeStruct(shape, jnp.uint8),
            jax.ShapeDtypeStruct((layers, experts), jnp.float32),
        )

    return PagedExperts(
        format=fmt,
        base=tuple(words(layers, experts) for _ in range(base_pages(base_bits))),
        scales=Matrices(*(scales(n, k) for n, k in fmt.matrix_shapes.values())),
        pool=words(pool_pages),
        table=cast(
            jax.Array,
            jax.ShapeDtypeStruct((table_rungs(base_bits), layers, experts), jnp.int32),
        ),
    )
