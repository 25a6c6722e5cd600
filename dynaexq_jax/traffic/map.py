"""Calibrated maps: the best fixed levels for the traffic of given texts, as a JSON file."""

import dataclasses
import json
from pathlib import Path
from typing import Final

import numpy as np

from dynaexq_jax.json_file import read_json_object
from dynaexq_jax.output_file import write_whole
from dynaexq_jax.policy import PolicyInput, StaticMixed
from dynaexq_jax.policy.value import map_value, value_bound
from dynaexq_jax.traffic.file_kind import FileKind, read_hotness
from dynaexq_jax.traffic.model import RoutedModel
from dynaexq_jax.traffic.simulation import Ladder

KIND: Final = FileKind(name="map", version=1, remedy="make it again with: dynaexq calibrate-map")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CalibratedMap:
    """A map, the hotness it was chosen for, and how good it is."""

    model: RoutedModel
    ladder: Ladder
    tokens: int
    """Of the texts."""
    hotness: np.ndarray
    """float64 [L, E]: router mass a token."""
    levels: np.ndarray
    """int [L, E]: what ``static-mixed`` holds with the pages of the ladder."""
    value: float
    """Hotness x benefit of all steps above the base that it holds."""
    bound: float
    """What no map of as many pages exceeds: the relaxation to parts of steps."""

    @property
    def gap(self) -> float:
        """Share of the bound that the map may miss at most."""
        # the two sums are rounded differently where they are one
        return max(self.bound - self.value, 0.0) / self.bound if self.bound else 0.0


def calibrated_map(
    model: RoutedModel,
    ladder: Ladder,
    hotness: np.ndarray,
    *,
    tokens: int,
    benefit: np.ndarray,
    pinned: tuple[tuple[int, int], ...] = (),
) -> CalibratedMap:
    """The map that ``static-mixed`` holds for ``hotness`` [L, E]."""
    pages_of_level = ladder.pages_of_level
    base = np.full(hotness.shape, sum(pages == 0 for pages in pages_of_level) - 1, np.int32)
    given = PolicyInput(
        hotness=hotness,
        levels=base,
        age=np.zeros_like(base),
        pool_pages=ladder.pool_pages,
        pages_of_level=pages_of_level,
        benefit=benefit[:, : len(pages_of_level) - 1],
        pinned=pinned,
        max_transitions=max(ladder.pool_pages, 1),
    )
    levels = StaticMixed(hotness=hotness).plan(given).wanted
    return CalibratedMap(
        model=model,
        ladder=ladder,
        tokens=tokens,
        hotness=hotness,
        levels=levels,
        value=map_value(given, levels),
        bound=value_bound(given),
    )


def write_map(path: Path, found: CalibratedMap) -> None:
    """Replaces ``path`` as a whole; numbers are written exactly.

    Raises InputError if it cannot be written.
    """
    body = {
        **KIND.head,
        "model": dataclasses.asdict(found.model),
        **dataclasses.asdict(found.ladder),
        "tokens": found.tokens,
        "value": found.value,
        "bound": found.bound,
        "gap": found.gap,
        "levels": found.levels.tolist(),
        "hotness": found.hotness.tolist(),
    }
    write_whole(path, json.dumps(body) + "\n")


def read_map(path: Path, model: RoutedModel) -> CalibratedMap:
    """What was written.

    Raises InputError for a file that is damaged or belongs to another model than ``model``.
    """
    body = read_json_object(path, KIND.remedy)
    KIND.check_head(path, body)
    with KIND.reading(path):
        written_for = RoutedModel.from_json(body["model"])
        found = CalibratedMap(
            model=written_for,
            ladder=Ladder(**{f.name: body[f.name] for f in dataclasses.fields(Ladder)}),
            tokens=int(body["tokens"]),
            hotness=read_hotness(body, "hotness", written_for),
            levels=np.array(body["levels"], np.int32),
            value=float(body["value"]),
            bound=float(body["bound"]),
        )
        if found.levels.shape != found.hotness.shape:
            raise ValueError(f"levels have shape {found.levels.shape}, its model {written_for}")
    KIND.check_model(path, written_for, model)
    return found
