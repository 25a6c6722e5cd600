"""When does dynamic precision beat a tuned fixed map? Quality by policy, traffic, pool and base.

    python benchmarks/quality.py HF_DIR --texts DIR --out OUT [--method grid] [--windows 12]
    python benchmarks/quality.py --report OUT [OUT ...] --into docs/results

DIR holds DOMAIN.calib.txt and DOMAIN.valid.txt. The model is converted (or given with
``--converted``), loaded once with all of its pages, and scored on the first windows of valid;
hotness is calibrated on those of calib. Every finished run is a line of OUT/MODEL-METHOD.jsonl, so
a run that is killed loses nothing, and starting it again goes on from there. A report can be made
of any number of them: quality.json, quality_tables.md and plots.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from environment import describe
from quality_report import write_report
from quality_scorer import Scorer
from quality_traffic import KINDS, Pool, best_map, follow, stretches
from run_file import read_runs
from tqdm import tqdm

from dynaexq_jax.cli.device import prepare_device
from dynaexq_jax.policy import Hotness, StaticMixed, make_policy
from dynaexq_jax.text.documents import read_windows
from dynaexq_jax.text.tokenizer import load_tokenizer

DOMAINS = ("c", "de", "en_general", "fr", "go", "ja", "math", "python", "ru", "zh")
PROMOTED = (0.25, 0.125, 0.5, 0.0625, 0.75)
"""The most interesting first: a run may be stopped."""
POLICIES = (
    "all-low",
    "all-high",
    "static-mixed",
    "static-wrong",
    "oracle",
    "dynamic",
    "dynamic-cold",
)
QUICK = {
    "window": 64,
    "windows": 3,
    "promoted": [0.25],
    "base_bits": [2],
    "traffic": ["one domain", "mixed"],
}


def main() -> None:
    """Runs what is asked for, and writes the report."""
    options = _parse()
    if options.report:
        write_report(options.report, options.into)
        return
    prepare_device(None)
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    converted = options.converted or _converted(options)
    path = options.out / f"{options.model.name}-{options.method}.jsonl"
    experiment = Experiment(options, converted)
    print(f"ready after {time.monotonic() - started:.0f} s", flush=True)
    experiment.run(path)
    write_report([path], options.out)
    print(json.dumps({"benchmark": "quality", **describe(), "runs": str(path)}))


class Experiment:
    """One model: its texts, what was calibrated, and the runs."""

    def __init__(self, options: argparse.Namespace, converted: Path) -> None:
        self.options = options
        tokenizer = load_tokenizer(options.model)

        def windows(split: str) -> np.ndarray:
            return np.stack(
                [
                    read_windows(
                        options.texts / f"{domain}.{split}.txt",
                        tokenizer,
                        options.window,
                        options.windows,
                    )
                    for domain in options.domains
                ]
            )

        self.scorer = Scorer(
            options.model, converted, windows("valid"), rows=max(options.windows // 3, 1)
        )
        self.calibrated = self.scorer.routing(windows("calib")).mean(axis=1)
        """float64 [D, L, E]: hotness of each domain's calibration text."""
        self.known = self.scorer.routing(self.scorer.windows)
        """float64 [D, parts, L, E]: hotness of the scored text."""
        self._scores: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def run(self, path: Path) -> None:
        """Appends every run that ``path`` lacks."""
        wanted = list(self._runs())
        done = {tuple(line["key"]) for line in read_runs(path)}
        with path.open("a", encoding="utf-8") as file:
            if not done:
                self._write(file, ["reference"], self.scorer.reference_nll, None, 0.0)
            for key, pool, score in tqdm(wanted, unit="run"):
                if key in done:
                    continue
                done.add(key)
                began = time.monotonic()
                nll, kl = score()
                self._write(file, list(key), nll, kl, time.monotonic() - began, pool)

    def _write(
        self,
        file: Any,
        key: list[Any],
        nll: np.ndarray,
        kl: np.ndarray | None,
        seconds: float,
        pool: Pool | None = None,
    ) -> None:
        line = {
            "key": key,
            "model": self.options.model.name,
            "method": self.options.method,
            "domains": list(self.options.domains),
            "window": self.options.window,
            "seconds": round(seconds, 2),
            "nll": nll.round(6).tolist(),
        }
        if pool is not None and kl is not None:
            layers, experts = self.scorer.shape
            bits = self.scorer.bits_per_weight(pool.base_bits, pool.pages(layers * experts))
            line |= {"bits_per_weight": round(bits, 4), "kl": kl.round(7).tolist()}
        else:
            line |= describe()
        file.write(json.dumps(line) + "\n")
        file.flush()

    def _runs(self) -> Iterator[tuple[tuple[Any, ...], Pool, Callable[[], Any]]]:
        """(policy, traffic, base, promoted), its pool, and what scores it."""
        options = self.options
        for base, promoted in itertools.product(options.base_bits, options.promoted):
            for kind, policy in itertools.product(options.traffic, options.policies):
                share = {"all-low": 0.0, "all-high": 1.0}.get(policy, promoted)
                pool = Pool(base_bits=base, promoted=share)
                if policy == "dynamic-cold" and kind != "one domain":
                    continue  # a start counts once for each stretch
                score = self._dynamic if policy.startswith("dynamic") else self._fixed
                yield (policy, kind, base, share), pool, score(policy, kind, pool)

    def _dynamic(self, policy: str, kind: str, pool: Pool) -> Callable[[], Any]:
        domains, windows = self.scorer.windows.shape[:2]

        def score() -> tuple[np.ndarray, np.ndarray]:
            traffic = stretches(kind, domains, windows, self.options.interval)
            hotness = Hotness.calibrated(self.calibrated.mean(axis=0))
            if policy == "dynamic-cold":
                hotness = Hotness.cold(*self.scorer.shape)
            return follow(self.scorer, make_policy("dynamic"), pool, hotness, traffic)

        return score

    def _fixed(self, policy: str, kind: str, pool: Pool) -> Callable[[], Any]:
        def score() -> tuple[np.ndarray, np.ndarray]:
            maps = self._maps_of(policy, kind, pool)
            key = maps.tobytes()
            if key not in self._scores:  # traffic is all the same to a fixed map
                self._scores[key] = self.scorer.score_maps(maps)
            return self._scores[key]

        return score

    def _maps_of(self, policy: str, kind: str, pool: Pool) -> np.ndarray:
        """Levels int32 [D, parts, L, E] that the windows are read at."""
        if policy in ("all-low", "all-high"):
            level = pool.base_level + int(pool.promoted)
            return np.full(self.known.shape, level, np.int32)
        if policy == "static-mixed":
            known = np.broadcast_to(self.calibrated.mean(axis=0), self.known.shape)
        elif policy == "static-wrong":
            of_next = np.roll(self.calibrated, -1, axis=0)
            known = np.broadcast_to(of_next[:, None], self.known.shape)
        else:
            known = self._known_beforehand(kind)
        flat = known.reshape(-1, *self.scorer.shape)
        maps = [best_map(self.scorer, StaticMixed(hotness=hotness), pool) for hotness in flat]
        return np.stack(maps).reshape(self.known.shape)

    def _known_beforehand(self, kind: str) -> np.ndarray:
        """Hotness of the text that is read together, float64 [D, parts, L, E]."""
        if kind == "mixed":
            return np.broadcast_to(self.known.mean(axis=(0, 1)), self.known.shape)
        if kind != "three domains":
            return np.broadcast_to(self.known.mean(axis=1, keepdims=True), self.known.shape)
        found = np.zeros_like(self.known)
        parts = self.known.shape[1]
        for stretch in stretches(kind, *self.scorer.windows.shape[:2], self.options.interval):
            together = {
                (d, w * parts // self.scorer.windows.shape[1])
                for b in stretch.batches
                for d, w in b
            }
            mean = np.mean([self.known[place] for place in together], axis=0)
            for place in together:
                found[place] = mean
        return found


def _converted(options: argparse.Namespace) -> Path:
    """The checkpoint in the output folder, made if it is not there."""
    output = options.out / f"{options.model.name}-{options.method}"
    if not output.exists():
        command = ["convert", str(options.model), str(output), "--method", options.method]
        if options.method != "grid":
            texts = [str(options.texts / f"{domain}.calib.txt") for domain in options.domains]
            command += ["--calibration", *texts]
        # a process of its own, which may choose another device and leaves no memory taken
        subprocess.run([sys.executable, "-m", "dynaexq_jax", *command], check=True)
    return output


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", metavar="HF_DIR")
    parser.add_argument("--texts", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, metavar="OUT", help="for runs, report and checkpoint")
    parser.add_argument("--method", default="grid", help="of conversion, grid or joint")
    parser.add_argument("--converted", type=Path, metavar="MODEL", help="converted with --method")
    parser.add_argument("--domains", nargs="+", default=list(DOMAINS))
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--windows", type=int, default=12, help="of each domain")
    parser.add_argument("--interval", type=int, default=32, help="tokens between two plans")
    parser.add_argument("--promoted", type=float, nargs="+", default=list(PROMOTED))
    parser.add_argument("--base-bits", type=int, nargs="+", choices=(2, 4), default=[2, 4])
    parser.add_argument("--traffic", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--quick", action="store_true", help="a small part, for a CPU")
    parser.add_argument("--report", type=Path, nargs="+", metavar="RUNS", help="of runs on file")
    parser.add_argument("--into", type=Path, metavar="DIR", help="where the report goes")
    options = parser.parse_args()
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args()
    if options.report:
        if options.into is None:
            parser.error("--report needs --into DIR")
        return options
    for name in ("model", "texts", "out"):
        if getattr(options, name) is None:
            parser.error(f"{name} is missing")
    if options.windows < 3 or options.windows % 3:
        parser.error(f"--windows must be a multiple of 3, got {options.windows}")
    if len(options.domains) < 3:
        parser.error(f"--domains must be three or more, got {options.domains}")
    return options


if __name__ == "__main__":
    main()
