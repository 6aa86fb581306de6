"""PyTree helpers that the files of this room share."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree


def describe(tree: PyTree) -> str:
    """Dtypes and shapes in one line, for messages."""
    words = jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", tree)
    return str(words).replace("'", "")


def subtract(a: PyTree, b: PyTree) -> PyTree:
    """Leaf by leaf, a − b."""
    return jax.tree.map(jnp.subtract, a, b)


def varying_axes(leaf: Any) -> frozenset:
    """Mesh axes over which `leaf` varies inside `shard_map(..., check_vma=True)`; else none."""
    return axes_of_type(jax.typeof(leaf))


def axes_of_type(kind: Any) -> frozenset:
    """The same for the type of an array."""
    if hasattr(kind, "manual_axis_type"):
        return frozenset(kind.manual_axis_type.varying)
    return frozenset(getattr(kind, "vma", ()))  # its name in earlier JAX
