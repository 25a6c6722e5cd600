"""How the kernel of the linear layer is cut up."""

import dataclasses

MOST_TOKENS = 64
TILE_ROWS = 64
"""Rows of A that the tensor cores take at a time."""
LINE = 64
"""bfloat16 values of one 128-byte line, the unit of the swizzle."""

_PROCESSORS = 132  # of an H100
_SHARED_BYTES = 227 * 1024  # of one processor
_RESERVED_BYTES = 12 * 1024  # of a block: norm weight, y, residual, what the driver takes


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """A block owns ``rows`` rows of W and streams them in ``stages`` pieces at a time."""

    rows: int
    """16, 32, 64 or 128. Fewer than 64 fill the 64 of the tensor cores with chunks of K."""
    step: int
    """Columns of each chunk of K in one stage: 64, 128 or 256."""
    stages: int
    """Stages in flight: 2 or more."""

    def __post_init__(self) -> None:
        for name, allowed in (("rows", (16, 32, 64, 128)), ("step", (64, 128, 256))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2, got {self.stages}")

    @property
    def chunks(self) -> int:
        """Equal parts of K that lie one below the other in the tensor cores' 64 rows."""
        return max(1, TILE_ROWS // self.rows)

    def shared_bytes(self, tokens: int, weight_bytes: int) -> int:
        """Of all stages: W, ``weight_bytes`` an element, and x, bfloat16."""
        return self.stages * _stage_bytes(self.rows, self.step, tokens, weight_bytes)

    def obstacle(self, tokens: int, outputs: int, inputs: int, weight_bytes: int = 2) -> str | None:
        """What keeps the kernel from y[tokens, outputs] of x[tokens, inputs], if anything does.

        ``weight_bytes`` is 2 for bfloat16 and 1 for weights at 8 bits.
        """
        if not 1 <= tokens <= MOST_TOKENS:
            return f"it takes 1 to {MOST_TOKENS} tokens, not {tokens}"
        if outputs % 8:
            return f"N must be a multiple of 8, not {outputs}"
        if inputs % (self.chunks * self.step):
            return f"K must be a multiple of {self.chunks * self.step} for {self}, not {inputs}"
        limit = _SHARED_BYTES - _RESERVED_BYTES
        if (taken := self.shared_bytes(tokens, weight_bytes)) > limit:
            return f"{self} takes {taken} bytes of shared memory, not {limit}"
        return None


def padded_tokens(tokens: int) -> int:
    """Columns of the tensor cores that one chunk's tokens take."""
    return max(8, 1 << (tokens - 1).bit_length())


def _stage_bytes(rows: int, step: int, tokens: int, weight_bytes: int) -> int:
    height = max(rows, TILE_ROWS)
    return (height * weight_bytes + height // rows * padded_tokens(tokens) * 2) * step


def default_config(tokens: int, outputs: int, inputs: int, weight_bytes: int = 2) -> LinearConfig:
    """What suits y[tokens, outputs] of x[tokens, inputs].

    Few rows a block give many blocks, and all processors pull at memory; but every block reads
    all of x, so many tokens want more rows, and more so where a weight is a byte. Up to two blocks
    share a processor.
    """
    tokens = min(tokens, MOST_TOKENS)
    share_of_x = tokens * 2 // weight_bytes
    if share_of_x <= 16:
        least, blocks = 16, 2 * _PROCESSORS
    elif share_of_x <= 32:
        least, blocks = 32, 2 * _PROCESSORS
    else:
        least, blocks = 32, _PROCESSORS // 2
    rows = next((r for r in (16, 32) if r >= least and outputs <= r * blocks), TILE_ROWS)
    while rows < TILE_ROWS and inputs % (TILE_ROWS // rows * LINE):
        rows *= 2
    if weight_bytes == 1 and tokens > 16 and outputs > 2 * TILE_ROWS * _PROCESSORS:
        rows = 2 * TILE_ROWS
    chunks = max(1, TILE_ROWS // rows)
    # 128 columns of so many tokens would not fit into the registers beside the products
    step = 128 if chunks * padded_tokens(tokens) <= 64 and inputs % (chunks * 128) == 0 else 64
    room = _SHARED_BYTES // 2 if outputs > rows * _PROCESSORS else 160 * 1024
    stage_bytes = _stage_bytes(rows, step, tokens, weight_bytes)
    stages = min((room - _RESERVED_BYTES) // stage_bytes, inputs // (chunks * step))
    return LinearConfig(
        rows=rows,
        step=step,
        stages=max(2, stages),
    )
