"""Where a swarm starts."""

from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Key, PyTree

from jaxopt_ext.core import check, tree
from jaxopt_ext.core.solver import Number
from jaxopt_ext.solvers.cbo_sobol import sobol


@runtime_checkable
class Start(Protocol):
    """Where the swarm starts: any callable of this form."""

    def __call__(self, key: Key[Array, ""], value: PyTree, number: int) -> PyTree:
        """Starting positions.

        Args:
            key: Random key.
            value: The `init` of the solve, one particle.
            number: How many particles.

        Returns:
            A PyTree like `value` with a leading axis of length `number`.
        """
        ...


class Normal(eqx.Module):
    """Particles normally distributed around `init`.

    Args:
        scale: Standard deviation in the variables' units, > 0.

    Raises:
        ValueError: `scale` is not positive.
    """

    scale: Number = 1.0

    def __check_init__(self):
        check.number("Normal", "scale", self.scale, above=0)

    def __call__(self, key, value, number):
        """See `Start`."""
        point, unravel = ravel_pytree(value)
        draws = jax.random.normal(key, (number, point.size), point.dtype)
        return jax.vmap(unravel)(point[None] + jnp.asarray(self.scale, point.dtype) * draws)


class Uniform(eqx.Module):
    """Particles uniformly distributed in a box; `init` gives only structure and dtypes.

    Args:
        lower: Lower bounds: a number, or a PyTree like `init`.
        upper: Upper bounds, above the lower ones.
        design: "random" for independent particles, "latin" for a Latin hypercube (each coordinate
            is stratified), "sobol" for a Sobol sequence under a random digital shift, in at most
            64 dimensions; best with a power of two particles.

    Raises:
        ValueError: The box is empty, a bound is not finite, or the design is none of these.
    """

    lower: PyTree
    upper: PyTree
    design: str = eqx.field(static=True, default="random")

    def __check_init__(self):
        if self.design not in ("random", "latin", "sobol"):
            raise ValueError(
                f'Uniform: design is {self.design!r}, expected "random", "latin" or "sobol"'
            )
        lower, upper = jax.tree.leaves(self.lower), jax.tree.leaves(self.upper)
        if any(isinstance(leaf, Tracer) for leaf in lower + upper):
            return
        number = max(len(lower), len(upper))
        lower, upper = (each * number if len(each) == 1 else each for each in (lower, upper))
        for low, high in zip(lower, upper, strict=True):
            if not np.all(np.isfinite(low) & np.isfinite(high) & (np.asarray(low) < high)):
                raise ValueError(
                    f"Uniform: lower is {low} and upper is {high}, expected finite bounds with "
                    "lower < upper"
                )

    def __call__(self, key, value, number):
        """See `Start`."""
        point, unravel = ravel_pytree(value)
        lower, upper = self._bound(value, self.lower), self._bound(value, self.upper)
        keys = jax.random.split(key)
        share = jax.random.uniform(keys[0], (number, point.size), point.dtype)
        if self.design == "sobol":
            shift = jax.random.bits(keys[1], (1, point.size), jnp.uint32)
            # the 24 leading bits are what float32 can hold
            share = ((sobol(number, point.size) ^ shift) >> 8).astype(point.dtype) / 2**24
        if self.design == "latin":
            strata = jnp.broadcast_to(jnp.arange(number)[:, None], share.shape)
            strata = jax.random.permutation(keys[1], strata, axis=0, independent=True)
            share = (strata.astype(point.dtype) + share) / number
        return jax.vmap(unravel)(lower[None] + (upper - lower)[None] * share)

    @staticmethod
    def _bound(value, bound):
        if jax.tree.structure(bound) != jax.tree.structure(value):
            bound = jax.tree.map(lambda leaf: bound, value)
        full = jax.tree.map(
            lambda leaf, b: jnp.broadcast_to(jnp.asarray(b, leaf.dtype), leaf.shape), value, bound
        )
        return ravel_pytree(full)[0]


class Particles(eqx.Module):
    """Particles at given positions; `init` gives only structure and dtypes.

    Args:
        positions: A PyTree like `init` whose leaves have a leading axis, one entry per particle.

    Raises:
        ValueError: The positions are all equal.
    """

    positions: PyTree

    def __check_init__(self):
        leaves = jax.tree.leaves(self.positions)
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            return
        if all(np.all(np.asarray(leaf) == np.asarray(leaf)[:1]) for leaf in leaves):
            raise ValueError(
                "Particles: positions are all equal, expected a swarm with a spread: noise that is "
                "proportional to the spread never moves it"
            )

    def __call__(self, key, value, number):
        """See `Start`."""
        expected = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((number, *leaf.shape), leaf.dtype), value
        )
        if not tree.same_types(self.positions, expected):
            raise ValueError(
                f"Particles: positions are {tree.describe(self.positions)}, expected "
                f"{tree.describe(expected)}: one entry per particle, each like init"
            )
        return self.positions
