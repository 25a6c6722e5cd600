"""Calibrated quantizer: scales and nested codes with the least expected error of the outputs.

Of each matrix it minimises tr(D2 H D2^T) + balance * tr(D4 H D4^T), where D2 and D4 are the errors
of the weights at 2 and at 4 bits and H is the Hessian of the matrix's inputs; then, with the 4-bit
codes as they are, the residual of the 8-bit level.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from convert.joint.choices import PairChoice, ResidualChoice
from convert.joint.feedback import Feedback, damped, descent_feedback, padded, start_feedback
from convert.joint.sweep import State, better, sweep, with_errors
from convert.quantize import LARGEST_WEIGHT, Quantized, fit_scales
from pallas_kernels.pages import ExpertFormat
from pallas_kernels.scales import decode_scales, encode_scales, groups_per_row


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointQuantizer:
    """GPTQ of both levels at once, then rounds of descent over scales and codes; from several
    starts, of which every row keeps the best.

    Deterministic: the same batch gives the same codes on the same kind of device.
    """

    balance: float = 10.0
    """Weight of the 4-bit error against the 2-bit error."""
    starts: tuple[float, ...] = (1 / 3, 1.0, 3.0)
    """Balances that starts are made with, in units of ``balance``: codes that suit one level more
    or less. Rounds do not lead far from where they set out."""
    rounds: int = 2
    """Passes from each start that may change scales as well as codes."""
    damping: float = 0.05
    """Added to the diagonal of a Hessian, in units of its mean."""
    start_steps: tuple[int, ...] = (0, -16, -12, -8, -4, 4, 8, 12, 16)
    """Scales that a start tries for each group, in 1/32 octaves from the data-free one."""
    steps: tuple[int, ...] = (0, -2, -1, 1, 2)
    """Scales that a round tries, from the present one; 0 first, so that no round does harm."""

    def __post_init__(self) -> None:
        for name, least in (("balance", 0.0), ("damping", 1e-3)):
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) >= least):
                raise ValueError(
                    f"{name} must be finite and at least {least:g}, got {getattr(self, name)}"
                )
        if not self.starts or min(self.starts) < 0:
            raise ValueError(f"starts must be some balances of at least 0, got {self.starts}")
        if self.rounds < 0:
            raise ValueError(f"rounds must not be negative, got {self.rounds}")
        if self.steps[:1] != (0,):
            raise ValueError(f"steps must begin with 0, got {self.steps}")

    def describe(self) -> dict[str, Any]:
        """Name and settings as plain JSON data, for the checkpoint's header."""
        settings = dataclasses.asdict(self)
        lists = {name: list(v) for name, v in settings.items() if isinstance(v, tuple)}
        return {"name": "joint", **settings, **lists}

    def __call__(
        self,
        weights: Float32[Any, "E N K"],
        hessians: Float32[Any, "E K K"],
        fmt: ExpertFormat,
    ) -> Quantized:
        """Codes uint8 [E, N, K] and scales float32 [E, G, N], as their encoding rounds them.

        Takes numpy or jax arrays, returns numpy arrays.
        ``hessians`` are symmetric and positive semidefinite; their scale does not matter, and one
        that is zero counts as the identity. On the device it needs about 50 bytes a weight and 24
        bytes an entry of a Hessian, so the caller picks E. Raises ValueError for shapes that do not
        fit, and for values that are not finite or too large.
        """
        weights = jnp.asarray(weights, jnp.float32)
        hessians = jnp.asarray(hessians, jnp.float32)
        _check(weights, hessians)
        columns, size = weights.shape[2], fmt.group_size
        unit = _units(weights)
        scaled = weights / unit[:, None, None]
        used = -(-columns // size)
        spare = used * size - columns
        across = jnp.pad(scaled.mT, ((0, 0), (0, spare), (0, 0)))
        start, descent = _feedbacks(hessians, columns + spare, self.damping)
        pair = PairChoice(table=fmt.table, balance=self.balance)

        scales = _rounded(_data_free(scaled, fmt, self.balance)[:, :used], columns, fmt)
        state = None
        for factor in self.starts:
            found = self._start(across, start, jnp.asarray(scales[:, :used]), factor, fmt)
            for _ in range(self.rounds):
                found = sweep(found, across, descent, choice=pair, steps=self.steps)
            state = found if state is None else better(state, found, descent, choice=pair)
        assert state is not None
        scales = _rounded(np.asarray(state.scales), columns, fmt)
        state = with_errors(state.codes, jnp.asarray(scales[:, :used]), across, choice=pair)
        state = sweep(state, across, descent, choice=pair, steps=(0,))
        codes = _residual(state, across, start, fmt)
        return Quantized(
            np.asarray(codes[:, :columns].mT), scales * np.asarray(unit)[:, None, None]
        )

    def _start(
        self,
        weights: jax.Array,
        feedback: Feedback,
        scales: jax.Array,
        factor: float,
        fmt: ExpertFormat,
    ) -> State:
        choice = PairChoice(table=fmt.table, balance=factor * self.balance)
        codes = jnp.zeros(weights.shape, jnp.uint8)
        empty = State(codes, scales, jnp.zeros((2, *weights.shape), jnp.float32))
        return sweep(empty, weights, feedback, choice=choice, steps=self.start_steps, is_start=True)


@functools.partial(jax.jit, static_argnames=("columns", "damping"))
def _feedbacks(
    hessians: Float32[jax.Array, "E K K"], columns: int, damping: float
) -> tuple[Feedback, Feedback]:
    """Feedback of a start and of descent, padded to so many columns."""
    hessians = damped(hessians, damping)
    return padded(start_feedback(hessians), columns), padded(descent_feedback(hessians), columns)


def _rounded(
    scales: Float32[np.ndarray, "E U N"], columns: int, fmt: ExpertFormat
) -> Float32[np.ndarray, "E G N"]:
    """Scales as their encoding holds them, of all groups; those of the padding count as 0."""
    spare = groups_per_row(columns, fmt.group_size) - scales.shape[1]
    everywhere = np.pad(scales, ((0, 0), (0, spare), (0, 0)))
    return decode_scales(encode_scales(everywhere, fmt.scale_encoding))


def _residual(state: State, weights: jax.Array, feedback: Feedback, fmt: ExpertFormat) -> jax.Array:
    """Codes with the residual of the 8-bit level, chosen by GPTQ on the 4-bit codes."""
    choice = ResidualChoice(table=fmt.table)
    empty = State(state.codes, state.scales, jnp.zeros((1, *weights.shape), jnp.float32))
    return sweep(empty, weights, feedback, choice=choice, steps=(0,), is_start=True).codes


def _data_free(
    weights: Float32[jax.Array, "E N K"], fmt: ExpertFormat, balance: float
) -> Float32[np.ndarray, "E G N"]:
    """Scales of each group by itself, not rounded."""
    experts, rows, columns = weights.shape
    fitted = fit_scales(
        weights.reshape(experts * rows, columns), fmt.group_size, fmt.table, balance
    )
    return np.moveaxis(np.asarray(fitted).reshape(-1, experts, rows), 0, 1)


def _units(weights: Float32[jax.Array, "E N K"]) -> Float32[jax.Array, " E"]:
    """A power of two near the largest magnitude of each matrix, so that squares stay in range."""
    largest = jnp.abs(weights).max(axis=(1, 2))
    return jnp.ldexp(jnp.float32(1), jnp.frexp(jnp.where(largest > 0, largest, 1))[1])


def _check(weights: jax.Array, hessians: jax.Array) -> None:
    if weights.ndim != 3:
        raise ValueError(f"weights must be [E, N, K], got shape {weights.shape}")
    experts, _, columns = weights.shape
    if hessians.shape != (experts, columns, columns):
        raise ValueError(
            f"hessians must be [E, K, K] = {(experts, columns, columns)} for weights of shape "
            f"{weights.shape}, got {hessians.shape}"
        )
    if not jnp.all(jnp.isfinite(hessians)):
        raise ValueError("hessians must be finite")
    if not jnp.all(jnp.abs(weights) <= LARGEST_WEIGHT):
        raise ValueError(f"weights must be finite and at most {LARGEST_WEIGHT:.3g} in magnitude")
