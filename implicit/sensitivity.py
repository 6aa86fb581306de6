"""Tools on top of the implicit rule: Jacobians, predictions along a path, covariance of a fit."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from jaxopt_ext.implicit.attach import as_solution, attach
from jaxopt_ext.implicit.linear_solvers import LinearSolver


def solution_jacobian(
    condition: Callable[..., PyTree],
    x: PyTree,
    *args: PyTree,
    argnum: int = 0,
    linear_solver: LinearSolver | None = None,
) -> PyTree:
    """The Jacobian dx*/dargs[argnum], materialised; one factorization serves all its columns.

    Args:
        condition: F(x, *args), zero at a solution.
        x: The solution, a PyTree of floating arrays.
        args: Further arguments of the condition.
        argnum: Which of `args` to differentiate with respect to.
        linear_solver: Default `Auto()`.

    Returns:
        A PyTree like `x` of PyTrees like `args[argnum]`, as of `jax.jacobian`: each leaf has
        the shape of the former followed by that of the latter.

    Raises:
        ValueError: `argnum` does not number one of `args`, or the condition does not fit `x`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext import implicit
        >>> condition = implicit.Root(lambda x, t: x**2 - t)
        >>> x, t = jnp.array([2.0, 4.0]), jnp.array([4.0, 16.0])
        >>> print(implicit.solution_jacobian(condition, x, t))  # 1 / (2 x)
        [[0.25  0.   ]
         [0.    0.125]]
    """
    if not 0 <= argnum < len(args):
        raise ValueError(
            f"solution_jacobian: argnum is {argnum}, expected 0 to {len(args) - 1} for "
            f"{len(args)} arguments"
        )
    x = as_solution(x)

    def solution(arg):
        here = (*args[:argnum], arg, *args[argnum + 1 :])
        return attach(condition, x, *here, linear_solver=linear_solver)

    size_in = sum(jnp.size(leaf) for leaf in jax.tree.leaves(args[argnum]))
    size_out = sum(leaf.size for leaf in jax.tree.leaves(x))
    jacobian = jax.jacfwd if size_in <= size_out else jax.jacrev
    return jacobian(solution)(args[argnum])


def predict(
    condition: Callable[..., PyTree],
    x: PyTree,
    args: tuple[PyTree, ...],
    new_args: tuple[PyTree, ...],
    *,
    order: int = 1,
    linear_solver: LinearSolver | None = None,
) -> PyTree:
    """Predict the solution at other arguments from derivatives at these: a Taylor step.

    For parameter sweeps and warm starts. The error is of order |new_args − args|^(order + 1), as
    long as the active set does not change on the way.

    Args:
        condition: F(x, *args), zero at a solution.
        x: The solution at `args`, a PyTree of floating arrays.
        args: The arguments that `x` belongs to, a tuple of PyTrees of floating arrays.
        new_args: The arguments to predict for, of the same types.
        order: 1 (one linear solve) or 2 (two, with the same matrix).
        linear_solver: Default `Auto()`.

    Returns:
        The predicted solution, a PyTree like `x`.

    Raises:
        ValueError: `order` is neither 1 nor 2, or the arguments do not match.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext import implicit
        >>> condition = implicit.Root(lambda x, t: x**2 - t)
        >>> guess = implicit.predict(condition, jnp.array(2.0), (4.0,), (4.4,), order=2)
        >>> print(round(float(guess), 4))  # √4.4 = 2.0976
        2.0975
    """
    if order not in (1, 2):
        raise ValueError(f"predict: order is {order}, expected 1 or 2")
    if jax.tree.structure(args) != jax.tree.structure(new_args):
        raise ValueError(
            f"predict: new_args has structure {jax.tree.structure(new_args)}, expected that of "
            f"args, {jax.tree.structure(args)}"
        )
    x = as_solution(x)
    dtype = jnp.result_type(*jax.tree.leaves(x))
    args, new_args = jax.tree.map(lambda a: jnp.asarray(a, dtype), (args, new_args))
    direction = jax.tree.map(jnp.subtract, new_args, args)

    def along(s):
        here = jax.tree.map(lambda a, d: a + s * d, args, direction)
        return attach(condition, x, *here, linear_solver=linear_solver)

    zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)

    def velocity(s):
        return jax.jvp(along, (s,), (one,))[1]

    if order == 1:
        return jax.tree.map(jnp.add, x, velocity(zero))
    first, second = jax.jvp(velocity, (zero,), (one,))
    return jax.tree.map(lambda x, v, a: x + v + a / 2, x, first, second)


def covariance(
    residual: Callable[..., PyTree],
    x: PyTree,
    *args: PyTree,
    noise_variance: float | Array | None = None,
) -> Float[Array, "n n"]:
    """Covariance of the parameters of a least-squares fit, σ² (JᵀJ)⁻¹, from its residual.

    For residuals with independent errors of equal variance σ² (divide each residual by its own
    standard deviation and pass `noise_variance=1.0` otherwise). Valid where the model is close to
    linear over the spread of the parameters.

    Args:
        residual: r(x, *args) → PyTree with m entries in all.
        x: The fitted parameters, a PyTree with n entries in all, n < m.
        args: Further arguments of `residual`.
        noise_variance: σ² in squared units of the residual; `None` estimates it by ‖r‖² / (m − n).

    Returns:
        The n × n covariance, in the order of `jax.flatten_util.ravel_pytree(x)`.

    Raises:
        ValueError: m ≤ n while σ² is to be estimated.

    Reference:
        Seber and Wild, "Nonlinear Regression", 1989, section 2.1.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext import implicit
        >>> y = jnp.array([0.0, 0.0, 6.0, 6.0])
        >>> variance = implicit.covariance(lambda mean: y - mean, jnp.array(3.0))
        >>> print(round(float(variance[0, 0]), 4))  # s² / 4 with s² = 12
        3.0
    """
    x = as_solution(x)
    flat, unravel = ravel_pytree(x)

    def raveled(v):
        return ravel_pytree(residual(unravel(v), *args))[0]

    r = raveled(flat)
    if noise_variance is None:
        if r.size <= flat.size:
            raise ValueError(
                f"covariance: {r.size} residuals for {flat.size} parameters, expected more "
                "residuals than parameters, or noise_variance"
            )
        noise_variance = jnp.sum(r**2) / (r.size - flat.size)
    # by the triangular factor of J: JᵀJ would square its condition number
    factor = jnp.linalg.qr(jax.jacfwd(raveled)(flat), mode="r")
    identity = jnp.eye(flat.size, dtype=flat.dtype)
    inverse = jax.scipy.linalg.solve_triangular(factor, identity)
    return jnp.asarray(noise_variance, flat.dtype) * (inverse @ inverse.T)
