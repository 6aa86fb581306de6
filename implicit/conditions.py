"""Optimality conditions: functions of (x, *args) that are zero at a solution.

Each condition is an `equinox.Module` with two facts about ∂F/∂x, `symmetric` and
`positive_definite`, which the linear solver of the implicit rule uses.
"""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree


class Condition(eqx.Module):
    """Base of all conditions: `condition(x, *args)` is a PyTree like `x`, zero at a solution.

    Attributes:
        symmetric: ∂F/∂x equals its transpose.
        positive_definite: ∂F/∂x is, besides, positive definite.
    """

    symmetric: ClassVar[bool] = False
    positive_definite: ClassVar[bool] = False

    def __call__(self, x: PyTree, *args: PyTree) -> PyTree:
        """Return the residual F(x, *args)."""
        raise NotImplementedError


class Root(Condition):
    """F(x, *args) = 0 as it stands.

    Args:
        fun: The function F.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import Root
        >>> print(Root(lambda x, t: x**2 - t)(jnp.array(3.0), 9.0))
        0.0
    """

    fun: Callable[..., PyTree]

    def __call__(self, x: PyTree, *args: PyTree) -> PyTree:
        """Return F(x, *args)."""
        return self.fun(x, *args)


class FixedPoint(Condition):
    """x − T(x, *args) = 0.

    The sign makes ∂F/∂x the identity minus a contraction, so that dropping ∂T/∂x or summing its
    powers approximates the inverse.

    Args:
        fun: The map T.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import FixedPoint
        >>> print(FixedPoint(lambda x, t: x / 2 + t)(jnp.array(4.0), 2.0))
        0.0
    """

    fun: Callable[..., PyTree]

    def __call__(self, x: PyTree, *args: PyTree) -> PyTree:
        """Return x − T(x, *args)."""
        return jax.tree.map(jnp.subtract, x, self.fun(x, *args))


class Stationary(Condition):
    """∇_x f(x, *args) = 0, the first-order condition of min f; ∂F/∂x is the Hessian.

    Args:
        fun: The function f, returning a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import Stationary
        >>> print(Stationary(lambda x, t: (x - t) ** 2)(jnp.array(1.0), 3.0))
        -4.0
    """

    symmetric: ClassVar[bool] = True
    fun: Callable[..., Array]

    def __call__(self, x: PyTree, *args: PyTree) -> PyTree:
        """Return ∇_x f(x, *args)."""
        return jax.grad(self.fun)(x, *args)


class LeastSquares(Condition):
    """J(x)ᵀ r(x, *args) = 0, the first-order condition of min ½‖r‖²; ∂F/∂x is the full Hessian.

    Args:
        residual: The function r, returning a PyTree.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import LeastSquares
        >>> print(LeastSquares(lambda x, t: jnp.array([x - t, 2 * x]))(jnp.array(1.0), 5.0))
        0.0
    """

    symmetric: ClassVar[bool] = True
    residual: Callable[..., PyTree]

    def __call__(self, x: PyTree, *args: PyTree) -> PyTree:
        """Return J(x)ᵀ r(x, *args)."""
        r, pull = jax.vjp(lambda x: self.residual(x, *args), x)
        return pull(r)[0]


class Multipliers(eqx.Module):
    """Lagrange multipliers of a nonlinear program, `None` where it has no such constraint.

    The Lagrangian is f + νᵀc_E + λᵀc_I + z_lᵀ(l − y) + z_uᵀ(y − u), with λ, z_l, z_u ≥ 0.

    Attributes:
        equality: ν, like the output of the equality constraints.
        inequality: λ ≥ 0, like the output of the inequality constraints.
        lower: z_l ≥ 0, like the variables.
        upper: z_u ≥ 0, like the variables.
    """

    equality: PyTree = None
    inequality: PyTree = None
    lower: PyTree = None
    upper: PyTree = None


def _inner(a: PyTree, b: PyTree) -> Array:
    return sum(jax.tree.leaves(jax.tree.map(lambda u, v: jnp.sum(u * v), a, b)), jnp.zeros(()))


def _broadcast(bound: PyTree, like: PyTree) -> PyTree:
    """A bound for every variable: PyTrees like the variables, or one number for all of them."""
    if jax.tree.structure(bound) == jax.tree.structure(like):
        pairs = jax.tree.map(lambda b, y: jnp.broadcast_to(b, y.shape).astype(y.dtype), bound, like)
        return pairs
    return jax.tree.map(lambda y: jnp.broadcast_to(bound, y.shape).astype(y.dtype), like)


class KKT(Condition):
    """Karush–Kuhn–Tucker conditions of min f(y) s.t. c_E(y) = 0, c_I(y) ≤ 0, l ≤ y ≤ u.

    The unknown is the pair `(y, multipliers)`. Complementarity is in active-set form: with the
    indicator m = [λ > −c_I], locally constant away from weakly active constraints, the rows are
    m·c_I − (1 − m)·λ, and m·λ enters the gradient of the Lagrangian. So ∂F/∂x is symmetric, and
    derivatives of all orders are exact under strict complementarity. Bounds are treated alike; a
    variable with l = u counts as held by its lower bound, whose multiplier then has either sign.

    Args:
        fun: f(y, *args) → scalar.
        equality: c_E(y, *args) → PyTree, or `None`.
        inequality: c_I(y, *args) → PyTree, ≤ 0 where feasible, or `None`.
        lower: l, a PyTree like y, a single number, or `None`; −inf where there is none.
        upper: u, likewise, +inf where there is none.

    Reference:
        Jittorntrum, "Solution point differentiability without strict complementarity", 1984;
        active-set rows as in Amos and Kolter, "OptNet", ICML 2017, made symmetric.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import KKT, Multipliers
        >>> kkt = KKT(lambda y: jnp.sum(y**2) / 2, inequality=lambda y: 1.0 - y[0])
        >>> y, multipliers = jnp.array([1.0, 0.0]), Multipliers(inequality=jnp.array(1.0))
        >>> gradient, rows = kkt((y, multipliers))
        >>> print(gradient, rows.inequality)
        [0. 0.] 0.0
    """

    symmetric: ClassVar[bool] = True
    fun: Callable[..., Array]
    equality: Callable[..., PyTree] | None = None
    inequality: Callable[..., PyTree] | None = None
    lower: PyTree = None
    upper: PyTree = None

    def __call__(self, x: tuple[PyTree, Multipliers], *args: PyTree) -> tuple[PyTree, Multipliers]:
        """Return the gradient of the Lagrangian and the constraint rows."""
        y, multipliers = x
        c_i = None if self.inequality is None else self.inequality(y, *args)
        below = None if self.lower is None else _below(self.lower, y)
        above = None if self.upper is None else _above(y, self.upper)
        m_i = _active(multipliers.inequality, c_i)
        m_l = _active(multipliers.lower, below)
        m_u = _active(multipliers.upper, above)
        if self.lower is not None and self.upper is not None:
            fixed = jax.tree.map(jnp.equal, _broadcast(self.lower, y), _broadcast(self.upper, y))
            m_l = jax.tree.map(jnp.logical_or, m_l, fixed)
            m_u = jax.tree.map(lambda a, b: a & ~b, m_u, m_l)

        def lagrangian(y):
            value = self.fun(y, *args)
            if self.equality is not None:
                value = value + _inner(multipliers.equality, self.equality(y, *args))
            if self.inequality is not None:
                value = value + _inner(
                    _only(m_i, multipliers.inequality), self.inequality(y, *args)
                )
            if self.lower is not None:
                value = value - _inner(_only(m_l, multipliers.lower), y)
            if self.upper is not None:
                value = value + _inner(_only(m_u, multipliers.upper), y)
            return value

        rows = Multipliers(
            None if self.equality is None else self.equality(y, *args),
            _rows(m_i, c_i, multipliers.inequality),
            _rows(m_l, below, multipliers.lower),
            _rows(m_u, above, multipliers.upper),
        )
        return jax.grad(lagrangian)(y), rows


def _below(lower, y):
    return jax.tree.map(jnp.subtract, _broadcast(lower, y), y)


def _above(y, upper):
    return jax.tree.map(jnp.subtract, y, _broadcast(upper, y))


def _active(multiplier, constraint):
    if constraint is None:
        return None
    return jax.tree.map(lambda m, c: m > -c, multiplier, constraint)


def _only(mask, values):
    return jax.tree.map(lambda m, v: jnp.where(m, v, 0), mask, values)


def _rows(mask, constraint, multiplier):
    if constraint is None:
        return None
    # the constraint may be −inf where a bound is absent: `where`, never a product
    return jax.tree.map(
        lambda m, c, v: jnp.where(m, jnp.where(m, c, 0), -v), mask, constraint, multiplier
    )


class PenaltySystem(Condition):
    """First-order system of a penalized bilevel problem; the unknown is the triple (x, y, z).

    With h = σ f + g: y minimizes h(x, ·), z minimizes g(x, ·), and x is stationary for
    ψ_σ(x) = (min h(x, ·) − min g(x, ·)) / σ:

        ∇_x f(x, y) + (∇_x g(x, y) − ∇_x g(x, z)) / σ = 0,
        ∇_y h(x, y) = 0,    ∇_z g(x, z) = 0,

    each as a projected-gradient fixed point v − P(v − ∇) where a set is given.

    Args:
        upper: f(x, y, *args) → scalar.
        lower: g(x, y, *args) → scalar.
        sigma: Penalty σ > 0, dimensionless.
        upper_set: Projection onto the set of x, or `None`.
        lower_set: Projection onto the set of y and z, or `None`.

    Reference:
        Kwon, Kwon, Wright, Nowak, "On Penalty Methods for Nonconvex Bilevel Optimization and
        First-Order Stochastic Approximation", ICLR 2024.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import PenaltySystem
        >>> f = lambda x, y: (y - 1.0) ** 2 / 2
        >>> g = lambda x, y: (y - x) ** 2 / 2
        >>> one = jnp.array(1.0)
        >>> residual = PenaltySystem(f, g, sigma=0.1)((one, one, one))
        >>> print(*residual)
        0.0 0.0 0.0
    """

    upper: Callable[..., Array]
    lower: Callable[..., Array]
    sigma: float | Array
    upper_set: Callable[[PyTree], PyTree] | None = None
    lower_set: Callable[[PyTree], PyTree] | None = None

    def __call__(
        self, xyz: tuple[PyTree, PyTree, PyTree], *args: PyTree
    ) -> tuple[PyTree, PyTree, PyTree]:
        """Return the three gradient (or projected-gradient) residuals."""
        x, y, z = xyz
        upper_x, upper_y = jax.grad(self.upper, argnums=(0, 1))(x, y, *args)
        lower_x, lower_y = jax.grad(self.lower, argnums=(0, 1))(x, y, *args)
        other_x, other_z = jax.grad(self.lower, argnums=(0, 1))(x, z, *args)
        grad_x = jax.tree.map(lambda f, g, o: f + (g - o) / self.sigma, upper_x, lower_x, other_x)
        grad_y = jax.tree.map(lambda f, g: self.sigma * f + g, upper_y, lower_y)
        return (
            _projected(x, grad_x, self.upper_set),
            _projected(y, grad_y, self.lower_set),
            _projected(z, other_z, self.lower_set),
        )


def _projected(x, gradient, projection):
    if projection is None:
        return gradient
    moved = projection(jax.tree.map(jnp.subtract, x, gradient))
    return jax.tree.map(jnp.subtract, x, moved)
