"""Weight error of the data-free quantizer by balance, residual steps, group size and encoding.

    python benchmarks/quantizer.py HF_DIR [HF_DIR ...] [--every 8]

Relative squared error of the expert weights (summed squared error over summed squared weights) at
2, 4 and 8 bits, over every eighth expert of each layer. The ceiling of a level is no error at all;
what an error costs in perplexity is measured by benchmarks/perplexity.py. Ends with one line of
JSON.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
from environment import describe
from tqdm import tqdm

from convert.quantize import DEFAULT_BALANCE, GridQuantizer
from dynaexq_jax.hf import HfDirectory
from dynaexq_jax.report.table import text_table
from pallas_kernels.levels import DEFAULT_TABLE, LEVEL_BITS
from pallas_kernels.pages import ExpertFormat

BALANCES = (0.3, 1.0, 3.0, 5.0, 10.0, 30.0)
RESIDUAL_STEPS = (
    (1 / 64, 1 / 32),
    (1 / 32, 1 / 16),
    (1 / 16, 1 / 8),
    (1 / 32, 1 / 8),
    (1 / 64, 1 / 16),
)
GROUPS = tuple((size, encoding) for size in (16, 32, 64, 128) for encoding in ("bf16", "log8"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One setting of the quantizer and the format."""

    label: str
    balance: float = DEFAULT_BALANCE
    residual_step: tuple[float, float] = DEFAULT_TABLE.residual_step
    group_size: int = 64
    encoding: str = "bf16"

    def format(self, hidden: int, width: int) -> ExpertFormat:
        """The format of a model's experts in this case."""
        return ExpertFormat(
            hidden=hidden,
            width=width,
            group_size=self.group_size,
            scale_encoding=self.encoding,
            table=dataclasses.replace(DEFAULT_TABLE, residual_step=self.residual_step),
        )


CASES = (
    *(Case(label=f"balance {balance:g}", balance=balance) for balance in BALANCES),
    *(
        Case(label=f"residual steps 1/{1 / inner:g}, 1/{1 / outer:g}", residual_step=(inner, outer))
        for inner, outer in RESIDUAL_STEPS
    ),
    *(
        Case(label=f"group {size}, {encoding}", group_size=size, encoding=encoding)
        for size, encoding in GROUPS
    ),
)


def main() -> None:
    """Measures every case on every model and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", type=Path, nargs="+", metavar="HF_DIR")
    parser.add_argument("--every", type=int, default=8, help="measure one expert in so many")
    arguments = parser.parse_args()
    models = {path.name: HfDirectory.open(path) for path in arguments.sources}
    results: dict[str, dict[str, list[float]]] = {case.label: {} for case in CASES}
    for name, model in models.items():
        matrices = [
            np.asarray(matrix, np.float32)
            for layer in model.config.sparse_layers
            for expert in range(0, model.config.num_experts, arguments.every)
            for matrix in model.expert(layer, expert)
        ]
        for case in tqdm(CASES, desc=name, file=sys.stderr):
            fmt = case.format(model.config.hidden_size, model.config.moe_intermediate_size)
            results[case.label][name] = errors(matrices, fmt, GridQuantizer(balance=case.balance))
    rows = [
        [label, *("  ".join(f"{e:.5f}" for e in by_model[name]) for name in models)]
        for label, by_model in results.items()
    ]
    print(
        f"balance {DEFAULT_BALANCE:g}, group 64, bf16, steps 1/32, 1/16 where nothing else is said"
    )
    print(text_table(["errors at 2, 4, 8 bits", *models], rows))
    print(json.dumps({"benchmark": "quantizer", **describe(), "results": results}))


def errors(matrices: list[np.ndarray], fmt: ExpertFormat, quantizer: GridQuantizer) -> list[float]:
    """Relative squared error of all matrices together, by level."""
    lost, energy = np.zeros(len(LEVEL_BITS)), 0.0
    for weights in matrices:
        codes, scales = quantizer(weights, fmt)
        scale = np.repeat(scales.T, fmt.group_size, axis=1)[:, : weights.shape[1]]
        for level, bits in enumerate(LEVEL_BITS):
            values = fmt.table.values(bits)[codes >> (8 - bits)] * scale
            lost[level] += np.square(weights - values, dtype=np.float64).sum()
        energy += np.square(weights, dtype=np.float64).sum()
    return (lost / energy).tolist()


if __name__ == "__main__":
    main()
