"""Traffic in files: hotness that outlives a run, routing that can be replayed. Numpy only."""

from dynaexq_jax.traffic.map import CalibratedMap, calibrated_map, read_map, write_map
from dynaexq_jax.traffic.model import RoutedModel
from dynaexq_jax.traffic.profile import read_profile, write_profile
from dynaexq_jax.traffic.simulation import Ladder, Simulation, simulate
from dynaexq_jax.traffic.trace import Trace, TraceHeader, TraceWriter, check_new_trace

__all__ = [
    "CalibratedMap",
    "Ladder",
    "RoutedModel",
    "Simulation",
    "Trace",
    "TraceHeader",
    "TraceWriter",
    "calibrated_map",
    "check_new_trace",
    "read_map",
    "read_profile",
    "simulate",
    "write_map",
    "write_profile",
]
