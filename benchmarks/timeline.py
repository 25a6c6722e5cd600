"""What the GPU did when, from a trace of JAX's profiler: kernels and copies, as a picture."""

import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax

LEAST_COPY_MS = 0.02
"""Shorter copies are not of pages."""


class Event(NamedTuple):
    """One kernel or copy on the GPU. Times in milliseconds since the first."""

    name: str
    start: float
    length: float

    @property
    def end(self) -> float:
        """When it was over."""
        return self.start + self.length


class Timeline(NamedTuple):
    """Events of one run, each list by start."""

    kernels: list[Event]
    copies: list[Event]
    """From the host to the device, one at a time: so the copy engine works."""

    @property
    def page_copies(self) -> list[Event]:
        """Those of pages."""
        return [event for event in self.copies if event.length >= LEAST_COPY_MS]


class Idle(NamedTuple):
    """Milliseconds without a kernel, between the first and the last."""

    total: float
    beside_copies: float
    """While pages were copied: what a step may have waited for."""

    @classmethod
    def of(cls, timeline: Timeline) -> Self:
        """From the events of a run."""
        gaps, busy_until = [], timeline.kernels[0].start
        for kernel in timeline.kernels:
            if kernel.start > busy_until:
                gaps.append((busy_until, kernel.start))
            busy_until = max(busy_until, kernel.end)
        beside = sum(
            max(0.0, min(end, copy.end) - max(start, copy.start))
            for start, end in gaps
            for copy in timeline.page_copies
        )
        return cls(sum(end - start for start, end in gaps), beside)


def record(function: Callable[[], Any]) -> Timeline:
    """Runs ``function`` under the profiler. Without a GPU there are no events."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # to note every call of Python would slow the host down
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True, profiler_options=options):
            jax.block_until_ready(function())
        (path,) = Path(folder).rglob("perfetto_trace.json.gz")
        with gzip.open(path, "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
    return _sorted(_of_device(events))


def _of_device(events: list[dict[str, Any]]) -> list[Event]:
    """Complete events of the processes that are GPUs."""
    devices = {
        event["pid"]
        for event in events
        if event.get("name") == "process_name" and "GPU" in event["args"]["name"]
    }
    streams = {
        (event["pid"], event["tid"])
        for event in events
        if event.get("name") == "thread_name"
        and event["pid"] in devices
        and event["args"]["name"].startswith("Stream")
    }
    return [
        Event(event["name"], event["ts"] / 1e3, event.get("dur", 0) / 1e3)
        for event in events
        if event.get("ph") == "X" and (event["pid"], event["tid"]) in streams
    ]


def _sorted(events: list[Event]) -> Timeline:
    first = min((event.start for event in events), default=0.0)
    moved = sorted((e._replace(start=e.start - first) for e in events), key=lambda e: e.start)
    is_copy = [event.name.startswith("MemcpyH2D") for event in moved]
    other = [event.name.startswith(("Memcpy", "Memset")) for event in moved]
    return Timeline(
        [event for event, skip in zip(moved, other, strict=True) if not skip],
        [event for event, copy in zip(moved, is_copy, strict=True) if copy],
    )


def draw(timeline: Timeline, path: Path, title: str) -> None:
    """Two rows, kernels and copies of pages, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 2.4), layout="constrained")
    commits = [event for event in timeline.kernels if "scatter" in event.name.lower()]
    steps = [event for event in timeline.kernels if event not in commits]
    for row, (events, colour) in enumerate(
        ((timeline.page_copies, "tab:orange"), (commits, "tab:red"), (steps, "tab:blue"))
    ):
        spans = [(event.start, max(event.length, 0.01)) for event in events]
        axes.broken_barh(spans, (row - 0.4, 0.8), color=colour, linewidth=0)
    axes.set_yticks([0, 1, 2], ["copies", "commits", "steps"])
    axes.set_xlabel("ms")
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
