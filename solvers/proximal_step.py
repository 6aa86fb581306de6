"""The step of a regularized Newton method on a composite problem min f + ψ.

The subproblem min_h ⟨g, h⟩ + ½⟨(H + λB) h, h⟩ + ψ(x + h) is solved by an accelerated proximal
gradient method with restarts, which stops as soon as the step decreases the objective by (1 − θ)
times what an exact one guarantees: with ξ the subgradient of ψ at x + h that the last proximal step
gives, ‖g + (H + λB) h + ξ‖_* ≤ θ λ ‖h‖. For H a multiple of B = I one proximal step solves it.
"""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from jaxopt_ext.solvers.curvature import Curvature, Direction, MatrixFree
from jaxopt_ext.solvers.hessian_models import LocalProblem

MAX_STEPS = 1000  # of the inner loop; the point so far is then tried


def prox(local: LocalProblem, point: Float[Array, " n"], step: Array) -> Float[Array, " n"]:
    """The proximal operator on raveled vectors."""
    problem = local.problem
    return ravel_pytree(problem.prox(local.unravel(point), step, local.args))[0]  # pyright: ignore[reportAttributeAccessIssue]


def residual(local: LocalProblem, point: Array, gradient: Array) -> Float[Array, " n"]:
    """The conditions of the problem: x − prox(x − ∇f(x), 1)."""
    return point - prox(local, point - gradient, jnp.ones((), point.dtype))


def start(local: LocalProblem, subgradient: Array) -> tuple[Array, Array]:
    """Trial and subgradient of the first evaluation: where ψ is finite.

    A point that had this subgradient already stays where it is.
    """
    anchor = local.point + subgradient
    trial = prox(local, anchor, jnp.ones((), anchor.dtype))
    return trial, anchor - trial


def proximal_direction(
    local: LocalProblem, curvature: Curvature, shift: Array, theta: Array | float, going: Array
) -> tuple[Direction, Array, Array]:
    """Solve the subproblem to the relative error theta; only if `going`.

    Returns:
        The step in the metric's coordinates, the trial (a value of the proximal operator, so
        exactly on the set or sparse) and the subgradient there.
    """
    scale_back = local.coordinates.unscale
    assert scale_back is not None
    transposed = jax.linear_transpose(scale_back, local.point)
    gradient = transposed(local.gradient)[0]  # of f, without the metric
    eps = jnp.finfo(gradient.dtype).eps

    def operator(h):
        u = scale_back(h)
        return transposed(curvature.product(u) + shift * u)[0]

    def open_loop(carry):
        steps, done = carry[0], carry[1]
        return (steps < MAX_STEPS) & ~done

    def body(carry):
        steps, _, bound, age, (h, Ah), (last, Alast), kept = carry
        momentum = age / (age + 3)
        y, Ay = h + momentum * (h - last), Ah + momentum * (Ah - Alast)
        anchor = local.point + y - (gradient + Ay) / bound
        trial = prox(local, anchor, 1 / bound)
        new = trial - local.point
        Anew = operator(new)
        d, Ad = new - y, Anew - Ay
        fits = jnp.dot(d, Ad) <= bound * jnp.sum(d**2) * (1 + 100 * eps)
        error = jnp.linalg.norm(local.coordinates.dual(Ad - bound * d))
        rounding = 10 * eps * bound * jnp.linalg.norm(local.coordinates.dual(trial))
        goal = theta * shift * jnp.linalg.norm(scale_back(new))
        done = fits & (error <= jnp.maximum(goal, rounding))
        restart = jnp.dot(d, new - h) < 0
        age = jnp.where(fits & ~restart, age + 1, 0)
        subgradient = -(gradient + Ay) - bound * d
        chosen = jax.tree.map(
            lambda a, b: jnp.where(fits, a, b),
            ((new, Anew), (h, Ah), (trial, subgradient)),
            ((h, Ah), (h, Ah), kept),
        )
        bound = jnp.where(fits, bound, 2 * bound)
        return steps + 1, done, bound, age, *chosen

    zero = jnp.zeros_like(gradient)
    size = jnp.linalg.norm(gradient)
    probe = jnp.where(size > 0, gradient, 1)
    bound = jnp.linalg.norm(operator(probe)) / jnp.linalg.norm(probe)
    start_of_loop = (
        jnp.zeros((), jnp.int32), ~going, bound, jnp.zeros_like(bound),
        (zero, zero), (zero, zero), (local.point, zero),
    )  # fmt: skip
    steps, _, _, _, (h, _), _, found = jax.lax.while_loop(open_loop, body, start_of_loop)
    products = jnp.where(going, steps + 1, 0) if isinstance(curvature, MatrixFree) else 0
    return Direction(scale_back(h), jnp.array(True), products), *found
