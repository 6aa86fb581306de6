"""What an accepted point of `SketchedNewtonAL` is like, and what is to be done there."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxopt_ext.core import tree
from jaxopt_ext.solvers.flat_program import Scaling
from jaxopt_ext.solvers.kkt_systems import Derivatives, dense_derivatives, rescaled
from jaxopt_ext.solvers.sketched_newton_state import (
    MEASURE,
    SEARCH,
    Iterate,
    Place,
    Settings,
    SketchedNewtonALState,
    Trial,
    weights,
)
from jaxopt_ext.solvers.sketched_newton_trials import restoration_barrier

SHORT, PATIENCE = 0.02, 3  # so many steps in a row with α below this: something else is tried
CLIP = 1e10  # multipliers of walls stay within this factor of barrier / distance
SMALL = 64  # number of variables up to which batches matter


def place_of(settings: Settings, trial: Trial, state: SketchedNewtonALState) -> Place:
    """How good the point is, and what is to be done there."""
    program = trial.program
    n, e = program.size, program.equalities
    real = program.walls.real
    dtype = trial.w.dtype
    measuring = state.phase == MEASURE
    derivatives = derivatives_of(settings, trial)
    scaling = scaling_of(settings, trial, derivatives, state)
    by_rows = scaling.rows / state.scaling.rows
    by_objective = scaling.objective / state.scaling.objective
    derivatives = rescaled(derivatives, by_objective, by_rows)
    values = trial.found.rows * by_rows
    w = trial.w.at[n:].set(jnp.where(measuring, jnp.maximum(-values[e:], 1e-2), trial.w[n:]))
    distances = program.walls.distances(w)
    walls = state.iterate.walls + state.walls_length * state.step.walls
    walls = jnp.where(measuring, state.barrier / distances, walls)
    ratio = state.barrier / distances
    walls = jnp.where(real, jnp.clip(walls, ratio / CLIP, ratio * CLIP), 0)
    iterate = Iterate(w, trial.rows, walls)

    # errors
    c = program.with_slack(values, w[n:])
    gradient = trial.found.gradient * program.free[:n]
    dual = jnp.concatenate([gradient, trial.rows[e:]]) - program.walls.pull(walls)
    number = max(trial.rows.size + (walls.size if program.bounded else 0), 1)
    mean = (jnp.sum(jnp.abs(trial.rows)) + jnp.sum(walls)) / number
    size = jnp.maximum(100, mean) / 100
    dual_error = jnp.max(jnp.abs(dual), initial=0)
    violation = jnp.max(jnp.abs(c), initial=0)
    norm = jnp.linalg.norm(c)
    product_error = jnp.max(jnp.where(real, distances * walls, 0), initial=0)

    # what next
    leave = state.restoring & (norm <= 0.1 * state.entry)
    restoring = state.restoring & ~leave
    merit_weights = weights(state)
    promised = jnp.abs(merit_weights @ state.slope)
    drowned = promised <= 10 * jnp.finfo(dtype).eps * (1 + jnp.abs(merit_weights @ state.merit))
    before = state.optimality * scaling.objective
    idle = jnp.maximum(dual_error, product_error) >= before
    tiny = jnp.where(drowned, idle, state.length < SHORT) & (state.phase == SEARCH)
    short = jnp.where(drowned | tiny, state.short, 0) + tiny.astype(jnp.int32)
    stuck = (short >= 2 * PATIENCE) & drowned
    slow = (short >= PATIENCE + state.resets) & ~state.restoring & ~drowned
    again = leave | (slow & (violation <= 1e-4))
    estimating = measuring | again

    def error(barrier):
        gap = jnp.where(real, jnp.abs(distances * walls - barrier), 0)
        dual_part = jnp.maximum(dual_error, jnp.max(gap, initial=0)) / size
        return jnp.maximum(dual_part, violation)

    settled = ~(estimating | state.restoring) & (state.phase == SEARCH)
    barrier = next_barrier(settings, program, state.barrier, error, settled, size, scaling)
    barrier = jnp.where(restoring, restoration_barrier(barrier, norm), barrier)
    barrier = jnp.where(leave, state.kept_barrier, barrier)

    push_off = program.walls.pull(barrier * program.walls.push(distances))
    force = jnp.concatenate([derivatives.pull(c), c[e:]]) - push_off
    force = force * program.walls.closeness(w)
    # beside the size of J, where that is at hand: in large variables its entries are small;
    # but they may also vanish at the point in question
    jacobian = None if derivatives.matrices is None else derivatives.matrices[1]
    steepest = 1 if jacobian is None else jnp.clip(jnp.max(jnp.abs(jacobian), initial=0), 1e-2, 1)
    negligible = 1e-6 * steepest * jnp.maximum(1e-2, norm)
    stationary = jnp.max(jnp.abs(force), initial=0) <= negligible
    return Place(
        iterate=iterate,
        scaling=scaling,
        derivatives=derivatives,
        objective=trial.found.objective * by_objective,
        gradient=gradient,
        values=values,
        c=c,
        distances=distances,
        barrier=barrier.astype(dtype),
        dual_error=dual_error,
        product_error=product_error,
        size=size,
        norm=norm,
        estimating=estimating,
        again=again,
        restoring=restoring,
        slow=slow,
        short=jnp.where(slow, 0, short),
        hopeless=restoring & stationary & (norm > 1e-6),
        stuck=stuck & ~state.restoring,
    )


def derivatives_of(settings: Settings, trial: Trial) -> Derivatives:
    """In the scaling so far."""
    program = trial.program
    n = program.size
    free = program.free[:n]
    no_rows = jnp.zeros_like(trial.rows)
    if not settings.inner.needs_matrix:

        def both(dy, drows):
            _, along, rows = trial.tangent(free * dy, drows)
            return free * along, rows

        def push(dy):
            return both(dy, no_rows)[1]

        def pull(drows):
            return both(jnp.zeros(n, trial.w.dtype), drows)[0]

        gradient = free * trial.found.gradient - pull(trial.rows)
        return Derivatives(gradient, lambda dy: both(dy, no_rows)[0], push, pull, both, None)
    basis = jnp.eye(n, dtype=trial.w.dtype)
    gradient, hessian, columns = jax.vmap(lambda e: trial.tangent(e, no_rows))(basis)
    # In a batch XLA's loop fusions compute each entry of H anew in all that reads it, with what the
    # user's functions need. A product ends the fusion; beside the factorization it is cheap.
    if n <= SMALL:
        hessian = jnp.matmul(jnp.diag(free), hessian, precision="highest") * free[None, :]
    else:
        hessian = free[:, None] * hessian * free[None, :]
    hessian = (hessian + hessian.T) / 2
    return dense_derivatives(gradient * free, hessian, columns.T * free[None, :])


def scaling_of(settings: Settings, trial, derivatives, state) -> Scaling:
    """Factors that bring the largest entries of ∇f and of the rows of J down to 100."""
    if not settings.scaled:
        return state.scaling
    if derivatives.matrices is not None:
        rows = jnp.max(jnp.abs(derivatives.matrices[1]), axis=1, initial=0)
    else:  # root mean square of a few random products: the Euclidean norms of the rows
        n = trial.program.size
        probes = jax.random.rademacher(jax.random.key(0), (8, n), trial.w.dtype)
        rows = jnp.sqrt(jnp.mean(jax.vmap(derivatives.push)(probes) ** 2, axis=0))
    objective = _damped(jnp.max(jnp.abs(derivatives.gradient), initial=0))
    wanted = Scaling(objective, _damped(rows))
    return tree.where(state.phase == MEASURE, wanted, state.scaling)


def next_barrier(settings: Settings, program, barrier, error, settled, size, scaling):
    """μ falls as far as the error of its barrier problem is at most 10 μ."""
    if not program.bounded:
        return barrier
    rtol, atol = settings.rtol, settings.atol
    least = (rtol * size + atol * scaling.objective) / 100
    least = jnp.maximum(least, jnp.finfo(barrier.dtype).tiny).astype(barrier.dtype)
    return jax.lax.while_loop(
        lambda mu: settled & (error(mu) <= 10 * mu) & (mu > least),
        lambda mu: jnp.maximum(least, jnp.minimum(0.2 * mu, mu**1.5)),
        barrier,
    )


def _damped(gradient: Array) -> Array:
    """The factor that brings the largest entry of a gradient down to 100."""
    return jnp.maximum(100 / jnp.maximum(gradient, 100), 1e-8)
