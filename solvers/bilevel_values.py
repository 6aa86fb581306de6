"""The penalty function and hypergradients of a bilevel problem at a point, for research use."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from jaxopt_ext import implicit
from jaxopt_ext.core import check, tree
from jaxopt_ext.core.drive import solve
from jaxopt_ext.core.problem import Bilevel, CompositeMinimization, Minimization
from jaxopt_ext.core.solution import Solution
from jaxopt_ext.core.solver import AbstractSolver
from jaxopt_ext.solvers.bilevel_hypergradients import (
    BilevelHypergradient,
    Linearized,
    linearize,
    lower_residual,
)
from jaxopt_ext.solvers.bilevel_steps import mapping, project
from jaxopt_ext.solvers.grad_norm_smooth import GradNormSmooth


class PenaltyValue(eqx.Module):
    """The penalty function ψ_σ at a point; see `penalty_value`.

    Attributes:
        value: ψ_σ(x) = f(x, y) + (g(x, y) − g(x, z)) / σ.
        upper: f(x, y).
        lower_gap: g(x, y) − g(x, z), of order σ² for regular problems, never below 0 but for
            rounding where both inner problems are solved.
        y: The minimizer of σf + g.
        z: The minimizer of g.
        residual: The larger of the residuals of y and z.
        success: Whether both inner problems were solved to the solver's tolerance.
    """

    value: Float[Array, ""]
    upper: Float[Array, ""]
    lower_gap: Float[Array, ""]
    y: PyTree
    z: PyTree
    residual: Float[Array, ""]
    success: Bool[Array, ""]


def lower_minimum(
    problem: Bilevel,
    x: PyTree,
    y: PyTree,
    args: PyTree = None,
    *,
    sigma: float | Array = 0.0,
    solver: AbstractSolver | None = None,
    max_steps: int = 500,
) -> tuple[PyTree, Bool[Array, ""]]:
    """The minimizer of g(x, ·) + σ f(x, ·) on the lower set, found from y.

    With σ = 0 it polishes the y of a penalty solution: the result is lower-level optimal and,
    started from there, still close to the best such point for f.

    Args:
        problem: The bilevel problem.
        x: The upper-level point.
        y: Where to start.
        args: Further arguments of the problem's functions.
        sigma: σ ≥ 0.
        solver: For a `Minimization`, or a `CompositeMinimization` if there is a lower set; default
            `GradNormSmooth()`, which needs second derivatives of g and f in y.
        max_steps: Steps of the solver at most.

    Returns:
        The minimizer, detached, and whether the solver was successful.

    Raises:
        TypeError: A leaf of `y` is not floating.
        ValueError: `sigma` is negative, or the problem's functions do not fit the point.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> problem = jx.Bilevel(
        ...     upper=lambda x, y, args: y**2, lower=lambda x, y, args: (y - x) ** 2
        ... )
        >>> y, success = solvers.lower_minimum(problem, jnp.array(3.0), jnp.array(0.0), sigma=0.5)
        >>> print(round(float(y), 3))  # x / (1 + σ)
        2.0
    """
    check.number("lower_minimum", "sigma", sigma, at_least=0)
    y = check.variables("y", y)
    adjoint = implicit.DetachedAdjoint()
    found = minimize_lower(problem, x, y, args, sigma, solver, max_steps, adjoint)
    return implicit.detach(found.value), found.success


def minimize_lower(
    problem: Bilevel,
    x: PyTree,
    y: PyTree,
    args: PyTree,
    sigma: float | Array,
    solver: AbstractSolver | None,
    max_steps: int,
    adjoint: implicit.Adjoint,
) -> Solution:
    """The whole solution of what `lower_minimum` solves."""
    start = project(problem.lower_set, y)

    def fun(v, inputs):
        x, args, sigma = inputs
        return sigma * problem.objective((x, v), args)[0] + problem.lower(x, v, args)

    set_ = problem.lower_set
    inner = (
        Minimization(fun)
        if set_ is None
        else CompositeMinimization(fun, lambda v, step, inputs: set_(v))
    )
    solver = GradNormSmooth() if solver is None else solver
    inputs = x, args, jnp.asarray(sigma, tree.dtype_of(y))
    return solve(inner, solver, start, inputs, max_steps=max_steps, adjoint=adjoint)


def penalty_value(
    problem: Bilevel,
    x: PyTree,
    y: PyTree,
    args: PyTree = None,
    *,
    sigma: float | Array = 1e-2,
    solver: AbstractSolver | None = None,
    max_steps: int = 500,
) -> PenaltyValue:
    """The penalty function ψ_σ(x) = (min (σf + g)(x, ·) − min g(x, ·)) / σ, by two inner solves.

    With global inner solutions ψ_σ is a lower bound of the bilevel objective, falls as σ grows,
    and lies above f(x, y). Differentiable with respect to x and args: the inner solutions count as
    constants, which by the envelope theorem is the gradient of ψ_σ.

    Args:
        problem: The bilevel problem.
        x: The upper-level point.
        y: Where the search for the minimizer of σf + g starts; that for g starts at its result.
        args: Further arguments of the problem's functions.
        sigma: σ > 0.
        solver: See `lower_minimum`.
        max_steps: Steps of each inner solve at most.

    Returns:
        A `PenaltyValue`.

    Raises:
        TypeError: A leaf of `y` is not floating.
        ValueError: `sigma` is not positive, or the problem's functions do not fit the point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> problem = jx.Bilevel(
        ...     upper=lambda x, y, args: y**2, lower=lambda x, y, args: (y - x) ** 2
        ... )
        >>> value = lambda x: solvers.penalty_value(problem, x, jnp.array(0.0), sigma=1.0).value
        >>> print(round(float(value(jnp.array(2.0))), 3))  # x² / (1 + σ)
        2.0
        >>> print(round(float(jax.grad(value)(jnp.array(2.0))), 3))
        2.0
    """
    check.number("penalty_value", "sigma", sigma, above=0)
    options: dict[str, Any] = {"solver": solver, "max_steps": max_steps}
    y, solved_y = lower_minimum(problem, *implicit.detach((x, y, args)), sigma=sigma, **options)
    z, solved_z = lower_minimum(problem, *implicit.detach((x, y, args)), **options)
    sigma = jnp.asarray(sigma, tree.dtype_of(y))
    upper = problem.objective((x, y), args)[0]
    gap = problem.lower(x, y, args) - problem.lower(x, z, args)
    gradient = jax.grad(lambda v: sigma * problem.objective((x, v), args)[0])(y)
    gradient = optax.tree.add(gradient, jax.grad(problem.lower, 1)(x, y, args))
    residual_y = tree.max_norm(mapping(problem.lower_set, y, gradient))
    residual_z = tree.max_norm(lower_residual(problem, args, x, z))
    return PenaltyValue(
        value=upper + gap / sigma,
        upper=upper,
        lower_gap=gap,
        y=y,
        z=z,
        residual=jnp.maximum(residual_y, residual_z),
        success=solved_y & solved_z,
    )


def hypergradient(
    problem: Bilevel,
    x: PyTree,
    y: PyTree,
    args: PyTree = None,
    *,
    method: str | implicit.LinearSolver = "penalty",
    sigma: float | Array = 1e-2,
    step: float | Array = 0.1,
    steps: int = 100,
    solver: AbstractSolver | None = None,
) -> BilevelHypergradient:
    """The hypergradient of a bilevel problem at x by one of the common methods.

    | `method` | what it does |
    |---|---|
    | `"penalty"` | the gradient of `penalty_value` at σ; y is where its inner solves start |
    | `"cg"`, `"neumann"`, `"pinv"` | the implicit gradient at the given y, by that linear solver |
    | a linear solver | the same with any solver of the implicit layer |
    | `"unroll"` | derivative through `steps` projected gradient steps of length `step` from y |

    The implicit gradient is right at an isolated lower-level solution y. With several solutions
    the pseudo-inverse is right at the best of them for f and at no other; `residual` tells.

    Args:
        problem: The bilevel problem.
        x: The upper-level point.
        y: A lower-level solution, or where the search for one starts.
        args: Further arguments of the problem's functions.
        method: See above.
        sigma: σ > 0 of "penalty".
        step: Step size of "unroll" and "neumann", > 0.
        steps: Steps of "unroll", terms of "neumann".
        solver: Of the inner problems of "penalty", see `lower_minimum`.

    Returns:
        A `BilevelHypergradient`.

    Raises:
        TypeError: `method` is neither a name nor a linear solver.
        ValueError: `method` is not a known name, or a number is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> problem = jx.Bilevel(
        ...     upper=lambda x, y, args: y**2 / 2, lower=lambda x, y, args: (y - 2 * x) ** 2
        ... )
        >>> x, y = jnp.array(1.0), jnp.array(2.0)
        >>> for method in ("cg", "unroll", "penalty"):
        ...     print(round(float(solvers.hypergradient(problem, x, y, method=method).gradient), 2))
        4.0
        4.0
        3.98
    """
    check.number("hypergradient", "step", step, above=0)
    check.count("hypergradient", "steps", steps)
    named = {
        "cg": lambda: implicit.CG(),
        "neumann": lambda: implicit.Neumann(steps, step),
        "pinv": lambda: implicit.MinimumNorm(),
    }
    if isinstance(method, str) and method not in (*named, "penalty", "unroll"):
        expected = ", ".join(map(repr, ("penalty", *named, "unroll")))
        raise ValueError(
            f"hypergradient: method is {method!r}, expected {expected} or a linear solver"
        )
    if method == "penalty":
        return _by_penalty(problem, x, y, args, sigma, solver)
    if method == "unroll":
        return _by_unrolling(problem, x, y, args, step, steps)
    linear_solver = named[method]() if isinstance(method, str) else method
    check.function("hypergradient", "method", linear_solver)
    here: Linearized = linearize(problem, args, x, y)
    adjoint, status = implicit.solve_linear(
        linear_solver, here.operator, here.upper_y, transpose=True
    )
    return BilevelHypergradient(here.direction(adjoint), here.objective, status.residual)


def _by_penalty(problem, x, y, args, sigma, solver):
    def value(x):
        found = penalty_value(problem, x, y, args, sigma=sigma, solver=solver)
        return found.value, found

    gradient, found = jax.grad(value, has_aux=True)(x)
    sigma = jnp.asarray(sigma, found.value.dtype)
    return BilevelHypergradient(gradient, found.upper, found.residual / sigma)


def _by_unrolling(problem, x, y, args, step, steps):
    rate = jnp.asarray(step, tree.dtype_of(y))

    def outcome(x):
        def move(y, _):
            gradient = jax.grad(problem.lower, 1)(x, y, args)
            moved = jax.tree.map(lambda v, d: v - rate * d, y, gradient)
            return project(problem.lower_set, moved), None

        end, _ = jax.lax.scan(jax.checkpoint(move), y, None, length=steps)
        return problem.objective((x, end), args)[0], end

    (objective, end), gradient = jax.value_and_grad(outcome, has_aux=True)(x)
    residual = tree.max_norm(lower_residual(problem, args, x, end))
    return BilevelHypergradient(gradient, objective, residual)
