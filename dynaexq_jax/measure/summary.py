"""From what a run noted to figures: latencies, throughput, hit share and how fast it recovers."""

import collections
import dataclasses
from collections.abc import Iterator

import numpy as np

from dynaexq_jax.hits import AboveBase, hit_mass
from dynaexq_jax.measure.run import RunLog

RECOVERED = 0.9
"""Of a phase's final hit share."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recovery:
    """How the hit share of one phase came to what it was in the end."""

    phase: int
    start_s: float
    """When the engine was given the first of its requests."""
    final_hit_share: float
    """Mean of the last quarter of its intervals."""
    seconds: float
    """From the start to the end of the interval that is back at 90 % of it."""
    steps: int
    """Decode steps and chunks in that time."""
    intervals: int
    """Whole intervals before that one; the first is that in which the phase began."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Figures of one run.

    Times per output token are those between successive tokens of one request, None if none had two.
    """

    requests: int
    tokens: int
    seconds: float
    tokens_per_s: float
    """New tokens of all requests over the whole run."""
    ttft_p50_ms: float
    """From a request's arrival, or where it had none from when a slot was free."""
    ttft_p95_ms: float
    tpot_p50_ms: float | None
    tpot_p95_ms: float | None
    tpot_p99_ms: float | None
    hit_share: float
    """Share of the router mass that met an expert above the base."""
    recoveries: tuple[Recovery, ...]
    """Of the phases that last four intervals or more and in the end meet experts above the base."""


def summarize(log: RunLog) -> Summary:
    """Raises ValueError for a run without requests."""
    if not log.requests:
        raise ValueError("there is nothing to summarize: no request was run")
    first = [
        tokens.arrivals_s[0] - (tokens.added_s if request.arrival_s is None else request.arrival_s)
        for request, tokens in zip(log.requests, log.tokens, strict=True)
    ]
    gaps = np.concatenate([np.diff(tokens.arrivals_s) for tokens in log.tokens])
    count = sum(len(tokens.arrivals_s) for tokens in log.tokens)
    seconds = float(log.calls_s[-1])
    ttft = 1e3 * np.percentile(first, (50, 95))
    tpot = (1e3 * np.percentile(gaps, (50, 95, 99))).tolist() if gaps.size else (None,) * 3
    return Summary(
        requests=len(log.requests),
        tokens=count,
        seconds=seconds,
        tokens_per_s=count / seconds,
        ttft_p50_ms=float(ttft[0]),
        ttft_p95_ms=float(ttft[1]),
        tpot_p50_ms=tpot[0],
        tpot_p95_ms=tpot[1],
        tpot_p99_ms=tpot[2],
        hit_share=hit_share(log),
        recoveries=tuple(_recoveries(log)),
    )


def hotness(log: RunLog) -> np.ndarray:
    """Router mass a token of the whole run: float64 [L, E]."""
    mass = np.stack([interval.mass for interval in log.intervals]).sum(axis=0, dtype=np.float64)
    return mass / max(1, sum(interval.tokens for interval in log.intervals))


def hit_share(log: RunLog) -> float:
    """Share of the run's router mass that met an expert above the base."""
    hit = sum(_hits(log))
    return float(hit / sum(interval.mass.sum(dtype=np.float64) for interval in log.intervals))


def hit_shares(log: RunLog) -> np.ndarray:
    """The same by interval: float64 [I]; 0 for one without traffic."""
    mass = np.array([interval.mass.sum(dtype=np.float64) for interval in log.intervals])
    return np.array(list(_hits(log))) / np.maximum(mass, 1e-30)


def promoted(log: RunLog) -> np.ndarray:
    """Experts above the base in each layer after each change: int64 [M + 1, L]."""
    return np.stack([(at.levels > log.base_level).sum(axis=1) for at in log.levels])


def phase_starts(log: RunLog) -> list[tuple[int, float, int]]:
    """(phase, seconds, steps) of where the engine was given the first request of each phase."""
    starts: dict[int, tuple[float, int]] = {}
    for request, tokens in zip(log.requests, log.tokens, strict=True):
        starts.setdefault(request.phase, (tokens.added_s, tokens.added_step))
    return [(phase, *start) for phase, start in starts.items()]


def _hits(log: RunLog) -> Iterator[float]:
    """Router mass of each interval that met an expert above the base."""
    first, *changes = log.levels
    above = AboveBase(first.levels > log.base_level)
    later = collections.deque(changes)
    start = 0
    for interval in log.intervals:
        while later and later[0].step < interval.step:
            change = later.popleft()
            above.change(change.step - start, change.levels > log.base_level)
        yield hit_mass(interval.mass, above.end_interval(interval.step - start))
        start = interval.step


def _recoveries(log: RunLog) -> Iterator[Recovery]:
    shares = hit_shares(log)
    steps = np.array([interval.step for interval in log.intervals])
    starts = phase_starts(log)
    ends = [*(step for _, _, step in starts[1:]), log.intervals[-1].step + 1]
    for (phase, start_s, start), end in zip(starts, ends, strict=True):
        within = np.flatnonzero((steps > start) & (steps <= end))
        if within.size < 4:
            continue
        of_phase = shares[within]
        final = float(of_phase[-(within.size // 4) :].mean())
        if not final:
            continue
        # at first the requests of the phase before still run, whose experts are there
        lowest = int(of_phase[: -(within.size // 4)].argmin())
        reached = of_phase >= RECOVERED * final
        first = 0 if reached[lowest] else lowest + int(reached[lowest:].argmax())
        yield Recovery(
            phase=phase,
            start_s=start_s,
            final_hit_share=final,
            seconds=log.intervals[within[first]].time_s - start_s,
            steps=int(steps[within[first]]) - start,
            intervals=first,
        )
