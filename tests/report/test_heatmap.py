import io
import re

import matplotlib.image
import numpy as np
import pytest

from dynaexq_jax.report import heatmap_png, heatmap_text

LEVELS = np.array([[0, 1, 2, 0], [2, 2, 0, 1]])


def test_text_has_a_row_a_layer_a_cell_an_expert_and_a_legend():
    assert heatmap_text(LEVELS, width=80, colour=False).splitlines() == [
        "layer 0 ·▒█·",
        "layer 1 ██·▒",
        "        · 2 bits: 3   ▒ 4 bits: 2   █ 8 bits: 3   (experts)",
    ]


def test_colour_only_adds_to_the_same_characters():
    plain = heatmap_text(LEVELS, width=80, colour=False)
    coloured = heatmap_text(LEVELS, width=80, colour=True)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain


def test_colour_is_for_terminals():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert "\x1b[" in heatmap_text(LEVELS, width=80, stream=Terminal())
    assert "\x1b[" not in heatmap_text(LEVELS, width=80, stream=io.StringIO())


@pytest.mark.parametrize(
    ("experts", "width", "lengths"),
    [
        (128, 200, [128]),
        (128, 80, [64, 64]),
        (512, 300, [128] * 4),
        (60, 50, [32, 28]),
        (9, 12, [3, 3, 3]),
        (3, 5, [1, 1, 1]),
    ],
)
def test_wide_rows_are_wrapped(experts, width, lengths):
    row = (np.arange(experts) % 3)[None]
    lines = heatmap_text(row, width=width, colour=False).splitlines()[:-1]
    cells = [line[len("layer 0 ") :] for line in lines]
    assert [len(cell) for cell in cells] == lengths
    assert "".join(cells) == "".join("·▒█"[level] for level in row[0])
    assert [line[:8].strip() for line in lines] == ["layer 0"] + [""] * (len(lines) - 1)


@pytest.mark.parametrize("bad", [np.zeros(3, int), np.zeros((0, 3), int), np.full((2, 2), 3)])
def test_bad_levels_are_refused(bad, tmp_path):
    with pytest.raises(ValueError, match="levels must be a 2-D array"):
        heatmap_text(bad)
    with pytest.raises(ValueError, match="levels must be a 2-D array"):
        heatmap_png(tmp_path / "a.png", {"now": bad})


def test_png_shows_each_level_in_its_colour(tmp_path):
    path = tmp_path / "out" / "map.png"
    heatmap_png(path, {"before": np.zeros((2, 4), int), "after": LEVELS}, title="T")
    image = matplotlib.image.imread(path)
    assert image.shape[1] == 1350
    pixels = (image[:, :, :3] * 255).round().astype(int).reshape(-1, 3)
    for colour, cells in (((233, 236, 239), 11), ((42, 157, 143), 2), ((231, 111, 81), 3)):
        share = np.all(pixels == colour, axis=1).mean()
        per_cell = np.all(pixels == (233, 236, 239), axis=1).mean() / 11
        assert share == pytest.approx(cells * per_cell, rel=0.15)


def test_panels_of_different_shapes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="panels of one shape"):
        heatmap_png(tmp_path / "a.png", {"a": LEVELS, "b": LEVELS[:1]})
    with pytest.raises(ValueError, match="panels of one shape"):
        heatmap_png(tmp_path / "a.png", {})
