"""Arguments of the layers of a decode step, and which shapes the kernel takes."""

import dataclasses
from typing import Any, Final, NamedTuple

MOST_TOKENS: Final = 16
_HEAD: Final = 128
_GROUP: Final = 8
_TILE: Final = 16  # positions that are scored at once
_SHARE: Final = 8  # rows of a projection that are dealt out together
_MOST_ROWS: Final = 256  # of a projection and a block
_SUMS_BYTES: Final = 40 * 1024  # of attention, behind the rows of the output projection
RING_BYTES: Final = 171 * 1024
"""Of shared memory, where a block's rows of a projection lie."""


class LayerWeights(NamedTuple):
    """Dense weights of layers that all have experts, stacked; matrices are [outputs, inputs].

    R = (Nq + 2 Nkv) D: rows of the queries, then of the keys, then of the values.
    """

    attention_norm: Any
    """[L, H]"""
    qkv: Any
    """[L, R, H], like o an array or an ``Int8Matrix``"""
    q_norm: Any
    """[L, D]"""
    k_norm: Any
    """[L, D]"""
    o: Any
    """[L, H, Nq D]"""
    mlp_norm: Any
    """[L, H]"""
    router: Any
    """[L, E, H]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeShapes:
    """Sizes; hashable."""

    layers: int  # L
    tokens: int  # B
    hidden: int  # H
    context: int  # S
    q_heads: int  # Nq
    kv_heads: int  # Nkv
    head: int  # D

    @property
    def qkv_rows(self) -> int:
        """R"""
        return (self.q_heads + 2 * self.kv_heads) * self.head

    def obstacle(self, blocks: int) -> str | None:
        """Why the kernel does not take these shapes on so many multiprocessors, if so."""
        if not 1 <= self.tokens <= MOST_TOKENS:
            return f"it takes 1 to {MOST_TOKENS} tokens, not {self.tokens}"
        if self.head != _HEAD:
            return f"heads must have {_HEAD} elements, not {self.head}"
        if self.q_heads % self.kv_heads:
            return f"{self.q_heads} query heads are no multiple of {self.kv_heads} others"
        if self.q_heads > _GROUP * self.kv_heads:
            return f"at most {_GROUP} query heads a key-value head, not {self.q_heads}"
        if self.context % _TILE:
            return f"the context must be a multiple of {_TILE}, not {self.context}"
        if self.hidden % 256:
            return f"H must be a multiple of 256, not {self.hidden}"
        if self.tokens * self.kv_heads > blocks:
            return f"{self.tokens} tokens of {self.kv_heads} heads are more than {blocks} blocks"
        for name, outputs, inputs, most in (
            ("qkv", self.qkv_rows, self.hidden, RING_BYTES),
            ("o", self.hidden, self.q_heads * self.head, RING_BYTES - _SUMS_BYTES),
        ):
            rows, row_bytes = _SHARE * -(-outputs // (_SHARE * blocks)), 2 * inputs + 64
            if rows > _MOST_ROWS or rows * row_bytes > most:
                return f"{rows} rows of {row_bytes} bytes, a block's of {name}, are too many"
        return None
