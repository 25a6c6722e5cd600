"""What the compiler says about a program."""

import jax


def bytes_beside_arguments(lowered: jax.stages.Lowered) -> int:
    """Bytes of the device that a program needs while it runs, without its arguments; compiles it.

    Results that take the place of donated arguments do not count.
    """
    memory = lowered.compile().memory_analysis()
    assert memory is not None  # CPUs and GPUs have one
    return int(memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes)
