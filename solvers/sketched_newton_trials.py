"""Trials of `SketchedNewtonAL`: evaluation, shorter steps, second-order correction, restoration."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxopt_ext.core import tree
from jaxopt_ext.core.result import RESULTS
from jaxopt_ext.solvers.exact_augmented_lagrangian import (
    GRADIENT_PENALTY_CAP,
    descends,
    merit_parts,
)
from jaxopt_ext.solvers.flat_program import FlatProgram
from jaxopt_ext.solvers.sketched_newton_state import (
    FRESH,
    Iterate,
    Settings,
    SketchedNewtonALState,
    Trial,
    zeros,
)

HALVINGS = 30  # rejected trials after which a search is given up


def evaluate(program: FlatProgram, state: SketchedNewtonALState) -> Trial:
    """The functions and the merit at the point that the state is about to try."""
    w = state.iterate.w + state.length * state.step.w + state.correction.w
    rows = state.iterate.rows + state.length * state.step.rows + state.correction.rows
    found, tangent = program.linearize(w[: program.size], rows, state.scaling)
    merit = merit_parts(
        program, state.barrier, found.objective, found.gradient, found.rows, w, rows
    )
    return Trial(program, w, rows, found, tangent, merit)


def lighter_penalty(
    settings: Settings, merit: Array, state: SketchedNewtonALState
) -> Float[Array, ""]:
    """An η₂ with which M accepts a trial that η₂/2 ‖D∇L‖² alone stands against, or 0.

    Along curved valleys the gradient grows while everything else in M falls, and steps would have
    to be tiny. Asked for after the second rejection of a search only; η₂ falls to a hundredth at
    most, d must descend on M with it, and the trial must not be less feasible.

    Args:
        settings: Of the solver.
        merit: The parts of M at the trial.
        state: With those at the iterate.
    """
    ones = jnp.stack([jnp.ones_like(state.penalty), jnp.ones_like(state.penalty), state.penalty])
    share = settings.decrease * state.length
    change, slope = merit - state.merit, state.slope
    others = ones @ (change[:3] - share * slope[:3])
    last = change[3] - share * slope[3]
    wanted = jnp.where(last > 0, -others / (2 * jnp.where(last > 0, last, 1)), 0)
    allowed = (wanted >= 0.01 * state.gradient_penalty) & (wanted < state.gradient_penalty)
    allowed &= (ones @ slope[:3] < 0) & descends(state.merit, slope, state.penalty, wanted)
    allowed &= (state.halvings >= 2) & ~state.restoring & (wanted > GRADIENT_PENALTY_CAP)
    allowed &= change[2] <= 0
    return jnp.where(allowed, wanted, 0)


def reject(settings: Settings, trial: Trial, state: SketchedNewtonALState) -> SketchedNewtonALState:
    """A corrected trial, or a shorter one; after too many steps to feasibility, or the end."""
    halvings = state.halvings + 1
    over = halvings > HALVINGS
    atol = settings.atol
    restore = over & ~state.restoring & (state.feasibility > atol)
    tried = state.optimality <= 1e-5 * (1 + state.optimality_scale)
    failure = RESULTS.where(tried, RESULTS.stagnated, RESULTS.line_search_failed)
    failure = RESULTS.where(over & ~restore, failure, RESULTS.successful)
    shorter = eqx.tree_at(
        lambda s: (s.length, s.correction, s.halvings, s.failure),
        state,
        (state.length / 2, zeros(state.correction), halvings, failure),
    )
    begun = begin_restoring(settings, shorter, jnp.sqrt(2 * state.merit[2]))
    shorter = tree.where(restore, begun, shorter)
    if not settings.inner.exact or trial.program.rows_size == 0:
        return shorter
    use, correction = second_order_correction(settings.inner, trial, state)
    corrected = eqx.tree_at(lambda s: (s.correction, s.halvings), state, (correction, halvings))
    return tree.where(use, corrected, shorter)


def begin_restoring(settings: Settings, state, norm):
    """Evaluate the iterate again, and then make steps for feasibility alone."""
    zero = jnp.zeros_like(state.length)
    return eqx.tree_at(
        lambda s: (
            s.restoring, s.entry, s.kept_barrier, s.barrier, s.phase, s.length,
            s.walls_length, s.correction, s.halvings, s.penalty, s.gradient_penalty,
            s.damping,
        ),
        state,
        (
            jnp.array(True), norm, state.barrier, restoration_barrier(state.barrier, norm),
            jnp.array(FRESH, jnp.int32), zero, zero, zeros(state.correction),
            jnp.zeros((), jnp.int32), jnp.asarray(settings.penalty, zero.dtype),
            jnp.asarray(settings.gradient_penalty, zero.dtype),
            1e-2 * jnp.minimum(1, norm),
        ),
    )  # fmt: skip


def second_order_correction(inner: Any, trial: Trial, state: SketchedNewtonALState):
    """Whether to try a second-order correction, and what it adds to the trial.

    After the first rejection, where the constraints have become worse: the same step with
    their values at the trial in the right-hand side.
    """
    program, here = trial.program, state.iterate
    n, e = program.size, program.equalities
    worse = jnp.isfinite(trial.merit[2]) & (trial.merit[2] >= state.merit[2])
    c = program.with_slack(trial.found.rows, trial.w[n:])
    rhs = (state.length - 1) * state.residual + c
    full = -jnp.concatenate([jnp.zeros(n, c.dtype), rhs])
    solution = inner.apply(state.kept, full)
    distances = program.walls.distances(here.w)
    sigma = program.walls.weights(here.walls / distances)[n:]
    dw = jnp.concatenate([solution[:n], -solution[n + e :] / sigma]) * program.free
    whole = Iterate(state.step.w + dw, state.step.rows + solution[n:], state.step.walls)
    length = to_boundary(
        distances, program.walls.change(whole.w), program.walls.real, state.barrier
    )
    correction = jax.tree.map(lambda new, old: length * new - state.length * old, whole, state.step)
    first = (state.halvings == 0) & ~state.restoring
    use = first & worse & jnp.isfinite(solution).all()
    return use, tree.where(use, correction, zeros(correction))


def restoration_barrier(barrier: Array, norm: Array) -> Array:
    """Small beside ½‖c‖², so that the steps lead to feasible points."""
    return jnp.minimum(barrier, 1e-2 * norm**2)


def to_boundary(values: Array, change: Array, real: Array, barrier: Array) -> Array:
    """The largest α ≤ 1 that leaves a part of each of the values."""
    fraction = jnp.maximum(0.99, 1 - barrier)
    shrinks = real & (change < 0)
    limits = jnp.where(shrinks, -fraction * values / jnp.where(shrinks, change, -1), 1)
    return jnp.minimum(1, jnp.min(limits, initial=1))
