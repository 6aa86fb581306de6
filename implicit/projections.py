"""Projections onto convex sets, with derivatives of every order.

Everything of `optax.projections` is here under its own name; the sets that optax lacks are added in
the same style: `projection_<set>(x, hyperparams)` is the point of the set closest to `x`. All of
them are functions of arrays that run under `jit`, `vmap` and `grad`, and the hyper-parameters are
differentiable arguments. Where the projection has a formula once its active set is known, that
formula is differentiated; elsewhere the optimality conditions are, through `attach`.

A projection is differentiable almost everywhere. At a kink (a constraint that is active with a zero
multiplier) the derivative is that of one of the neighboring pieces, and finite.
"""

import operator as op
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float, PyTree
from optax.projections import (
    projection_box,
    projection_halfspace,
    projection_hypercube,
    projection_hyperplane,
    projection_l1_ball,
    projection_l2_ball,
    projection_linf_ball,
    projection_non_negative,
    projection_simplex,
    projection_vector,
)

from jaxopt_ext.implicit.attach import attach
from jaxopt_ext.implicit.hoist import detach, vary_like
from jaxopt_ext.implicit.linear_solvers import LinearOperator

__all__ = [
    "kl_projection_birkhoff",
    "kl_projection_transport",
    "projection_affine_set",
    "projection_birkhoff",
    "projection_box",
    "projection_box_section",
    "projection_halfspace",
    "projection_hypercube",
    "projection_hyperplane",
    "projection_l1_ball",
    "projection_l1_sphere",
    "projection_l2_ball",
    "projection_l2_sphere",
    "projection_linf_ball",
    "projection_non_negative",
    "projection_polyhedron",
    "projection_psd_cone",
    "projection_second_order_cone",
    "projection_simplex",
    "projection_sparse_simplex",
    "projection_transport",
    "projection_vector",
]


# ---- arguments ----------------------------------------------------------------------------------


def as_floating(name: str, value: Any, ndim: int | None = None) -> Array:
    """`value` as a strongly typed floating array.

    Raises:
        TypeError: Its dtype is not real floating.
        ValueError: It has another number of axes than `ndim`.
    """
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} has dtype {array.dtype}, expected a real floating dtype")
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name} has shape {array.shape}, expected {ndim} axes")
    return array.astype(array.dtype)


def as_parameter(name: str, value: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """`value` as an array of a given dtype and shape; a single number stands for all entries.

    Raises:
        ValueError: It has another shape.
    """
    array = jnp.asarray(value).astype(dtype)
    if array.shape not in (shape, ()):
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    return jnp.broadcast_to(array, shape)


def require(holds: Any, message: str, *values: Any) -> None:
    """Raise ValueError if the condition on concrete values fails; traced values are believed."""
    if not any(isinstance(value, Tracer) for value in values):
        if not holds(*(np.asarray(value) for value in values)):
            raise ValueError(message)


def non_negative(name: str, value: Any) -> None:
    """Raise ValueError if a concrete value is negative or not a number."""
    require(lambda v: np.all(v >= 0), f"{name} is {value}, expected values >= 0", value)


def tuple_of(name: str, value: Any, names: str) -> tuple:
    """Check that the hyper-parameters are a tuple of the expected length."""
    count = len(names.split(","))
    if not isinstance(value, tuple | list) or len(value) != count:
        got = f"{len(value)} entries" if isinstance(value, tuple | list) else type(value).__name__
        raise ValueError(f"{name} is a {got}, expected the tuple ({names})")
    return tuple(value)


def positive_part(x: Array) -> Array:
    """max(x, 0) with derivative 0 at 0."""
    return jnp.where(x > 0, x, 0)


def safe_norm(tree: PyTree) -> Array:
    """Euclidean norm of a PyTree with gradient 0 at 0; neither overflows nor underflows."""
    flat = ravel_pytree(tree)[0]
    largest = detach(jnp.max(jnp.abs(flat), initial=0))
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    square = jnp.sum((flat / scale) ** 2)
    return scale * jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


# ---- linear solves ------------------------------------------------------------------------------


def _pseudo_inverse_apply(matrix, rhs):
    """Minimum-norm least-squares solution for a symmetric matrix."""
    values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
    largest = jnp.max(jnp.abs(values))
    keep = jnp.abs(values) > 10 * values.size * jnp.finfo(values.dtype).eps * largest
    inverse = jnp.where(keep, 1 / jnp.where(keep, values, 1), 0)
    return vectors @ (inverse * (vectors.T @ rhs))


def _minimum_norm(operator: LinearOperator, rhs: PyTree) -> PyTree:
    """Linear solver of the implicit rule for symmetric operators that may be singular."""

    def solve(mv, b):
        flat, unravel = ravel_pytree(b)
        return unravel(_pseudo_inverse_apply(LinearOperator(mv, b).as_matrix(), flat))

    return jax.lax.custom_linear_solve(operator.mv, rhs, solve, solve, symmetric=True)


# ---- spheres, simplices -------------------------------------------------------------------------


def projection_l2_sphere(tree: PyTree, scale: ArrayLike = 1) -> PyTree:
    """Closest point of the sphere: argmin_y ‖y − x‖² subject to ‖y‖₂ = scale.

    As optax's, but at x = 0, where every point of the sphere is closest, it returns the one with
    equal entries, with derivative zero, instead of NaN.

    Args:
        tree: x, a PyTree of floating arrays.
        scale: Radius, a number.

    Returns:
        The projection, a PyTree like `tree`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import projections
        >>> print(projections.projection_l2_sphere(jnp.array([3.0, 4.0]), 10.0))
        [6. 8.]
    """
    zero = detach(safe_norm(tree)) == 0
    return optax.projections.projection_l2_sphere(
        jax.tree.map(lambda x: jnp.where(zero, jnp.ones_like(x), x), tree), scale
    )


def _simplex(values: Float[Array, " n"], scale: Array) -> Float[Array, " n"]:
    """Projection onto {y >= 0, sum(y) = scale} by sorting; piecewise linear in both arguments."""
    ordered = jnp.sort(detach(values), descending=True)
    counts = jnp.arange(1, values.size + 1).astype(values.dtype)
    thresholds = (jnp.cumsum(ordered) - detach(scale)) / counts
    rank = jnp.maximum(jnp.sum(ordered > thresholds), 1)
    support = detach(values) > thresholds[rank - 1]
    size = jnp.maximum(jnp.sum(support), 1).astype(values.dtype)
    threshold = (jnp.sum(jnp.where(support, values, 0)) - scale) / size
    return jnp.where(support, positive_part(values - threshold), 0)


def projection_l1_sphere(tree: PyTree, scale: ArrayLike = 1) -> PyTree:
    """A closest point of the l1 sphere: argmin_y ‖y − x‖² subject to ‖y‖₁ = scale.

    As optax's, but entries of x that are exactly zero count as positive, so that the result lies on
    the sphere also when the projection moves them (optax leaves them at zero).

    Args:
        tree: x, a PyTree of floating arrays.
        scale: Radius, a number >= 0.

    Returns:
        The projection, a PyTree like `tree`.

    Raises:
        ValueError: `scale` is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import projections
        >>> print(projections.projection_l1_sphere(jnp.array([0.0, -0.5])))
        [ 0.25 -0.75]
    """
    non_negative("scale", scale)
    flat, unravel = ravel_pytree(tree)
    sign = jnp.where(flat >= 0, 1, -1).astype(flat.dtype)
    return unravel(sign * _simplex(sign * flat, as_parameter("scale", scale, (), flat.dtype)))


def projection_sparse_simplex(
    x: Float[ArrayLike, " n"], max_nz: int, scale: ArrayLike = 1
) -> Float[Array, " n"]:
    """A closest sparse point of the simplex.

    argmin_y ‖y − x‖² subject to y >= 0, sum(y) = scale, and at most `max_nz` entries of y nonzero.
    The set is not convex; among entries of x that tie for the last place the first ones are kept.
    The derivative is that of the projection onto the simplex of the kept entries.

    Args:
        x: The point to project, shape (n,).
        max_nz: Largest number of nonzero entries, a Python integer between 1 and n.
        scale: The sum, a number > 0.

    Returns:
        The projection, shape (n,).

    Raises:
        ValueError: `x` is not a vector, `max_nz` is out of range, or `scale` is negative.

    Reference:
        Kyrillidis, Becker, Cevher, Koch, "Sparse Projections onto the Simplex", ICML 2013.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import projections
        >>> print(projections.projection_sparse_simplex(jnp.array([0.5, 0.1, 0.7]), 2).round(3))
        [0.4 0.  0.6]
    """
    x = as_floating("x", x, 1)
    max_nz = op.index(max_nz)
    if not 1 <= max_nz <= x.size:
        raise ValueError(f"max_nz is {max_nz}, expected an integer between 1 and {x.size}")
    non_negative("scale", scale)
    kept = jax.lax.top_k(detach(x), max_nz)[1]
    values = _simplex(x[kept], as_parameter("scale", scale, (), x.dtype))
    return jnp.zeros_like(x).at[kept].set(values)


# ---- affine sets and polyhedra ------------------------------------------------------------------


def _rows(names: str, matrix, vector, x):
    """Constraint rows scaled to unit length; the scaling leaves the set as it is."""
    name_matrix, name_vector = names.split(",")
    if (matrix is None) != (vector is None):
        missing, given = sorted((name_matrix, name_vector), key=lambda n: n == name_matrix)
        missing, given = (given, missing) if matrix is None else (missing, given)
        raise ValueError(f"{missing} is None but {given} is not, expected both or neither")
    if matrix is None:
        return jnp.zeros((0, x.size), x.dtype), jnp.zeros((0,), x.dtype)
    matrix = jnp.asarray(matrix).astype(x.dtype)
    if matrix.ndim != 2 or matrix.shape[1] != x.size:
        raise ValueError(f"{name_matrix} has shape {matrix.shape}, expected (rows, {x.size})")
    vector = jnp.asarray(vector).astype(x.dtype)
    if vector.shape != matrix.shape[:1]:
        raise ValueError(f"{name_vector} has shape {vector.shape}, expected {matrix.shape[:1]}")
    length = detach(jnp.sqrt(jnp.sum(matrix**2, axis=1)))
    length = jnp.where(length > 0, length, 1)
    return matrix / length[:, None], vector / length


def _active_rows(multipliers, x, rows, rhs, active):
    """Zero where the active rows hold at y = x − rowsᵀ multipliers and the other multipliers are 0.

    The derivative with respect to the multipliers is the masked Gram matrix: symmetric, positive
    semidefinite, locally constant in the multipliers.
    """
    y = x - jnp.where(active, multipliers, 0) @ rows
    return jnp.where(active, rhs - rows @ y, multipliers)


_active_rows.symmetric = True  # type: ignore[attr-defined]


def _on_active_rows(x, rows, rhs, active):
    """The point of {rows_active y = rhs_active} closest to x; differentiable in x, rows and rhs."""
    with_derivatives = (x, rows, rhs)
    x, rows, rhs = detach(with_derivatives)
    both = active[:, None] & active[None, :]
    gram = jnp.where(both, rows @ rows.T, jnp.diag((~active).astype(x.dtype)))
    multipliers = jnp.zeros_like(rhs)
    for _ in range(2):  # the second pass removes the rounding error of the first
        residual = jnp.where(active, rows @ (x - multipliers @ rows) - rhs, 0)
        multipliers = multipliers + _pseudo_inverse_apply(gram, residual)
    multipliers = attach(
        _active_rows, multipliers, *with_derivatives, active, linear_solver=_minimum_norm
    )
    x, rows, _ = with_derivatives
    return x - jnp.where(active, multipliers, 0) @ rows


def projection_affine_set(
    x: Float[ArrayLike, " n"], hyperparams: tuple[ArrayLike, ArrayLike]
) -> Float[Array, " n"]:
    """Closest point of an affine set: argmin_y ‖y − x‖² subject to A y = b.

    y = x − Aᵀ(A Aᵀ)⁺(A x − b), in O(m² n + m³) operations. Dependent rows are allowed. If the
    equations contradict each other, the result is the point closest to x among their least-squares
    solutions (rows scaled to unit length).

    Args:
        x: The point to project, shape (n,).
        hyperparams: The pair (A, b) of shapes (m, n) and (m,).

    Returns:
        The projection, shape (n,). Derivatives of all orders with respect to x and b are exact, and
        with respect to A where its rows are independent.

    Raises:
        TypeError: `x` is not floating.
        ValueError: A shape does not fit.

    Reference:
        Boyd and Vandenberghe, "Convex Optimization", 2004, section 8.1.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import projections
        >>> A, b = jnp.array([[1.0, 1.0]]), jnp.array([1.0])
        >>> print(projections.projection_affine_set(jnp.array([2.0, 1.0]), (A, b)).round(4))
        [1. 0.]
    """
    x = as_floating("x", x, 1)
    A, b = tuple_of("hyperparams", hyperparams, "A, b")
    rows, rhs = _rows("A,b", A, b, x)
    if not rhs.size:
        return x
    return _on_active_rows(x, rows, rhs, jnp.ones(rhs.shape, bool))


def _dual_active_set(x, rows, rhs, equality):
    """Which rows hold as equations at the projection, and whether the set has a point.

    The method of Goldfarb and Idnani: the violated row p enters; multipliers move until p holds
    or the multiplier of an inequality reaches zero, and that row leaves.
    """
    eps = jnp.finfo(x.dtype).eps
    size = 1 + jnp.max(jnp.abs(x)) + jnp.max(jnp.abs(rhs))
    tol = 50 * eps * size
    max_steps = 10 * (rhs.size + 10)
    gram = rows @ rows.T
    index = jnp.arange(rhs.size)

    def running(state):
        step, _, _, _, status = state
        return (status == 0) & (step < max_steps)

    def body(state):
        step, multipliers, active, entering, _ = state
        residual = rows @ (x - multipliers @ rows) - rhs
        violation = jnp.where(active, -jnp.inf, jnp.where(equality, jnp.abs(residual), residual))
        worst = jnp.argmax(violation)
        p = jnp.where(entering < 0, worst, entering)
        feasible = (entering < 0) & (violation[worst] <= tol)
        sign = jnp.where(equality[p] & (residual[p] < 0), -1, 1).astype(x.dtype)
        # the row of p as a combination of the active ones, and what is left of it
        both = active[:, None] & active[None, :]
        masked = jnp.where(both, gram, 0) + jnp.diag(jnp.where(active, 10 * eps, 1).astype(x.dtype))
        factor = jax.scipy.linalg.cho_factor(masked, lower=True)
        normal = sign * rows[p]
        combination = jnp.zeros_like(multipliers)
        for _ in range(2):
            missing = jnp.where(active, rows @ (normal - combination @ rows), 0)
            combination = combination + jax.scipy.linalg.cho_solve(factor, missing)
        left = normal - combination @ rows
        square = left @ left
        independent = square > 1e3 * eps
        full = jnp.where(independent, violation[p] / jnp.where(independent, square, 1), jnp.inf)
        blocks = active & ~equality & (combination > eps)
        ratios = jnp.where(blocks, multipliers / jnp.where(blocks, combination, 1), jnp.inf)
        leaving = jnp.argmin(ratios)
        partial = jnp.maximum(ratios[leaving], 0)
        stuck = ~jnp.isfinite(jnp.minimum(full, partial))
        enters = full <= partial
        length = jnp.where(stuck, 0, jnp.minimum(full, partial))
        moved = multipliers - length * combination
        moved = jnp.where(index == p, multipliers + sign * length, moved)
        leaves = (index == leaving) & ~enters
        moved = jnp.where(leaves, 0, moved)
        now_active = jnp.where(enters, active | (index == p), active & ~leaves)
        close = violation[p] <= jnp.sqrt(eps) * size  # a dependent row, off by rounding alone
        status = jnp.where(feasible | (stuck & close), 1, jnp.where(stuck, 2, 0))
        stay = status != 0
        return (
            step + 1,
            jnp.where(stay, multipliers, moved),
            jnp.where(stay, active, now_active),
            jnp.where(enters, -1, p),
            status,
        )

    start = (
        jnp.zeros((), jnp.int32),
        jnp.zeros_like(rhs),
        jnp.zeros(rhs.shape, bool),
        jnp.full((), -1, index.dtype),
        jnp.zeros((), jnp.int32),
    )
    body_typed = _typed(body, start)
    start = vary_like(start, (x, rows, rhs))
    _, _, active, _, status = jax.lax.while_loop(running, body_typed, start)
    return active | equality, status == 1


def _typed(body, start):
    """The loop body with the dtypes of its outputs held at those of the start."""
    return lambda state: jax.tree.map(lambda new, old: new.astype(old.dtype), body(state), start)


def projection_polyhedron(
    x: Float[ArrayLike, " n"],
    hyperparams: tuple[ArrayLike | None, ArrayLike | None, ArrayLike | None, ArrayLike | None],
) -> Float[Array, " n"]:
    """Closest point of a polyhedron: argmin_y ‖y − x‖² subject to A y = b, G y <= h.

    A dual active-set method finds which of the m rows hold as equations, in about as many steps of
    O(m³ + m n) as there are active rows; the projection onto these rows follows.

    Args:
        x: The point to project, shape (n,).
        hyperparams: The tuple (A, b, G, h) of shapes (p, n), (p,), (q, n), (q,); `None` in place of
            A and b, or of G and h, where there are no such constraints.

    Returns:
        The projection, shape (n,); NaN if the set is empty. Derivatives of all orders with respect
        to x, b and h are exact under strict complementarity, and with respect to A and G where
        besides the active rows are independent.

    Raises:
        TypeError: `x` is not floating.
        ValueError: A shape does not fit.

    Reference:
        Goldfarb and Idnani, "A numerically stable dual method for solving strictly convex quadratic
        programs", Mathematical Programming 27, 1983.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import projections
        >>> G, h = jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.array([1.0, 1.5])
        >>> x = jnp.array([2.0, 1.0])
        >>> print(projections.projection_polyhedron(x, (None, None, G, h)).round(4))
        [1.  0.5]
    """
    x = as_floating("x", x, 1)
    A, b, G, h = tuple_of("hyperparams", hyperparams, "A, b, G, h")
    equations, inequalities = _rows("A,b", A, b, x), _rows("G,h", G, h, x)
    rows, rhs = (jnp.concatenate(pair) for pair in zip(equations, inequalities, strict=True))
    if not rhs.size:
        return x
    equality = jnp.arange(rhs.size) < equations[1].size
    active, found = _dual_active_set(detach(x), detach(rows), detach(rhs), equality)
    return jnp.where(found, _on_active_rows(x, rows, rhs, active), jnp.nan)


def projection_box_section(
    x: Float[ArrayLike, " n"],
    hyperparams: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike],
) -> Float[Array, " n"]:
    """Closest point of a box cut by a hyperplane.

    argmin_y ‖y − x‖² subject to lower <= y <= upper and w·y = c. The solution is
    clip(x − τ w, lower, upper); the breakpoints of w·clip(x − τ w, lower, upper) are sorted, the
    interval that holds τ is found by bisection over them, and τ is then a quotient of sums. The
    result is exact to rounding, in O(n log n) operations.

    Args:
        x: The point to project, shape (n,).
        hyperparams: The tuple (lower, upper, w, c): bounds of shape (n,) or single numbers, ±inf
            where there is none; weights of shape (n,) or a single number, of either sign; the value
            c, a number.

    Returns:
        The projection, shape (n,); NaN if the set is empty. Derivatives of all orders are exact
        where no free entry touches its bound; where every entry is at a bound (c at the end of its
        range) they are those with all entries held.

    Raises:
        TypeError: `x` is not floating.
        ValueError: A shape does not fit, or a lower bound exceeds its upper bound.

    Reference:
        Brucker, "An O(n) algorithm for quadratic knapsack problems", Operations Research Letters 3,
        1984.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import projections
        >>> x = jnp.array([0.2, 0.9, 2.0])
        >>> print(projections.projection_box_section(x, (0.0, 1.0, 1.0, 1.5)).round(4))
        [0.  0.5 1. ]
    """
    x = as_floating("x", x, 1)
    names = ("lower", "upper", "w")
    given = tuple_of("hyperparams", hyperparams, "lower, upper, w, c")
    lower, upper, w = (
        as_parameter(name, value, x.shape, x.dtype)
        for name, value in zip(names, given[:3], strict=True)
    )
    c = as_parameter("c", given[3], (), x.dtype)
    require(
        lambda low, up: np.all(low <= up),
        "lower exceeds upper in some entry, expected lower <= upper",
        lower,
        upper,
    )
    middle, feasible = _section_multiplier(*detach((x, lower, upper, w, c)))
    moved = detach(x) - middle * detach(w)
    low, high = moved <= detach(lower), moved >= detach(upper)
    free = ~low & ~high & (w != 0)
    held = jnp.where(
        low, lower, jnp.where(high, upper, x)
    )  # entries with w = 0 stay where they are
    square = jnp.sum(jnp.where(free, w**2, 0))
    excess = jnp.sum(w * jnp.where(free, x, held)) - c
    tau = jnp.where(square > 0, excess / jnp.where(square > 0, square, 1), 0)
    y = jnp.where(free, x - tau * w, held)
    y = jnp.where(free, y - _rounding(y, lower, upper), y)
    return jnp.where(feasible, y, jnp.nan)


def _rounding(y, lower, upper):
    """By how much rounding has moved y out of its bounds, as a constant."""
    return detach(y - jnp.clip(y, lower, upper))


def _section_multiplier(x, lower, upper, w, c):
    """A multiplier inside the interval of breakpoints that holds the root; is there a root?"""
    nonzero = w != 0
    divisor = jnp.where(nonzero, w, 1)
    ends = jnp.concatenate([(x - lower) / divisor, (x - upper) / divisor])
    breaks = jnp.sort(jnp.where(jnp.concatenate([nonzero, nonzero]), ends, jnp.inf))
    finite = jnp.isfinite(breaks)

    def value(tau):
        return jnp.sum(w * jnp.clip(x - tau * w, lower, upper)) - c

    def at_or_left_of_root(i):
        at = jnp.where(finite[i], breaks[i], 0)
        return jnp.where(finite[i], value(at) >= 0, breaks[i] < 0)

    def halve(_, bracket):
        low, high = bracket  # breakpoint `low` is left of the root, `high` right of it
        i = (low + high) // 2
        left = at_or_left_of_root(i)
        more = high - low > 1
        low, high = jnp.where(more & left, i, low), jnp.where(more & ~left, i, high)
        return low, high

    count = breaks.size
    bracket = (jnp.full((), -1, jnp.int32), jnp.full((), count, jnp.int32))
    bracket = vary_like(bracket, (x, lower, upper, w, c))
    low, high = jax.lax.fori_loop(0, count.bit_length() + 1, halve, bracket)
    left = jnp.where(low >= 0, breaks[jnp.maximum(low, 0)], -jnp.inf)
    right = jnp.where(high < count, breaks[jnp.minimum(high, count - 1)], jnp.inf)
    has_left, has_right = jnp.isfinite(left), jnp.isfinite(right)
    safe_left, safe_right = jnp.where(has_left, left, 0), jnp.where(has_right, right, 0)
    beyond = 1 + jnp.abs(safe_left) + jnp.abs(safe_right)
    middle = jnp.where(
        has_left & has_right,
        safe_left + (safe_right - safe_left) / 2,
        jnp.where(has_left, safe_left + beyond, jnp.where(has_right, safe_right - beyond, 0)),
    )
    fixed = jnp.sum(jnp.where(nonzero, 0, w))  # zero, with the type of w
    least = jnp.sum(jnp.where(nonzero, jnp.minimum(w * lower, w * upper), fixed))
    most = jnp.sum(jnp.where(nonzero, jnp.maximum(w * lower, w * upper), fixed))
    slack = 100 * x.size * jnp.finfo(x.dtype).eps * (1 + jnp.abs(c) + jnp.max(jnp.abs(w)))
    return middle, (least <= c + slack) & (most >= c - slack) & jnp.all(lower <= upper)


# ---- transport ----------------------------------------------------------------------------------


def _marginals(x, marginals):
    x = as_floating("x", x, 2)
    given = tuple_of("marginals", marginals, "a, b")
    a = as_parameter("a", given[0], x.shape[:1], x.dtype)
    b = as_parameter("b", given[1], x.shape[1:], x.dtype)
    for name, value in (("a", a), ("b", b)):
        non_negative(name, value)
    require(
        lambda u, v: abs(u.sum() - v.sum()) <= 1e3 * np.finfo(u.dtype).eps * max(u.sum(), v.sum()),
        "the sums of a and b differ, expected marginals of equal total",
        a,
        b,
    )
    return x, a, b


def _plan(potentials, x):
    u, v = potentials
    return positive_part(x - u[:, None] - v[None, :])


def _marginal_gap(potentials, x, a, b):
    """Gradient of the dual ½‖max(x − u1ᵀ − 1vᵀ, 0)‖² + a·u + b·v."""
    plan = _plan(potentials, x)
    return a - jnp.sum(plan, axis=1), b - jnp.sum(plan, axis=0)


_marginal_gap.symmetric = True  # type: ignore[attr-defined]


def _bipartite(weights):
    """The matrix [[diag(W1), W], [Wᵀ, diag(Wᵀ1)]]."""
    return jnp.block(
        [[jnp.diag(jnp.sum(weights, 1)), weights], [weights.T, jnp.diag(jnp.sum(weights, 0))]]
    )


def _transport_potentials(x, a, b):
    """Semismooth Newton method on the dual, after a few exact minimizations over u and v."""
    eps = jnp.finfo(x.dtype).eps
    total = jnp.maximum(jnp.sum(a), jnp.finfo(x.dtype).tiny)
    rows = x.shape[0]

    def thresholds(values, sums):
        """Per row τ with Σ max(values − τ, 0) = sum."""
        ordered = jnp.sort(values, axis=1, descending=True)
        counts = jnp.arange(1, values.shape[1] + 1).astype(x.dtype)
        candidates = (jnp.cumsum(ordered, axis=1) - sums[:, None]) / counts[None, :]
        rank = jnp.maximum(jnp.sum(ordered > candidates, axis=1), 1)
        return jnp.take_along_axis(candidates, rank[:, None] - 1, axis=1)[:, 0]

    def alternate(_, v):
        u = thresholds(x - v[None, :], a)
        return thresholds((x - u[:, None]).T, b)

    def gap(z):
        return jnp.concatenate(_marginal_gap((z[:rows], z[rows:]), x, a, b))

    def body(state):
        step, z, g, _ = state
        support = (_plan((z[:rows], z[rows:]), x) > 0).astype(x.dtype)
        error = jnp.sum(jnp.abs(g)) / total
        shift = jnp.maximum(1e-3 * jnp.minimum(error, 1), 10 * eps)
        hessian = _bipartite(support) + shift * jnp.eye(z.size, dtype=x.dtype)
        factor = jax.scipy.linalg.cho_factor(hessian, lower=True)
        direction = -jax.scipy.linalg.cho_solve(factor, g)
        slope = g @ direction

        def uphill(trial):  # the dual is convex: where it still falls, it is lower
            halvings, length = trial
            return (halvings < 40) & (gap(z + length * direction) @ direction > -1e-3 * slope)

        length = jax.lax.while_loop(
            uphill,
            lambda trial: (trial[0] + 1, trial[1] / 2),
            vary_like((jnp.zeros((), jnp.int32), jnp.ones((), x.dtype)), (x, a, b)),
        )[1]
        z = z + length * direction
        new = gap(z)
        return step + 1, z, new, jnp.sum(jnp.abs(new)) / total

    v = jax.lax.fori_loop(0, 10, alternate, vary_like(jnp.zeros_like(b), (x, a, b)))
    z = jnp.concatenate([thresholds(x - v[None, :], a), v])
    tol = 4 * eps * x.size**0.5 * (1 + jnp.max(jnp.abs(x)) / total)
    g = gap(z)
    start = (jnp.zeros((), jnp.int32), z, g, jnp.sum(jnp.abs(g)) / total)
    _, z, _, _ = jax.lax.while_loop(
        lambda state: (state[3] > tol) & (state[0] < 100),
        _typed(body, start),
        vary_like(start, (x, a, b)),
    )
    return z[:rows], z[rows:]


def projection_transport(
    x: Float[ArrayLike, "n m"], marginals: tuple[ArrayLike, ArrayLike]
) -> Float[Array, "n m"]:
    """Closest point of the transport polytope.

    argmin_P ‖P − x‖² subject to P >= 0, P 1 = a, Pᵀ 1 = b, for a similarity matrix x (minus a cost
    matrix): the transport plan with quadratic regularization. The dual in n + m potentials is
    minimized by a semismooth Newton method, in O((n + m)³) operations per step and rarely more than
    20 steps.

    Args:
        x: The matrix to project, shape (n, m).
        marginals: The pair (a, b) of shapes (n,) and (m,) or single numbers, nonnegative and of
            equal total.

    Returns:
        The plan P, shape (n, m). Derivatives of all orders are exact where no zero of P is at a
        kink; tangents of a and b must keep the totals equal (on every connected part of the support
        of P), else their least-squares correction is meant.

    Raises:
        TypeError: `x` is not floating.
        ValueError: A shape does not fit, a marginal is negative, or the totals differ.

    Reference:
        Blondel, Seguy, Rolet, "Smooth and Sparse Optimal Transport", AISTATS 2018.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import projections
        >>> x = jnp.array([[0.8, 0.0], [0.0, 0.4]])
        >>> print(projections.projection_transport(x, (0.5, 0.5)).round(3))
        [[0.5 0. ]
         [0.  0.5]]
    """
    x, a, b = _marginals(x, marginals)
    potentials = _transport_potentials(*detach((x, a, b)))
    return _plan(attach(_marginal_gap, potentials, x, a, b, linear_solver=_minimum_norm), x)


def _square(x):
    x = as_floating("x", x, 2)
    if x.shape[0] != x.shape[1]:
        raise ValueError(f"x has shape {x.shape}, expected a square matrix")
    return x


def projection_birkhoff(x: Float[ArrayLike, "n n"]) -> Float[Array, "n n"]:
    """Closest doubly stochastic matrix: argmin_P ‖P − x‖² with P >= 0, P 1 = 1, Pᵀ 1 = 1.

    Method, cost and derivatives are those of `projection_transport`.

    Args:
        x: The matrix to project, shape (n, n).

    Returns:
        The projection, shape (n, n).

    Raises:
        TypeError: `x` is not floating.
        ValueError: `x` is not a square matrix.

    Reference:
        Blondel, Seguy, Rolet, "Smooth and Sparse Optimal Transport", AISTATS 2018.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import projections
        >>> P = projections.projection_birkhoff(jnp.array([[1.0, 0.5], [0.0, 0.5]]))
        >>> print((4 * P).round())
        [[3. 1.]
         [1. 3.]]
    """
    return projection_transport(_square(x), (1, 1))


def _log_sum_exp(values, where, axis):
    """Log Σ exp over the entries of `where`; 0 where there is none."""
    some = jnp.any(where, axis=axis)
    masked = jnp.where(where, values, -jnp.inf)
    shift = detach(jnp.where(some, jnp.max(masked, axis=axis), 0))
    terms = jnp.where(where, values - jnp.expand_dims(shift, axis), -jnp.inf)
    total = jnp.sum(jnp.exp(terms), axis=axis)
    return jnp.where(some, jnp.log(jnp.where(some, total, 1)) + shift, 0)


def _log(marginal):
    return jnp.where(marginal > 0, jnp.log(jnp.where(marginal > 0, marginal, 1)), 0)


def _log_marginal_gap(potentials, x, log_a, log_b, mask):
    """Log of the marginals of exp(f1ᵀ + x + 1gᵀ) over the wanted ones, plus Σf − Σg = 0.

    The sum fixes the direction (1, −1) along which the potentials give the same plan.
    """
    f, g = potentials
    fix = (jnp.sum(f) - jnp.sum(g)) / (f.size + g.size)
    gap_f = f - log_a + _log_sum_exp(x + g[None, :], mask, 1) + fix
    gap_g = g - log_b + _log_sum_exp(x + f[:, None], mask, 0) - fix
    return jnp.where(jnp.any(mask, 1), gap_f, f), jnp.where(jnp.any(mask, 0), gap_g, g)


def _entropic_plan(potentials, x, mask):
    f, g = potentials
    return jnp.where(mask, jnp.exp(jnp.where(mask, x + f[:, None] + g[None, :], 0)), 0)


def _sinkhorn(x, a, b, mask):
    """Sinkhorn's method in the log domain; if it is slow, Newton steps from a heated problem on."""
    eps = jnp.finfo(x.dtype).eps
    log_a, log_b = _log(a), _log(b)
    on_a, on_b = a > 0, b > 0
    total = jnp.maximum(jnp.sum(b), jnp.finfo(x.dtype).tiny)
    size = jnp.max(jnp.abs(x))

    def sweep(f, x):
        g = jnp.where(on_b, log_b - _log_sum_exp(x + f[:, None], mask, 0), 0)
        f = jnp.where(on_a, log_a - _log_sum_exp(x + g[None, :], mask, 1), 0)
        error = jnp.sum(jnp.abs(jnp.sum(_entropic_plan((f, g), x, mask), 0) - b)) / total
        return f, g, error

    def newton(state):
        step, f, _, _, length, heat = state
        heated = x / heat
        f, g, plain = sweep(f, heated)
        plan = _entropic_plan((f, g), heated, mask)
        gradient = jnp.concatenate([jnp.sum(plan, 1) - a, jnp.sum(plan, 0) - b])
        hessian = _bipartite(plan)
        scale = jnp.sqrt(jnp.diag(hessian))
        scale = jnp.where(scale > 0, scale, 1)
        hessian = hessian / (scale[:, None] * scale[None, :])
        null = scale * jnp.where(jnp.arange(scale.size) < a.size, 1, -1).astype(x.dtype)
        null = null / safe_norm(null)
        shift = 10 * eps * jnp.eye(scale.size, dtype=x.dtype)
        hessian = hessian + null[:, None] * null[None, :] + shift
        factor = jax.scipy.linalg.cho_factor(hessian, lower=True)
        direction = -jax.scipy.linalg.cho_solve(factor, gradient / scale) / scale
        trial = sweep(f + length * direction[: a.size], heated)
        better = trial[2] < plain
        f, g, error = (
            jnp.where(better, new, old) for new, old in zip(trial, (f, g, plain), strict=True)
        )
        length = jnp.where(better, jnp.minimum(2 * length, 1), length / 4)
        # the problem cools down to heat 1; its potentials times heat change little
        cooler = jnp.where(error < 0.1, jnp.maximum(heat / 2, 1), heat)
        changed = cooler != heat
        error = jnp.where(changed, jnp.inf, error)
        length = jnp.where(changed | (length < 1e-6), 1, length)
        return step + 1, f * (heat / cooler), g * (heat / cooler), error, length, cooler

    tol = 4 * eps * (x.size**0.5 + size)
    one = jnp.ones((), x.dtype)
    start = (jnp.zeros((), jnp.int32), *sweep(jnp.zeros_like(a), x))
    step, f, g, error = jax.lax.while_loop(
        lambda state: (state[3] > tol) & (state[0] < 200),
        lambda state: (state[0] + 1, *sweep(state[1], x)),
        vary_like(start, (x, a, b)),
    )
    slow = error > tol
    heat = jnp.where(slow, jnp.maximum(size, 1), 1)
    start = (0 * step, jnp.where(slow, 0, f), g, error, one, heat)
    _, f, g, _, _, _ = jax.lax.while_loop(
        lambda state: (state[3] > tol) & (state[0] < 300),
        _typed(newton, start),
        vary_like(start, (x, a, b)),
    )
    shift = (jnp.sum(f) - jnp.sum(g)) / jnp.maximum(jnp.sum(on_a) + jnp.sum(on_b), 1).astype(
        x.dtype
    )
    return jnp.where(on_a, f - shift, 0), jnp.where(on_b, g + shift, 0)


def kl_projection_transport(
    x: Float[ArrayLike, "n m"], marginals: tuple[ArrayLike, ArrayLike]
) -> Float[Array, "n m"]:
    """Point of the transport polytope closest to exp(x) in Kullback-Leibler divergence.

    argmin_P Σ P (log P − x − 1) subject to P >= 0, P 1 = a, Pᵀ 1 = b, for a similarity matrix x
    (minus a cost matrix, divided by the temperature): the entropic transport plan. Sinkhorn's
    method in the log domain, O(n m) per sweep; after 200 sweeps without convergence, Newton steps
    on the potentials of O((n + m)³) each, from a higher temperature down.

    Args:
        x: The logarithm of the matrix to project, finite, shape (n, m).
        marginals: The pair (a, b) of shapes (n,) and (m,) or single numbers, nonnegative and of
            equal total. A zero entry empties its row or column.

    Returns:
        The plan P, shape (n, m). Derivatives of all orders are exact; tangents of a and b must keep
        the totals equal.

    Raises:
        TypeError: `x` is not floating.
        ValueError: A shape does not fit, a marginal is negative, or the totals differ.

    Reference:
        Cuturi, "Sinkhorn Distances", NeurIPS 2013; Newton steps as in Brauer, Clason, Lorenz,
        Wirth, "A Sinkhorn-Newton method for entropic optimal transport", 2017.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import projections
        >>> x = jnp.log(jnp.array([[4.0, 1.0], [1.0, 4.0]]))
        >>> print(projections.kl_projection_transport(x, (0.5, 0.5)).round(3))
        [[0.4 0.1]
         [0.1 0.4]]
    """
    x, a, b = _marginals(x, marginals)
    mask = (a > 0)[:, None] & (b > 0)[None, :]
    potentials = _sinkhorn(detach(x), detach(a), detach(b), mask)
    potentials = attach(_log_marginal_gap, potentials, x, _log(a), _log(b), mask)
    return _entropic_plan(potentials, x, mask)


def kl_projection_birkhoff(x: Float[ArrayLike, "n n"]) -> Float[Array, "n n"]:
    """Doubly stochastic matrix closest to exp(x) in Kullback-Leibler divergence.

    argmin_P Σ P (log P − x − 1) subject to P >= 0, P 1 = 1, Pᵀ 1 = 1. Method, cost and derivatives
    are those of `kl_projection_transport`.

    Args:
        x: The logarithm of the matrix to project, finite, shape (n, n).

    Returns:
        The projection, shape (n, n).

    Raises:
        TypeError: `x` is not floating.
        ValueError: `x` is not a square matrix.

    Reference:
        Sinkhorn, "A relationship between arbitrary positive matrices and doubly stochastic
        matrices", Annals of Mathematical Statistics 35, 1964.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import projections
        >>> x = jnp.log(jnp.array([[4.0, 1.0], [1.0, 4.0]]))
        >>> print(projections.kl_projection_birkhoff(x).round(3))
        [[0.8 0.2]
         [0.2 0.8]]
    """
    return kl_projection_transport(_square(x), (1, 1))


# ---- cones --------------------------------------------------------------------------------------


def projection_second_order_cone(
    x: tuple[Float[ArrayLike, ""], Float[ArrayLike, " n"]],
) -> tuple[Float[Array, ""], Float[Array, " n"]]:
    """Closest point of the second-order cone {(t, v) : ‖v‖₂ <= t}.

    argmin ‖y − x‖² over the cone: x itself inside the cone, 0 inside its polar, and otherwise
    (t + ‖v‖)/2 · (1, v/‖v‖).

    Args:
        x: The pair (t, v): a number and an array of any shape.

    Returns:
        The projection, a pair like `x`. The derivative is exact off the boundaries of the cone and
        its polar, and finite everywhere, v = 0 included.

    Raises:
        TypeError: t or v is not floating.
        ValueError: x is not a pair, or t is not a number.

    Reference:
        Fukushima, Luo, Tseng, "Smoothing functions for second-order-cone complementarity problems",
        SIAM Journal on Optimization 12, 2002.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import projections
        >>> t, v = projections.projection_second_order_cone((jnp.array(0.0), jnp.array([3.0, 4.0])))
        >>> print(t, v)
        2.5 [1.5 2. ]
    """
    t, v = tuple_of("x", x, "t, v")
    v = as_floating("x[1]", v)
    t = as_floating("x[0]", t, 0).astype(v.dtype)
    norm = safe_norm(v)
    inside, polar = norm <= t, norm <= -t
    between = ~inside & ~polar
    height = jnp.where(between, (t + norm) / 2, jnp.where(inside, t, 0))
    ratio = jnp.where(between, height / jnp.where(between, norm, 1), inside.astype(v.dtype))
    return height, ratio * v


class _Lyapunov(eqx.Module):
    """Solves (S H + H S)/2 = R for H, with S = V diag(s) Vᵀ and s >= 0.

    On the null space of S, where the equation says nothing, H is zero.
    """

    values: Float[Array, " n"]
    vectors: Float[Array, "n n"]

    def __call__(self, operator: LinearOperator, rhs: PyTree) -> PyTree:
        """Return H with operator(H) = rhs."""
        total = self.values[:, None] + self.values[None, :]
        cut = 10 * self.values.size * jnp.finfo(total.dtype).eps * jnp.max(self.values)
        weights = jnp.where(total > cut, 2 / jnp.where(total > cut, total, 1), 0)

        def solve(_, b):
            inner = self.vectors.T @ b @ self.vectors
            return self.vectors @ (weights * inner) @ self.vectors.T

        return jax.lax.custom_linear_solve(operator.mv, rhs, solve, solve, symmetric=True)


def _complementary(y, x):
    """y² − (x y + y x)/2, zero at the projection: y (y − x) = 0 with y and y − x semidefinite.

    Its derivative with respect to y is H ↦ (|x| H + H |x|)/2, regular unless x is singular.
    """
    return y @ y - (x @ y + y @ x) / 2


_complementary.symmetric = True  # type: ignore[attr-defined]


def projection_psd_cone(x: Float[ArrayLike, "n n"]) -> Float[Array, "n n"]:
    """Closest positive semidefinite matrix: argmin_Y ‖Y − (x + xᵀ)/2‖² (Frobenius), Y ⪰ 0.

    By one eigendecomposition, O(n³). The derivative solves the Lyapunov equation of the
    complementarity condition in the same eigenvectors, which is the formula of Daleckii and Krein;
    it divides by sums of absolute eigenvalues, never by differences.

    Args:
        x: The matrix to project, shape (n, n); only its symmetric part counts.

    Returns:
        The projection, shape (n, n), symmetric. Derivatives of all orders are exact unless x is
        singular, also where eigenvalues repeat; at a singular x the derivative is that of the piece
        that keeps the null space at zero.

    Raises:
        TypeError: `x` is not floating.
        ValueError: `x` is not a square matrix.

    Reference:
        Malick and Sendov, "Clarke generalized Jacobian of the projection onto the cone of positive
        semidefinite matrices", Set-Valued Analysis 14, 2006.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import projections
        >>> print(projections.projection_psd_cone(jnp.array([[0.0, 1.0], [1.0, 0.0]])).round(3))
        [[0.5 0.5]
         [0.5 0.5]]
    """
    x = _square(x)
    x = (x + x.T) / 2
    values, vectors = jnp.linalg.eigh(detach(x))
    y = (vectors * positive_part(values)[None, :]) @ vectors.T
    y = (y + y.T) / 2
    return attach(_complementary, y, x, linear_solver=_Lyapunov(jnp.abs(values), vectors))
