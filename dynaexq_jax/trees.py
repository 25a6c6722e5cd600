"""Small helpers for pytrees of arrays."""

from typing import TypeVar, cast

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


def abstract_array(shape: tuple[int, ...], dtype: jnp.dtype | type) -> jax.Array:
    """A shape and dtype that stands for an array, with nothing allocated.

    Typed as an array because the pytrees that hold arrays hold these as well.
    """
    return cast(jax.Array, jax.ShapeDtypeStruct(shape, dtype))


def abstract_on(device: jax.Device, tree: Tree) -> Tree:
    """Abstract arrays that stand for arrays committed to a device; those of ``tree`` do not."""
    sharding = jax.sharding.SingleDeviceSharding(device)

    def one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return cast(Tree, jax.tree.map(one, tree))


def tree_bytes(tree: object) -> int:
    """Bytes of all arrays of a pytree, abstract ones included."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def has_arrived(tree: object) -> bool:
    """Whether every array of a pytree is computed or copied; does not wait."""
    return all(leaf.is_ready() for leaf in jax.tree.leaves(tree))
