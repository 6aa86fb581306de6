"""The nearest point that satisfies equations and inequalities, as a layer."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxopt_ext.core import check, tree
from jaxopt_ext.core.solver import AbstractSolver
from jaxopt_ext.layers.hard_constraint import Constrained, HardConstraint


class Projection(eqx.Module):
    """The point nearest to a network's output that satisfies constraints exactly.

    It minimizes ½ Σ_i m_i (z_i − y_i)² subject to c_E(z, args) = 0, c_I(z, args) ≤ 0 and
    l ≤ z ≤ u. Affine equalities take one factorization (`linear=True`); all else is solved by
    `SketchedNewtonAL`, in nonconvex cases for a local minimum near the start. The derivative is
    that of the KKT conditions, in y and in everything that the constraints depend on.

    Args:
        equality: c_E(variables, args) → PyTree, zero where it holds; or `None`.
        inequality: c_I(variables, args) → PyTree, ≤ 0 where it holds; or `None`.
        lower: l: a PyTree like the variables, one number for all of them, or `None`.
        upper: u, likewise.
        metric: m > 0, a PyTree like the variables: large where the output is trusted, e.g. the
            inverse of its variance. `None` means 1.
        linear: Declares that c_E is affine and that there is nothing else.
        solver: `None` means `SketchedNewtonAL()`.
        max_steps: Steps of the solver at most.

    Raises:
        TypeError: A function is none, or `solver` no solver for programs.
        ValueError: There is no constraint, or a setting does not fit the others.

    Reference:
        Boyd, Vandenberghe, "Convex Optimization" (2004), section 8.1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxopt_ext import layers
        >>> simplex = layers.Projection(lambda z, args: jnp.sum(z) - 1.0, lower=0.0)
        >>> nearest = simplex(jnp.array([0.9, 0.5, -0.3])).value
        >>> bool(jnp.max(jnp.abs(nearest - jnp.array([0.7, 0.3, 0.0]))) < 1e-3)
        True
        >>> mean = layers.Projection(lambda z, total: jnp.sum(z) - total, linear=True)
        >>> print(mean(jnp.array([1.0, 2.0]), 5.0).value.round())
        [2. 3.]
    """

    equality: Callable | None = None
    inequality: Callable | None = None
    lower: PyTree = eqx.field(default=None, kw_only=True)
    upper: PyTree = eqx.field(default=None, kw_only=True)
    metric: PyTree = eqx.field(default=None, kw_only=True)
    linear: bool = eqx.field(static=True, default=False, kw_only=True)
    solver: AbstractSolver | None = eqx.field(default=None, kw_only=True)
    max_steps: int = eqx.field(static=True, default=100, kw_only=True)

    def __check_init__(self):
        name = type(self).__name__
        check.function(name, "equality", self.equality, optional=True)
        check.function(name, "inequality", self.inequality, optional=True)
        if not self.layer().constraints:
            raise ValueError(
                f"{name}: no constraint is given, expected equality, inequality, lower or upper"
            )

    def layer(self) -> HardConstraint:
        """The same as a `HardConstraint` with arguments (y, args), e.g. for a mixture."""
        return HardConstraint(
            _Offset(self.metric),
            self.solver,
            linear=self.linear,
            ridge=0.0,
            normalize=False,
            max_steps=self.max_steps,
            equality=_of_args(self.equality),
            inequality=_of_args(self.inequality),
            lower=self.lower,
            upper=self.upper,
        )

    def __call__(self, point: PyTree, args: PyTree = None, init: PyTree = None) -> Constrained:
        """Project.

        Args:
            point: y, a PyTree of floating arrays.
            args: Second argument of the constraints.
            init: Starting point, e.g. the answer of the previous training step; `None` means y.

        Returns:
            The projection; `report.max_residual` says by how much it moved, in units of √m · y,
            and `report.violation` how well the constraints hold.

        Raises:
            TypeError: `point` has a leaf that is not floating.
            ValueError: `metric`, `init` or a bound does not fit `point`.
        """
        point = check.variables("point", point)
        for name, given in (("init", init), ("metric", self.metric)):
            if given is not None and jax.tree.map(jnp.shape, given) != jax.tree.map(
                jnp.shape, point
            ):
                raise ValueError(
                    f"Projection: {name} is {tree.describe(given)}, expected a PyTree like point, "
                    f"{tree.describe(point)}"
                )
        return self.layer()(point if init is None else init, (point, args))


class _Offset(eqx.Module):
    """√m (z − y)."""

    metric: Any

    def __call__(self, variables, args):
        offset = jax.tree.map(jnp.subtract, variables, args[0])
        if self.metric is not None:
            offset = jax.tree.map(
                lambda m, v: jnp.sqrt(jnp.asarray(m, v.dtype)) * v, self.metric, offset
            )
        return jnp.concatenate([v.reshape(-1) for v in jax.tree.leaves(offset)])


class _OfArgs(eqx.Module):
    """A constraint that does not see the point y."""

    fun: Callable

    def __call__(self, variables, args):
        return self.fun(variables, args[1])


def _of_args(fun):
    return None if fun is None else _OfArgs(fun)
