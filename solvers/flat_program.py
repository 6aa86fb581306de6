"""A nonlinear program as functions of flat vectors, with slack variables and scaled rows.

The program min f(y) s.t. c_E(y) = 0, c_I(y) ≤ 0, l ≤ y ≤ u becomes

    min f(y)   s.t.   c(w) = (c_E(y), c_I(y) + s) = 0,   walls(w) ≥ 0,   w = (y, s),

where the walls are the distances y − l, u − y and s, as far as they exist.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from jaxopt_ext.core.problem import NonlinearProgram
from jaxopt_ext.implicit import Multipliers
from jaxopt_ext.implicit.hoist import vary_like

DAMPING = 1e-5  # of the barrier, as in IPOPT


class Scaling(eqx.Module):
    """Factors on the objective and on each constraint, all positive.

    Attributes:
        objective: Factor on f.
        rows: Factors on the constraints (c_E, c_I).
    """

    objective: Float[Array, ""]
    rows: Float[Array, " m"]


class Evaluation(NamedTuple):
    """The scaled functions at one point.

    Attributes:
        objective: Scaled f.
        gradient: Gradient of the scaled Lagrangian f + λᵀc in y.
        rows: Scaled (c_E, c_I), without slack variables.
        aux: Auxiliary output of the objective.
    """

    objective: Float[Array, ""]
    gradient: Float[Array, " n"]
    rows: Float[Array, " m"]
    aux: PyTree


class Walls(eqx.Module):
    """The one-sided limits d(w) ≥ 0 of w = (y, s): y − l, u − y, s.

    Attributes:
        lower: l, or `None`.
        upper: u, or `None`.
        real: Which limits exist: finite, and not those of a fixed variable.
        single: Which of them have no limit on the other side.
        size: Number of y.
    """

    lower: Float[Array, " n"] | None
    upper: Float[Array, " n"] | None
    real: Bool[Array, " k"]
    single: Bool[Array, " k"]
    size: int = eqx.field(static=True)

    def distances(self, w: Array) -> Array:
        """D(w); 1 where there is no limit."""
        y, s = w[: self.size], w[self.size :]
        below = [] if self.lower is None else [y - self.lower]
        above = [] if self.upper is None else [self.upper - y]
        return jnp.where(self.real, jnp.concatenate([*below, *above, s]), 1)

    def barrier(self, distances: Array) -> Array:
        """Σ (DAMPING · d − log d), the first term for limits without one on the other side.

        It keeps log d from growing along directions in which nothing else changes.
        """
        damped = jnp.where(self.single, DAMPING * distances, 0)
        return jnp.sum(damped - jnp.where(self.real, jnp.log(distances), 0))

    def push(self, distances: Array) -> Array:
        """Minus the derivative of `barrier` by the distances."""
        damped = jnp.where(self.single, DAMPING, 0).astype(distances.dtype)
        return jnp.where(self.real, 1 / distances, 0) - damped

    def change(self, dw: Array) -> Array:
        """How the distances change with w."""
        dy, ds = dw[: self.size], dw[self.size :]
        below = [] if self.lower is None else [dy]
        above = [] if self.upper is None else [-dy]
        return jnp.where(self.real, jnp.concatenate([*below, *above, ds]), 0)

    def pull(self, forces: Array) -> Array:
        """The transpose of `change`."""
        return self.collect(jnp.where(self.real, forces, 0), -1)

    def weights(self, weights: Array) -> Array:
        """The diagonal of changeᵀ · diag(weights) · change."""
        return self.collect(jnp.where(self.real, weights, 0), 1)

    def collect(self, values: Array, sign: int) -> Array:
        """Sum per entry of w; `sign` multiplies the values of the upper limits."""
        y = jnp.zeros(self.size, values.dtype)
        if self.lower is not None:
            y, values = y + values[: self.size], values[self.size :]
        if self.upper is not None:
            y, values = y + sign * values[: self.size], values[self.size :]
        return jnp.concatenate([y, values])

    def closeness(self, w: Array) -> Array:
        """Per entry of w, the product of d / (1 + d) over its limits."""
        d = self.distances(w)
        ratio = jnp.where(self.real, d / (1 + d), 1)
        y = jnp.ones(self.size, w.dtype)
        if self.lower is not None:
            y, ratio = y * ratio[: self.size], ratio[self.size :]
        if self.upper is not None:
            y, ratio = y * ratio[: self.size], ratio[self.size :]
        return jnp.concatenate([y, ratio])

    def split(self, values: Array) -> tuple[Array | None, Array | None, Array]:
        """What belongs to l, to u and to the slack variables."""
        low = up = None
        if self.lower is not None:
            low, values = values[: self.size], values[self.size :]
        if self.upper is not None:
            up, values = values[: self.size], values[self.size :]
        return low, up, values


class FlatProgram:
    """A nonlinear program in flat variables.

    Attributes:
        problem: The program.
        args: Arguments of its functions.
        unravel: From flat variables to the user's.
        size: Number of variables y.
        equalities: Number of entries of c_E.
        inequalities: Number of entries of c_I, and of slack variables.
        walls: The limits of w.
        fixed: Which variables have l = u.
        bounded: Whether there is any limit.
    """

    def __init__(self, problem: NonlinearProgram, args: PyTree, value: PyTree):
        self.problem, self.args = problem, args
        flat, self.unravel = ravel_pytree(value)
        self.size, self.dtype = flat.size, flat.dtype
        self._equality = _shape(problem.equality, value, args)
        self._inequality = _shape(problem.inequality, value, args)
        self.equalities = _entries(self._equality)
        self.inequalities = _entries(self._inequality)
        lower = None if problem.lower is None else self._flat_bound(problem.lower, value)
        upper = None if problem.upper is None else self._flat_bound(problem.upper, value)
        # without any limit, a lower one at −∞ avoids arrays without entries, beside which XLA
        # cannot compile callbacks in the user's functions (jax 0.10)
        self.bounded = self.inequalities > 0 or lower is not None or upper is not None
        if not self.bounded:
            lower = jnp.full(self.size, -jnp.inf, self.dtype)
        self.fixed = jnp.zeros(self.size, bool)
        if lower is not None and upper is not None:
            self.fixed = lower == upper
        nowhere = jnp.zeros(self.size, bool)
        below = nowhere if lower is None else jnp.isfinite(lower) & ~self.fixed
        above = nowhere if upper is None else jnp.isfinite(upper) & ~self.fixed
        slack = jnp.ones(self.inequalities, bool)
        real = [b for b, bound in ((below, lower), (above, upper)) if bound is not None]
        single = [b for b, bound in ((~above, lower), (~below, upper)) if bound is not None]
        real, single = jnp.concatenate([*real, slack]), jnp.concatenate([*single, slack])
        self.walls = Walls(lower, upper, real, real & single, self.size)

    @property
    def free(self) -> Array:
        """1 for every entry of w that may change, 0 for fixed variables."""
        slack = jnp.ones(self.inequalities, self.dtype)
        return jnp.concatenate([jnp.where(self.fixed, 0, 1).astype(self.dtype), slack])

    @property
    def rows_size(self) -> int:
        """Number of constraints."""
        return self.equalities + self.inequalities

    def _flat_bound(self, bound: PyTree, value: PyTree) -> Array:
        leaves = jax.tree.leaves(bound)
        if len(leaves) == 1 and jnp.ndim(leaves[0]) == 0:
            bound = jax.tree.map(lambda y: jnp.broadcast_to(leaves[0], y.shape), value)
        return ravel_pytree(bound)[0].astype(self.dtype)

    def rows(self, value: PyTree) -> Array:
        """(c_E, c_I) in their own units."""
        parts = [jnp.zeros(0, self.dtype)]
        for fun in (self.problem.equality, self.problem.inequality):
            if fun is not None:
                parts.append(ravel_pytree(fun(value, self.args))[0].astype(self.dtype))
        return jnp.concatenate(parts)

    def unravel_rows(self, rows: Array) -> PyTree:
        """What the constraints return, from flat values; a pair where there are both kinds."""
        parts = (
            _unflatten(self._equality, rows[: self.equalities]),
            _unflatten(self._inequality, rows[self.equalities :]),
        )
        there = tuple(part for part in parts if part is not None)
        return there[0] if len(there) == 1 else there

    def linearize(
        self, y: Array, multipliers: Array, scaling: Scaling
    ) -> tuple[Evaluation, Callable[[Array, Array], tuple[Array, Array, Array]]]:
        """Evaluate once; the second result maps (dy, dλ) to the changes of f, gradient and rows."""

        def lagrangian(y, multipliers):
            value = self.unravel(y)
            objective, aux = self.problem.objective(value, self.args)
            objective = scaling.objective * jnp.asarray(objective, self.dtype)
            rows = scaling.rows * self.rows(value)
            return objective + jnp.vdot(multipliers, rows), (objective, rows, aux)

        def parts(y, multipliers):
            gradient, (objective, rows, aux) = jax.grad(lagrangian, has_aux=True)(y, multipliers)
            return (objective, gradient, rows), aux

        y, multipliers = vary_like((y, multipliers), self.args)  # inside `shard_map`
        (objective, gradient, rows), tangent, aux = jax.linearize(
            parts, y, multipliers, has_aux=True
        )

        def change(dy, drows):
            return tangent(*vary_like((dy, drows), (y, multipliers)))

        return Evaluation(objective, gradient, rows, aux), change

    def with_slack(self, rows: Array, slack: Array) -> Array:
        """C(w) from the rows without slack variables."""
        return rows.at[self.equalities :].add(slack)

    def inside(self, y: Array) -> Array:
        """The point moved into the interior of its bounds, as IPOPT does."""
        push = jnp.asarray(1e-2, y.dtype)
        low, up = self.walls.lower, self.walls.upper
        width = jnp.inf if low is None or up is None else up - low
        y_in = y
        if low is not None:
            gap = jnp.minimum(push * jnp.maximum(1, jnp.abs(low)), push * width)
            y_in = jnp.where(jnp.isfinite(low), jnp.maximum(y_in, low + gap), y_in)
        if up is not None:
            gap = jnp.minimum(push * jnp.maximum(1, jnp.abs(up)), push * width)
            y_in = jnp.where(jnp.isfinite(up), jnp.minimum(y_in, up - gap), y_in)
        return y_in if low is None else jnp.where(self.fixed, low, y_in)

    def multipliers(self, rows: Array, walls: Array, scaling: Scaling, gradient: Array):
        """`Multipliers` in the units of the program, from those of the scaled one.

        Args:
            rows: Of the constraints.
            walls: Of the limits.
            scaling: Of the program.
            gradient: Of the scaled Lagrangian in y, without the walls; for fixed variables.
        """
        rows = rows * scaling.rows / scaling.objective
        low, up, _ = self.walls.split(walls / scaling.objective)
        if low is not None:
            low = jnp.where(self.fixed, gradient / scaling.objective, low)
        return Multipliers(
            _unflatten(self._equality, rows[: self.equalities]),
            _unflatten(self._inequality, jnp.maximum(rows[self.equalities :], 0)),
            None if low is None or self.problem.lower is None else self.unravel(low),
            None if up is None else self.unravel(up),
        )

    def flat_multipliers(self, given: Multipliers, scaling: Scaling) -> tuple[Array, Array]:
        """The inverse of `multipliers`: those of the constraints, and those of the limits."""
        parts = [jnp.zeros(0, self.dtype)]
        for part in (given.equality, given.inequality):
            if part is not None:
                parts.append(ravel_pytree(part)[0].astype(self.dtype))
        rows = jnp.concatenate(parts) * scaling.objective / scaling.rows
        limits = [
            jnp.zeros(self.size, self.dtype)
            if part is None
            else ravel_pytree(part)[0].astype(self.dtype) * scaling.objective
            for part, bound in ((given.lower, self.walls.lower), (given.upper, self.walls.upper))
            if bound is not None
        ]
        return rows, jnp.concatenate([*limits, rows[self.equalities :]])


def _shape(fun: Any, value: PyTree, args: PyTree) -> PyTree:
    return None if fun is None else jax.eval_shape(fun, value, args)


def _entries(shapes: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _unflatten(shapes: PyTree, flat: Array) -> PyTree:
    if shapes is None:
        return None
    leaves, structure = jax.tree.flatten(shapes)
    out, first = [], 0
    for leaf in leaves:
        out.append(flat[first : first + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
        first += leaf.size
    return jax.tree.unflatten(structure, out)
