"""How far a solution and its derivative can be trusted, computed at the point itself.

At an approximate solution x̂ of F(x, θ) = 0, with A = ∂F/∂x, one Newton correction s = −A⁻¹F(x̂)
estimates the error x* − x̂, and the hypergradient recomputed at x̂ + s estimates the error of the
hypergradient at x̂. Both estimates are asymptotically exact: their error is of second order in ‖s‖.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from jaxopt_ext.implicit.attach import as_solution
from jaxopt_ext.implicit.hoist import detach, strong
from jaxopt_ext.implicit.linear_solvers import (
    Auto,
    LinearOperator,
    LinearSolver,
    LinearStatus,
    solve_linear,
)
from jaxopt_ext.implicit.tree import subtract

DENSE_BELOW = 512  # up to this size singular values come from a dense SVD


class Certificate(eqx.Module):
    """What is known of a solution and, where an outer function was given, of its hypergradient.

    A PyTree of arrays: it passes through `jit` and `vmap`, and printing it gives one line a topic.
    Norms are Euclidean unless said otherwise, in the units of what they measure.

    Attributes:
        residual: Max norm of the conditions at the point.
        solution_error: Estimate of ‖x̂ − x*‖: the length of the Newton correction.
        solution_norm: ‖x̂‖, to judge it by.
        contraction: ‖F(x̂ + s)‖ / ‖F(x̂)‖; the estimates are meaningful where it is well below 1.
        solution_error_bound: Rigorous bound on ‖x̂ − x*‖, infinite without `lipschitz` or where
            Kantorovich's condition lipschitz · ‖s‖ ≤ 1/2 fails.
        smallest_singular_value: Of ∂F/∂x (an estimate from above it for more than 512 unknowns).
        largest_singular_value: Of ∂F/∂x (an estimate from below it for more than 512 unknowns).
        margin: Distance to a change of the active set, as the condition measures it; infinite for
            conditions without one.
        adjoint_residual: Relative residual of the adjoint system; `None` without `outer`.
        kernel_component: Share of the cotangent outside the range of (∂F/∂x)ᵀ, between 0 and 1:
            how much the outer function sees of directions that the conditions leave open. NaN for
            more than 512 unknowns; `None` without `outer`.
        gradient_norm: Norm of the hypergradient; `None` without `outer`.
        gradient_error: Estimate of its error, from the solution and from the linear solve
            together; `None` without `outer`.
        gradient_error_bound: `gradient_lipschitz` times `solution_error_bound`; `None` without
            `outer`.
        singular: ∂F/∂x is singular to working precision.
        ambiguous: It is, and the outer function depends on the directions that are left open.
        kink: The active set may change within the error of the solution.
        unconverged: The relative error exceeds `rtol`, or Newton's correction does not contract.
    """

    residual: Float[Array, "*batch"]
    solution_error: Float[Array, "*batch"]
    solution_norm: Float[Array, "*batch"]
    contraction: Float[Array, "*batch"]
    solution_error_bound: Float[Array, "*batch"]
    smallest_singular_value: Float[Array, "*batch"]
    largest_singular_value: Float[Array, "*batch"]
    margin: Float[Array, "*batch"]
    adjoint_residual: Float[Array, "*batch"] | None
    kernel_component: Float[Array, "*batch"] | None
    gradient_norm: Float[Array, "*batch"] | None
    gradient_error: Float[Array, "*batch"] | None
    gradient_error_bound: Float[Array, "*batch"] | None
    singular: Bool[Array, "*batch"]
    ambiguous: Bool[Array, "*batch"]
    kink: Bool[Array, "*batch"]
    unconverged: Bool[Array, "*batch"]

    @property
    def condition_number(self) -> Float[Array, "*batch"]:
        """Ratio of the singular values of ∂F/∂x."""
        return self.largest_singular_value / self.smallest_singular_value

    @property
    def flagged(self) -> Bool[Array, "*batch"]:
        """Whether any of the four warnings is raised."""
        return self.singular | self.ambiguous | self.kink | self.unconverged

    def __str__(self) -> str:
        if isinstance(self.residual, Tracer):
            return "Certificate(traced)"

        def show(value):
            low, high = float(jnp.min(value)), float(jnp.max(value))
            return f"{low:.1e}" if low == high or jnp.ndim(value) == 0 else f"{low:.1e}..{high:.1e}"

        names = [n for n in ("singular", "ambiguous", "kink", "unconverged")]
        raised = [n for n in names if bool(jnp.any(getattr(self, n)))]
        lines = [
            f"solution     residual {show(self.residual)}, error about {show(self.solution_error)} "
            f"(of {show(self.solution_norm)})",
            f"conditions   condition number {show(self.condition_number)}, active-set margin "
            f"{show(self.margin)}",
        ]
        if self.gradient_error is not None:
            lines.append(
                f"gradient     error about {show(self.gradient_error)} (of "
                f"{show(self.gradient_norm)}), adjoint residual {show(self.adjoint_residual)}"
            )
        lines.append(f"warnings     {', '.join(raised) or 'none'}")
        return "\n".join(lines)


class Hypergradient(eqx.Module):
    """Value and total derivative of an outer function of a solution.

    Attributes:
        value: outer(x̂, *args).
        gradient: Total derivative with respect to each of `args`, a tuple; `None` at leaves that
            are not floating.
        adjoint: Solution of the adjoint system; pass it as `adjoint0` at the next point.
        certificate: How far the gradient can be trusted.
    """

    value: Float[Array, "*batch"]
    gradient: tuple
    adjoint: PyTree
    certificate: Certificate


def certify(
    condition: Callable[..., PyTree],
    x: PyTree,
    *args: PyTree,
    outer: Callable[..., Array] | None = None,
    linear_solver: LinearSolver | None = None,
    rtol: float | Array = 1e-3,
    lipschitz: float | Array | None = None,
    gradient_lipschitz: float | Array | None = None,
) -> Certificate:
    """Measure how far a solution, and the derivative of a function of it, can be trusted.

    Costs two linear solves with ∂F/∂x at x̂ and, up to 512 unknowns, one singular value
    decomposition of it; with `outer` besides that one adjoint solve at x̂, one at the corrected
    point, and one to refine.

    Args:
        condition: F(x, *args), zero at a solution; e.g. `problem.condition()`.
        x: The approximate solution x̂, a PyTree of floating arrays.
        args: Further arguments of the condition.
        outer: A scalar function of (x, *args) whose total derivative is of interest; or `None` to
            judge the solution alone.
        linear_solver: The solver whose derivative is judged; default `Auto()`.
        rtol: Relative error above which a solution or gradient counts as unconverged.
        lipschitz: Lipschitz constant of A(x̂)⁻¹A(·) near x̂, in inverse units of x, if known: then
            the bound on the solution error is rigorous (Newton–Kantorovich).
        gradient_lipschitz: Lipschitz constant of the hypergradient as a function of x near x̂.

    Returns:
        The certificate. It is silent about other solutions of the same conditions.

    Raises:
        TypeError: A leaf of `x` is not floating.
        ValueError: `x` is empty.

    Reference:
        Blondel et al., NeurIPS 2022, theorem 1 (the error is linear in ‖x̂ − x*‖); Kantorovich's
        theorem as in Deuflhard, "Newton Methods for Nonlinear Problems", 2004, theorem 2.1.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext import implicit
        >>> condition = implicit.Stationary(lambda x, t: jnp.sum(jnp.cosh(x) - t * x))
        >>> t = jnp.array([1.0, 2.0])
        >>> sloppy = jnp.arcsinh(t) + 0.01
        >>> certificate = implicit.certify(condition, sloppy, t)
        >>> print(round(float(certificate.solution_error), 3))  # truth: 0.01 √2
        0.014
    """
    return hypergradient_parts(
        condition, x, args, outer, linear_solver, None, rtol, lipschitz, gradient_lipschitz
    )[3]


def hypergradient(
    outer: Callable[..., Array],
    condition: Callable[..., PyTree],
    x: PyTree,
    *args: PyTree,
    linear_solver: LinearSolver | None = None,
    adjoint0: PyTree | None = None,
    correct: bool = False,
    rtol: float | Array = 1e-3,
    lipschitz: float | Array | None = None,
    gradient_lipschitz: float | Array | None = None,
) -> Hypergradient:
    """The total derivative of outer(x*(args), *args), explicitly, with its certificate.

    The gradient equals that of automatic differentiation through `attach`. What is more here: the
    adjoint comes back, so that the next solve of a bilevel loop starts warm; the error is
    estimated; and `correct=True` returns the gradient at the Newton-corrected point, whose error is
    of second order in the solver's.

    Args:
        outer: A scalar function of (x, *args).
        condition: F(x, *args), zero at a solution.
        x: The approximate solution x̂, a PyTree of floating arrays.
        args: The arguments to differentiate with respect to, PyTrees.
        linear_solver: Default `Auto()`.
        adjoint0: A guess of the adjoint, a PyTree like `x`.
        correct: Whether to return the corrected gradient.
        rtol: See `certify`.
        lipschitz: See `certify`.
        gradient_lipschitz: See `certify`.

    Returns:
        Value, gradient, adjoint and certificate. The certificate is that of the uncorrected
        gradient in either case.

    Raises:
        TypeError: A leaf of `x` is not floating.
        ValueError: `x` is empty.

    Reference:
        Ablin, Peyré, Moreau, "Super-efficiency of automatic differentiation for functions defined
        as a minimum", ICML 2020, for the idea of the correction.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext import implicit
        >>> condition = implicit.Stationary(lambda x, t: jnp.sum(jnp.cosh(x) - t * x))
        >>> sloppy = jnp.arcsinh(jnp.array([1.0])) + 0.01
        >>> found = implicit.hypergradient(
        ...     lambda x, t: jnp.sum(x**2), condition, sloppy, jnp.array([1.0]), correct=True
        ... )
        >>> print(jnp.round(found.gradient[0], 3))  # 2 asinh(1) / √2
        [1.246]
    """
    value, gradients, adjoint, certificate = hypergradient_parts(
        condition, x, args, outer, linear_solver, adjoint0, rtol, lipschitz, gradient_lipschitz
    )
    return Hypergradient(value, gradients[1 if correct else 0], adjoint, certificate)


def _norm(tree: PyTree) -> Array:
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    return jnp.linalg.norm(jnp.concatenate([jnp.ravel(leaf) for leaf in leaves]))


class _Adjoint(eqx.Module):
    """One hypergradient at one point."""

    gradient: tuple
    adjoint: PyTree
    cotangent: PyTree
    status: LinearStatus
    linear_error: Array


def hypergradient_parts(
    condition, x, args, outer, linear_solver, adjoint0, rtol, lipschitz, gradient_lipschitz
) -> tuple[Any, Any, PyTree, Certificate]:
    """Everything that `certify` and `hypergradient` return, computed once."""
    x = as_solution(x)
    dtype = jnp.result_type(*jax.tree.leaves(x))
    args = detach(strong(args, dtype))
    solver: LinearSolver = Auto() if linear_solver is None else linear_solver
    symmetric = bool(getattr(condition, "symmetric", False))
    positive = bool(getattr(condition, "positive_definite", False))

    def operator_at(y) -> LinearOperator:
        return LinearOperator(
            jax.linearize(lambda v: condition(v, *args), y)[1], y, symmetric, positive
        )

    operator = operator_at(x)
    residual = condition(x, *args)
    correction, _ = solve_linear(solver, operator, jax.tree.map(jnp.negative, residual))
    corrected = jax.tree.map(jnp.add, x, correction)
    error, size = _norm(correction), _norm(residual)
    rounding = 100 * jnp.finfo(dtype).eps
    tiny = jnp.finfo(dtype).tiny
    contraction = _norm(condition(corrected, *args)) / jnp.maximum(size, tiny)
    x_norm = _norm(x)
    at_rounding = error <= rounding * jnp.maximum(x_norm, tiny)
    contraction = jnp.where(at_rounding, 0, contraction)

    smallest, largest, kernel = _spectrum(solver, operator)
    singular = ~(smallest > rounding * largest)
    bound = _kantorovich(error, lipschitz, dtype)
    margin = condition.margin(x, *args) if hasattr(condition, "margin") else jnp.inf
    margin = jnp.asarray(margin, dtype)
    kink = margin <= jnp.maximum(2 * error, jnp.sqrt(jnp.finfo(dtype).eps))
    unconverged = ~(contraction < 0.5) | ~(error <= rtol * jnp.maximum(x_norm, tiny))
    unconverged &= ~at_rounding

    value = gradients = adjoint = None
    adjoint_residual = kernel_component = gradient_norm = gradient_error = gradient_bound = None
    ambiguous = jnp.zeros_like(singular)
    if outer is not None:
        value = outer(x, *args)
        first = _adjoint(solver, operator, condition, outer, x, args, adjoint0)
        second = _adjoint(
            solver, operator_at(corrected), condition, outer, corrected, args, first.adjoint
        )
        adjoint = first.adjoint
        gradients = first.gradient, second.gradient
        adjoint_residual = first.status.residual
        gradient_norm = _norm(first.gradient)
        gradient_error = _norm(subtract(second.gradient, first.gradient)) + first.linear_error
        kernel_component = kernel(first.cotangent)
        ambiguous = singular & (kernel_component > jnp.sqrt(jnp.finfo(dtype).eps))
        unconverged |= ~(
            gradient_error <= jnp.maximum(rtol * gradient_norm, rounding * _norm(first.cotangent))
        )
        constant = jnp.inf if gradient_lipschitz is None else gradient_lipschitz
        gradient_bound = jnp.where(jnp.isinf(bound), jnp.inf, constant * bound).astype(dtype)

    certificate = Certificate(
        residual=jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(residual)])),
        solution_error=error,
        solution_norm=x_norm,
        contraction=contraction,
        solution_error_bound=bound,
        smallest_singular_value=smallest,
        largest_singular_value=largest,
        margin=margin,
        adjoint_residual=adjoint_residual,
        kernel_component=kernel_component,
        gradient_norm=gradient_norm,
        gradient_error=gradient_error,
        gradient_error_bound=gradient_bound,
        singular=singular,
        ambiguous=ambiguous,
        kink=kink,
        unconverged=unconverged,
    )
    return value, gradients, adjoint, certificate


def _adjoint(solver, operator, condition, outer, y, args, guess) -> _Adjoint:
    """∇_args outer − (∂F/∂args)ᵀ λ with (∂F/∂x)ᵀ λ = ∇_x outer, and the effect of λ's error."""
    dynamic, static = eqx.partition(args, eqx.is_inexact_array)

    def combined(d):
        return eqx.combine(d, static)

    cotangent, direct = jax.grad(lambda v, d: outer(v, *combined(d)), argnums=(0, 1))(y, dynamic)
    adjoint, status = solve_linear(solver, operator, cotangent, x0=guess, transpose=True)
    _, pull = jax.vjp(lambda d: condition(y, *combined(d)), dynamic)
    gradient = subtract(direct, pull(adjoint)[0])
    # the residual of λ, pulled back through one more solve, is the error that λ causes
    transposed = jax.linear_transpose(operator.mv, operator.structure)
    missing = subtract(cotangent, transposed(adjoint)[0])
    rest, _ = solve_linear(solver, operator, missing, transpose=True)
    return _Adjoint(gradient, adjoint, cotangent, status, _norm(pull(rest)[0]))


def _kantorovich(error, lipschitz, dtype):
    """(1 − √(1 − 2h)) / ω with h = ω‖s‖, if h ≤ 1/2."""
    if lipschitz is None:
        return jnp.full_like(error, jnp.inf)
    omega = jnp.asarray(lipschitz, dtype)
    h = omega * error
    # the same, without cancellation for small h
    radius = 2 * error / (1 + jnp.sqrt(jnp.maximum(1 - 2 * h, 0)))
    return jnp.where(h <= 0.5, radius, jnp.inf).astype(dtype)


def _spectrum(solver, operator: LinearOperator):
    """Extreme singular values, and a function for the share of a vector in the null space."""
    if operator.size <= DENSE_BELOW:
        _, singular_values, right = jnp.linalg.svd(operator.as_matrix())
        largest, smallest = singular_values[0], singular_values[-1]
        cut = 100 * jnp.finfo(largest.dtype).eps * largest
        null = singular_values <= cut

        def kernel(v):
            flat = ravel_pytree(v)[0]
            inside = jnp.where(null, right @ flat, 0)
            norm = jnp.maximum(jnp.linalg.norm(flat), jnp.finfo(flat.dtype).tiny)
            return jnp.linalg.norm(inside) / norm

        return smallest, largest, kernel

    transposed = jax.linear_transpose(operator.mv, operator.structure)
    flat, unravel = ravel_pytree(operator.structure)
    start = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)

    def power(apply, steps=20):
        def body(_, carry):
            v, _ = carry
            w = ravel_pytree(apply(unravel(v)))[0]
            norm = jnp.linalg.norm(w)
            return w / jnp.maximum(norm, jnp.finfo(w.dtype).tiny), norm

        unit = start / jnp.linalg.norm(start)
        return jax.lax.fori_loop(0, steps, body, (unit, jnp.zeros((), flat.dtype)))[1]

    largest = jnp.sqrt(power(lambda v: transposed(operator.mv(v))[0]))

    def inverse(v):
        inner = solve_linear(solver, operator, v, transpose=True)[0]
        return solve_linear(solver, operator, inner)[0]

    smallest = 1 / jnp.sqrt(power(inverse, steps=5))
    return smallest, largest, lambda v: jnp.full_like(largest, jnp.nan)
