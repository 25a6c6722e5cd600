"""Runs of several policies over the same traffic, side by side."""

import dataclasses
from typing import Any

import jax

from dynaexq_jax.measure.run import RunLog
from dynaexq_jax.measure.summary import Summary, hit_shares, summarize
from dynaexq_jax.report.table import text_table


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PolicyRun:
    """What one policy made of the traffic."""

    policy: str
    log: RunLog
    summary: Summary
    peak_bytes: int | None
    """Most bytes of the device that were ever in use by then; None if the backend cannot tell."""

    @classmethod
    def of(cls, policy: str, log: RunLog) -> "PolicyRun":
        """Of a run that has just ended."""
        return cls(policy=policy, log=log, summary=summarize(log), peak_bytes=peak_bytes())


def peak_bytes() -> int | None:
    """Most bytes of the device that were ever in use; None if the backend cannot tell."""
    stats = jax.devices()[0].memory_stats()
    return int(stats["peak_bytes_in_use"]) if stats and "peak_bytes_in_use" in stats else None


def runs_table(runs: list[PolicyRun]) -> str:
    """One line a policy."""
    header = [
        "policy", "tokens/s", "TTFT p50", "p95", "TPOT p50", "p95", "p99 (ms)", "pages", "MB",
        "promoted", "demoted", "hit share", "intervals to 90 %",
        "steps",
    ]  # fmt: skip
    rows = []
    for run in runs:
        summary, moved = run.summary, run.log.moved
        rows.append(
            [
                run.policy,
                f"{summary.tokens_per_s:.1f}",
                *(f"{ms:.1f}" for ms in (summary.ttft_p50_ms, summary.ttft_p95_ms)),
                *(
                    "-" if ms is None else f"{ms:.2f}"
                    for ms in (summary.tpot_p50_ms, summary.tpot_p95_ms, summary.tpot_p99_ms)
                ),
                str(moved["pages"]),
                f"{moved['bytes'] / 1e6:.1f}",
                str(moved["promotions"]),
                str(moved["demotions"]),
                f"{100 * summary.hit_share:.1f} %",
                ", ".join(str(r.intervals) for r in summary.recoveries) or "-",
                ", ".join(str(r.steps) for r in summary.recoveries) or "-",
            ]
        )
    return text_table(header, rows)


def run_json(run: PolicyRun) -> dict[str, Any]:
    """One run as JSON data: figures, movements, hit share by interval."""
    return {
        "policy": run.policy,
        **dataclasses.asdict(run.summary),
        "moved": run.log.moved,
        "peak_bytes": run.peak_bytes,
        "hit_share_by_interval": [
            [round(interval.time_s, 4), round(share, 4)]
            for interval, share in zip(run.log.intervals, hit_shares(run.log).tolist(), strict=True)
        ],
    }
