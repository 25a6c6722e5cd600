"""From runs of ``quality`` to rows, tables and plots.

The gap is the increase of perplexity of all experts at the lower level over that at the higher;
a run has recovered the share of it that its own increase is below. All are macro means over the
domains, against the unquantized model on the same windows.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RESAMPLES = 1000
ENDS = {"all-low": 0.0, "all-high": 1.0}
"""Policies at the ends of the gap, and what they promote."""
STYLES = {
    "all-low": ("#6c757d", "o"),
    "all-high": ("#264653", "s"),
    "static-mixed": ("#8d6cab", "o"),
    "static-wrong": ("#f4a261", "o"),
    "oracle": ("#2a9d8f", "o"),
    "dynamic": ("#c1121f", "o"),
    "dynamic-cold": ("#e76f51", "x"),
}
HOW_TO_READ = """\
What these tables show: [quality.md](quality.md). As data: [quality.json](quality.json).

    python benchmarks/quality.py MODEL --texts TEXTS --method METHOD --out OUT
    python benchmarks/quality.py --report OUT/*.jsonl --into docs/results

Each model is scored on the first windows of each domain's `valid` text, macro mean over the
domains, against the unquantized model on the same windows. A base of 2 bits is promoted to 4, one
of 4 to 8, as many experts as "promoted" says. A cell holds the increase of perplexity / mean
KL(unquantized || model) in nats; then, in %, the share recovered of the gap of perplexity between
all experts at the base and all at the higher level (95 % interval of a bootstrap over the windows
of each domain) / the same share of the gap of KL, which has less noise: trust it where the gap
itself is small, as from 4 to 8 bits.

Scoring is prequential: a text is read in intervals of about 32 tokens (of all rows together; 8 of
each where all domains are read at once), each at the levels that the text before it has led to,
with the cache of what was read before. The routing of an interval is read while the next one runs,
and its plan holds from the one after: the lag is one to two intervals. Nothing but the page table
changes between intervals, and the kernels are those that serve.

| traffic | |
|---|---|
| one domain | a stream of each domain, each with a start of its own |
| three domains | three streams side by side, each domain with three pairs of others |
| mixed | a stream of every domain side by side, in one batch |
| shifting | one stream, in which the domain changes every 2048 tokens |

| policy | |
|---|---|
| all-low, all-high | no page, and a page for everyone: the ends of the gap |
| static-mixed | the best fixed map for the mix of all domains' `calib` text |
| static-wrong | the best fixed map for the `calib` text of another domain |
| dynamic | `dynamic`, beginning with the hotness of that mix: it starts where static-mixed stays |
| dynamic-cold | the same from no hotness, with an empty pool |
| oracle | the best fixed map for the scored text itself, known beforehand, without lag |
"""


class Increase(NamedTuple):
    """Of a run: what it lost, and how sure that is."""

    percent: float
    kl: float
    recovered: float | None
    low: float | None
    """95 % interval of ``recovered``."""
    high: float | None
    of_kl: float | None


def write_report(runs: Sequence[Path], folder: Path) -> None:
    """quality.json, quality_tables.md and plots in ``folder``, of all runs on file."""
    lines = [json.loads(text) for path in runs for text in path.read_text().splitlines()]
    folder.mkdir(parents=True, exist_ok=True)
    rows, sections = [], []
    for model, method in dict.fromkeys((line["model"], line["method"]) for line in lines):
        own = [line for line in lines if (line["model"], line["method"]) == (model, method)]
        found = _increases(own)
        rows += [_row(line, found[tuple(line["key"])]) for line in own if line["key"][1:]]
        sections.append(_section(model, method, own, found))
        _plot(folder / f"quality_{model}_{method}.png", model, method, own, found)
    (folder / "quality.json").write_text(
        "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8"
    )
    head = "# Quality by policy, traffic, pool and base\n\n"
    text = head + HOW_TO_READ + "\n" + "\n".join(sections)
    (folder / "quality_tables.md").write_text(text, encoding="utf-8")


def _increases(lines: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], Increase]:
    """By (policy, traffic, base, promoted)."""
    by_key = {tuple(line["key"]): line for line in lines}
    reference = np.array(by_key["reference",]["nll"])
    rng = np.random.default_rng(0)
    domains, windows = reference.shape
    samples = rng.integers(0, windows, (RESAMPLES, domains, windows))

    def increases(nll: np.ndarray) -> tuple[float, np.ndarray]:
        """Percent, of all windows and of each resample."""
        drawn = np.take_along_axis((nll - reference)[None], samples, axis=2).mean(axis=2)
        whole = (nll - reference).mean(axis=1)
        return 100 * np.expm1(whole).mean(), 100 * np.expm1(drawn).mean(axis=1)

    found = {}
    for key, line in by_key.items():
        if key == ("reference",):
            continue
        _, kind, base, _ = key
        percent, drawn = increases(np.array(line["nll"]))
        kl = float(np.mean(line["kl"]))
        ends = [by_key.get((name, kind, base, share)) for name, share in ENDS.items()]
        if None in ends:
            found[key] = Increase(percent, kl, None, None, None, None)
            continue
        (low, low_drawn), (high, high_drawn) = (increases(np.array(end["nll"])) for end in ends)
        kl_low, kl_high = (float(np.mean(end["kl"])) for end in ends)
        resampled = 100 * (low_drawn - drawn) / (low_drawn - high_drawn)
        found[key] = Increase(
            percent,
            kl,
            100 * (low - percent) / (low - high),
            *(float(q) for q in np.quantile(resampled, (0.025, 0.975))),
            100 * (kl_low - kl) / (kl_low - kl_high),
        )
    return found


def _row(line: Mapping[str, Any], increase: Increase) -> dict[str, Any]:
    policy, traffic, base_bits, promoted = line["key"]
    recovered = increase.recovered
    return {
        "model": line["model"],
        "method": line["method"],
        "policy": policy,
        "traffic": traffic,
        "base_bits": base_bits,
        "promoted": promoted,
        "bits_per_weight": line["bits_per_weight"],
        "perplexity_increase_percent": round(increase.percent, 4),
        "kl": round(increase.kl, 6),
        "gap_recovered_percent": None if recovered is None else round(recovered, 2),
    }


def _section(
    model: str,
    method: str,
    lines: Sequence[Mapping[str, Any]],
    found: Mapping[tuple[Any, ...], Increase],
) -> str:
    """Tables of one model."""
    shape = np.array(lines[0]["nll"]).shape
    text = [
        f"## {model}, {method}\n",
        f"{shape[0]} domains ({', '.join(lines[0]['domains'])}), {shape[1]} windows of "
        f"{lines[0]['window']} tokens of each; {lines[0]['device']}, jax {lines[0]['jax']}, "
        f"{lines[0]['date']}.\n",
        f"![KL over bits a weight](quality_{model}_{method}.png)\n",
    ]
    keys = [tuple(line["key"]) for line in lines if line["key"][1:]]
    bits = {tuple(line["key"]): line.get("bits_per_weight") for line in lines}
    for base in dict.fromkeys(key[2] for key in keys):
        text.append(f"### {base} to {2 * base} bits\n")
        for kind in dict.fromkeys(key[1] for key in keys):
            here = {key: found[key] for key in keys if key[1:3] == (kind, base)}
            if here:
                text.append(_table(kind, here, bits))
    return "\n".join(text)


def _table(
    kind: str,
    here: Mapping[tuple[Any, ...], Increase],
    bits: Mapping[tuple[Any, ...], float | None],
) -> str:
    """A line for each share that is promoted, a column for each policy."""
    ends = [
        f"{key[0]} ({bits[key]:.2f} bits) +{increase.percent:.2f} % / {increase.kl:.4f}"
        for key, increase in here.items()
        if key[0] in ENDS
    ]
    policies = [name for name in STYLES if name not in ENDS and any(k[0] == name for k in here)]
    lines = [
        f"{kind}; {', '.join(ends)}:\n",
        f"| promoted | bits a weight | {' | '.join(policies)} |",
        "|---" * (2 + len(policies)) + "|",
    ]
    for share in sorted({key[3] for key in here if key[0] not in ENDS}):
        row = {key[0]: (bits[key], here[key]) for key in here if key[3] == share}
        resident = next(resident for resident, _ in row.values())
        cells = [_cell(row[name][1]) if name in row else "" for name in policies]
        lines.append(f"| {100 * share:g} % | {resident:.2f} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(increase: Increase) -> str:
    text = f"+{increase.percent:.2f} % / {increase.kl:.4f}"
    if increase.recovered is not None:
        text += (
            f"; **{increase.recovered:.1f}** ({increase.low:.1f} to {increase.high:.1f}) / "
            f"{increase.of_kl:.1f}"
        )
    return text


def _plot(
    path: Path,
    model: str,
    method: str,
    lines: Sequence[Mapping[str, Any]],
    found: Mapping[tuple[Any, ...], Increase],
) -> None:
    """KL over resident bits a weight: a panel for each traffic."""
    keyed = {tuple(line["key"]): line for line in lines if line["key"][1:]}
    kinds = list(dict.fromkeys(key[1] for key in keyed))
    figure = Figure(figsize=(4.2 * len(kinds), 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        for policy, (colour, marker) in STYLES.items():
            points = sorted(
                (line["bits_per_weight"], found[key].kl)
                for key, line in keyed.items()
                if key[:2] == (policy, kind)
            )
            if points:
                style = "" if policy.startswith("all-") else "-"
                axes.plot(
                    *zip(*points, strict=True), style, marker=marker, markersize=4, color=colour,
                    label=policy, linewidth=1.2,
                )  # fmt: skip
        axes.set(title=kind, xlabel="resident bits a weight", yscale="log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("KL from the unquantized model, nats a token")
    panels[-1].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{model}, {method}")
    figure.savefig(path, dpi=110, format="png")
