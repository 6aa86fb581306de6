"""Nonlinear programs: an inexact Newton method on the exact augmented Lagrangian.

Hong, Na, Mahoney, Kolar, "Constrained Optimization via Exact Augmented Lagrangian and Randomized
Iterative Sketching", ICML 2023, for equality constraints. Inequalities and bounds come in by slack
variables and a primal-dual logarithmic barrier on the same merit function.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxopt_ext.core import check, tree
from jaxopt_ext.core.problem import NonlinearProgram
from jaxopt_ext.core.result import RESULTS
from jaxopt_ext.core.solver import AbstractSolver, Counts, Info, Number, default_tolerance
from jaxopt_ext.core.stop import Feasible, Optimality, Track
from jaxopt_ext.implicit import Multipliers
from jaxopt_ext.solvers.exact_augmented_lagrangian import (
    Accuracy,
    PublishedAccuracy,
    RelativeAccuracy,
    Sizes,
    capped,
    descends,
    merit_parts,
)
from jaxopt_ext.solvers.flat_program import Evaluation, FlatProgram, Scaling
from jaxopt_ext.solvers.inner_solvers import InnerSolver, SketchAndProject, automatic
from jaxopt_ext.solvers.kkt_systems import (
    Derivatives,
    KKTSystem,
    convexifying_shift,
    larger_shift,
    reduced_hessian,
)

Shift = Literal["inertia", "frobenius"]

MEASURE, FRESH, SEARCH = 0, 1, 2  # what the next evaluation is for, see `step`
HALVINGS = 30  # rejected trials after which a search is given up
SHORT, PATIENCE = 0.02, 3  # so many steps in a row with α below this: something else is tried
CLIP = 1e10  # multipliers of walls stay within this factor of barrier / distance
LARGE_MULTIPLIER = 1e3  # estimates of multipliers beyond this are not trusted
BOUNDED_FRACTION = 1e-3  # with a barrier, rows of complementarity are small beside the others
TRIES = 40  # inner solves per step


class Iterate(eqx.Module):
    """Primal and dual variables of the scaled program.

    Attributes:
        w: Variables and slack variables.
        rows: Multipliers of the constraints.
        walls: Multipliers of the walls, > 0.
    """

    w: Float[Array, " n"]
    rows: Float[Array, " m"]
    walls: Float[Array, " k"]


class SketchedNewtonALState(eqx.Module):
    """State of `SketchedNewtonAL`.

    Attributes:
        value: The last accepted point.
        iterate: The same with slack variables and multipliers, in the scaled program.
        step: The search direction from there.
        correction: What a second-order correction adds to the next trial.
        kept: What the inner solver keeps of its matrix.
        residual: c at the iterate.
        length: α of the next trial.
        walls_length: α of the walls' multipliers.
        merit: The parts of the merit function at the iterate.
        slope: Their derivatives along the step.
        penalty: η₁.
        gradient_penalty: η₂.
        sharpness: State of the accuracy rule.
        barrier: μ.
        kept_barrier: μ to go on with after steps for feasibility alone.
        shift: The last τ > 0.
        damping: Of the steps for feasibility.
        scaling: Of objective and constraints.
        phase: What the next evaluation is for.
        restoring: Whether the steps are for feasibility alone.
        entry: ‖c‖ when that began.
        halvings: Rejected trials of this search.
        short: Accepted steps in a row with a small α.
        resets: How often that had consequences.
        failure: Why the method cannot go on.
        objective: f at the value.
        optimality: See `Info`.
        optimality_scale: See `Info`.
        feasibility: See `Info`.
        multipliers: In the program's units.
        aux: Auxiliary output at the value.
        iterations: Accepted steps.
        key: For random inner solvers.
        counts: Evaluations so far.
    """

    value: PyTree
    iterate: Iterate
    step: Iterate
    correction: Iterate
    kept: PyTree
    residual: Float[Array, " m"]
    length: Float[Array, ""]
    walls_length: Float[Array, ""]
    merit: Float[Array, " 4"]
    slope: Float[Array, " 4"]
    penalty: Float[Array, ""]
    gradient_penalty: Float[Array, ""]
    sharpness: Float[Array, ""]
    barrier: Float[Array, ""]
    kept_barrier: Float[Array, ""]
    shift: Float[Array, ""]
    damping: Float[Array, ""]
    scaling: Scaling
    phase: Int[Array, ""]
    restoring: Bool[Array, ""]
    entry: Float[Array, ""]
    halvings: Int[Array, ""]
    short: Int[Array, ""]
    resets: Int[Array, ""]
    failure: RESULTS
    objective: Float[Array, ""]
    optimality: Float[Array, ""]
    optimality_scale: Float[Array, ""]
    feasibility: Float[Array, ""]
    multipliers: Multipliers
    aux: PyTree
    iterations: Int[Array, ""]
    key: PyTree
    counts: Counts


class Trial(NamedTuple):
    """An evaluated trial.

    Attributes:
        program: The program.
        w: Variables and slack variables.
        rows: Multipliers.
        found: The functions there, with the scaling so far.
        tangent: Their linear approximation.
        merit: The parts of the merit function there.
    """

    program: FlatProgram
    w: Array
    rows: Array
    found: Evaluation
    tangent: Callable[[Array, Array], tuple[Array, Array, Array]]
    merit: Array


class Place(NamedTuple):
    """A trial that is taken, in the scaling that holds from now on, and what is to be done there.

    Attributes:
        iterate: Primal and dual variables.
        scaling: Of the program.
        derivatives: There.
        objective: Scaled f.
        gradient: Of the scaled Lagrangian, without the walls; 0 for fixed variables.
        values: Scaled constraints, without slack variables.
        c: With them.
        distances: From the walls.
        barrier: μ.
        dual_error: Max norm of the gradient of the Lagrangian with the walls.
        product_error: Max norm of multipliers times distances.
        size: Mean size of the multipliers over 100, at least 1.
        norm: ‖c‖₂.
        estimating: No step from here: multipliers are estimated first.
        again: Likewise, because the method starts anew here.
        restoring: The step is for feasibility alone.
        slow: The last steps were short.
        short: How many of them were, in a row.
        hopeless: A stationary point of infeasibility.
        stuck: What the last steps could gain is rounding error of the merit function.
    """

    iterate: Iterate
    scaling: Scaling
    derivatives: Derivatives
    objective: Array
    gradient: Array
    values: Array
    c: Array
    distances: Array
    barrier: Array
    dual_error: Array
    product_error: Array
    size: Array
    norm: Array
    estimating: Array
    again: Array
    restoring: Array
    slow: Array
    short: Array
    hopeless: Array
    stuck: Array

    @property
    def newton(self) -> Array:
        """Whether the next step is for the program itself."""
        return ~(self.estimating | self.restoring)


class Step(NamedTuple):
    """A search direction and what was changed to find it."""

    iterate: Iterate
    multiplier: Array
    kept: PyTree
    merit: Array
    slope: Array
    penalty: Array
    gradient_penalty: Array
    sharpness: Array
    shift: Array
    damping: Array
    products: Array
    ok: Array


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
            constraints together and matrix-free `MINRES` beyond.
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
            step=_zeros(iterate),
            correction=_zeros(iterate),
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
            aux=_zeros(aux),
            iterations=jnp.zeros((), jnp.int32),
            key=key if self.needs_key else None,
            counts=Counts.zero(),
        )
        # what the inner solver keeps has a shape that only it knows
        kept = jax.eval_shape(lambda: self._take(self._evaluate(program, state), state).kept)
        return eqx.tree_at(lambda s: s.kept, state, _zeros(kept), is_leaf=lambda x: x is None)

    def step(self, problem, args, state):
        """See `AbstractSolver.step`: one evaluation, and if it is taken, the next direction.

        The first evaluation only measures: scales, slack variables and multipliers follow from it,
        and the point is evaluated again with them.
        """
        program = FlatProgram(_program(problem), args, state.value)
        trial = self._evaluate(program, state)
        finite = jnp.isfinite(trial.merit).all() & jnp.isfinite(trial.found.gradient).all()
        counts = state.counts.add(value=1, gradient=1, constraint=int(program.rows_size > 0))
        state = eqx.tree_at(lambda s: s.counts, state, counts)

        weights = _weights(state)
        allowed = self.decrease * state.length * jnp.minimum(weights @ state.slope, 0)
        rounding = 10 * jnp.finfo(trial.w.dtype).eps * (1 + jnp.abs(weights @ state.merit))
        enough = weights @ (trial.merit - state.merit) <= allowed + rounding
        take = finite & ((state.phase != SEARCH) | enough)
        new = jax.lax.cond(
            take, lambda: self._take(trial, state), lambda: self._reject(trial, state)
        )
        nowhere = (state.phase == MEASURE) & ~finite
        failure = RESULTS.where(nowhere, RESULTS.nonfinite_start, new.failure)
        new = eqx.tree_at(lambda s: s.failure, new, failure)
        moved = take & (state.phase != FRESH)
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

    # ---- settings and their consequences

    def _inner(self, program: FlatProgram) -> InnerSolver:
        if self.inner_solver is not None:
            return self.inner_solver
        return automatic(program.size + program.rows_size)

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

    # ---- trials

    def _evaluate(self, program, state) -> Trial:
        w = state.iterate.w + state.length * state.step.w + state.correction.w
        rows = state.iterate.rows + state.length * state.step.rows + state.correction.rows
        found, tangent = program.linearize(w[: program.size], rows, state.scaling)
        merit = merit_parts(
            program, state.barrier, found.objective, found.gradient, found.rows, w, rows
        )
        return Trial(program, w, rows, found, tangent, merit)

    def _reject(self, trial: Trial, state: SketchedNewtonALState) -> SketchedNewtonALState:
        """A corrected trial, or a shorter one; after too many steps to feasibility, or the end."""
        halvings = state.halvings + 1
        over = halvings > HALVINGS
        _, atol = self._tolerances(state.length.dtype)
        restore = over & ~state.restoring & (state.feasibility > atol)
        tried = state.optimality <= 1e-5 * (1 + state.optimality_scale)
        failure = RESULTS.where(tried, RESULTS.stagnated, RESULTS.line_search_failed)
        failure = RESULTS.where(over & ~restore, failure, RESULTS.successful)
        shorter = eqx.tree_at(
            lambda s: (s.length, s.correction, s.halvings, s.failure),
            state,
            (state.length / 2, _zeros(state.correction), halvings, failure),
        )
        begun = self._begin_restoring(shorter, jnp.sqrt(2 * state.merit[2]))
        shorter = tree.where(restore, begun, shorter)
        if not self._inner(trial.program).exact or trial.program.rows_size == 0:
            return shorter
        use, correction = self._correct(trial, state)
        corrected = eqx.tree_at(lambda s: (s.correction, s.halvings), state, (correction, halvings))
        return tree.where(use, corrected, shorter)

    def _begin_restoring(self, state, norm):
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
                jnp.array(True), norm, state.barrier, _restoration_barrier(state.barrier, norm),
                jnp.array(FRESH, jnp.int32), zero, zero, _zeros(state.correction),
                jnp.zeros((), jnp.int32), jnp.asarray(self.penalty, zero.dtype),
                jnp.asarray(self.gradient_penalty, zero.dtype),
                1e-2 * jnp.minimum(1, norm),
            ),
        )  # fmt: skip

    def _correct(self, trial, state):
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
        solution = jax.scipy.linalg.lu_solve(state.kept, full)
        distances = program.walls.distances(here.w)
        sigma = program.walls.weights(here.walls / distances)[n:]
        dw = jnp.concatenate([solution[:n], -solution[n + e :] / sigma]) * program.free
        whole = Iterate(state.step.w + dw, state.step.rows + solution[n:], state.step.walls)
        length = _to_boundary(
            distances, program.walls.change(whole.w), program.walls.real, state.barrier
        )
        correction = jax.tree.map(
            lambda new, old: length * new - state.length * old, whole, state.step
        )
        first = (state.halvings == 0) & ~state.restoring
        use = first & worse & jnp.isfinite(solution).all()
        return use, tree.where(use, correction, _zeros(correction))

    # ---- the next direction

    def _take(self, trial: Trial, state: SketchedNewtonALState) -> SketchedNewtonALState:
        """Make the trial the iterate, and find the direction of the next ones."""
        place = self._place(trial, state)
        step = self._direction(trial, place, state)
        program, here = trial.program, place.iterate
        n, e = program.size, program.equalities
        real = program.walls.real
        length = _to_boundary(
            place.distances, program.walls.change(step.iterate.w), real, place.barrier
        )
        walls_length = _to_boundary(here.walls, step.iterate.walls, real, place.barrier)

        # estimated multipliers, where the solve was for them
        fresh = jnp.where(real, place.barrier / place.distances, 0)
        slack = fresh[fresh.size - program.inequalities :]
        trusted = jnp.max(jnp.abs(step.multiplier), initial=0) <= LARGE_MULTIPLIER
        estimate = jnp.where(trusted, step.multiplier, 0)
        estimate = jnp.where(place.again | ~trusted, estimate.at[e:].set(slack), estimate)
        if self.multipliers is not None:
            given, at_walls = program.flat_multipliers(self.multipliers, place.scaling)
            measuring = place.estimating & ~place.again
            estimate = jnp.where(measuring, given, estimate)
            known = jnp.where(real, jnp.maximum(at_walls, fresh), 0)
            here = eqx.tree_at(lambda i: i.walls, here, jnp.where(measuring, known, here.walls))
        here = Iterate(
            here.w,
            jnp.where(place.estimating, estimate, here.rows),
            jnp.where(place.again, fresh, here.walls),
        )

        _, atol = self._tolerances(trial.w.dtype)
        violation = jnp.max(jnp.abs(place.c), initial=0)
        failed = capped(step.penalty, step.gradient_penalty) & place.newton
        restore = (failed | (place.slow & ~place.again)) & (violation > atol)
        failure = RESULTS.where(place.hopeless, RESULTS.infeasible_stationary, RESULTS.successful)
        failure = RESULTS.where(place.stuck, RESULTS.stagnated, failure)
        failure = RESULTS.where(step.ok, failure, RESULTS.linear_solve_failed)
        moving = jnp.where(place.estimating, 0, 1)
        costs = {"hessian": 1} if self._inner(program).needs_matrix else {}
        values = trial.found.rows / state.scaling.rows
        new = SketchedNewtonALState(
            value=program.unravel(trial.w[:n]),
            iterate=here,
            step=jax.tree.map(lambda d: moving * d, step.iterate),
            correction=_zeros(step.iterate),
            kept=step.kept,
            residual=place.c,
            length=moving * length,
            walls_length=moving * walls_length,
            merit=step.merit,
            slope=step.slope,
            penalty=jnp.where(place.again, self.penalty, step.penalty),
            gradient_penalty=jnp.where(place.again, self.gradient_penalty, step.gradient_penalty),
            sharpness=jnp.where(place.again, self.accuracy.first, step.sharpness),
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
            feasibility=_violation(program, values),
            multipliers=program.multipliers(
                here.rows, here.walls, place.scaling, trial.found.gradient
            ),
            aux=trial.found.aux,
            iterations=state.iterations + (state.phase == SEARCH).astype(jnp.int32),
            key=state.key if state.key is None else jax.random.split(state.key)[0],
            counts=state.counts.add(linear_solve=1, hvp=step.products, **costs),
        )
        return tree.where(restore, self._begin_restoring(new, place.norm), new)

    def _derivatives(self, trial: Trial) -> Derivatives:
        """In the scaling so far."""
        program = trial.program
        n = program.size
        free = program.free[:n]
        no_rows = jnp.zeros_like(trial.rows)
        if not self._inner(program).needs_matrix:

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
        hessian = (hessian + hessian.T) / 2 * free[:, None] * free[None, :]
        return _dense_derivatives(gradient * free, hessian, columns.T * free[None, :])

    def _scaling(self, trial, derivatives, state) -> Scaling:
        """Factors that bring the largest entries of ∇f and of the rows of J down to 100."""
        if not self.scaled:
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

    def _place(self, trial: Trial, state: SketchedNewtonALState) -> Place:
        """How good the point is, and what is to be done there."""
        program = trial.program
        n, e = program.size, program.equalities
        real = program.walls.real
        dtype = trial.w.dtype
        measuring = state.phase == MEASURE
        derivatives = self._derivatives(trial)
        scaling = self._scaling(trial, derivatives, state)
        by_rows = scaling.rows / state.scaling.rows
        by_objective = scaling.objective / state.scaling.objective
        derivatives = _rescaled(derivatives, by_objective, by_rows)
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
        weights = _weights(state)
        promised = jnp.abs(weights @ state.slope)
        drowned = promised <= 10 * jnp.finfo(dtype).eps * (1 + jnp.abs(weights @ state.merit))
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
        barrier = self._next_barrier(program, state.barrier, error, settled, size, scaling)
        barrier = jnp.where(restoring, _restoration_barrier(barrier, norm), barrier)
        barrier = jnp.where(leave, state.kept_barrier, barrier)

        push_off = program.walls.pull(barrier * program.walls.push(distances))
        force = jnp.concatenate([derivatives.pull(c), c[e:]]) - push_off
        force = force * program.walls.closeness(w)
        stationary = jnp.max(jnp.abs(force), initial=0) <= 1e-6 * jnp.maximum(1e-2, norm)
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

    def _next_barrier(self, program, barrier, error, settled, size, scaling):
        """μ falls as far as the error of its barrier problem is at most 10 μ."""
        if not program.bounded:
            return barrier
        rtol, atol = self._tolerances(barrier.dtype)
        least = (rtol * size + atol * scaling.objective) / 100
        least = jnp.maximum(least, jnp.finfo(barrier.dtype).tiny).astype(barrier.dtype)
        return jax.lax.while_loop(
            lambda mu: settled & (error(mu) <= 10 * mu) & (mu > least),
            lambda mu: jnp.maximum(least, jnp.minimum(0.2 * mu, mu**1.5)),
            barrier,
        )

    def _direction(self, trial: Trial, place: Place, state) -> Step:
        """Solve for the step, correct the curvature, and adapt the penalties to it."""
        program, here, derivatives = trial.program, place.iterate, place.derivatives
        n, e = program.size, program.equalities
        dtype = trial.w.dtype
        free = program.free
        inner = self._inner(program)
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
        loose, least, dependent = self._looseness(program, derivatives, optimality)
        loose = jnp.where(place.restoring, 1, loose)
        relaxation = jnp.full(here.rows.shape, loose, dtype).at[e:].add(1 / sigma[n:])
        plain = jnp.where(place.estimating, 1, jnp.where(place.restoring, damping, 0))
        diagonal = sigma[:n] + plain * free[:n] + (1 - free[:n])

        def system(shift):
            return _system(derivatives, diagonal + shift * free[:n], relaxation, place.newton)

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
            return jax.jvp(
                parts, primals, (derivatives.gradient @ dy, along, rows, step.w, step.rows)
            )

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
                decrease=self.decrease,
                penalty=penalty,
                gradient_penalty=gradient_penalty,
            )

        shift = jnp.zeros((), dtype)
        if derivatives.matrices is not None:
            shift = self._shift(program, place, diagonal, relaxation, dependent, state.shift)
        if inner.exact:
            matrix = system(shift)
            kept = inner.prepare(matrix)
            zero = jnp.zeros_like(rhs)
            solution, products = inner.solve(matrix, kept, rhs, zero, jnp.zeros((), dtype), None)
            step = spread(solution)
            merit, slope = slopes(step)
            penalty, gradient_penalty = jax.lax.while_loop(
                lambda p: place.newton & ~descends(merit, slope, *p) & ~capped(*p),
                lambda p: (p[0] * self.growth**2, p[1] / self.growth),
                self._first_penalties(place, state),
            )
            sharpness = state.sharpness
        else:
            (
                solution,
                step,
                merit,
                slope,
                kept,
                shift,
                penalty,
                gradient_penalty,
                sharpness,
                (products),
            ) = self._inexact(
                inner, system, rhs, spread, slopes, sizes, shift, place, state, program.bounded
            )
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

    def _first_penalties(self, place, state):
        """The penalties to begin with: those of the last step, or anew for a new barrier."""
        anew = place.barrier < state.barrier
        first = jnp.asarray(self.penalty, state.penalty.dtype)
        second = jnp.asarray(self.gradient_penalty, state.penalty.dtype)
        return (
            jnp.where(anew, first, state.penalty),
            jnp.where(anew, second, state.gradient_penalty),
        )

    def _inexact(self, inner, system, rhs, spread, slopes, sizes, shift, place, state, bounded):
        """Solve to the accuracy asked for, until curvature and slope are as they must be."""
        n = place.gradient.size
        dense = place.derivatives.matrices is not None
        first = system(shift)
        kept = inner.prepare(first)

        def attempt(carry):
            solution, shift, penalty, gradient_penalty, sharpness, key, tries, products, _ = carry
            matrix = first if dense else system(shift)
            size = sizes(penalty, gradient_penalty, matrix.matrix)
            sharpness = self.accuracy.update(sharpness, size)
            tolerance = self.accuracy.tolerance(sharpness, size)
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
            penalty = jnp.where(harder, penalty * self.growth**2, penalty)
            gradient_penalty = jnp.where(harder, gradient_penalty / self.growth, gradient_penalty)
            sharpness = jnp.where(harder, sharpness / self.growth**4, sharpness)
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
            jnp.zeros_like(rhs), shift, *self._first_penalties(place, state), state.sharpness,
            state.key, zero, zero, jnp.array(False),
        )  # fmt: skip
        shapes = jax.eval_shape(attempt, start)[1]
        carry, found = jax.lax.while_loop(
            going, lambda carry: attempt(carry[0]), (start, _zeros(shapes))
        )
        solution, shift, penalty, gradient_penalty, sharpness, _, _, products, _ = carry
        step, merit, slope = found
        return (
            solution, step, merit, slope, kept, shift, penalty, gradient_penalty, sharpness,
            products,
        )  # fmt: skip

    def _looseness(self, program, derivatives, optimality):
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
        if isinstance(self.accuracy, PublishedAccuracy):
            least = jnp.linalg.eigvalsh(gram)[0]
        loose = jnp.where(dependent, jnp.minimum(1e-2, 1e-2 * optimality), 0)
        return loose, least, dependent

    def _shift(self, program, place, diagonal, relaxation, dependent, previous):
        """Τ, from the dense matrices."""
        matrices: Any = place.derivatives.matrices
        hessian, jacobian = matrices
        full = hessian + jnp.diag(diagonal)
        reduced = reduced_hessian(full, jacobian, relaxation, program.equalities, dependent)
        if self.shift == "frobenius":
            flat = jnp.linalg.eigvalsh(reduced)[0] < 1e-6
            return jnp.where(flat & place.newton, 0.1 + jnp.linalg.norm(hessian), 0)
        harmless = jnp.eye(len(reduced), dtype=reduced.dtype)
        return convexifying_shift(jnp.where(place.newton, reduced, harmless), previous)


def _program(problem: Any) -> NonlinearProgram:
    return problem  # the driver has checked it


def _zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def _weights(state: SketchedNewtonALState) -> Array:
    """What the parts of the merit function are multiplied by; for feasibility, f and L drop out."""
    one, zero = jnp.ones_like(state.penalty), jnp.zeros_like(state.penalty)
    normal = jnp.stack([one, one, state.penalty, state.gradient_penalty])
    return jnp.where(state.restoring, jnp.stack([zero, one, one, zero]), normal)


def _violation(program: FlatProgram, values: Array) -> Array:
    equality = jnp.abs(values[: program.equalities])
    inequality = jnp.maximum(values[program.equalities :], 0)
    return jnp.max(jnp.concatenate([equality, inequality]), initial=0)


def _restoration_barrier(barrier: Array, norm: Array) -> Array:
    """Small beside ½‖c‖², so that the steps lead to feasible points."""
    return jnp.minimum(barrier, 1e-2 * norm**2)


def _damped(gradient: Array) -> Array:
    """The factor that brings the largest entry of a gradient down to 100."""
    return jnp.maximum(100 / jnp.maximum(gradient, 100), 1e-8)


def _to_boundary(values: Array, change: Array, real: Array, barrier: Array) -> Array:
    """The largest α ≤ 1 that leaves a part of each of the values."""
    fraction = jnp.maximum(0.99, 1 - barrier)
    shrinks = real & (change < 0)
    limits = jnp.where(shrinks, -fraction * values / jnp.where(shrinks, change, -1), 1)
    return jnp.minimum(1, jnp.min(limits, initial=1))


def _dense_derivatives(gradient: Array, hessian: Array, jacobian: Array) -> Derivatives:
    def both(dy, drows):
        return hessian @ dy + jacobian.T @ drows, jacobian @ dy

    return Derivatives(
        gradient,
        lambda dy: hessian @ dy,
        lambda dy: jacobian @ dy,
        lambda drows: jacobian.T @ drows,
        both,
        (hessian, jacobian),
    )


def _rescaled(derivatives: Derivatives, objective: Array, rows: Array) -> Derivatives:
    """With factors on objective and constraints; H is not touched, no step is taken then."""
    gradient = objective * derivatives.gradient
    if derivatives.matrices is not None:
        hessian, jacobian = derivatives.matrices
        return _dense_derivatives(gradient, hessian, rows[:, None] * jacobian)

    def both(dy, drows):
        along, values = derivatives.both(dy, rows * drows)
        return along, rows * values

    return Derivatives(
        gradient,
        derivatives.hessian,
        lambda dy: rows * derivatives.push(dy),
        lambda drows: derivatives.pull(rows * drows),
        both,
        None,
    )


def _system(derivatives: Derivatives, diagonal: Array, relaxation: Array, newton: Array):
    """K, with H only in Newton's steps."""
    n = diagonal.size
    if derivatives.matrices is not None:
        hessian, jacobian = derivatives.matrices
        block = jnp.where(newton, hessian, 0) + jnp.diag(diagonal)
        matrix = jnp.block([[block, jacobian.T], [jacobian, -jnp.diag(relaxation)]])
        return KKTSystem(
            lambda v: matrix @ v, matrix, jnp.diagonal(block), derivatives.push,
            derivatives.pull, jacobian, relaxation,
        )  # fmt: skip

    def apart(dy, drows):
        return derivatives.pull(drows), derivatives.push(dy)

    def product(v):
        dy, drows = v[:n], v[n:]
        along, rows = jax.lax.cond(newton, derivatives.both, apart, dy, drows)
        return jnp.concatenate([along + diagonal * dy, rows - relaxation * drows])

    return KKTSystem(product, None, diagonal, derivatives.push, derivatives.pull, None, relaxation)
