"""The search direction of `SketchedNewtonAL`, the curvature it needs and the penalties it suits."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_ext.implicit.hoist import vary_like
from jaxopt_ext.solvers.exact_augmented_lagrangian import (
    PublishedAccuracy,
    Sizes,
    capped,
    descends,
    merit_parts,
)
from jaxopt_ext.solvers.kkt_systems import (
    Units,
    convexifying_shift,
    larger_shift,
    newton_system,
    reduced_hessian,
)
from jaxopt_ext.solvers.sketched_newton_state import (
    SEARCH,
    Iterate,
    Place,
    Settings,
    Step,
    Trial,
    zeros,
)

BOUNDED_FRACTION = 1e-3  # with a barrier, rows of complementarity are small beside the others
TRIES = 40  # inner solves per step


def direction(settings: Settings, trial: Trial, place: Place, state) -> Step:
    """Solve for the step, correct the curvature, and adapt the penalties to it."""
    program, here, derivatives = trial.program, place.iterate, place.derivatives
    n, e = program.size, program.equalities
    dtype = trial.w.dtype
    free = program.free
    inner = settings.inner
    real = program.walls.real
    inverse = jnp.where(real, 1 / place.distances, 0)
    sigma = program.walls.weights(here.walls * inverse)
    sigma = jnp.where(place.estimating, jnp.where(jnp.arange(sigma.size) < n, 0, 1), sigma)

    # right-hand side: of Newton's step, of the step to feasibility, of the estimate
    push_off = program.walls.pull(place.barrier * program.walls.push(place.distances))
    lagrangian = jnp.concatenate([place.gradient, here.rows[e:]])
    objective = jnp.concatenate([derivatives.gradient, jnp.zeros_like(here.w[n:])])
    forces = jnp.where(place.restoring, 0, lagrangian) - push_off
    residual = free * jnp.where(
        place.estimating, objective - program.walls.pull(here.walls), forces
    )
    target = jnp.where(place.estimating, 0, place.c)
    rhs = -jnp.concatenate([residual[:n], target.at[e:].add(-residual[n:] / sigma[n:])])

    # the matrix, without the shift
    last = jnp.where(state.length < 0.3, 10, jnp.where(state.length > 0.9, 0.2, 1))
    last = jnp.where(state.phase == SEARCH, last, 1)
    damping = jnp.maximum(state.damping * last, 1e-8 * jnp.minimum(1, place.norm))
    optimality = jnp.sqrt(
        jnp.sum((program.walls.closeness(here.w) * residual) ** 2) + place.norm**2
    )
    loose, least, dependent = looseness(settings, program, derivatives, optimality)
    loose = jnp.where(place.restoring, 1, loose)
    relaxation = jnp.full(here.rows.shape, loose, dtype).at[e:].add(1 / sigma[n:])
    plain = jnp.where(place.estimating, 1, jnp.where(place.restoring, damping, 0))
    diagonal = sigma[:n] + plain * free[:n] + (1 - free[:n])

    units = Units(program.unravel, program.unravel_rows, place.scaling, e)

    def system(shift):
        shifted = diagonal + shift * free[:n]
        return newton_system(derivatives, shifted, relaxation, place.newton, units)

    def spread(solution):
        """The parts of a step, from the solution of the system."""
        dy, multiplier = free[:n] * solution[:n], solution[n:]
        ds = -(residual[n:] + multiplier[e:]) / sigma[n:]
        dw = jnp.concatenate([dy, ds])
        along = here.walls * inverse * program.walls.change(dw)
        dwalls = jnp.where(real, place.barrier * inverse - here.walls - along, 0)
        return Iterate(dw, jnp.where(place.restoring, 0, multiplier), dwalls)

    def parts(objective, gradient, values, w, rows):
        return merit_parts(program, place.barrier, objective, gradient, values, w, rows)

    def slopes(step):
        dy = step.w[:n]
        along, rows = derivatives.both(dy, step.rows)
        primals = (place.objective, place.gradient, place.values, here.w, here.rows)
        tangents = derivatives.gradient @ dy, along, rows, step.w, step.rows
        return jax.jvp(parts, *vary_like((primals, tangents)))

    dense = derivatives.matrices is not None
    jacobian = derivatives.matrices[1] if derivatives.matrices is not None else None

    def sizes(penalty, gradient_penalty, matrix):
        norm: Any = jnp.linalg.norm
        return Sizes(
            residual=norm(rhs),
            optimality=optimality,
            hessian=norm(matrix[:n, :n]) if dense else jnp.full((), jnp.nan, dtype),
            jacobian=norm(jacobian) if dense else jnp.full((), jnp.nan, dtype),
            matrix=norm(matrix) if dense else jnp.full((), jnp.nan, dtype),
            least=least,
            decrease=settings.decrease,
            penalty=penalty,
            gradient_penalty=gradient_penalty,
        )

    shift = jnp.zeros((), dtype)
    if derivatives.matrices is not None:
        shift = curvature_shift(
            settings, program, place, diagonal, relaxation, dependent, state.shift
        )
    if inner.exact:
        matrix = system(shift)
        kept = inner.prepare(matrix)
        zero = jnp.zeros_like(rhs)
        solution, products = inner.solve(matrix, kept, rhs, zero, jnp.zeros((), dtype), None)
        step = spread(solution)
        merit, slope = slopes(step)
        penalty, gradient_penalty = jax.lax.while_loop(
            lambda p: place.newton & ~descends(merit, slope, *p) & ~capped(*p),
            lambda p: (p[0] * settings.growth**2, p[1] / settings.growth),
            vary_like(first_penalties(settings, place, state), merit),
        )
        sharpness = state.sharpness
    else:
        (
            solution, step, merit, slope, kept, shift, penalty, gradient_penalty, sharpness,
            products,
        ) = inexact(
            settings, system, rhs, spread, slopes, sizes, shift, place, state, program.bounded
        )  # fmt: skip
    return Step(
        iterate=step,
        multiplier=solution[n:],
        kept=kept,
        merit=merit,
        slope=slope,
        penalty=penalty,
        gradient_penalty=gradient_penalty,
        sharpness=sharpness,
        shift=jnp.where(place.newton & (shift > 0), shift, state.shift),
        damping=damping,
        products=products,
        ok=jnp.isfinite(solution).all(),
    )


def first_penalties(settings: Settings, place, state):
    """The penalties to begin with: those of the last step; η₁ anew for a new barrier."""
    anew = place.barrier < state.barrier
    first = jnp.asarray(settings.penalty, state.penalty.dtype)
    return jnp.where(anew, first, state.penalty), state.gradient_penalty


def inexact(settings: Settings, system, rhs, spread, slopes, sizes, shift, place, state, bounded):
    """Solve to the accuracy asked for, until curvature and slope are as they must be."""
    n = place.gradient.size
    inner = settings.inner
    dense = place.derivatives.matrices is not None
    first = system(shift)
    kept = inner.prepare(first)

    def attempt(carry):
        solution, shift, penalty, gradient_penalty, sharpness, key, tries, products, _ = carry
        matrix = first if dense else system(shift)
        size = sizes(penalty, gradient_penalty, matrix.matrix)
        sharpness = settings.accuracy.update(sharpness, size)
        tolerance = settings.accuracy.tolerance(sharpness, size)
        if bounded:
            tolerance = jnp.minimum(tolerance, BOUNDED_FRACTION * size.residual)
        tolerance = jnp.where(place.newton, tolerance, 1e-4 * size.residual)
        now = None
        if key is not None:
            key, now = jax.random.split(key)
        solution, more = inner.solve(matrix, kept, rhs, solution, tolerance, now)
        step = spread(solution)
        merit, slope = slopes(step)
        convex = jnp.array(True)
        if not dense:
            dy = step.w[:n]
            bent = dy @ place.derivatives.hessian(dy) + (matrix.diagonal * dy) @ dy
            slack = (step.w[n:] ** 2) @ (1 / matrix.relaxation[matrix.rows - step.w[n:].size :])
            convex = bent + slack >= 1e-8 * (step.w @ step.w)
        falls = descends(merit, slope, penalty, gradient_penalty)
        good = (convex & falls) | ~place.newton
        harder = ~good & convex
        penalty = jnp.where(harder, penalty * settings.growth**2, penalty)
        gradient_penalty = jnp.where(harder, gradient_penalty / settings.growth, gradient_penalty)
        sharpness = jnp.where(harder, sharpness / settings.growth**4, sharpness)
        shift = jnp.where(good | convex, shift, larger_shift(shift, state.shift))
        carry = (
            solution, shift, penalty, gradient_penalty, sharpness, key, tries + 1,
            products + more, good,
        )  # fmt: skip
        return carry, (step, merit, slope)

    def going(carry):
        inside, _ = carry
        over = capped(inside[2], inside[3])
        return ~inside[-1] & (inside[6] < TRIES) & ~over

    zero = jnp.zeros((), jnp.int32)
    start = (
        jnp.zeros_like(rhs), shift, *first_penalties(settings, place, state), state.sharpness,
        state.key, zero, zero, jnp.array(False),
    )  # fmt: skip
    shapes = jax.eval_shape(attempt, start)[1]
    carry, found = jax.lax.while_loop(
        going, lambda carry: attempt(carry[0]), vary_like((start, zeros(shapes)), rhs)
    )
    solution, shift, penalty, gradient_penalty, sharpness, _, _, products, _ = carry
    step, merit, slope = found
    return (
        solution, step, merit, slope, kept, shift, penalty, gradient_penalty, sharpness,
        products,
    )  # fmt: skip


def looseness(settings: Settings, program, derivatives, optimality):
    """Δ for the equalities, λ_min(J_E J_Eᵀ), and whether their gradients are dependent."""
    zero = jnp.zeros_like(optimality)
    if program.equalities == 0:
        return zero, zero + 1, jnp.array(False)
    if derivatives.matrices is None:
        return 1e-8 * jnp.minimum(1, optimality), zero, jnp.array(False)
    jacobian = derivatives.matrices[1][: program.equalities]
    gram = jacobian @ jacobian.T
    pivots = jnp.diagonal(jnp.linalg.cholesky(gram)) ** 2
    independent = pivots > 1e-8 * jnp.maximum(1, jnp.max(jnp.diagonal(gram)))
    dependent = ~independent.all()  # also where the factorization failed, with NaN
    least = zero
    if isinstance(settings.accuracy, PublishedAccuracy):
        least = jnp.linalg.eigvalsh(gram)[0]
    loose = jnp.where(dependent, jnp.minimum(1e-2, 1e-2 * optimality), 0)
    return loose, least, dependent


def curvature_shift(settings: Settings, program, place, diagonal, relaxation, dependent, previous):
    """Τ, from the dense matrices."""
    matrices: Any = place.derivatives.matrices
    hessian, jacobian = matrices
    full = hessian + jnp.diag(diagonal)
    reduced = reduced_hessian(full, jacobian, relaxation, program.equalities, dependent)
    if settings.shift == "frobenius":
        flat = jnp.linalg.eigvalsh(reduced)[0] < 1e-6
        return jnp.where(flat & place.newton, 0.1 + jnp.linalg.norm(hessian), 0)
    harmless = jnp.eye(len(reduced), dtype=reduced.dtype)
    return convexifying_shift(jnp.where(place.newton, reduced, harmless), previous)
