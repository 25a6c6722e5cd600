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
    """16, 32 or 64. Fewer than 64 rows fill the 64 of the tensor cores with chunks of K."""
    step: int
    """Columns of each chunk of K in one stage: 64, 128 or 256."""
    stages: int
    """Stages in flight: 2 or more."""

    def __post_init__(self) -> None:
        for name, allowed in (("rows", (16, 32, 64)), ("step", (64, 128, 256))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2, got {self.stages}")

    @property
    def chunks(self) -> int:
        """Equal parts of K that lie one below the other in the tensor cores' 64 rows."""
        return TILE_ROWS // self.rows

    def shared_bytes(self, tokens: int) -> int:
        """Of all stages: W and x, both bfloat16."""
        return self.stages * _stage_bytes(self.chunks, self.step, tokens)

    def obstacle(self, tokens: int, outputs: int, inputs: int) -> str | None:
        """What keeps the kernel from y[tokens, outputs] of x[tokens, inputs], if anything does."""
        if not 1 <= tokens <= MOST_TOKENS:
            return f"it takes 1 to {MOST_TOKENS} tokens, not {tokens}"
        if outputs % 8:
            return f"N must be a multiple of 8, not {outputs}"
        if inputs % (self.chunks * self.step):
            return f"K must be a multiple of {self.chunks * self.step} for {self}, not {inputs}"
        limit = _SHARED_BYTES - _RESERVED_BYTES
        if self.shared_bytes(tokens) > limit:
            return f"{self} takes {self.shared_bytes(tokens)} bytes of shared memory, not {limit}"
        return None


def padded_tokens(tokens: int) -> int:
    """Columns of the tensor cores that one chunk's tokens take."""
    return max(8, 1 << (tokens - 1).bit_length())


def _stage_bytes(chunks: int, step: int, tokens: int) -> int:
    return (TILE_ROWS + chunks * padded_tokens(tokens)) * step * 2


def default_config(tokens: int, outputs: int, inputs: int) -> LinearConfig:
    """What suits y[tokens, outputs] of x[tokens, inputs].

    Few rows a block give many blocks, and all processors pull at memory; but every block reads
    all of x, so many tokens want more rows. Up to two blocks share a processor.
    """
    tokens = min(tokens, MOST_TOKENS)
    if tokens <= 16:
        least, blocks = 16, 2 * _PROCESSORS
    elif tokens <= 32:
        least, blocks = 32, 2 * _PROCESSORS
    else:
        least, blocks = 32, _PROCESSORS // 2
    rows = next((r for r in (16, 32) if r >= least and outputs <= r * blocks), TILE_ROWS)
    while rows < TILE_ROWS and inputs % (TILE_ROWS // rows * LINE):
        rows *= 2
    chunks = TILE_ROWS // rows
    # 128 columns of so many tokens would not fit into the registers beside the products
    step = 128 if chunks * padded_tokens(tokens) <= 64 and inputs % (chunks * 128) == 0 else 64
    room = _SHARED_BYTES // 2 if outputs > rows * _PROCESSORS else 160 * 1024
    stage_bytes = _stage_bytes(chunks, step, tokens)
    stages = min((room - _RESERVED_BYTES) // stage_bytes, inputs // (chunks * step))
    return LinearConfig(
        rows=rows,
        step=step,
        stages=max(2, stages),
    )
