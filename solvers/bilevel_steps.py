"""What all bilevel solvers share: step rules, samples, the state, and how a step is reported."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree, UInt32

from jaxopt_ext.core import check, tree
from jaxopt_ext.core.problem import Bilevel
from jaxopt_ext.core.result import RESULTS
from jaxopt_ext.core.solver import AbstractSolver, Counts, Info, Number
from jaxopt_ext.solvers.cbo_consensus import Schedule, check_schedule, scheduled

Rule = Schedule | optax.GradientTransformation
Sampler = Callable[[Array, PyTree], PyTree]  # (key, args) -> args of the same types


class PowerLaw(eqx.Module):
    """Schedule scale · (1 + step / offset)^exponent, as the theory of bilevel methods asks for.

    Args:
        scale: The value at step 0, > 0.
        exponent: Negative for a schedule that falls.
        offset: Steps after which the power law sets in, > 0.

    Raises:
        ValueError: A number outside its range.

    Example:
        >>> from jaxopt_ext import solvers
        >>> print(solvers.PowerLaw(1.0, -0.5)(3))
        0.5
    """

    scale: Number
    exponent: Number
    offset: Number = 1.0

    def __check_init__(self):
        check.number("PowerLaw", "scale", self.scale, above=0)
        check.number("PowerLaw", "exponent", self.exponent)
        check.number("PowerLaw", "offset", self.offset, above=0)

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """The value at `step`."""
        scale, exponent, offset = map(jnp.asarray, (self.scale, self.exponent, self.offset))
        return scale * (1 + jnp.asarray(step, offset.dtype) / offset) ** exponent


# ---- step rules --------------------------------------------------------------------------------


def check_rule(owner: str, name: str, rule: Any) -> None:
    """Accept a positive number, a schedule, or a gradient transformation of optax."""
    if not isinstance(rule, optax.GradientTransformation):
        check_schedule(owner, name, rule, above=0)


def start_rule(rule: Rule, point: PyTree) -> PyTree:
    """The memory of a rule; `None` for plain gradient steps."""
    return rule.init(point) if isinstance(rule, optax.GradientTransformation) else None


def apply_rule(
    rule: Rule,
    point: PyTree,
    gradient: PyTree,
    memory: PyTree,
    step: Int[Array, ""],
    projection: Callable[[PyTree], PyTree] | None,
) -> tuple[PyTree, PyTree]:
    """One projected step, and the new memory of the rule."""
    if isinstance(rule, optax.GradientTransformation):
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            updates, new = rule.update(gradient, memory, point)
        memory = jax.tree.map(lambda leaf, old: jnp.asarray(leaf, old.dtype), new, memory)
        moved: PyTree = optax.apply_updates(point, updates)
    else:
        rate = scheduled(rule, step, tree.dtype_of(point))
        moved = combine(-rate, gradient, point)
    return project(projection, moved), memory


def project(projection: Callable[[PyTree], PyTree] | None, point: PyTree) -> PyTree:
    """The nearest point of the set; the point itself without a set."""
    return point if projection is None else projection(point)


def combine(factor: Array, a: PyTree, b: PyTree) -> PyTree:
    """The tree factor · a + b, in the dtypes of b."""
    return jax.tree.map(lambda u, v: factor.astype(v.dtype) * u + v, a, b)


def mapping(
    projection: Callable[[PyTree], PyTree] | None, point: PyTree, gradient: PyTree
) -> PyTree:
    """The gradient, or with a set the gradient mapping point − P(point − gradient)."""
    if projection is None:
        return gradient
    return optax.tree.sub(point, projection(optax.tree.sub(point, gradient)))


# ---- state and base class ----------------------------------------------------------------------


class BilevelState(eqx.Module):
    """State of a bilevel solver.

    Attributes:
        value: The pair (x, y) that was evaluated last.
        companion: What the method follows besides: z of the penalty methods, the adjoint of the
            implicit ones, or `None`.
        ahead: The points that the next step evaluates.
        optimizers: Memory of the step rules.
        memory: Gradient estimates of the momentum methods, or `None`.
        objective: The upper objective at `value`.
        optimality: Max norm of the optimality conditions there.
        optimality_scale: What the relative tolerance multiplies.
        aux: Auxiliary output there.
        report: Further scalars at `value`, by name.
        key: Data of the random key; `None` without a sampler.
        steps: Steps so far.
        counts: Evaluations so far.
        impl: The kind of random key.
    """

    value: tuple[PyTree, PyTree]
    companion: PyTree
    ahead: PyTree
    optimizers: PyTree
    memory: PyTree
    objective: Float[Array, ""]
    optimality: Float[Array, ""]
    optimality_scale: Float[Array, ""]
    aux: PyTree
    report: dict[str, Array]
    key: UInt32[Array, " words"] | None
    steps: Int[Array, ""]
    counts: Counts
    impl: str = eqx.field(static=True)

    def sample_key(self) -> Array | None:
        """The key of this step's samples; `None` without a sampler."""
        if self.key is None:
            return None
        return jax.random.fold_in(jax.random.wrap_key_data(self.key, impl=self.impl), self.steps)


class Trial(NamedTuple):
    """What one step of a method found, before it is known to be finite; fields as in the state.

    `scale` is a size of the terms that cancel in the optimality conditions.
    """

    value: tuple[PyTree, PyTree]
    companion: PyTree
    ahead: PyTree
    optimizers: PyTree
    memory: PyTree
    objective: Array
    aux: PyTree
    optimality: Array
    scale: Array
    report: dict[str, Array]
    counts: dict[str, int]


class BilevelSolver(AbstractSolver):
    """Base of the bilevel solvers: min_x f(x, y) with y ∈ argmin g(x, ·), on sets by projection.

    A step evaluates the points of `state.ahead` and then moves them, so `state.value` is always a
    point that has been evaluated. The objective alone says nothing of a bilevel point (y need not
    be optimal), so the last point counts as the best one.

    Args:
        lower_steps: Steps on the lower level per step of the solver, at least 1.
        sampler: Draws the `args` of one evaluation, as a function (key, args) → args of the same
            types, e.g. with other row numbers or another key. The solver then needs a key.
    """

    accepts: ClassVar = (Bilevel,)
    honours: ClassVar = frozenset({"sets"})
    monotone: ClassVar[bool] = True
    reports: ClassVar[tuple[str, ...]] = ()

    lower_steps: int = eqx.field(static=True, default=10)
    sampler: Sampler | None = None

    def __check_init__(self):
        owner = type(self).__name__
        check.count(owner, "lower_steps", self.lower_steps)
        check.function(owner, "sampler", self.sampler, optional=True)

    # ---- what a method says ----

    @abc.abstractmethod
    def _points(self, problem: Any, args: PyTree, x: PyTree, y: PyTree) -> PyTree:
        """The points of the first step."""

    def _companion(self, points: PyTree) -> PyTree:
        """What is reported besides (x, y), of those points."""
        return None

    @abc.abstractmethod
    def _optimizers(self, points: PyTree) -> PyTree:
        """Memory of the step rules at the start."""

    def _memory(self, points: PyTree) -> PyTree:
        return None

    @abc.abstractmethod
    def _advance(self, problem: Any, args: PyTree, state: BilevelState) -> Trial:
        """Evaluate `state.ahead` and move on."""

    def _draw(self, args: PyTree, key: Array | None) -> PyTree:
        """The args of one evaluation."""
        return args if self.sampler is None or key is None else self.sampler(key, args)

    # ---- the contract of a solver ----

    def init(self, problem: Any, value, args, key=None):
        """See `AbstractSolver.init`; points outside of their set are projected onto it."""
        if self.sampler is not None and key is None:
            raise ValueError(
                f"{type(self).__name__}: key is None, expected a key such as jax.random.key(0) "
                "because sampler is given"
            )
        x, y = project(problem.upper_set, value[0]), project(problem.lower_set, value[1])
        self._check_sampler(args, key)
        points = self._points(problem, args, x, y)
        dtype = tree.dtype_of(value)
        nan, zero = jnp.array(jnp.nan, dtype), jnp.zeros((), jnp.int32)
        _, aux = jax.eval_shape(lambda value: problem.objective(value, args), value)
        typed = None if self.sampler is None else _typed(key)
        return BilevelState(
            value=(x, y),
            companion=self._companion(points),
            ahead=points,
            optimizers=self._optimizers(points),
            memory=self._memory(points),
            objective=nan,
            optimality=nan,
            optimality_scale=jnp.zeros((), dtype),
            aux=jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), aux),
            report=dict.fromkeys(self.reports, nan),
            key=None if typed is None else jax.random.key_data(typed),
            steps=zero,
            counts=Counts.zero(),
            impl="" if typed is None else str(jax.random.key_impl(typed)),
        )

    def step(self, problem, args, state):
        """See `AbstractSolver.step`; a step that is not finite leaves the state where it was."""
        trial = self._advance(problem, args, state)
        dtype = state.objective.dtype
        objective = trial.objective.astype(dtype)
        ok = tree.all_finite((trial.value, trial.companion, objective, trial.optimality))
        first = state.steps == 0
        counts = state.counts.add(**trial.counts)
        moved = BilevelState(
            value=trial.value,
            companion=trial.companion,
            ahead=trial.ahead,
            optimizers=trial.optimizers,
            memory=trial.memory,
            objective=objective,
            optimality=trial.optimality.astype(dtype),
            optimality_scale=jnp.maximum(state.optimality_scale, trial.scale).astype(dtype),
            aux=trial.aux,
            report={name: value.astype(dtype) for name, value in trial.report.items()},
            key=state.key,
            steps=state.steps,
            counts=counts,
            impl=state.impl,
        )
        new = tree.where(ok, moved, state)
        new = eqx.tree_at(lambda s: (s.steps, s.counts), new, (state.steps + 1, counts))
        broken = RESULTS.where(first, RESULTS.nonfinite_start, RESULTS.nonfinite_step)
        info = Info(
            objective=new.objective,
            optimality=new.optimality,
            optimality_scale=new.optimality_scale,
            feasibility=jnp.zeros((), dtype),
            step_size=optax.tree.norm(optax.tree.sub(new.value, state.value)).astype(dtype),
            value_change=jnp.where(first, jnp.inf, state.objective - new.objective).astype(dtype),
            accepted=ok,
            counts=counts,
            failure=RESULTS.where(ok, RESULTS.successful, broken),
            aux=new.aux,
            multipliers=self._multipliers(new),
            extras=new.report,
        )
        return new, info

    def _multipliers(self, state: BilevelState) -> PyTree:
        """Further unknowns of the conditions that `condition` returns."""
        return None

    def _check_sampler(self, args, key):
        if self.sampler is None:
            return
        drawn = eqx.filter_eval_shape(self.sampler, key, args)
        if not tree.same_types(drawn, eqx.filter_eval_shape(lambda args: args, args)):
            raise ValueError(
                f"{type(self).__name__}: sampler returned {tree.describe(drawn)}, expected args of "
                f"the same structure, shapes and dtypes, {tree.describe(args)}"
            )


def _typed(key: Array | None) -> Array:
    """A typed key, also from a key of the old kind."""
    assert key is not None
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if typed else jax.random.wrap_key_data(key)
