"""Time of the calibrated quantizer on one batch of experts at the shape of Qwen3-30B-A3B.

    python benchmarks/joint.py [--experts 32] [--repeats 3] [--group-size 32] [--rounds 2]

Weights and inputs are random. Both matrices of the experts are quantized on the default device,
from host arrays to host arrays; the first call, which compiles, is timed apart. Extrapolated to
the 128 experts of a layer and to the 48 layers of the model by the median. The ceiling is what the
same floating-point operations take at the rate of one large float32 matmul on this device. Ends
with one line of JSON.
"""

import argparse
import dataclasses
import json
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from environment import describe, product_flops_per_s, seconds_of
from full_size import QWEN3_30B

from convert.joint import JointQuantizer
from dynaexq_jax.report.table import text_table
from pallas_kernels.levels import DEFAULT_TABLE
from pallas_kernels.pages import ExpertFormat
from pallas_kernels.scales import SCALE_ENCODINGS

SAMPLES = 4096
"""Random inputs that a Hessian is made of."""
CHOICE_FLOPS = 70
"""Of one weight in one visit, about: eight lines of two products, their comparison, the rest."""


def main() -> None:
    """Measures both matrices and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=32, help="experts of a batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=JointQuantizer.rounds)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--scale-encoding", choices=SCALE_ENCODINGS, default="log8")
    arguments = parser.parse_args()
    fmt = ExpertFormat(
        hidden=QWEN3_30B["hidden_size"],
        width=QWEN3_30B["moe_intermediate_size"],
        group_size=arguments.group_size,
        scale_encoding=arguments.scale_encoding,
        table=DEFAULT_TABLE,
    )
    quantizer = JointQuantizer(rounds=arguments.rounds)
    rate = product_flops_per_s(4096, jax.lax.Precision.HIGHEST)
    layer = QWEN3_30B["num_experts"] / arguments.experts
    rows, measured = [], {}
    for name, (n, k) in fmt.matrix_shapes.items():
        first_s, seconds = measure(quantizer, fmt, (arguments.experts, n, k), arguments.repeats)
        ceiling_s = arguments.experts * flops(quantizer, n, k, fmt.group_size) / rate
        measured[name] = {"first_s": first_s, "seconds": seconds, "ceiling_s": ceiling_s}
        rows.append(
            [
                f"{name} [{n}, {k}]",
                *(f"{value:.2f}" for value in (first_s, seconds, ceiling_s, layer * seconds)),
            ]
        )
    layer_s = layer * sum(each["seconds"] for each in measured.values())
    model_s = layer_s * QWEN3_30B["num_hidden_layers"]
    heads = ["first call, s", "batch, s", "ceiling, s", "layer, s"]
    print(text_table([f"{arguments.experts} experts", *heads], rows))
    print(f"float32 matmul: {rate / 1e12:.2f} TFLOP/s")
    print(f"a layer of 128 experts {layer_s:.1f} s, all 48 layers {model_s / 60:.1f} min")
    facts = {
        "benchmark": "joint",
        **describe(),
        "experts": arguments.experts,
        "group_size": fmt.group_size,
        "scale_encoding": fmt.scale_encoding,
        "quantizer": dataclasses.asdict(quantizer),
    }
    result = {
        "matmul_tflops": rate / 1e12,
        "matrices": measured,
        "layer_s": layer_s,
        "model_s": model_s,
        "peak_device_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }
    print(json.dumps({**facts, **result}))


def measure(
    quantizer: JointQuantizer, fmt: ExpertFormat, shape: tuple[int, int, int], repeats: int
) -> tuple[float, float]:
    """Seconds of the first call and median seconds of the others, for weights [E, N, K]."""
    experts, _, columns = shape
    weights = np.random.default_rng(0).standard_normal(shape, np.float32)
    hessians = np.stack([random_hessian(columns, seed) for seed in range(experts)])
    first_s, *seconds = seconds_of(lambda: quantizer(weights, hessians, fmt), repeats + 1)
    return first_s, statistics.median(seconds)


def random_hessian(columns: int, seed: int) -> np.ndarray:
    """Of correlated inputs whose energy falls by a hundred over the columns."""
    inputs = jax.random.normal(jax.random.key(seed), (SAMPLES, columns))
    mixed = inputs + jnp.roll(inputs, 1, axis=1)
    scaled = mixed * jnp.geomspace(1.0, 0.1, columns)
    return np.asarray(scaled.T @ scaled / SAMPLES)


def flops(quantizer: JointQuantizer, rows: int, columns: int, group_size: int) -> float:
    """Floating-point operations on one matrix: matmuls between and inside groups, choices."""
    starts, rounds = len(quantizer.starts), quantizer.rounds
    sweeps = 2 * (starts * (2 + rounds) + 1) + 1  # two levels, loss included; one in the residual
    visits = starts * (len(quantizer.start_steps) + rounds * len(quantizer.steps)) + 1
    between = 2 * columns * sweeps
    inside = 2 * group_size * (2 * visits + 1) + CHOICE_FLOPS * visits
    return rows * columns * (between + inside) + columns**3 / 3


if __name__ == "__main__":
    main()
