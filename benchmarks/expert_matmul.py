"""The two expert matmuls of a decode step at the shape of Qwen3-30B-A3B, phase by phase.

    python benchmarks/expert_matmul.py
    python benchmarks/expert_matmul.py --bits 4 --tokens 1 8 --group-size 64 32 \\
        --scale-encoding bf16 log8

They are phases of one kernel, so each is timed as what the kernel takes longer for it: kernels
that end after one phase, by the GPU's own clock, over layers whose weights do not fit the L2
cache. Bytes are pages and scales of the distinct experts read; shares are of a copy measured in
the same run. "down" includes the wait for the sums of gate_up. All cases take some minutes, so
rows are in OUT/expert_matmul.json as soon as they are measured. The last line is JSON.
"""

import argparse
import dataclasses
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import full_size
import jax
import jax.numpy as jnp
import numpy as np
from environment import describe
from gpu import copy_bandwidth, kernels_of

from convert.pipeline import DEFAULT_GROUP_SIZE, DEFAULT_SCALE_ENCODING
from dynaexq_jax.output_file import write_whole
from pallas_kernels.layout import page_shape
from pallas_kernels.levels import LEVEL_BITS, PAGES_OF_BITS
from pallas_kernels.moe_layer.mosaic import moe_layer_kernel
from pallas_kernels.moe_layer.mosaic.kernel import default_config
from pallas_kernels.pages import PagedExperts, levels_of_table
from pallas_kernels.scales import GROUP_SIZES, SCALE_ENCODINGS

LAYERS = 3
CALLS = 12
"""Kernels of one timing, over the layers in turn, each with tokens of its own."""
CASES: list[tuple[str, dict[str, Any]]] = [
    ("4", {"base_bits": 4}),
    ("2", {"base_bits": 2}),
    ("8", {"base_bits": 8}),
    ("half 4", {"base_bits": 2, "promoted": 0.5}),
    ("all 4 by promotion", {"base_bits": 2, "promoted": 1.0}),
]


def main() -> None:
    """Measures every case and prints a table, then JSON."""
    options = _parse()
    config = full_size.config(LAYERS)
    share = full_size.popularity(options.routing, LAYERS, config.num_experts)
    dense = full_size.random_dense(config, share[None])
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.2f} TB/s", describe(), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    cases = [(bits, how) for bits, how in CASES if bits.split()[0] in options.bits]
    scales = itertools.product(options.group_size, options.scale_encoding)
    for (bits, how), (group_size, encoding) in itertools.product(cases, scales):
        experts = full_size.random_experts(
            config, **how, group_size=group_size, scale_encoding=encoding
        )
        for tokens in options.tokens:
            measured = _measure(dense, experts, tokens, bits, bandwidth, options.routing)
            print(*measured, sep="\n", flush=True)
            rows += measured
            write_whole(options.out / "expert_matmul.json", json.dumps(rows, indent=1) + "\n")
    print(json.dumps({"copy_tb_s": bandwidth / 1e12, **describe(), "matmuls": rows}))


def _measure(
    dense: Any, experts: PagedExperts, tokens: int, bits: str, bandwidth: float, routing: str
) -> list[dict[str, Any]]:
    rng = np.random.default_rng(tokens)
    ids = rng.integers(0, dense.embedding.shape[0], (CALLS, tokens))
    x = dense.embedding[jnp.asarray(ids)]
    times, mass = {}, None
    for last in ("choose", "gate_up", "down", "combine"):
        config = dataclasses.replace(default_config(tokens, experts), last=last)
        run = jax.jit(partial(_layers, config=config))
        call = partial(run, x, dense.mlp_norm, dense.router, experts)
        mass = np.asarray(call()[1])
        times[last] = sum(us for name, (_, us) in kernels_of(call).items() if "mosaic" in name)
    assert mass is not None
    rows = []
    for matmul, before in (("gate_up", "choose"), ("down", "gate_up")):
        us = times[matmul] - times[before]
        size = _bytes(experts, matmul, mass > 0)
        rows.append(
            {
                "device": jax.devices()[0].device_kind,
                "matmul": matmul,
                "tokens": tokens,
                "bits": bits,
                "group_size": experts.format.group_size,
                "scale_encoding": experts.format.scale_encoding,
                "routing": routing,
                "us": round(us, 1),
                "bytes": round(size),
                "share_of_copy": round(size / (us * 1e-6) / bandwidth, 3),
                "whole_block_us": round(times["combine"], 1),
            }
        )
    return rows


def _layers(
    x: jax.Array, norm: jax.Array, router: jax.Array, experts: PagedExperts, config: Any
) -> tuple[list[jax.Array], jax.Array]:
    """All calls; their results, and the router mass of each [CALLS, E]."""
    counter, results, mass = jnp.zeros(1, jnp.int32), [], []
    for call in range(CALLS):
        layer = call % LAYERS
        y, of_call, counter = moe_layer_kernel(
            x[call],
            norm=(norm, jnp.int32(layer), 1e-6),
            router=router,
            experts=experts,
            layer=jnp.int32(layer),
            valid=jnp.ones(x.shape[1], jnp.bool_),
            top_k=8,
            normalize=True,
            mass=jnp.zeros(router.shape[:2], jnp.float32),
            counter=counter,
            config=config,
        )
        results.append(y)
        mass.append(of_call[layer])
    return results, jnp.stack(mass)


def _bytes(experts: PagedExperts, matmul: str, read: np.ndarray) -> float:
    """Mean bytes of the pages and scales of the experts that a call read; ``read`` [CALLS, E]."""
    shape = experts.format.matrix_shapes[matmul]
    levels = np.asarray(levels_of_table(np.asarray(experts.table), experts.base_bits))
    pages = np.asarray([PAGES_OF_BITS[bits] for bits in LEVEL_BITS])[levels]
    page = 4 * int(np.prod(page_shape(*shape)))
    codes = getattr(experts.scales, matmul).codes
    scales = codes.dtype.itemsize * int(np.prod(codes.shape[2:]))
    of_expert = (pages * page + scales)[np.arange(CALLS) % LAYERS]
    return float((read * of_expert).sum(axis=1).mean())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--bits", nargs="+", default=["4", "2", "8", "half", "all"])
    parser.add_argument("--group-size", type=int, nargs="+", choices=GROUP_SIZES,
                        default=[DEFAULT_GROUP_SIZE])  # fmt: skip
    parser.add_argument("--scale-encoding", nargs="+", choices=SCALE_ENCODINGS,
                        default=[DEFAULT_SCALE_ENCODING])  # fmt: skip
    parser.add_argument("--routing", default="random")
    parser.add_argument("--out", type=Path, default=Path("out"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
