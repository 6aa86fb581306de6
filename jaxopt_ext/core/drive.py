"""The driver: runs any solver on any problem it accepts and attaches the derivative.

Called from Python it runs compiled chunks of steps and comes back to the host between them, so
progress, callbacks, time limits and Ctrl-C need nothing inside the compiled code. Inside `jit`,
`vmap` and `grad` the same chunk, without limit, is the whole solve.
"""

import time
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.experimental
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, PyTree

from jaxopt_ext import implicit
from jaxopt_ext.core import check, tree
from jaxopt_ext.core.problem import Problem
from jaxopt_ext.core.report import Callback, Snapshot, emit, progress_sink, snapshot
from jaxopt_ext.core.result import RESULTS
from jaxopt_ext.core.solution import Solution, Stats
from jaxopt_ext.core.solver import (
    AbstractSolver,
    Info,
    check_compatible,
    default_relative,
    default_tolerance,
)
from jaxopt_ext.core.stop import Criterion, Track
from jaxopt_ext.implicit.attach import attach_problem, follow
from jaxopt_ext.implicit.hoist import strong, vary_like

RECORDED = ("objective", "optimality", "feasibility", "step_size", "accepted")


class Best(eqx.Module):
    """The best evaluated point so far.

    Attributes:
        value: The point.
        info: What the step that found it reported.
    """

    value: PyTree
    info: Info


class RunState(eqx.Module):
    """What a solve goes on from: a PyTree of arrays that can be saved and loaded.

    Attributes:
        solver: The solver's own state, as `solver.step` takes it.
        best: The best point so far; `None` for a monotone solver, whose state holds it.
    """

    solver: Any
    best: Best | None


class _Carry(eqx.Module):
    """What the loop carries: the solver's state and the driver's own bookkeeping."""

    state: Any
    info: Info
    best: Best | None  # None for a monotone solver: there it is the current point
    track: Track
    done: Array
    result: RESULTS
    history: dict[str, Array] | None


class _Job(eqx.Module):
    """Everything a chunk needs besides the carry; numbers are leaves, the rest is static."""

    problem: Problem
    solver: AbstractSolver
    args: PyTree
    stop: Criterion | None


def solve(
    problem: Problem,
    solver: AbstractSolver,
    init: PyTree,
    args: PyTree = None,
    *,
    key: Array | None = None,
    max_steps: int = 1000,
    adjoint: implicit.Adjoint | None = None,
    stop: Criterion | None = None,
    throw: bool = False,
    progress: bool | str | None = None,
    history: bool = False,
    callback: Callback | None = None,
    time_limit: float | int | None = None,
    state: Any = None,
) -> Solution:
    """Solve a problem and make the solution differentiable.

    Whatever happens, the best point found comes back with a result code. Derivatives flow to
    `args` and to every array that the problem's functions captured.

    Args:
        problem: What to solve, e.g. `Minimization(fun)`.
        solver: How, e.g. `solvers.GradNormSmooth()`.
        init: Starting point, a PyTree of floating arrays.
        args: Second argument of the problem's functions, any PyTree.
        key: Random key; required exactly where the solver is random.
        max_steps: Steps of the solver at most. Running out is a result, not an error.
        adjoint: How to differentiate: `implicit.ImplicitAdjoint()` (default), `UnrolledAdjoint`,
            `OneStepAdjoint` or `DetachedAdjoint`.
        stop: Stopping criterion, e.g. `Optimality(atol=1e-6) | Stalled(50)`; default: the
            solver's own test with its `rtol` and `atol`.
        throw: Raise `SolveError` unless successful; only where the call runs from Python.
        progress: `True` (tqdm, or text without it), `"tqdm"` or `"text"`.
        history: Record objective, optimality, feasibility, step size and acceptance of each step.
        callback: Called after each step with a `Snapshot`; returning True stops the solve.
        time_limit: Wall-clock seconds, compilation included; only where the call runs from Python.
        state: Go on from `Solution.state` instead of `init`, bit for bit as if never stopped. With
            other `args` the solver first brings its state up to date.

    Returns:
        A `Solution`.

    Raises:
        TypeError: An argument is of the wrong kind, e.g. integer variables.
        ValueError: The functions do not fit `init` and `args`, a constraint cannot be honoured, a
            key is missing, or a limit is out of range.
        SolveError: With `throw=True`, the solve was not successful.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> problem = jx.Minimization(lambda y, t: jnp.sum((y - t) ** 2) + jnp.sum(y**2))
        >>> solve = lambda t: jx.solve(problem, solvers.GradNormSmooth(), jnp.zeros(2), t).value
        >>> print(jnp.round(solve(jnp.array([2.0, 4.0])), 3))
        [1. 2.]
        >>> print(jax.jacobian(solve)(jnp.array([2.0, 4.0])))
        [[0.5 0. ]
         [0.  0.5]]
    """
    check_compatible(problem, solver, key)
    check.count("solve", "max_steps", max_steps)
    if time_limit is not None:
        check.number("solve", "time_limit", time_limit, above=0)
    if stop is not None and not isinstance(stop, Criterion):
        raise TypeError(
            f"solve: stop is a {type(stop).__name__}, expected a criterion such as Optimality()"
        )
    check.function("solve", "callback", callback, optional=True)
    adjoint = implicit.ImplicitAdjoint() if adjoint is None else adjoint
    if not isinstance(adjoint, implicit.Adjoint):
        raise TypeError(
            f"solve: adjoint is a {type(adjoint).__name__}, expected an adjoint such as "
            "implicit.ImplicitAdjoint()"
        )

    value = check.variables("init", init)
    dtype = tree.dtype_of(value)
    problem, solver, args, stop = strong((problem, solver, args, stop), dtype)
    value, args = _vary(value, args)
    live = _Job(problem.trace(value, args), solver, args, stop)

    unrolled = isinstance(adjoint, implicit.UnrolledAdjoint)
    job, start, resumed = (
        (live, value, state) if unrolled else implicit.detach((live, value, state))
    )
    carry = _prepare(job, start, key, resumed, max_steps if history else None)
    if _on_host((job, start, key, resumed)):
        sink = progress_sink(progress, lambda now: _tolerance(solver, now))
        carry = _run_on_host(job, carry, max_steps, sink, callback, time_limit)
    else:
        checkpoints = (adjoint.checkpoints,) if unrolled else None
        listener = _listener(callback, progress, solver)
        bound = max_steps if unrolled else None
        carry = _advance(job, carry, jnp.asarray(max_steps), bound, checkpoints, listener)
    value, info = _finish(job, carry)
    solution = Solution(
        value=value,
        multipliers=info.multipliers,
        objective=info.objective,
        optimality=info.optimality,
        feasibility=info.feasibility,
        result=carry.result,
        stats=Stats(carry.track.steps, info.counts),
        aux=info.aux,
        history=carry.history,
        state=RunState(carry.state, carry.best),
    )
    if throw and not isinstance(solution.objective, Tracer):
        solution.check()
    return solution if unrolled else _differentiate(live, solution, adjoint)


def _vary(value: PyTree, args: PyTree) -> tuple[PyTree, PyTree]:
    """Inside `shard_map`, start and arguments that vary over the same mesh axes.

    The problem's functions are traced once. The program then fits only arguments that vary as
    those it was traced with, and the iterates vary wherever an argument does.
    """
    dynamic, static = eqx.partition(args, eqx.is_array)
    value, dynamic = vary_like((value, dynamic))
    return value, eqx.combine(dynamic, static)


# ---- the loop ------------------------------------------------------------------------------


@eqx.filter_jit
def _prepare(job: _Job, value, key, resumed, history_length) -> _Carry:
    """Initialise the solver, or check the state to go on from, and lay out the carry."""

    def fresh():
        return job.solver.init(job.problem, value, job.args, key)

    if resumed is None:
        state = fresh()
    else:
        expected = jax.eval_shape(fresh)
        if not isinstance(resumed, RunState) or not tree.same_types(resumed.solver, expected):
            raise ValueError(
                f"solve: state is {tree.describe(resumed)}, expected the `state` of a Solution "
                f"found by {type(job.solver).__name__} for init {tree.describe(value)}"
            )
        state = job.solver.resume(job.problem, job.args, resumed.solver)
    # inside `shard_map` a loop's carry must vary from the start wherever the problem does
    inputs = eqx.filter((job, value, resumed), eqx.is_array)
    state = vary_like(state, inputs)
    _, info = jax.eval_shape(lambda s: _solver_step(job, s), state)
    info = jax.tree.map(_unknown, info)
    zero = jnp.zeros((), jnp.int32)
    history = None
    if history_length is not None:
        history = {
            name: jnp.full(history_length, jnp.nan, info.objective.dtype) for name in RECORDED
        }
    if job.solver.monotone:
        best = None
    else:
        best = Best(state.value, info) if resumed is None else resumed.best
    done = jnp.array(False)
    carry = _Carry(state, info, best, Track(zero, zero), done, RESULTS.max_steps_reached, history)
    return vary_like(carry, inputs)


def _unknown(shape):
    """NaN for numbers that no step has reported yet."""
    if jnp.issubdtype(shape.dtype, jnp.inexact):
        return jnp.full(shape.shape, jnp.nan, shape.dtype)
    return jnp.zeros(shape.shape, shape.dtype)


@eqx.filter_jit
def _solver_step(job: _Job, state):
    """The solver's step; under `jit`, so that laying out the carry and the loop share one trace."""
    # inside `shard_map` what a step makes anew, as zeros, varies as the state before
    return vary_like(job.solver.step(job.problem, job.args, state), state)


@eqx.filter_jit
def _advance(job: _Job, carry: _Carry, limit, max_steps, checkpoints, listener) -> _Carry:
    """Step until done or until `limit` steps in all; one call site of `solver.step`."""

    def going(carry):
        return ~carry.done & (carry.track.steps < limit)

    def body(carry):
        return _one_step(job, carry, listener)

    if checkpoints is None:
        return jax.lax.while_loop(going, body, carry)
    return eqxi.while_loop(
        going, body, carry, max_steps=max_steps, kind="checkpointed", checkpoints=checkpoints[0]
    )


def _one_step(job: _Job, carry: _Carry, listener) -> _Carry:
    state, info = _solver_step(job, carry.state)
    first = carry.track.steps == 0
    if carry.best is None:
        best, better = None, info.accepted
    else:
        better = _better(info, carry.best.info, job.problem.has_objective)
        best = tree.where(better, Best(state.value, info), carry.best)
    steps = carry.track.steps + 1
    track = Track(steps, jnp.where(better, 0, carry.track.since_best + 1))

    if job.stop is None:
        met, result = job.solver.stop(job.problem, job.args, state, info)
    else:
        met, result = job.stop(info, track)
        failed = info.failure != RESULTS.successful
        result = RESULTS.where(met, result, info.failure)
        met = met | failed

    ok = tree.all_finite(state.value)
    if job.problem.has_objective:
        ok &= jnp.isfinite(info.objective)
        huge = jnp.sqrt(jnp.finfo(info.objective.dtype).max)
        unbounded = info.objective < -huge
        result = RESULTS.where(unbounded & ok, RESULTS.diverged, result)
        met |= unbounded
    broken = RESULTS.where(first, RESULTS.nonfinite_start, RESULTS.nonfinite_step)
    # a method that names its failure knows better than this guard
    named = info.failure != RESULTS.successful
    result = RESULTS.where(ok | named, result, broken)
    done = met | ~ok

    if listener is not None:
        asked = emit(listener, snapshot(steps, state.value, info))
        result = RESULTS.where(asked & ~done, RESULTS.user_stopped, result)
        done |= asked
    history = carry.history
    if history is not None:
        history = {
            name: column.at[carry.track.steps].set(
                jnp.asarray(getattr(info, name), column.dtype), mode="drop"
            )
            for name, column in history.items()
        }
    result = RESULTS.where(done, result, RESULTS.max_steps_reached)
    return _Carry(state, info, best, track, done, result, history)


def _better(new: Info, old: Info, has_objective: bool):
    """Less infeasible, or equally feasible with an objective (else residual) at least as good.

    Nothing is worse than a point that is not finite, or not known yet.
    """
    tolerance = default_tolerance(new.feasibility.dtype)

    def violation(info):
        return jnp.where(info.feasibility <= tolerance, 0, info.feasibility)

    a, b = violation(new), violation(old)
    merit = (lambda info: info.objective) if has_objective else (lambda info: info.optimality)
    unknown = jnp.isnan(merit(old)) | jnp.isnan(b)
    better = (a < b) | ((a == b) & (merit(new) <= merit(old)))
    return unknown | (better & ~jnp.isnan(merit(new)))


@eqx.filter_jit
def _finish(job: _Job, carry: _Carry):
    """The final point where the criterion was met there, else the best evaluated one."""
    final = Best(carry.state.value, carry.info)
    if carry.best is not None:
        final = tree.where(carry.result == RESULTS.successful, final, carry.best)
    info = eqx.tree_at(lambda info: info.counts, final.info, carry.info.counts)
    return job.solver.finish(job.problem, job.args, final.value, info)


# ---- the host side -------------------------------------------------------------------------


def _on_host(inputs) -> bool:
    """Whether nothing is traced: neither an input nor, inside `jit`, everything."""
    leaves = jax.tree.leaves(inputs)
    traced = any(isinstance(leaf, Tracer) for leaf in leaves)
    return not traced and not isinstance(jnp.add(0.0, 0.0), Tracer)


def _run_on_host(job, carry, max_steps, sink, callback, time_limit) -> _Carry:
    """Chunks of steps: one at a time for a callback, else as many as fit into a tenth of a second.

    Ctrl-C keeps the last chunk's result.
    """
    started, steps = time.perf_counter(), 0
    watched = sink is not None or callback is not None or time_limit is not None
    chunk = 1 if watched else 8
    try:
        while steps < max_steps:
            began = time.perf_counter()
            limit = jnp.asarray(min(steps + chunk, max_steps))
            carry = _advance(job, carry, limit, None, None, None)
            steps, done = map(int, jax.device_get((carry.track.steps, carry.done)))
            took = time.perf_counter() - began
            now = None
            if sink is not None or callback is not None:
                now = jax.device_get(snapshot(carry.track.steps, carry.state.value, carry.info))
            if sink is not None:
                sink.update(now, final=done)
            if done:
                break
            if callback is not None:
                if callback(now):
                    return _stopped(carry, RESULTS.user_stopped)
            elif took < 0.1:
                chunk *= 2
            elif took > 0.3:
                chunk = max(1, chunk // 2)
            if time_limit is not None:
                spent = time.perf_counter() - started
                if spent >= time_limit:
                    return _stopped(carry, RESULTS.time_limit_reached)
                chunk = max(1, min(chunk, int(chunk * (time_limit - spent) / max(took, 1e-9))))
    except KeyboardInterrupt:
        return _stopped(carry, RESULTS.user_stopped)
    finally:
        if sink is not None:
            sink.close()
    return carry


def _stopped(carry: _Carry, result: RESULTS) -> _Carry:
    return eqx.tree_at(lambda c: c.result, carry, result)


def _tolerance(solver: AbstractSolver, now: Snapshot) -> float:
    dtype = now.optimality.dtype
    rtol = default_relative(dtype) if solver.rtol is None else float(solver.rtol)
    atol = default_tolerance(dtype) if solver.atol is None else float(solver.atol)
    return atol + rtol * float(now.tolerance_scale)


def _listener(callback, progress, solver):
    """One host function for callback and progress inside compiled code."""
    if callback is None and not progress:
        return None
    sink = progress_sink(progress, lambda now: _tolerance(solver, now))

    def listen(now: Snapshot) -> bool:
        if sink is not None:
            sink.update(now)
        return bool(callback(now)) if callback is not None else False

    return listen


# ---- derivatives ---------------------------------------------------------------------------


class _Iterations(eqx.Module):
    """`steps` unguarded iterations from a detached point, as a function of what is live."""

    steps: int = eqx.field(static=True)

    def __call__(self, job: _Job, state, value):
        for _ in range(self.steps):
            value = job.solver.iteration_map(job.problem, job.args, state, value)
        return value


def _differentiate(live: _Job, solution: Solution, adjoint: implicit.Adjoint) -> Solution:
    """Attach the derivative to the value, and through it to multipliers, objective and aux."""
    if isinstance(adjoint, implicit.DetachedAdjoint):
        return solution
    value, multipliers = solution.value, solution.multipliers
    if isinstance(adjoint, implicit.OneStepAdjoint):
        run = _Iterations(adjoint.steps)
        eqx.filter_eval_shape(
            run, live, solution.state.solver, value
        )  # refuse here what has no such map
        value = follow(run, value, live, solution.state.solver, value)
    else:
        linear_solver = getattr(adjoint, "linear_solver", None)
        condition = live.solver.condition(live.problem)
        unknowns = live.problem.variables(value, multipliers)
        unknowns = attach_problem(condition, unknowns, (live.args,), linear_solver)
        value, multipliers = live.problem.split(unknowns)
    objective, aux = solution.objective, solution.aux
    if live.problem.has_objective:
        objective, aux = follow(live.problem.objective, (objective, aux), value, live.args)
    return eqx.tree_at(
        lambda s: (s.value, s.multipliers, s.objective, s.aux),
        solution,
        (value, multipliers, objective, aux),
        is_leaf=lambda leaf: leaf is None,
    )


# ---- many starts ---------------------------------------------------------------------------


class Multistart(eqx.Module):
    """Solutions from many starts.

    Attributes:
        best: The successful solution with the least objective, or the least of all.
        all: Every solution, with a leading batch axis.
    """

    best: Solution
    all: Solution


def multistart(
    problem: Problem,
    solver: AbstractSolver,
    inits: PyTree,
    args: PyTree = None,
    *,
    key: Array | None = None,
    **options: Any,
) -> Multistart:
    """Solve from many starting points at once: `vmap` of `solve`, and the best of it.

    Args:
        problem: See `solve`.
        solver: See `solve`.
        inits: Starting points, PyTree leaves with a common leading axis.
        args: See `solve`; shared by all starts.
        key: See `solve`; split over the starts.
        options: Further keyword arguments of `solve`.

    Returns:
        The best solution and all of them.

    Raises:
        ValueError: The leaves of `inits` have no common leading axis.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> double_well = jx.Minimization(lambda y, args: (y**2 - 1.0) ** 2 + 0.3 * y)
        >>> inits = jnp.array([-2.0, -0.5, 0.5, 2.0])
        >>> found = jx.multistart(double_well, solvers.GradNormSmooth(), inits)
        >>> print(jnp.round(found.best.value, 3))
        -1.036
    """
    inits = check.variables("inits", inits)
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(inits)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"multistart: inits is {tree.describe(inits)}, expected leaves with a common leading "
            "axis, one entry per start"
        )
    throw = options.pop("throw", False)
    if key is None:
        every = jax.vmap(lambda init: solve(problem, solver, init, args, **options))(inits)
    else:
        keys = jax.random.split(key, *sizes)
        every = jax.vmap(lambda init, k: solve(problem, solver, init, args, key=k, **options))(
            inits, keys
        )
    objective = jnp.where(jnp.isnan(every.objective), jnp.inf, every.objective)
    failed_last = jnp.lexsort((objective, ~every.success))
    best = jax.tree.map(lambda leaf: leaf[failed_last[0]], every)
    if throw and not isinstance(best.objective, Tracer):
        best.check()
    return Multistart(best, every)
