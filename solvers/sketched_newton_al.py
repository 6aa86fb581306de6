"""Nonlinear programs: an inexact Newton method on the exact augmented Lagrangian.

Hong, Na, Mahoney, Kolar, "Constrained Optimization via Exact Augmented Lagrangian and Randomized
Iterative Sketching", ICML 2023, for equality constraints. Inequalities and bounds come in by slack
variables and a primal-dual logarithmic barrier on the same merit function.
"""

from typing import Any, ClassVar, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from jaxopt_ext.core import check, tree
from jaxopt_ext.core.problem import NonlinearProgram
from jaxopt_ext.core.result import RESULTS
from jaxopt_ext.core.solver import AbstractSolver, Counts, Info, Number, default_tolerance
from jaxopt_ext.core.stop import Feasible, Optimality, Track
from jaxopt_ext.implicit import Multipliers
from jaxopt_ext.implicit.hoist import cond, vary_like
from jaxopt_ext.solvers.exact_augmented_lagrangian import (
    Accuracy,
    PublishedAccuracy,
    RelativeAccuracy,
    capped,
)
from jaxopt_ext.solvers.flat_program import FlatProgram, Scaling
from jaxopt_ext.solvers.inner_solvers import InnerSolver, SketchAndProject, automatic
from jaxopt_ext.solvers.sketched_newton_direction import direction
from jaxopt_ext.solvers.sketched_newton_place import place_of
from jaxopt_ext.solvers.sketched_newton_state import (
    FRESH,
    MEASURE,
    SEARCH,
    Iterate,
    Settings,
    Shift,
    SketchedNewtonALState,
    Trial,
    weights,
    zeros,
)
from jaxopt_ext.solvers.sketched_newton_trials import (
    begin_restoring,
    evaluate,
    lighter_penalty,
    reject,
    to_boundary,
)

LARGE_MULTIPLIER = 1e3  # estimates of multipliers beyond this are not trusted


class SketchedNewtonAL(AbstractSolver):
    """Inexact Newton method on the exact augmented Lagrangian, with a barrier for inequalities.

    For min f(y) s.t. c_E(y) = 0, c_I(y) ≤ 0, l ≤ y ≤ u. A step in variables and multipliers solves

        [ H + τI  Jᵀ ] [ dy ]     [ ∇f + Jᵀλ ]
        [ J        0 ] [ dλ ] = − [    c      ]

    by `inner_solver`, to the `accuracy` asked for; τ makes H positive definite on the null space of
    J. The merit function M = f + λᵀc + η₁/2 ‖c‖² + η₂/2 ‖∇f + Jᵀλ‖² judges it. If d does not
    descend on M, η₁ grows, η₂ falls and the accuracy sharpens; then α = 1, 1/2, … until
    M falls by `decrease` · α |⟨∇M, d⟩|, where the first rejection is followed by a second-order
    correction. Inequalities get slack variables, c_I + s = 0; slack variables and bounds enter M by
    −μ Σ log of their distances, and the system by a primal-dual diagonal; μ falls when its problem
    is solved.

    Every trial is one step and costs one value, gradient and product of the constraints' transposed
    Jacobian; the Hessian and the Jacobian (or products with them) are computed where a trial was
    accepted. Convergence is global under the assumptions of the paper (independent gradients of the
    equalities, H + τI bounded and positive definite on their null space), and superlinear with
    `RelativeAccuracy()`.

    Where steps stay short or no penalty gives descent, the method makes Gauss–Newton steps to
    feasible points alone and starts anew from there. A stationary point of the infeasibility ends
    the solve as `infeasible_stationary`.

    The start is moved into the interior of the bounds, and every iterate stays there. Variables
    with l = u are held fixed. `optimality` is the largest entry of the gradient of the Lagrangian
    and of the products of multipliers with their distances. It has to fall to
    atol + rtol · scale, where the scale is at least 1 and grows with the gradient at the start and
    with the multipliers beyond 100, and the largest violation to atol.

    Args:
        inner_solver: One of `solvers.kkt`; `None` chooses `Direct` for up to 500 variables and
            equalities together and matrix-free `MINRES` beyond.
        accuracy: How exact inner solves are: `kkt.RelativeAccuracy(fraction)` or the rule of the
            paper's code, `kkt.PublishedAccuracy()`. `Direct` is always exact.
        shift: How τ is found where the dense Hessian is at hand: `"inertia"`, the smallest of a
            growing sequence that works; `"frobenius"`, the paper's ξ + ‖H‖_F.
        penalty: η₁ at the start, > 0.
        gradient_penalty: η₂ at the start, > 0.
        growth: ν > 1; η₁ grows by ν² and η₂ falls by ν.
        decrease: Constant of the line search, in (0, 1/2), dimensionless.
        barrier: μ at the start, > 0, in units of the scaled objective. Small, around 1e-5, with
            `multipliers` of a near-by solution.
        scaled: Whether objective and constraints are scaled so that no gradient at the start has an
            entry beyond 100.
        multipliers: To start from, as in `Solution.multipliers`; `None` estimates them.
        rtol: Relative tolerance; `None` means eps^(2/3) of the dtype.
        atol: Absolute tolerance, also on the constraints; `None` likewise.

    Raises:
        TypeError: A setting is of the wrong kind.
        ValueError: A setting is outside its range; more equalities than variables; a rule that
            needs the dense matrix with an inner solver that has none.

    Reference:
        Hong, Na, Mahoney, Kolar, "Constrained Optimization via Exact Augmented Lagrangian and
        Randomized Iterative Sketching", ICML 2023. Barrier, scaling and τ as in Wächter and
        Biegler, Mathematical Programming 106, 2006.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> program = jx.NonlinearProgram(
        ...     fun=lambda y, args: y[0] * y[3] * (y[0] + y[1] + y[2]) + y[2],
        ...     equality=lambda y, args: jnp.sum(y**2) - 40.0,
        ...     inequality=lambda y, args: args - jnp.prod(y),
        ...     lower=1.0,
        ...     upper=5.0,
        ... )
        >>> start = jnp.array([1.0, 5.0, 5.0, 1.0])
        >>> sol = jx.solve(program, solvers.SketchedNewtonAL(), start, 25.0)
        >>> print(jnp.round(sol.value, 2), jnp.round(sol.multipliers.inequality, 2))
        [1.   4.74 3.82 1.38] 0.55
    """

    accepts: ClassVar = (NonlinearProgram,)
    honours: ClassVar = frozenset({"equality", "inequality", "bounds"})

    inner_solver: InnerSolver | None = None
    accuracy: Accuracy = RelativeAccuracy()
    shift: Shift = eqx.field(static=True, default="inertia")
    penalty: Number = 1.0
    gradient_penalty: Number = 0.1
    growth: Number = 1.5
    decrease: Number = 1e-4
    barrier: Number = 0.1
    scaled: bool = eqx.field(static=True, default=True)
    multipliers: Multipliers | None = None

    def __check_init__(self):
        name = type(self).__name__
        if self.inner_solver is not None and not isinstance(self.inner_solver, InnerSolver):
            raise TypeError(
                f"{name}: inner_solver is a {type(self.inner_solver).__name__}, expected an inner "
                "solver such as kkt.MINRES(), or None for an automatic choice"
            )
        if not isinstance(self.accuracy, Accuracy):
            raise TypeError(
                f"{name}: accuracy is a {type(self.accuracy).__name__}, expected a rule such as "
                "kkt.RelativeAccuracy(0.01)"
            )
        check.choice(name, "shift", self.shift, get_args(Shift))
        if self.multipliers is not None and not isinstance(self.multipliers, Multipliers):
            raise TypeError(
                f"{name}: multipliers is a {type(self.multipliers).__name__}, expected the "
                "`multipliers` of a Solution"
            )
        check.number(name, "penalty", self.penalty, above=0)
        check.number(name, "gradient_penalty", self.gradient_penalty, above=0)
        check.number(name, "growth", self.growth, above=1)
        check.number(name, "decrease", self.decrease, above=0, below=0.5)
        check.number(name, "barrier", self.barrier, above=0)

    @classmethod
    def published(cls, inner_solver: InnerSolver | None = None, **settings: Any):
        """The method with the constants of the paper's code.

        Those are η₁ = 1, η₂ = 0.1, ν = 1.5, the line search constant 0.1, the Frobenius shift, the
        published accuracy rule and no scaling. To start from multipliers of zero as well, give them
        as `multipliers`.

        Args:
            inner_solver: `None` is randomized Kaczmarz, `kkt.SketchAndProject("coordinate")`.
            settings: Further settings, which take precedence.

        Example:
            >>> from jaxopt_ext import solvers
            >>> print(solvers.SketchedNewtonAL.published().shift)
            frobenius
        """
        if inner_solver is None:
            inner_solver = SketchAndProject("coordinate")
        constants: dict[str, Any] = {
            "accuracy": PublishedAccuracy(),
            "shift": "frobenius",
            "decrease": 0.1,
            "scaled": False,
        }
        return cls(inner_solver, **{**constants, **settings})

    @property
    def needs_key(self) -> bool:  # pyright: ignore
        """Whether the inner solver is random."""
        return self.inner_solver is not None and self.inner_solver.random

    def init(self, problem, value, args, key=None):
        """See `AbstractSolver.init`; moves the start into the interior of the bounds."""
        program = FlatProgram(_program(problem), args, value)
        self._check(program)
        y = program.inside(ravel_pytree(value)[0])
        dtype, rows = y.dtype, jnp.zeros(program.rows_size, y.dtype)
        zero, unknown = jnp.zeros((), dtype), jnp.array(jnp.nan, dtype)
        slack = jnp.ones(program.inequalities, dtype)
        walls = jnp.ones(program.walls.real.size, dtype)
        iterate = Iterate(jnp.concatenate([y, slack]), rows, walls)
        scaling = Scaling(jnp.ones((), dtype), jnp.ones_like(rows))
        value = program.unravel(y)
        _, aux = jax.eval_shape(lambda value: problem.objective(value, args), value)
        state = SketchedNewtonALState(
            value=value,
            iterate=iterate,
            step=zeros(iterate),
            correction=zeros(iterate),
            kept=None,
            residual=rows,
            length=zero,
            walls_length=zero,
            merit=jnp.zeros(4, dtype),
            slope=jnp.zeros(4, dtype),
            penalty=jnp.asarray(self.penalty, dtype),
            gradient_penalty=jnp.asarray(self.gradient_penalty, dtype),
            sharpness=jnp.asarray(self.accuracy.first, dtype),
            barrier=jnp.asarray(self.barrier, dtype),
            kept_barrier=zero,
            shift=zero,
            damping=zero,
            scaling=scaling,
            phase=jnp.array(MEASURE, jnp.int32),
            restoring=jnp.array(False),
            entry=zero,
            halvings=jnp.zeros((), jnp.int32),
            short=jnp.zeros((), jnp.int32),
            resets=jnp.zeros((), jnp.int32),
            failure=RESULTS.successful,
            objective=unknown,
            optimality=unknown,
            optimality_scale=jnp.ones((), dtype),
            feasibility=unknown,
            multipliers=program.multipliers(rows, walls, scaling, jnp.zeros_like(y)),
            aux=zeros(aux),
            iterations=jnp.zeros((), jnp.int32),
            key=key if self.needs_key else None,
            counts=Counts.zero(),
        )
        state = vary_like(state, eqx.filter((problem, value, args), eqx.is_array))
        # what the inner solver keeps has a shape that only it knows
        kept = jax.eval_shape(
            lambda: take(self._settings(program), evaluate(program, state), state).kept
        )
        return eqx.tree_at(lambda s: s.kept, state, zeros(kept), is_leaf=lambda x: x is None)

    def step(self, problem, args, state):
        """See `AbstractSolver.step`: one evaluation, and if it is taken, the next direction.

        The first evaluation only measures: scales, slack variables and multipliers follow from it,
        and the point is evaluated again with them.
        """
        program = FlatProgram(_program(problem), args, state.value)
        settings = self._settings(program)
        trial = evaluate(program, state)
        finite = jnp.isfinite(trial.merit).all() & jnp.isfinite(trial.found.gradient).all()
        counts = state.counts.add(value=1, gradient=1, constraint=int(program.rows_size > 0))
        state = eqx.tree_at(lambda s: s.counts, state, counts)

        merit_weights = weights(state)
        allowed = self.decrease * state.length * jnp.minimum(merit_weights @ state.slope, 0)
        rounding = 10 * jnp.finfo(trial.w.dtype).eps * (1 + jnp.abs(merit_weights @ state.merit))
        enough = merit_weights @ (trial.merit - state.merit) <= allowed + rounding
        searching = state.phase == SEARCH
        gradient_penalty = lighter_penalty(settings, trial.merit, state)
        lighter = finite & searching & ~enough & (gradient_penalty > 0)
        state = eqx.tree_at(
            lambda s: s.gradient_penalty,
            state,
            jnp.where(lighter, gradient_penalty, state.gradient_penalty),
        )
        taken = finite & (~searching | enough | lighter)
        new = cond(
            taken, lambda: take(settings, trial, state), lambda: reject(settings, trial, state)
        )
        nowhere = (state.phase == MEASURE) & ~finite
        failure = RESULTS.where(nowhere, RESULTS.nonfinite_start, new.failure)
        new = eqx.tree_at(lambda s: s.failure, new, failure)
        moved = taken & (state.phase != FRESH)
        info = Info(
            objective=new.objective,
            optimality=new.optimality,
            optimality_scale=new.optimality_scale,
            feasibility=new.feasibility,
            step_size=state.length * jnp.linalg.norm(state.step.w[: program.size]),
            value_change=jnp.where(moved, state.objective - new.objective, 0),
            accepted=moved,
            counts=new.counts,
            failure=failure,
            aux=new.aux,
            multipliers=new.multipliers,
            extras={
                "iterations": new.iterations,
                "length": state.length,
                "barrier": new.barrier,
                "penalty": new.penalty,
                "gradient_penalty": new.gradient_penalty,
                "shift": new.shift,
                "restoring": new.restoring,
            },
        )
        return new, info

    def stop(self, problem, args, state, info):
        """See `AbstractSolver.stop`: optimality, and feasibility to `atol`."""
        rtol, atol = self._tolerances(info.optimality.dtype)
        zero = jnp.zeros((), jnp.int32)
        criterion = Optimality(rtol, atol) & Feasible(atol)
        met, _ = criterion(info, Track(zero, zero))
        met &= state.phase == SEARCH
        result = RESULTS.where(met, RESULTS.successful, info.failure)
        return met | (info.failure != RESULTS.successful), result

    def _settings(self, program: FlatProgram) -> Settings:
        rtol, atol = self._tolerances(program.dtype)
        return Settings(
            inner=self._inner(program),
            accuracy=self.accuracy,
            shift=self.shift,
            penalty=self.penalty,
            gradient_penalty=self.gradient_penalty,
            growth=self.growth,
            decrease=self.decrease,
            scaled=self.scaled,
            multipliers=self.multipliers,
            rtol=rtol,
            atol=atol,
        )

    def _inner(self, program: FlatProgram) -> InnerSolver:
        if self.inner_solver is not None:
            return self.inner_solver
        return automatic(program.size + program.equalities)

    def _check(self, program: FlatProgram) -> None:
        name = type(self).__name__
        if program.equalities > program.size:
            raise ValueError(
                f"{name}: equality returns {program.equalities} values for {program.size} "
                "variables, expected at most as many as variables; an overdetermined system is a "
                "LeastSquares problem"
            )
        dense = self._inner(program).needs_matrix
        if isinstance(self.accuracy, PublishedAccuracy) and not dense:
            raise ValueError(
                f"{name}: accuracy is PublishedAccuracy, which needs norms of the dense matrix; "
                "choose an inner solver that has it, such as kkt.SketchAndProject()"
            )
        if self.shift == "frobenius" and not dense:
            raise ValueError(
                f"{name}: shift is 'frobenius', which needs the dense Hessian; choose 'inertia' or "
                "an inner solver that has it, such as kkt.SketchAndProject()"
            )

    def _tolerances(self, dtype):
        default = default_tolerance(dtype)
        rtol = default if self.rtol is None else self.rtol
        atol = default if self.atol is None else self.atol
        return rtol, atol


def take(settings: Settings, trial: Trial, state: SketchedNewtonALState) -> SketchedNewtonALState:
    """Make the trial the iterate, and find the direction of the next ones."""
    place = place_of(settings, trial, state)
    step = direction(settings, trial, place, state)
    program, here = trial.program, place.iterate
    n, e = program.size, program.equalities
    real = program.walls.real
    length = to_boundary(place.distances, program.walls.change(step.iterate.w), real, place.barrier)
    walls_length = to_boundary(here.walls, step.iterate.walls, real, place.barrier)

    # estimated multipliers, where the solve was for them
    fresh = jnp.where(real, place.barrier / place.distances, 0)
    slack = fresh[fresh.size - program.inequalities :]
    trusted = jnp.max(jnp.abs(step.multiplier), initial=0) <= LARGE_MULTIPLIER
    estimate = jnp.where(trusted, step.multiplier, 0)
    estimate = jnp.where(place.again | ~trusted, estimate.at[e:].set(slack), estimate)
    if settings.multipliers is not None:
        given, at_walls = program.flat_multipliers(settings.multipliers, place.scaling)
        measuring = place.estimating & ~place.again
        estimate = jnp.where(measuring, given, estimate)
        known = jnp.where(real, jnp.maximum(at_walls, fresh), 0)
        here = eqx.tree_at(lambda i: i.walls, here, jnp.where(measuring, known, here.walls))
    here = Iterate(
        here.w,
        jnp.where(place.estimating, estimate, here.rows),
        jnp.where(place.again, fresh, here.walls),
    )

    atol = settings.atol
    violation = jnp.max(jnp.abs(place.c), initial=0)
    failed = capped(step.penalty, step.gradient_penalty) & place.newton
    restore = (failed | (place.slow & ~place.again)) & (violation > atol)
    failure = RESULTS.where(place.hopeless, RESULTS.infeasible_stationary, RESULTS.successful)
    failure = RESULTS.where(place.stuck, RESULTS.stagnated, failure)
    failure = RESULTS.where(step.ok, failure, RESULTS.linear_solve_failed)
    moving = jnp.where(place.estimating, 0, 1)
    costs = {"hessian": 1} if settings.inner.needs_matrix else {}
    values = trial.found.rows / state.scaling.rows
    new = SketchedNewtonALState(
        value=program.unravel(trial.w[:n]),
        iterate=here,
        step=jax.tree.map(lambda d: moving * d, step.iterate),
        correction=zeros(step.iterate),
        kept=step.kept,
        residual=place.c,
        length=moving * length,
        walls_length=moving * walls_length,
        merit=step.merit,
        slope=step.slope,
        penalty=jnp.where(place.again, settings.penalty, step.penalty),
        gradient_penalty=jnp.where(place.again, settings.gradient_penalty, step.gradient_penalty),
        sharpness=jnp.where(place.again, settings.accuracy.first, step.sharpness),
        barrier=place.barrier,
        kept_barrier=state.kept_barrier,
        shift=step.shift,
        damping=step.damping,
        scaling=place.scaling,
        phase=jnp.where(place.estimating, FRESH, SEARCH).astype(jnp.int32),
        restoring=place.restoring,
        entry=state.entry,
        halvings=jnp.zeros((), jnp.int32),
        short=place.short,
        resets=state.resets + place.slow.astype(jnp.int32),
        failure=failure,
        objective=place.objective / place.scaling.objective,
        optimality=jnp.maximum(place.dual_error, place.product_error) / place.scaling.objective,
        optimality_scale=place.size / place.scaling.objective,
        feasibility=largest_violation(program, values),
        multipliers=program.multipliers(here.rows, here.walls, place.scaling, trial.found.gradient),
        aux=trial.found.aux,
        iterations=state.iterations + (state.phase == SEARCH).astype(jnp.int32),
        key=state.key if state.key is None else jax.random.split(state.key)[0],
        counts=state.counts.add(linear_solve=1, hvp=step.products, **costs),
    )
    return tree.where(restore, begin_restoring(settings, new, place.norm), new)


def _program(problem: Any) -> NonlinearProgram:
    return problem  # the driver has checked it


def largest_violation(program: FlatProgram, values: Array) -> Array:
    """In the units of the constraints.

    Args:
        program: The program.
        values: (c_E, c_I).
    """
    equality = jnp.abs(values[: program.equalities])
    inequality = jnp.maximum(values[program.equalities :], 0)
    return jnp.max(jnp.concatenate([equality, inequality]), initial=0)
