"""A policy and a migration that only take notes, and statistics that arrive when a test says."""

import numpy as np

from dynaexq_jax.controller import Controller, ControllerConfig
from dynaexq_jax.migration import MigrationCounters
from dynaexq_jax.policy import Plan
from dynaexq_jax.residency import Residency
from dynaexq_jax.router_stats import RouterStats

LAYERS, EXPERTS = 2, 4


class Scripted:
    """A policy that wants what the test says."""

    name = "scripted"

    def __init__(self, waits=False):
        self.waits_for_copies = waits
        self.given = []
        self.wants = lambda given: given.levels

    def plan(self, given):
        self.given.append(given)
        return Plan.between(given.levels, self.wants(given), given.hotness)


class Notes:
    """A migration that notes what it is told; carries plans out when it is drained."""

    def __init__(self, residency):
        self.counters = MigrationCounters()
        self.calls = []
        self.levels = residency.levels()
        self._residency = residency

    def submit(self, plan):
        self.calls.append(plan)
        for change in plan.demotions:
            self._residency.demote(change.layer, change.expert, change.to_level)
            self.counters.demotions += 1
        self._planned = plan.promotions

    def advance(self, *, during_chunk=False):
        self.calls.append("advance")
        self.show()

    def publish(self):
        self.calls.append("publish")
        self.show()

    def show(self):
        if (self._residency.levels() != self.levels).any():
            self.levels = self._residency.levels()

    def drain(self):
        self.calls.append("drain")
        for c in self._planned:
            self._residency.commit(self._residency.reserve(c.layer, c.expert, c.to_level))
            self.counters.promotions += 1
        self._planned = ()
        self.show()


class OnItsWay:
    """Stands for an array on the device whose copy arrives when the test says."""

    def __init__(self, value):
        self.value = np.asarray(value)
        self.arrived = False
        self.copied = 0

    def copy_to_host_async(self):
        self.copied += 1

    def is_ready(self):
        return self.arrived

    def __array__(self, dtype=None, copy=None):
        return self.value


def stats_of(mass, tokens):
    return RouterStats(OnItsWay(np.full((LAYERS, EXPERTS), mass)), OnItsWay(np.int32(tokens)))


def arrive(stats):
    for part in stats:
        part.arrived = True


def arrived(mass, tokens):
    stats = stats_of(mass, tokens)
    arrive(stats)
    return stats


def make(*, waits=False, interval=3, hotness=None, record=None, wants=None, **config):
    policy = Scripted(waits)
    policy.wants = wants or policy.wants
    residency = Residency(layers=LAYERS, experts=EXPERTS, base_bits=2, pool_pages=6)
    migration = Notes(residency)
    controller = Controller(
        policy=policy,
        residency=residency,
        pages_of_level=residency.pages_of_level,
        migration=migration,
        benefit=np.array([1.0, 0.1]),
        pinned=((1, 2),),
        hotness=hotness,
        record=record,
        config=ControllerConfig(interval=interval, **config),
    )
    return controller, policy, migration
