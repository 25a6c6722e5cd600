"""Heat maps of levels by layer and expert, for the terminal and as PNG."""

import itertools
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np

from dynaexq_jax.errors import InputError
from pallas_kernels.levels import LEVEL_BITS

_GLYPHS: Final = "·▒█"
_ANSI: Final = ("\x1b[38;5;244m", "\x1b[38;5;37m", "\x1b[38;5;208m")
_ANSI_END: Final = "\x1b[0m"
_COLOURS: Final = ("#e9ecef", "#2a9d8f", "#e76f51")
_MAX_CELLS: Final = 128


def heatmap_text(
    levels: np.ndarray,
    *,
    width: int | None = None,
    colour: bool | None = None,
    stream: TextIO | None = None,
) -> str:
    """A heat map of levels int [L, E] for the terminal, without a newline at the end.

    One character an expert and one row a layer, which is cut into lines of equal length where
    the terminal is narrower or there are more than 128 experts; a legend with counts below.

    ``width`` is in characters, the terminal's by default; ``colour`` adds ANSI colours, by default
    if ``stream`` (stdout by default) is a terminal. Raises ValueError for levels that are not a
    2-D array of 0, 1, 2.
    """
    levels = _check(levels)
    names = [f"layer {n}" for n in range(len(levels))]
    if colour is None:
        colour = (stream or sys.stdout).isatty()
    margin = max(map(len, names)) + 1
    width = shutil.get_terminal_size().columns if width is None else width
    cells = _cells_a_line(levels.shape[1], width - margin)

    lines = []
    for name, row in zip(names, levels, strict=True):
        for start in range(0, row.size, cells):
            label = name if start == 0 else ""
            lines.append(f"{label:<{margin}}" + _paint(row[start : start + cells], colour))
    legend = "   ".join(
        f"{_paint(np.array([level]), colour)} {bits} bits: {np.count_nonzero(levels == level)}"
        for level, bits in enumerate(LEVEL_BITS)
    )
    return "\n".join([*lines, f"{'':<{margin}}{legend}   (experts)"])


def heatmap_png(
    path: Path | str,
    panels: Mapping[str, np.ndarray],
    *,
    title: str = "",
) -> None:
    """Writes one PNG with a panel for each title -> levels int [L, E], one below the other.

    All panels have the same shape. Needs matplotlib; draws without a display. Folders are made.

    Raises InputError where matplotlib is missing, ValueError for panels that do not fit together.
    """
    checked = {name: _check(levels) for name, levels in panels.items()}
    shapes = {levels.shape for levels in checked.values()}
    if len(shapes) != 1:
        raise ValueError(f"a heat map needs panels of one shape, got {sorted(shapes)}")
    ((count, experts),) = shapes
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import BoundaryNorm, ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise InputError(
            "a heat map as PNG needs matplotlib: pip install 'dynaexq-jax[plots]'"
        ) from error

    row_height = float(np.clip(3.0 / count, 0.09, 0.34))
    panel_height = count * row_height + 0.62
    figure = Figure(figsize=(9.0, len(checked) * panel_height + 1.0), layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: no global state, and no display is looked for
    norm = BoundaryNorm(np.arange(len(LEVEL_BITS) + 1) - 0.5, len(LEVEL_BITS))
    axes = figure.subplots(len(checked), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (name, levels) in zip(axes, checked.items(), strict=True):
        ax.pcolormesh(
            np.arange(experts + 1) - 0.5,
            np.arange(count + 1) - 0.5,
            levels,
            cmap=ListedColormap(_COLOURS),
            norm=norm,
            edgecolors="white",
            linewidth=0.9 if experts <= 64 else 0.4,
        )
        ax.set_title(name, loc="left", fontsize=10)
        ax.set_ylabel("layer", fontsize=9)
        _style(ax, count)
    axes[-1].set_xlabel("expert", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold")
    patches = [
        Patch(facecolor=colour, edgecolor="#adb5bd", label=f"{bits} bits")
        for colour, bits in zip(_COLOURS, LEVEL_BITS, strict=True)
    ]
    figure.legend(
        handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=9
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")


def _style(ax: Any, count: int) -> None:
    shown = np.unique(np.linspace(0, count - 1, min(count, 8)).round().astype(int))
    ax.set_yticks(shown, [str(n) for n in shown])
    ax.invert_yaxis()
    ax.tick_params(length=0, labelsize=8)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _check(levels: np.ndarray) -> np.ndarray:
    levels = np.asarray(levels)
    if levels.ndim != 2 or not levels.size or not np.isin(levels, range(len(LEVEL_BITS))).all():
        raise ValueError(
            f"levels must be a 2-D array of 0..{len(LEVEL_BITS) - 1} by layer and expert, got "
            f"shape {levels.shape}"
        )
    return levels


def _cells_a_line(experts: int, room: int) -> int:
    """Cells of a line: as few lines as fit, of about equal length, multiples of 8 if possible."""
    lines = -(-experts // max(1, min(room, _MAX_CELLS)))
    cells = -(-experts // lines)
    rounded = -(-cells // 8) * 8
    return rounded if lines > 1 and rounded <= min(room, _MAX_CELLS) else cells


def _paint(row: np.ndarray, colour: bool) -> str:
    if not colour:
        return "".join(_GLYPHS[level] for level in row)
    starts = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), row.size]
    runs = [(int(row[a]), b - a) for a, b in itertools.pairwise(starts) if a < b]
    return "".join(_ANSI[level] + _GLYPHS[level] * n + _ANSI_END for level, n in runs)
