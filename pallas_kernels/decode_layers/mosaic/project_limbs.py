"""The input of a projection with weights at 8 bits, as int8: two limbs of each number.

For a warp's columns of a token there is a power of two b above all its magnitudes: b / 2 is that of
the largest magnitude times 1 + 2^-7, so limbs never overflow. A number becomes

    x = b 2^-15 (256 high + low) + error,    -127 <= high <= 127,    -128 <= low <= 127

where |error| is at most 2^-15 (1 + 2^-7) of the largest magnitude, and zero for numbers above 1/127
of it, for a bfloat16 has 8 significant bits. That is little: a bfloat16 is rounded by 2^-9 of
itself; and what makes the largest magnitude stand out errs more by itself, for rounding its
weights to codes moves the result by 0.29 of a code times it, while the limbs of n other columns
move it by 2^-14 sqrt(n) times their codes as much, 5 % at n = 384 and codes of 40. A number that
is not finite makes the token's results so, or NaN.

Numbers are spread over all lanes, eight consecutive columns each, and limbs come through shared
memory to the lanes whose fragments they are.
"""

from typing import Any

from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.decode_layers.mosaic.project_plan import (
    LIMBS,
    UNIT,
    WARPS,
    ProjectPlan,
    Threads,
    Words,
    both,
)
from pallas_kernels.mosaic import emit, shuffle
from pallas_kernels.mosaic.mma import load_matrices

_CHUNK_LANES = 8  # that hold a token's columns of a unit
_LEAST = 0x0D800D80  # a pair of 2^-100: a scale must be finite
_EXPONENT = 0x7F800000
_MAGIC = 1.5 * 2**23 + 128
"""Plus an integer above -2^15 and below 2^15 - 128, this has it in its low 16 bits, plus 128."""


class Limbs:
    """The work of a lane: columns of a token, ``plan.rounds`` times eight of them.

    ``stage``: pointer to the ``plan.stage_bytes`` of shared memory for the limbs.
    """

    def __init__(self, plan: ProjectPlan, threads: Threads, stage: Any) -> None:
        self._plan = plan
        lanes = plan.lanes_of_token
        self._token = emit.shift_right(emit.lane(), lanes.bit_length() - 1)
        chunk = emit.and_(emit.lane(), lanes - 1)
        unit = emit.shift_right(chunk, 3)
        chunk = emit.and_(chunk, _CHUNK_LANES - 1)
        self._unit = emit.add(threads.warp, emit.mul(unit, WARPS))
        self._columns = emit.add(emit.mul(self._unit, 2 * UNIT), emit.mul(chunk, 16))
        of_warp = emit.move(stage, emit.mul(threads.warp, plan.stage_bytes // WARPS))
        own = emit.add(emit.mul(unit, UNIT), emit.mul(self._token, LIMBS * plan.limb_stride))
        self._target = emit.move(of_warp, emit.add(own, emit.mul(chunk, 8)))
        # columns of B are limbs of a token side by side; where there are fewer, some are the same
        column = emit.and_(emit.lane(), LIMBS * plan.tokens_at_once - 1)
        own = emit.mul(emit.shift_right(emit.lane(), 3), 16)
        own = emit.add(own, emit.mul(column, plan.limb_stride))
        self._source = arith.addi(llvm.ptrtoint(emit.i32_type(), of_warp), own)
        self._of_sums = emit.and_(threads.column, plan.tokens_at_once - 1)

    def load_norm(self, norm: Any) -> Words:
        """The norm's weight at the lane's columns, four words a round; none without a norm."""
        if norm is None:
            return []
        mine = emit.move(norm, self._columns)
        return self._load(mine, None, "stream")

    def load(self, x: Any, tile: Any) -> Words:
        """Four words of x a round; zeros where there is no such token, unit or tile.

        x: pointer to bfloat16 [T, K].
        """
        plan, wanted = self._plan, None
        token = emit.add(self._token, emit.mul(tile, plan.tokens_of_tile))
        if plan.tokens > plan.tokens_of_tile or plan.tokens < plan.tokens_at_once:
            wanted = emit.less(token, plan.tokens)
        mine = emit.move(emit.move64(x, token, 2 * plan.inputs), self._columns)
        return self._load(mine, wanted, "shared")

    def _load(self, where: Any, wanted: Any, caching: str) -> Words:
        words = []
        for number in range(self._plan.rounds):
            before = number * self._plan.units_at_once * WARPS  # units
            has = None
            if before + self._plan.units_at_once * WARPS > self._plan.units:
                has = emit.less(self._unit, self._plan.units - before)
            at = emit.move(where, before * 2 * UNIT)
            words += emit.load_if(both(has, wanted), at, 4, caching)
        return words

    def scales(self, words: Words) -> tuple[Any, Any]:
        """2^15 / b of the lane's token, and b 2^-15 of the t-th, for its sums."""
        plan = self._plan
        largest = emit.const(_LEAST)
        for word in words:
            largest = emit.larger_magnitude_pair(largest, word)
        largest = emit.larger_magnitude(*emit.bf16_pair(largest))
        above = arith.mulf(largest, emit.const_f32(1 + 2**-7))
        half = self._largest_of_token(emit.and_(emit.bits_of(above), _EXPONENT))  # b / 2
        factor = arith.subi(emit.const((2 * 127 + 14) << 23), half)
        scale = arith.mulf(emit.as_f32(half), emit.const_f32(2**-14))
        if plan.tokens_at_once > 1:
            scale = shuffle.from_lane(scale, emit.mul(self._of_sums, plan.lanes_of_token))
        return emit.as_f32(factor), scale

    def share(self, words: Words, factor: Any) -> list[Words]:
        """Fragments of B of each unit, of a tile of tokens whose words all lanes give."""
        plan = self._plan
        if plan.token_tiles > 1:  # the limbs before have been read
            emit.sync_warp()
        for number in range(plan.rounds):
            high, low = [], []
            for start in (4 * number, 4 * number + 2):
                limbs = _limbs(words[start : start + 2], factor)
                high.append(limbs[0])
                low.append(limbs[1])
            at = emit.move(self._target, number * plan.units_at_once * UNIT)
            emit.store_words(at, high)
            emit.store_words(emit.move(at, plan.limb_stride), low)
        emit.sync_warp()
        return [load_matrices(emit.add(self._source, j * UNIT)) for j in range(plan.units_of_warp)]

    def _largest_of_token(self, value: Any) -> Any:
        """Of float32 that are not negative, as words, over a token's lanes."""
        lanes = self._plan.lanes_of_token
        if lanes == 32:
            return shuffle.reduce_of_warp("max", value)
        while lanes > 1:
            lanes //= 2
            other = emit.bits_of(shuffle.shuffle_xor(emit.as_f32(value), lanes))
            value = arith.maxui(value, other)
        return value


def _limbs(words: Words, factor: Any) -> tuple[Any, Any]:
    """High and low limbs of four numbers, a byte each."""
    pairs = []
    for word in words:
        first, second = (
            emit.bits_of(emit.fma(number, factor, emit.const_f32(_MAGIC)))
            for number in emit.bf16_pair(word)
        )
        pairs.append(emit.permute_bytes(first, second, 0x5410))
    first, second = pairs
    high, low = (emit.permute_bytes(first, second, selector) for selector in (0x7531, 0x6420))
    return high, emit.xor(low, 0x80808080)
