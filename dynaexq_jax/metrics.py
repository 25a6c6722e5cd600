"""Metrics of an engine for Prometheus: the one place of their names and help texts.

Counters and gauges are read from those who count anyway, when somebody asks; only histograms are
kept here. Each engine has a registry of its own.

    prometheus_client.generate_latest(engine.metrics.registry)  # the text that a server exposes
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from dynaexq_jax.controller import Controller

PREFIX: Final = "dynaexq_"

# (metric, without the _total that Prometheus adds; field of who counts; help)
_Counters = Sequence[tuple[str, str, str]]
ENGINE: Final[_Counters] = (
    ("decode_steps", "decode_steps", "Decode steps dispatched, each for all slots."),
    ("prompt_chunks", "prompt_chunks", "Prompt chunks dispatched."),
    ("window_chunks", "window_chunks", "Chunks of scored windows dispatched, of one or more rows."),
    ("prompt_tokens", "prompt_tokens", "Prompt tokens dispatched."),
    ("generated_tokens", "tokens", "Tokens that sequences have gained."),
)
MIGRATION: Final[_Counters] = (
    ("promotions", "promotions", "Experts promoted: their pages are committed."),
    ("demotions", "demotions", "Experts demoted."),
    ("pages_moved", "pages", "Pages copied to the device and committed."),
    ("bytes_moved", "bytes", "Bytes of those pages."),
    ("commits", "commits", "Batches of pages committed."),
    (
        "promotions_cancelled",
        "cancelled",
        "Promotions given up before their copy began, for newer traffic.",
    ),
    ("copy_failures", "failures", "Batches of pages whose copy failed."),
)
ROUTING: Final[_Counters] = (
    ("intervals", "intervals", "Intervals whose routing the controller has read."),
    ("router_mass", "mass", "Router probability of the experts that tokens selected, all layers."),
    ("router_mass_hit", "hit_mass", "Router mass that met an expert above the base."),
)
IN_FLIGHT: Final = ("transitions_in_flight", "Promotions that are planned or under way.")
POOL_PAGES: Final = ("pool_pages", "Pages of the pool, by state: used, reserved or free.")
TIME_TO_FIRST_TOKEN: Final = (
    "time_to_first_token_seconds",
    "From queueing a prompt to its first token on the host.",
    (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
TIME_PER_OUTPUT_TOKEN: Final = (
    "time_per_output_token_seconds",
    "Mean time between the tokens of a sequence after its first, once for each sequence.",
    (0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1),
)
STEP_DISPATCH: Final = (
    "step_dispatch_seconds",
    "Time of the host for dispatching one decode step; the device is not waited for.",
    (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.2, 1),
)


@dataclasses.dataclass(kw_only=True)
class EngineCounters:
    """What an engine has dispatched and received since the start; it counts here itself."""

    decode_steps: int = 0
    prompt_chunks: int = 0
    window_chunks: int = 0
    prompt_tokens: int = 0
    tokens: int = 0


class Metrics:
    """Registry and histograms of one engine."""

    def __init__(self, counters: EngineCounters, controller: Controller | None) -> None:
        """Without a controller nothing is promoted, and there are no metrics of it."""
        self.registry = CollectorRegistry()
        self.time_to_first_token = self._histogram(*TIME_TO_FIRST_TOKEN)
        self.time_per_output_token = self._histogram(*TIME_PER_OUTPUT_TOKEN)
        self.step_dispatch = self._histogram(*STEP_DISPATCH)
        self.registry.register(_Facts(counters, controller))

    def value(self, name: str, **labels: str) -> float:
        """A sample as the text form names it: "dynaexq_decode_steps_total".

        Raises KeyError if there is none.
        """
        value = self.registry.get_sample_value(name, labels)
        if value is None:
            raise KeyError(f"no sample {name} with labels {labels}")
        return value

    def _histogram(self, name: str, help_text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(PREFIX + name, help_text, registry=self.registry, buckets=buckets)


class _Facts(Collector):
    """Reads counters and gauges where they are kept."""

    def __init__(self, counters: EngineCounters, controller: Controller | None) -> None:
        self._counters = counters
        self._controller = controller

    def collect(self) -> Iterator[Metric]:
        yield from _counters(ENGINE, self._counters)
        controller = self._controller
        if controller is None:
            return
        yield from _counters(MIGRATION, controller.counters)
        yield from _counters(ROUTING, controller.routing)
        name, help_text = IN_FLIGHT
        in_flight = controller.transitions_in_flight
        yield GaugeMetricFamily(PREFIX + name, help_text, value=in_flight)
        name, help_text = POOL_PAGES
        pages = GaugeMetricFamily(PREFIX + name, help_text, labels=("state",))
        for state, count in controller.pool_pages().items():
            pages.add_metric((state,), count)
        yield pages


def _counters(table: _Counters, source: object) -> Iterator[Metric]:
    for name, field, help_text in table:
        yield CounterMetricFamily(PREFIX + name, help_text, value=getattr(source, field))
