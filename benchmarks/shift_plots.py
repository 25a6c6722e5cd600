"""Plots of runs of several policies over the same traffic."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from dynaexq_jax.measure.report import PolicyRun
from dynaexq_jax.measure.run import RunLog
from dynaexq_jax.measure.summary import hit_shares, phase_starts, promoted
from pallas_kernels.levels import LEVEL_BITS

COLOURS = ("#6c757d", "#264653", "#8d6cab", "#e76f51", "#f4a261", "#2a9d8f", "#c1121f")
LEVEL_COLOURS = ("#e9ecef", "#2a9d8f", "#e76f51")


def write_plots(folder: Path, runs: list[PolicyRun]) -> list[Path]:
    """Hit share and step time of all runs, and the levels of the dynamic run.

    Returns the files: hit_share.png, step_time.png, levels.png (without such a run, not this one).
    """
    files = [_hit_share(folder, runs), _step_time(folder, runs)]
    return files + [_levels(folder, run) for run in runs if run.policy == "dynamic"]


def _hit_share(folder: Path, runs: list[PolicyRun]) -> Path:
    figure = _figure(9, 4.2)
    axes = figure.subplots()
    # requests that come at their time shift by the clock, those that wait for a slot by the step
    timed = runs[0].log.requests[0].arrival_s is not None
    for run, colour in zip(runs, COLOURS, strict=False):
        ends = [interval.time_s if timed else interval.step for interval in run.log.intervals]
        axes.plot(ends, 100 * hit_shares(run.log), color=colour, label=run.policy, linewidth=1.4)
        for phase, start_s, start in phase_starts(run.log):
            if phase:
                shift = start_s if timed else start
                axes.axvline(shift, color=colour, linewidth=0.7, linestyle=":")
    axes.set(
        xlabel="seconds" if timed else "decode steps and chunks of prompts",
        ylabel="hit share, %", ylim=(-2, 102),
        title="Router mass that met an expert above the base; dotted: the domain changes",
    )  # fmt: skip
    axes.legend(fontsize=8, frameon=False)
    return _save(figure, folder / "hit_share.png")


def _step_time(folder: Path, runs: list[PolicyRun]) -> Path:
    figure = _figure(9, 1.2 + 1.5 * len(runs))
    most = 1.5 * max(1e3 * float(np.percentile(run.log.steps_s, 99.5)) for run in runs)
    for axes, run, colour in zip(
        figure.subplots(len(runs), squeeze=False)[:, 0], runs, COLOURS, strict=False
    ):
        at, length, commits = run.log.calls_s, 1e3 * run.log.steps_s, run.log.commits
        axes.plot(at, length, ".", color=colour, markersize=1.5)
        axes.plot(at[commits], length[commits], ".", color="black", markersize=2.5)
        _mark_phases(axes, run.log)
        axes.set_ylim(0, most)
        p99 = run.summary.tpot_p99_ms
        of_tokens = "" if p99 is None else f": p99 of tokens {p99:.2f} ms"
        axes.set_title(run.policy + of_tokens, fontsize=9)
        axes.set_ylabel("ms", fontsize=8)
    axes.set_xlabel("seconds; black: pages were committed or experts demoted in this step")
    return _save(figure, folder / "step_time.png")


def _levels(folder: Path, run: PolicyRun) -> Path:
    log = run.log
    end = float(log.calls_s[-1])
    edges = np.array([*(at.time_s for at in log.levels), end])
    layer = log.levels[0].levels.shape[0] // 2
    figure = _figure(9, 7)
    above, below = figure.subplots(2, sharex=True)
    by_layer = promoted(log).T
    mesh = above.pcolormesh(edges, np.arange(len(by_layer) + 1) - 0.5, by_layer, cmap="viridis")
    figure.colorbar(mesh, ax=above, label="experts above the base")
    above.yaxis.get_major_locator().set_params(integer=True)
    above.set(ylabel="layer", title=f"{run.policy}: experts above the base in each layer")
    raster = np.stack([at.levels[layer] for at in log.levels]).T
    below.pcolormesh(
        edges,
        np.arange(len(raster) + 1) - 0.5,
        raster,
        cmap=ListedColormap(LEVEL_COLOURS),
        norm=BoundaryNorm(np.arange(len(LEVEL_BITS) + 1) - 0.5, len(LEVEL_BITS)),
    )
    bits = ", ".join(
        f"{name} {bits} bits"
        for name, bits in zip(("grey", "green", "orange"), LEVEL_BITS, strict=True)
    )
    below.set(xlabel="seconds", ylabel="expert", title=f"Levels of layer {layer}: {bits}")
    for axes in (above, below):
        _mark_phases(axes, log)
    return _save(figure, folder / "levels.png")


def _mark_phases(axes: Any, log: RunLog) -> None:
    for phase, start_s, _ in phase_starts(log):
        if phase:
            axes.axvline(start_s, color="black", linewidth=0.8, linestyle=":")


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: no global state, and no display is looked for
    return figure


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=130, format="png")
    return path
