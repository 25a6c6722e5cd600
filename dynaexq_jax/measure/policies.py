"""One engine under one policy after another, each over the same traffic from the same start."""

from collections.abc import Sequence

from dynaexq_jax.engine.engine import Engine
from dynaexq_jax.measure.report import PolicyRun
from dynaexq_jax.measure.requests import Request
from dynaexq_jax.measure.run import controller_of, run_traffic
from dynaexq_jax.policy import Policy, StaticHigh


def warm_up(engine: Engine, requests: Sequence[Request]) -> None:
    """Runs as many requests as there are slots, with pages moved before: compiles all programs."""
    controller_of(engine).restart(StaticHigh())
    run_traffic(engine, requests[: engine.config.batch])


def run_policy(engine: Engine, policy: Policy, requests: Sequence[Request]) -> PolicyRun:
    """Brings all experts back to the base, then runs all requests under ``policy``.

    What the policy moves before the first request is not counted.
    """
    controller = controller_of(engine)
    controller.restart(policy)
    log = run_traffic(engine, requests)
    controller.settle()
    return PolicyRun.of(policy.name, log)
