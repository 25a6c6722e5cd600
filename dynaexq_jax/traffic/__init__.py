"""Traffic in files: hotness that outlives a run. Numpy only."""

from dynaexq_jax.traffic.model import RoutedModel
from dynaexq_jax.traffic.profile import read_profile, write_profile

__all__ = ["RoutedModel", "read_profile", "write_profile"]
