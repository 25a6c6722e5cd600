"""Runs traffic through an engine and notes what happened, with as little work a step as can be."""

import dataclasses
import gc
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dynaexq_jax.controller import Controller
from dynaexq_jax.engine.engine import Engine
from dynaexq_jax.errors import InputError
from dynaexq_jax.measure.requests import Request
from dynaexq_jax.router_stats import RouterStats

IDLE_S = 0.002
"""Between two looks at pages on their way while no request is there."""


class Levels(NamedTuple):
    """Levels of the experts from a step on."""

    step: int
    """Steps that had been dispatched before."""
    time_s: float
    levels: np.ndarray
    """int32 [L, E]"""


class Interval(NamedTuple):
    """Routing of the steps since the interval before."""

    step: int
    """Steps that had been dispatched at its end."""
    time_s: float
    """When it ended."""
    mass: np.ndarray
    """float32 [L, E]: router mass."""
    tokens: int


class Tokens(NamedTuple):
    """What one request saw."""

    added_s: float
    """When the engine was given it: when it arrived, or when a slot was free."""
    added_step: int
    arrivals_s: tuple[float, ...]
    """Of its tokens, where ``Engine.step`` returned them."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RunLog:
    """Everything that was noted. Times in seconds since the start, steps counted from it.

    A step is a decode step or a prompt's chunk, as in ``Engine.steps``; a call of ``Engine.step``
    dispatches up to one of each.
    """

    requests: tuple[Request, ...]
    tokens: tuple[Tokens, ...]
    """By request."""
    calls_s: np.ndarray
    """float64 [C]: when each call of ``Engine.step`` returned."""
    steps_s: np.ndarray
    """float64 [C]: how long each was, since the one before had returned or a request had come."""
    commits: np.ndarray
    """int64 [M]: calls that committed pages or demoted experts, ascending."""
    levels: tuple[Levels, ...]
    """At the start and whenever they changed."""
    intervals: tuple[Interval, ...]
    base_level: int
    moved: dict[str, int]
    """What the counters of migration have gained."""


def run_traffic(engine: Engine, requests: Sequence[Request]) -> RunLog:
    """Runs all requests, which are in order of arrival, to their end.

    The engine must be idle and have a controller, which is left as the traffic has made it. What
    stays of earlier traffic's statistics is dropped.
    """
    controller = controller_of(engine)
    if engine.busy:
        raise RuntimeError("the engine is busy with other sequences")
    engine.take_stats()
    taken: list[tuple[int, float, RouterStats]] = []
    counters, first_step = controller.counters, engine.steps
    before = dataclasses.asdict(counters)
    levels = [Levels(0, 0.0, controller.levels())]
    moving: list[int] = []
    calls: list[float] = []
    lengths: list[float] = []
    added: list[tuple[float, int]] = []
    arrivals: list[list[float]] = [[] for _ in requests]
    index: dict[int, int] = {}
    slots, free, count = engine.config.batch, engine.config.batch, len(requests)
    gc.collect()
    clock = time.perf_counter
    start = clock()
    controller.on_stats = lambda stats: taken.append((engine.steps, clock() - start, stats))

    def note_levels() -> None:
        levels.append(Levels(engine.steps - first_step, clock() - start, controller.levels()))
        moving.append(len(calls))

    controller.on_levels = note_levels
    now = 0.0
    try:
        while len(added) < count or free < slots:
            while free and len(added) < count:
                request = requests[len(added)]
                if request.arrival_s is not None and request.arrival_s > now:
                    break
                number = engine.add(request.prompt, max_tokens=request.max_tokens)
                index[number] = len(added)
                added.append((now, engine.steps - first_step))
                free -= 1
            if free == slots:  # nothing to do until the next one arrives but to let pages land
                engine.step()
                wait_s = (requests[len(added)].arrival_s or 0.0) - (clock() - start)
                time.sleep(min(max(wait_s, 0.0), IDLE_S))
                now = clock() - start
                continue
            events = engine.step()
            last, now = now, clock() - start
            calls.append(now)
            lengths.append(now - last)
            for event in events:
                arrivals[index[event.sequence]].append(now)
                free += event.last
    finally:
        controller.on_stats = lambda stats: None
        controller.on_levels = lambda: None
    taken.append((engine.steps, now, engine.take_stats()))
    return RunLog(
        requests=tuple(requests),
        tokens=tuple(Tokens(*a, tuple(b)) for a, b in zip(added, arrivals, strict=True)),
        calls_s=np.array(calls),
        steps_s=np.array(lengths),
        commits=np.unique(np.array([call for call in moving if call < len(calls)], np.int64)),
        levels=tuple(levels),
        intervals=tuple(
            Interval(step - first_step, at, np.asarray(stats.mass), int(stats.tokens))
            for step, at, stats in taken
            if int(stats.tokens)
        ),
        base_level=controller.base_level,
        moved={name: value - before[name] for name, value in vars(counters).items()},
    )


def controller_of(engine: Engine) -> Controller:
    """The engine's controller. Raises InputError if it has no pool, and so no controller."""
    if engine.controller is None:
        raise InputError(
            "there is no pool of pages whose use could be measured; give it --pages with "
            "--base-bits, or raise --hbm-budget"
        )
    return engine.controller
