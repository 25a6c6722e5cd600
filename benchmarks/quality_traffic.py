"""Traffic made of scored windows, and the prequential run of a policy over it.

Every window occurs once in each kind of traffic, so that what policies lose is lost on the same
tokens. Axes as in ``quality_scorer``.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from quality_scorer import Scorer

from dynaexq_jax.policy import Hotness, Policy, replay
from dynaexq_jax.residency import Residency, pages_of_levels
from pallas_kernels.levels import Bits, level_of_bits

KINDS = ("one domain", "three domains", "mixed", "shifting")
WINDOWS_BEFORE_A_SHIFT = 4
"""Of 512 tokens: the domain changes every 2048."""

Window = tuple[int, int]
"""Domain, and number of the window in it."""
Batch = tuple[Window, ...]
"""Windows read together, a slot each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretch:
    """Batches one after another, from one start of the policy."""

    batches: tuple[Batch, ...]
    tokens: int
    """Of each row that are read between two plans."""


def stretches(kind: str, domains: int, windows: int, interval: int) -> list[Stretch]:
    """The traffic of a kind.

    ``one domain`` is a stream of each domain; ``three domains`` are three streams side by side,
    every domain with three pairs of others; ``mixed`` is a stream of every domain side by side;
    ``shifting`` is one stream, in which the domain changes every few windows. ``interval`` tokens
    lie between two plans, or as few more as the rows need.
    """
    match kind:
        case "one domain":
            return [_stretch([((d, w),) for w in range(windows)], interval) for d in range(domains)]
        case "three domains":
            part = windows // 3
            return [
                _stretch(
                    [
                        tuple(
                            ((d + role * (domains // 3)) % domains, role * part + w)
                            for role in range(3)
                        )
                        for w in range(part)
                    ],
                    interval,
                )
                for d in range(domains)
            ]
        case "mixed":
            batches = [tuple((d, w) for d in range(domains)) for w in range(windows)]
            return [_stretch(batches, interval)]
        case "shifting":
            size = min(WINDOWS_BEFORE_A_SHIFT, windows)
            order = [
                ((d, first + w),)
                for first in range(0, windows, size)
                for d in range(domains)
                for w in range(min(size, windows - first))
            ]
            return [_stretch(order, interval)]
    raise ValueError(f"no traffic {kind!r}: choose one of {', '.join(KINDS)}")


def _stretch(batches: list[Batch], interval: int) -> Stretch:
    tokens = 1 << max(3, (interval // len(batches[0])).bit_length() - 1)
    return Stretch(batches=tuple(batches), tokens=tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
    """A base, a pool above it, and one step of the ladder to spend it on."""

    base_bits: Bits
    promoted: float
    """Share of all experts that the pool has pages for."""

    @property
    def base_level(self) -> int:
        """Level of experts without pages."""
        return level_of_bits(self.base_bits)

    def pages(self, experts: int) -> int:
        """Pages of the pool, for so many experts of all layers."""
        above = pages_of_levels(self.base_bits)[self.base_level + 1]
        return above * round(self.promoted * experts)

    def residency(self, shape: tuple[int, int]) -> Residency:
        """An empty page table."""
        layers, experts = shape
        return Residency(
            layers=layers,
            experts=experts,
            base_bits=self.base_bits,
            pool_pages=self.pages(layers * experts),
        )


def follow(
    scorer: Scorer, policy: Policy, pool: Pool, hotness: Hotness, traffic: list[Stretch]
) -> tuple[np.ndarray, np.ndarray]:
    """Loss and divergence of every window, float64 [D, n], while ``policy`` follows the traffic.

    Every stretch begins with ``hotness`` and an empty pool, and the plan that follows from them.
    What an interval has routed is read when the next one is under way, and the plan made from it
    holds from the one after that on: a lag of one to two intervals.
    """
    hidden: dict[Window, jax.Array] = {}
    for stretch in traffic:
        read = _read(scorer, policy, pool, hotness, stretch)
        for batch, rows in zip(stretch.batches, read, strict=True):
            hidden |= dict(zip(batch, rows, strict=True))
    domains, windows = scorer.windows.shape[:2]
    scores = [
        scorer.compare(d, jnp.concatenate([hidden[d, w] for w in range(windows)]))
        for d in range(domains)
    ]
    nll, kl = zip(*scores, strict=True)
    return np.stack(nll), np.stack(kl)


def _read(
    scorer: Scorer, policy: Policy, pool: Pool, hotness: Hotness, stretch: Stretch
) -> list[jax.Array]:
    """Hidden states [R, W, H] of every batch."""
    residency = pool.residency(scorer.shape)
    found: list[jax.Array] = []

    def traffic() -> Iterator[tuple[np.ndarray, int]]:
        scorer.take_mass()
        length = scorer.windows.shape[2] - 1
        for batch in stretch.batches:
            rows = np.stack([scorer.windows[window][:-1] for window in batch])  # [R, W]
            parts = []
            for start in range(0, length, stretch.tokens):
                scorer.set_levels(residency.levels())
                parts.append(scorer.read(rows[:, start : start + stretch.tokens], start))
                stats = scorer.engine.take_stats()
                for array in stats:
                    array.copy_to_host_async()
                if waiting:
                    mass, tokens = jax.device_get(waiting.pop())
                    yield mass, int(tokens)
                waiting.append(stats)
            found.append(jnp.concatenate(parts, axis=1))

    waiting: list = []
    benefit = scorer.checkpoint.benefit
    steps = pool.base_level + 1
    for _ in replay(
        policy,
        traffic(),
        residency=residency,
        hotness=hotness,
        benefit=benefit[:, :steps],
        max_transitions=max(residency.pool_pages, 1),
        pinned=scorer.checkpoint.pinned,
    ):
        pass
    return found


def best_map(scorer: Scorer, policy: Policy, pool: Pool) -> np.ndarray:
    """The map that a policy begins with, int [L, E]."""
    residency = pool.residency(scorer.shape)
    cold = Hotness.cold(*scorer.shape)
    next(
        replay(
            policy,
            [],
            residency=residency,
            hotness=cold,
            benefit=scorer.checkpoint.benefit[:, : pool.base_level + 1],
            max_transitions=max(residency.pool_pages, 1),
            pinned=scorer.checkpoint.pinned,
        )
    )
    return residency.levels()
