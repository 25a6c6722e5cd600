"""What is asked of the compiler for every program of the engine, and what it says about one."""

from typing import Final

import jax

IN_GRAPHS: Final = {"xla_gpu_graph_min_graph_size": 1}
"""Compiler options: programs of a few kernels become CUDA graphs, too.

A kernel that is launched by itself makes the device take .4 us longer from kernel to kernel ever
after, in graphs as well: a millisecond for each chunk of a prompt (docs/results/switching.md).
"""


def bytes_beside_arguments(lowered: jax.stages.Lowered) -> int:
    """Bytes of the device that a program needs while it runs, without its arguments; compiles it.

    Results that take the place of donated arguments do not count.
    """
    memory = lowered.compile().memory_analysis()
    assert memory is not None  # CPUs and GPUs have one
    return int(memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes)
