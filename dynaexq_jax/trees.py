"""Small helpers for pytrees of arrays."""

import jax


def tree_bytes(tree: object) -> int:
    """Bytes of all arrays of a pytree, abstract ones included."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
