"""PyTree helpers that optax.tree does not have: types, finiteness, the max norm, selection."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree


def dtype_of(tree: PyTree) -> jnp.dtype:
    """The floating dtype that the leaves of `tree` promote to."""
    return jnp.result_type(*jax.tree.leaves(tree))


def max_norm(tree: PyTree) -> Float[Array, ""]:
    """Largest absolute entry; 0 for a tree without entries."""
    largest = [jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree) if leaf.size]
    return jnp.max(jnp.stack(largest)) if largest else jnp.zeros(())


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every floating entry is finite."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if eqx.is_inexact_array(leaf)]
    finite = jnp.array(True)
    for leaf in leaves:
        finite &= jnp.all(jnp.isfinite(leaf))
    return finite


def where(condition: Bool[Array, ""], on_true: PyTree, on_false: PyTree) -> PyTree:
    """Select whole trees by one flag."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), on_true, on_false)


def describe(tree: PyTree) -> str:
    """Shapes and dtypes in one line, for messages."""

    def one(leaf):
        if hasattr(leaf, "dtype"):
            return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        return type(leaf).__name__

    leaves, structure = jax.tree.flatten(tree)
    if structure == jax.tree.structure(0):
        return one(leaves[0])
    return str(jax.tree.unflatten(structure, [_Word(one(leaf)) for leaf in leaves]))


class _Word(str):
    def __repr__(self):
        return str(self)


def same_types(a: PyTree, b: PyTree) -> bool:
    """Whether two trees have the same structure, shapes and dtypes."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(
        jnp.shape(u) == jnp.shape(v) and jnp.result_type(u) == jnp.result_type(v)
        for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
