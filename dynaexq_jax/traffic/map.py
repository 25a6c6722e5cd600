"""Calibrated maps: the best fixed levels for the traffic of given texts, as a JSON file."""

import dataclasses
import json
from pathlib import Path
from typing import Final

import numpy as np

from dynaexq_jax.errors import InputError
from dynaexq_jax.json_file import read_json_object
from dynaexq_jax.output_file import write_whole
from dynaexq_jax.policy import PolicyInput, StaticMixed
from dynaexq_jax.policy.value import map_value, value_bound
from dynaexq_jax.traffic.model import RoutedModel
from dynaexq_jax.traffic.simulation import Ladder

FORMAT: Final = "dynaexq map"
VERSION: Final = 1
_REMEDY: Final = "make it again with: dynaexq calibrate-map"


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
        "format": FORMAT,
        "version": VERSION,
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
    body = read_json_object(path, _REMEDY)
    if body.get("format") != FORMAT:
        raise InputError(f"{path}: is not a map; {_REMEDY}")
    if body.get("version") != VERSION:
        raise InputError(
            f"{path}: version is {body.get('version')!r}, this program reads {VERSION}; {_REMEDY}"
        )
    try:
        written_for = RoutedModel.from_json(body["model"])
        found = CalibratedMap(
            model=written_for,
            ladder=Ladder(**{f.name: body[f.name] for f in dataclasses.fields(Ladder)}),
            tokens=int(body["tokens"]),
            hotness=np.array(body["hotness"], np.float64),
            levels=np.array(body["levels"], np.int32),
            value=float(body["value"]),
            bound=float(body["bound"]),
        )
        shape = (written_for.layers, written_for.experts)
        for name in ("hotness", "levels"):
            if getattr(found, name).shape != shape:
                got = getattr(found, name).shape
                raise ValueError(f"{name} has shape {got}, its model {written_for}")
        if not (np.all(np.isfinite(found.hotness)) and np.all(found.hotness >= 0)):
            raise ValueError("hotness must be finite and not negative")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: is not a valid map ({error}); {_REMEDY}") from error
    if written_for != model:
        raise InputError(
            f"{path}: was made for a model with {written_for}; this one has {model}; {_REMEDY}"
        )
    return found
