"""The solver `CBO`: how the pieces of consensus-based optimization make a step."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from jaxopt_ext import implicit
from jaxopt_ext.core import check, tree
from jaxopt_ext.core.problem import ComposedMinimization, LeastSquares, Minimization
from jaxopt_ext.core.result import RESULTS
from jaxopt_ext.core.solver import (
    AbstractSolver,
    Counts,
    Info,
    Number,
    default_relative,
    default_tolerance,
)
from jaxopt_ext.solvers.cbo_consensus import (
    EffectiveSampleSize,
    Geometric,
    Schedule,
    check_schedule,
    effective_sample_size,
    scheduled,
    temperature,
    weights,
)
from jaxopt_ext.solvers.cbo_constraints import ConstraintDrift, Penalty
from jaxopt_ext.solvers.cbo_noise import (
    Anisotropic,
    Increments,
    Noise,
    fold,
    gaussian,
)
from jaxopt_ext.solvers.cbo_pieces import Batch, Cutoff, Jumps, Kick, Memory, Polarized, Polish
from jaxopt_ext.solvers.cbo_start import Normal, Start
from jaxopt_ext.solvers.cbo_state import Agreement, CBOState, Personal

# Streams of random numbers: of a run, and of one step (fewer than 8).
START, RUN = 0, 1
NOISE, MEMORY, JUMPS, KICK, BATCHES = range(5)


class CBO(AbstractSolver):
    """Consensus-based optimization.

    Each of N particles drifts to the consensus c = Σ wᵢ xᵢ, wᵢ ∝ exp(−α f(xᵢ)), and is shaken
    in proportion to its distance from it:

        x ← x − λ dt (x − c) + σ √dt A(x − c) ξ.

    `value` is the best particle ever evaluated. A step costs N evaluations and no derivative, so
    `optimality` is NaN unless `polish` is set: CBO itself does not know it. Without `polish` a run
    is successful when the spread of the swarm is at most atol + rtol · (spread at the start); the
    spread is (mean √‖xᵢ − c‖∞)², which a few stray particles do not dominate. With `polish` a run
    is successful when the polishing solver is.

    Args:
        particles: N, at least 2.
        start: Where the swarm starts.
        drift: λ > 0; λ dt < 2.
        sigma: σ > 0, or a schedule (of optax, or any function of the step).
        dt: Time step > 0.
        alpha: Inverse temperature α ≥ 0, a schedule, or `EffectiveSampleSize`.
        noise: A, how the noise is shaped.
        increments: Distribution of ξ: `gaussian`, `uniform`, `rademacher`, `StudentT()`, or any
            function of key and shape with mean 0 and variance 1. Ours are drawn in float32.
        memory: Particles remember their best points.
        gradient: λ₃, for the additional drift −λ₃ dt ∇f(x), by automatic differentiation.
        cutoff: Particles better than the consensus do not drift.
        batch: Evaluate a random part of the particles in each step.
        polarized: A consensus for each particle instead of a common one.
        jumps: Jump noise.
        kick: Resampling when stagnating.
        projection: Constraint set: a function from a particle to the nearest point of the set,
            e.g. of `implicit.projections`. All particles stay in it. With a method `tangent`, as
            of `Sphere()` and `Stiefel()`, their steps are tangent to it.
        penalty: General constraints by an adaptive penalty.
        constraint_drift: Equality constraints by a stiff drift.
        mirror: Mirror map: a function from unconstrained dual variables of a particle to the
            particle itself, e.g. `jax.nn.softmax`. The start is that of the dual variables.
        polish: Refinement of the best particle by a local solver.
        mesh: Devices over whose first axis the particles are sharded.
        rtol: Tolerance on the spread relative to the start; `None` means eps.
        atol: Tolerance on the spread; `None` means eps^(2/3).

    Raises:
        TypeError: An unknown setting, or one of the wrong type.
        ValueError: A setting outside its range, or settings that exclude each other.

    Reference:
        Pinnau, Totzeck, Tse, Martin, 2017; Carrillo, Jin, Li, Zhu, 2021.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> def rastrigin(y, shift):
        ...     z = y - shift
        ...     return jnp.sum(z**2 - 10 * jnp.cos(2 * jnp.pi * z) + 10)
        >>> solution = jx.solve(
        ...     jx.Minimization(rastrigin),
        ...     solvers.CBO(start=solvers.cbo.Uniform(-3.0, 3.0)),
        ...     jnp.zeros(2),
        ...     jnp.array([1.2, -0.7]),
        ...     key=jax.random.key(0),
        ... )
        >>> print([f"{x:.2f}" for x in solution.value])
        ['1.20', '-0.70']
    """

    accepts: ClassVar = (Minimization, ComposedMinimization, LeastSquares)
    needs_key: ClassVar[bool] = True
    monotone: ClassVar[bool] = True

    particles: int = eqx.field(static=True, default=100)
    start: Start = Normal()
    drift: Number = 1.0
    sigma: Schedule = 9.0
    dt: Number = 0.01
    alpha: Schedule | EffectiveSampleSize = Geometric(1.0, 1.05, 1e5)
    noise: Noise = Anisotropic()
    increments: Increments = gaussian
    memory: Memory | None = None
    gradient: Number | None = None
    cutoff: Cutoff | None = None
    batch: Batch | None = None
    polarized: Polarized | None = None
    jumps: Jumps | None = None
    kick: Kick | None = None
    projection: Callable[[PyTree], PyTree] | None = None
    penalty: Penalty | None = None
    constraint_drift: ConstraintDrift | None = None
    mirror: Callable[[PyTree], PyTree] | None = None
    polish: Polish | None = None
    mesh: Mesh | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check.count("CBO", "particles", self.particles, at_least=2)
        check.number("CBO", "drift", self.drift, above=0)
        check.number("CBO", "dt", self.dt, above=0)
        check_schedule("CBO", "sigma", self.sigma, above=0)
        if not isinstance(self.alpha, EffectiveSampleSize):
            check_schedule("CBO", "alpha", self.alpha, at_least=0)
        for name in ("start", "noise", "increments"):
            check.function("CBO", name, getattr(self, name))
        for name in ("projection", "mirror"):
            check.function("CBO", name, getattr(self, name), optional=True)
        if self.gradient is not None:
            check.number("CBO", "gradient", self.gradient, above=0)
        if isinstance(self.drift, float | int) and isinstance(self.dt, float | int):
            check.number("CBO", "drift * dt", self.drift * self.dt, below=2)
        self._check_pieces()

    def _check_pieces(self):
        kinds = {
            "memory": Memory,
            "cutoff": Cutoff,
            "batch": Batch,
            "polarized": Polarized,
            "jumps": Jumps,
            "kick": Kick,
            "penalty": Penalty,
            "constraint_drift": ConstraintDrift,
            "polish": Polish,
            "mesh": Mesh,
        }
        for name, kind in kinds.items():
            piece = getattr(self, name)
            if piece is not None and not isinstance(piece, kind):
                raise TypeError(
                    f"CBO: {name} is a {type(piece).__name__}, expected {kind.__name__}(...) or "
                    "None"
                )
        if self.batch is not None and self.batch.size > self.particles:
            raise ValueError(
                f"CBO: batch.size is {self.batch.size}, expected at most the {self.particles} "
                "particles"
            )
        if self.mesh is not None and self.particles % self.mesh.devices.shape[0]:
            raise ValueError(
                f"CBO: particles is {self.particles}, expected a multiple of the "
                f"{self.mesh.devices.shape[0]} devices of the mesh"
            )
        for name in ("mirror", "polish"):
            if self.projection is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"CBO: projection and {name} are both given, expected one of them: "
                    f"{name} would leave the set"
                )
        if self.polish is not None:
            for name in ("penalty", "constraint_drift"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"CBO: {name} and polish are both given, expected one of them: the "
                        "polishing solver does not know the constraints"
                    )
        if self.gradient is not None and (self.mirror is not None or self.batch is not None):
            raise ValueError(
                "CBO: gradient is given together with mirror or batch, expected neither of them"
            )

    # ---- the contract of a solver ----

    def init(self, problem, value, args, key=None):
        """See `AbstractSolver.init`; the problem's functions are not evaluated.

        For `ask` and `tell` without a problem, `problem` and `args` are `None`.
        """
        point, key = ravel_pytree(value)[0], _typed(key)
        positions = self.start(fold(key, START), value, self.particles)
        swarm = jax.vmap(lambda particle: ravel_pytree(particle)[0])(positions)
        swarm = self._placed(self._feasible(swarm, value))
        aux = None
        if problem is not None:
            _, aux = jax.eval_shape(lambda value: problem.objective(value, args), value)
        nan, inf = jnp.array(jnp.nan, point.dtype), jnp.array(jnp.inf, point.dtype)
        zero = jnp.zeros((), jnp.int32)
        energies = jnp.full(self.particles, jnp.inf, point.dtype)
        return CBOState(
            value=value,
            objective=inf,
            aux=jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), aux),
            optimality=nan,
            polished=jnp.array(False),
            result=RESULTS.max_steps_reached,
            swarm=swarm,
            personal=None if self.memory is None else Personal(swarm, energies),
            penalty=None if self.penalty is None else self.penalty.init(point.dtype),
            consensus=value,
            alpha=nan,
            spread=nan,
            spread_scale=nan,
            key=jax.random.key_data(fold(key, RUN)),
            steps=zero,
            since_best=zero,
            nonfinite=zero,
            counts=Counts.zero(),
            impl=str(jax.random.key_impl(key)),
        )

    def step(self, problem, args, state):
        """See `AbstractSolver.step`: one evaluation of each particle and one move."""
        unravel = ravel_pytree(state.value)[1]

        def objective(row):
            value, aux = problem.objective(unravel(row), args)
            return value.astype(row.dtype), aux

        def evaluate(rows):
            if self.gradient is None:
                energies, aux = jax.vmap(objective)(rows)
                return energies, aux, None
            differentiated = jax.vmap(jax.value_and_grad(objective, has_aux=True))
            (energies, aux), gradients = differentiated(rows)
            return energies, aux, gradients

        penalty = self.penalty

        violation = None
        if penalty is not None:
            violation = lambda row: penalty.violation(unravel(row), args)  # noqa: E731

        def correct(rows, change):
            drift = self.constraint_drift
            if drift is None:
                return change
            dt = jnp.asarray(self.dt, change.dtype)
            return jax.vmap(lambda x, d: drift.corrected(unravel(x), args, d, dt))(rows, change)

        rows = self._batch(state)
        energies, aux, gradients = evaluate(self._primal(state.swarm, state.value)[rows])
        new, info = self._advance(
            state, rows, energies, aux, gradients, lambda c: objective(c)[0], violation, correct
        )
        if self.polish is None:
            return new, info
        return self._refined(self.polish, problem, args, new, info)

    def ask(self, state: CBOState) -> PyTree:
        """The particles to be evaluated, for objectives that live outside of JAX.

        Args:
            state: From `init(None, value, None, key)` or from the last `tell`.

        Returns:
            A PyTree like `value` with a leading axis, one entry per particle.
        """
        rows = self._primal(state.swarm, state.value)[self._batch(state)]
        return jax.vmap(ravel_pytree(state.value)[1])(rows)

    def tell(
        self, state: CBOState, energies: Float[Array, " particles"], aux: PyTree = None
    ) -> tuple[CBOState, Info]:
        """Move the swarm, given the objective at the particles of `ask`.

        Args:
            state: The state that `ask` was given.
            energies: The objective of each particle; NaN and infinite values are allowed.
            aux: Auxiliary outputs with a leading axis, if there are any.

        Returns:
            The next state and what the step reports.

        Raises:
            ValueError: A setting needs more than these values: `gradient`, `cutoff`, `penalty`,
                `constraint_drift` or `polish`.
        """
        for name in ("gradient", "cutoff", "penalty", "constraint_drift", "polish"):
            if getattr(self, name) is not None:
                raise ValueError(f"CBO.tell: {name} is given, expected None without a problem")
        energies = jnp.asarray(energies, state.swarm.dtype)
        return self._advance(state, self._batch(state), energies, aux)

    def stop(self, problem, args, state, info):
        """See `AbstractSolver.stop`: the swarm agrees, or the polishing is done."""
        failed = info.failure != RESULTS.successful
        if self.polish is None:
            return failed | self._agreed(state), info.failure
        return failed | state.polished, RESULTS.where(failed, info.failure, state.result)

    def resume(self, problem, args, state):
        """See `AbstractSolver.resume`: compares the objective at the best particle.

        If it differs, a new swarm starts from there.
        """
        objective = problem.objective(state.value, args)[0].astype(state.objective.dtype)
        rounding = 1e3 * jnp.finfo(objective.dtype).eps * jnp.maximum(1, jnp.abs(objective))
        same = (jnp.abs(objective - state.objective) <= rounding) | (state.steps == 0)
        fresh = self.init(problem, state.value, args, fold(_key(state), state.steps))
        fresh = eqx.tree_at(lambda s: s.counts, fresh, state.counts)
        return tree.where(same, state, fresh)

    def condition(self, problem):
        """See `AbstractSolver.condition`; with `projection`, stationarity on its set.

        With `penalty` or `constraint_drift` the multipliers are not known: derivatives are NaN.
        """
        if self.penalty is not None or self.constraint_drift is not None:

            def unknown(value, args):
                objective = problem.objective(value, args)[0]
                return jax.tree.map(lambda leaf: leaf * objective * jnp.nan, value)

            return implicit.Root(unknown)
        if self.projection is None:
            return problem.condition()
        project = self.projection
        return implicit.ProjectedGradient(
            lambda value, args: problem.objective(value, args)[0],
            lambda value, args: project(value),
        )

    # ---- one step ----

    def _advance(
        self,
        state,
        rows,
        energies,
        aux,
        gradients=None,
        objective=None,
        violation=None,
        correct=None,
    ):
        """Everything after the evaluation of the particles, or of these rows of them."""
        primal = self._primal(state.swarm, state.value)
        violations, penalized = None, energies
        if self.penalty is not None and violation is not None:
            violations = jax.vmap(violation)(primal[rows])
            penalized = energies + state.penalty.weight * violations
        better, (value, best, aux, violated) = self._best(
            state, primal[rows], energies, aux, violations
        )
        known = self._known(penalized, rows)
        personal = self._remembered(state.personal, primal, known)
        agreed = self._agree(state, primal, personal, known)
        pull = agreed.distance
        if self.cutoff is not None and objective is not None:
            there = objective(agreed.consensus)
            if violations is not None and violation is not None:
                there += state.penalty.weight * violation(agreed.consensus)
            pull *= self.cutoff.factor(known - there)[:, None]
        change = self._shaken(state, agreed) - self._per_time(self.drift, pull)
        if personal is not None:
            change += self._recalled(state, primal - personal.points, self.memory)
        if gradients is not None:
            change -= self._per_time(self.gradient, gradients)
        if correct is not None:
            change = correct(primal, change)
        penalty = state.penalty
        if self.penalty is not None and violations is not None:
            penalty = self.penalty.adapted(penalty, agreed.weight[rows], violations, violated)

        spread = jnp.mean(jnp.sqrt(jnp.max(jnp.abs(agreed.distance), axis=1))) ** 2
        since_best = jnp.where(better, 0, state.since_best + 1)
        new = CBOState(
            value=value,
            objective=best,
            aux=aux,
            optimality=jnp.where(better, jnp.nan, state.optimality),
            polished=state.polished & ~better,
            result=state.result,
            swarm=self._moved(state, change, rows, since_best),
            personal=personal,
            penalty=penalty,
            consensus=ravel_pytree(state.value)[1](agreed.consensus),
            alpha=agreed.alpha,
            spread=spread,
            spread_scale=jnp.where(state.steps == 0, spread, state.spread_scale),
            key=state.key,
            steps=state.steps + 1,
            since_best=since_best,
            nonfinite=state.nonfinite + jnp.sum(~jnp.isfinite(energies), dtype=jnp.int32),
            counts=state.counts.add(
                value=energies.size + (self.cutoff is not None),
                gradient=0 if gradients is None else energies.size,
            ),
            impl=state.impl,
        )
        return new, self._info(state, new, better, agreed)

    def _batch(self, state):
        """Which particles are evaluated."""
        if self.batch is None:
            return slice(None)
        return self.batch.rows(fold(_key(state), BATCHES), state.steps, self.particles)

    def _primal(self, swarm, value):
        if self.mirror is None:
            return swarm
        return _rowwise(self.mirror, value, swarm)

    def _feasible(self, swarm, value):
        if self.projection is None:
            return swarm
        return _rowwise(self.projection, value, swarm)

    def _placed(self, swarm):
        """Sharded over the first axis of the mesh."""
        if self.mesh is None:
            return swarm
        names = self.mesh.axis_names
        automatic = Mesh(self.mesh.devices, names, axis_types=(AxisType.Auto,) * len(names))
        along = NamedSharding(automatic, PartitionSpec(names[0]))
        return jax.lax.with_sharding_constraint(swarm, along)

    def _best(self, state, rows, energies, aux, violations):
        """Whether a particle is the best ever; the best value, objective, aux and violation."""
        ranked = jnp.where(jnp.isnan(energies), jnp.inf, energies)
        if self.penalty is None or violations is None:
            index = jnp.argmin(ranked)
            better = ranked[index] < state.objective
            violation = old_violation = jnp.zeros((), energies.dtype)
        else:
            old_violation = state.penalty.violation
            beyond, ranked = self.penalty.ranked(energies, violations)
            least = jnp.min(beyond)
            index = jnp.argmin(jnp.where(beyond == least, ranked, jnp.inf))
            old = self.penalty.ranked(state.objective[None], old_violation[None])[0, 0]
            smaller = (least == old) & (ranked[index] < state.objective)
            better = ((least < old) | smaller) & (ranked[index] < jnp.inf)
            violation = violations[index]
        found = ravel_pytree(state.value)[1](rows[index])
        return better, tree.where(
            better,
            (found, ranked[index], jax.tree.map(lambda leaf: leaf[index], aux), violation),
            (state.value, state.objective, state.aux, old_violation),
        )

    def _known(self, energies, rows):
        """Energies of all particles: +inf for what is not a number, or not in the batch."""
        usable = jnp.where(jnp.isnan(energies), jnp.inf, energies)
        if self.batch is None:
            return usable
        return jnp.full(self.particles, jnp.inf, energies.dtype).at[rows].set(usable)

    def _agree(self, state, primal, personal, known):
        """The consensus, and how far each particle is from it, or from its own."""
        points, energies = primal, known
        if personal is not None:
            points = personal.points
            energies = jnp.where(known < jnp.inf, personal.energies, jnp.inf)
        alpha = temperature(self.alpha, energies, state.steps)
        weight = weights(energies, alpha)
        previous = ravel_pytree(state.consensus)[0]
        consensus = jnp.where(jnp.any(weight > 0), weight @ points, previous)
        centers = consensus[None]
        if self.polarized is not None:
            centers = self.polarized.centers(primal, points, energies, alpha)
        return Agreement(alpha, weight, consensus, primal - centers)

    def _remembered(self, personal, primal, known):
        if personal is None:
            return None
        better = known < personal.energies
        return Personal(
            jnp.where(better[:, None], primal, personal.points),
            jnp.where(better, known, personal.energies),
        )

    def _per_time(self, rate, direction):
        dtype = direction.dtype
        return jnp.asarray(rate, dtype) * jnp.asarray(self.dt, dtype) * direction

    def _draws(self, state, stream, shape, dtype):
        return self.increments(_stream(state, stream), shape).astype(dtype)

    def _shaken(self, state, agreed):
        """The noise of one step, and its jumps."""
        distance = agreed.distance
        dtype, dt = distance.dtype, jnp.asarray(self.dt, distance.dtype)
        draws = self._draws(state, NOISE, distance.shape, dtype)
        scale = scheduled(self.sigma, state.steps, dtype) * jnp.sqrt(dt)
        noise = scale * self.noise(distance, draws, agreed.weight)
        if self.jumps is not None:
            noise += self.jumps.displacement(_stream(state, JUMPS), state.steps, dt, distance)
        return noise

    def _recalled(self, state, distance, memory):
        """Drift and noise with respect to the remembered points."""
        dtype = distance.dtype
        draws = self._draws(state, MEMORY, distance.shape, dtype)
        scale = jnp.sqrt(jnp.asarray(self.dt, dtype)) * jnp.asarray(memory.sigma, dtype)
        weight = jnp.full(self.particles, 1 / self.particles, dtype)
        return scale * self.noise(distance, draws, weight) - self._per_time(memory.drift, distance)

    def _moved(self, state, change, rows, since_best):
        """The swarm after the step; a coordinate that would overflow stays where it is."""
        tangent = getattr(self.projection, "tangent", None)
        if tangent is not None:
            change = _rowwise(tangent, state.value, state.swarm, change)
        moved = state.swarm + change
        if self.kick is not None:
            draws = self._draws(state, KICK, change.shape, change.dtype)
            due = (since_best > 0) & (since_best % self.kick.patience == 0)
            moved += jnp.where(due, jnp.asarray(self.kick.width, change.dtype), 0) * draws
        moved = jnp.where(jnp.isfinite(moved), moved, state.swarm)
        if self.batch is not None and not self.batch.move_all:
            moved = state.swarm.at[rows].set(moved[rows])
        return self._placed(self._feasible(moved, state.value))

    def _agreed(self, state):
        dtype = state.spread.dtype
        rtol = default_relative(dtype) if self.rtol is None else self.rtol
        atol = default_tolerance(dtype) if self.atol is None else self.atol
        return state.spread <= atol + rtol * state.spread_scale

    def _refined(self, polish, problem, args, state, info):
        """Polish the best particle when the swarm agrees or its time is over."""
        ending = self._agreed(state) | (state.steps >= polish.after)
        due = ending & ~state.polished & jnp.isfinite(state.objective)
        value, report = polish.run(problem, args, state.value, due)
        take = due & (report.objective <= state.objective)
        new = tree.where(
            due,
            eqx.tree_at(
                lambda s: (s.polished, s.result, s.counts),
                state,
                (due, report.failure, jax.tree.map(jnp.add, state.counts, report.counts)),
            ),
            state,
        )
        best = (value, report.objective, report.aux, report.optimality)
        old = (state.value, state.objective, state.aux, state.optimality)
        new = eqx.tree_at(
            lambda s: (s.value, s.objective, s.aux, s.optimality),
            new,
            tree.where(take, best, old),
            is_leaf=lambda leaf: leaf is None,
        )
        moved = info.accepted | (take & (report.objective < state.objective))
        return new, eqx.tree_at(
            lambda i: (i.objective, i.optimality, i.accepted, i.counts, i.aux),
            info,
            (new.objective, new.optimality, moved, new.counts, new.aux),
            is_leaf=lambda leaf: leaf is None,
        )

    def _info(self, old, new, better, agreed):
        dtype, first = new.objective.dtype, old.steps == 0
        failure = RESULTS.where(new.objective == -jnp.inf, RESULTS.diverged, RESULTS.successful)
        none = first & (new.objective == jnp.inf)
        failure = RESULTS.where(none, RESULTS.nonfinite_start, failure)
        far = new.spread > new.spread_scale * float(jnp.finfo(dtype).max) ** 0.25
        failure = RESULTS.where(far, RESULTS.diverged, failure)
        return Info(
            objective=new.objective,
            optimality=new.optimality,
            optimality_scale=jnp.zeros((), dtype),
            feasibility=jnp.zeros((), dtype) if new.penalty is None else new.penalty.violation,
            step_size=jnp.linalg.norm(agreed.consensus - ravel_pytree(old.consensus)[0]),
            value_change=old.objective - new.objective,
            accepted=better,
            counts=new.counts,
            failure=failure,
            aux=new.aux,
            extras={
                "alpha": new.alpha,
                "spread": new.spread,
                "effective_sample_size": effective_sample_size(agreed.weight),
                "nonfinite": new.nonfinite,
            },
        )


def _typed(key: Array | None) -> Array:
    """A typed key, also from a key of the old kind."""
    if key is None:
        raise ValueError("CBO.init: key is None, expected a key such as jax.random.key(0)")
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if typed else jax.random.wrap_key_data(key)


def _key(state: CBOState):
    return jax.random.wrap_key_data(state.key, impl=state.impl)


def _stream(state: CBOState, stream: int):
    """The key of one stream of random numbers in this step."""
    return fold(_key(state), state.steps.astype(jnp.uint32) * jnp.uint32(8) + jnp.uint32(stream))


def _rowwise(fun, value, *rows):
    """Apply a function of particles like `value` to each row."""
    unravel = ravel_pytree(value)[1]
    return jax.vmap(lambda *each: ravel_pytree(fun(*map(unravel, each)))[0])(*rows)
