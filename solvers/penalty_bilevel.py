"""Penalty methods for bilevel problems: first derivatives only, any number of lower solutions."""

import abc
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree

from jaxopt_ext import implicit
from jaxopt_ext.core import check, tree
from jaxopt_ext.core.result import RESULTS
from jaxopt_ext.core.solver import AbstractSolver, Number
from jaxopt_ext.solvers.bilevel_steps import (
    BilevelSolver,
    BilevelState,
    Rule,
    Trial,
    apply_rule,
    check_rule,
    combine,
    mapping,
    start_rule,
)
from jaxopt_ext.solvers.bilevel_systems import CentralSystem, PolishedSystem
from jaxopt_ext.solvers.bilevel_values import minimize_lower
from jaxopt_ext.solvers.cbo_consensus import Geometric, Schedule, check_schedule, scheduled

LAST = 2**30  # the step at which a schedule is taken to have settled
POLISHING = 500  # steps of the polishing solver at most


class Values(NamedTuple):
    """What the functions are at (x, y) and (x, z).

    Attributes:
        objective: f(x, y).
        upper: f(x, y) and f(x, z); the latter for central differences only, else 0.
        lower: g(x, y) and g(x, z).
        aux: Auxiliary output of f at (x, y).
        size: The largest entry among the gradients with respect to x before they cancel.
    """

    objective: Array
    upper: Array
    lower: Array
    aux: PyTree
    size: Array


class Pieces(NamedTuple):
    """The gradients that a step is made of; linear in the samples, so each has its own momentum.

    Attributes:
        upper_x: ∇_x f at (x, y); for central differences the mean with (x, z).
        lower_x: ∇_x g(x, y) − ∇_x g(x, z).
        upper_y: ∇_y f at (x, y), and for central differences at (x, z).
        lower_y: ∇_y g at (x, y) and at (x, z).
    """

    upper_x: PyTree
    lower_x: PyTree
    upper_y: tuple[PyTree, ...]
    lower_y: tuple[PyTree, PyTree]


class Directions(NamedTuple):
    """Gradients with respect to x, y and z of the penalty function, of h_σ and of h_τ."""

    x: PyTree
    y: PyTree
    z: PyTree


class PenaltyMethod(BilevelSolver):
    """The penalty step, shared by `PenaltyBilevel` and `F2SA`."""

    reports: ClassVar = ("sigma", "penalty_value", "lower_gap", "lower_residual")

    # ---- what distinguishes the methods ----

    @abc.abstractmethod
    def _sigma(self, step: Int[Array, ""], dtype: Any) -> Float[Array, ""]:
        """The penalty parameter of one step."""

    @abc.abstractmethod
    def _rules(self) -> tuple[Rule, Rule, Rule]:
        """Step rules of x, y and z."""

    @property
    def _central(self) -> bool:
        return False

    @property
    def _independent(self) -> bool:
        """Whether y and z see different samples."""
        return False

    @property
    def _apart(self) -> bool:
        """Whether x waits for the last lower-level step, at the price of one more evaluation."""
        return False

    def _eta(self, step, dtype) -> Array | None:
        """Weight of the new sample in the momentum; `None` without momentum."""
        return None

    def _anchored(self, directions: Directions, state_points, y, z) -> tuple[PyTree, PyTree]:
        """Gradients of y and z with the proximal term, if there is one."""
        return directions.y, directions.z

    def _averaged(self, step, old: PyTree, new: PyTree) -> PyTree:
        """The proximal centres of the next step."""
        return new

    @property
    def _rescues(self) -> bool:
        """Whether y takes the place of a z that is a worse lower-level point."""
        return False

    def condition(self, problem: Any):
        """See `AbstractSolver.condition`: the penalty system at the final σ."""
        sigma = self._sigma(jnp.array(LAST), _dtype(problem))
        forward = problem.condition(sigma)
        if not self._central:
            return forward
        return CentralSystem(
            forward.upper, forward.lower, sigma, forward.upper_set, forward.lower_set
        )

    # ---- the step ----

    def _points(self, problem, args, x, y):
        return x, y, y

    def _companion(self, points):
        return points[2]

    def _multipliers(self, state):
        return state.companion

    def _optimizers(self, points):
        rules = self._rules()
        return tuple(start_rule(rule, point) for rule, point in zip(rules, points, strict=True))

    def _advance(self, problem, args, state):
        dtype, step = state.objective.dtype, state.steps
        sigma = self._sigma(step, dtype)
        x, y, z = state.ahead
        rule_x, rule_y, rule_z = self._rules()
        key = state.sample_key()

        def visit(number, carry):
            """Evaluate (x, y, z) and move y and z."""
            y, z, memory_y, memory_z = carry
            values, directions, memory = self._evaluate(
                problem, args, (x, y, z), _numbered(key, number), sigma, state
            )
            gradient_y, gradient_z = self._anchored(directions, state.ahead, y, z)
            set_ = problem.lower_set
            next_y, memory_y = apply_rule(rule_y, y, gradient_y, memory_y, step, set_)
            next_z, memory_z = apply_rule(rule_z, z, gradient_z, memory_z, step, set_)
            return (next_y, next_z, memory_y, memory_z), (y, z, values, directions, memory)

        start = (y, z, *state.optimizers[1:])
        moved, (y, z, values, directions, memory) = self._loop(visit, start)
        next_x, memory_x = apply_rule(
            rule_x, x, directions.x, state.optimizers[0], step, problem.upper_set
        )
        centres = self._averaged(step, state.ahead[1:], moved[:2])
        span = 2 * sigma if self._central else sigma
        residual_x = tree.max_norm(mapping(problem.upper_set, x, directions.x))
        residual = jnp.maximum(
            tree.max_norm(mapping(problem.lower_set, y, directions.y)),
            tree.max_norm(mapping(problem.lower_set, z, directions.z)),
        ).astype(dtype)
        upper, lower = values.upper, values.lower
        gap = lower[0] - lower[1]
        memory_y, memory_z = moved[2:]
        if self._rescues:
            worse = _worse(gap, residual, y, z, values.objective)
            centres = centres[0], tree.where(worse, *centres)
            memory_z = tree.where(worse, memory_y, memory_z)
        # with σf(x, z) the same formula holds for both differences
        shared = (upper[0] + upper[1]) / 2 if self._central else upper[0]
        visits = self.lower_steps + self._apart
        cost = visits * (4 if self._central else 3) * (1 if memory is None else 2)
        return Trial(
            value=(x, y),
            companion=z,
            ahead=(next_x, *centres),
            optimizers=(memory_x, memory_y, memory_z),
            memory=memory,
            objective=values.objective,
            aux=values.aux,
            optimality=jnp.maximum(residual_x.astype(dtype), residual / sigma),
            scale=jnp.maximum(values.size.astype(dtype) / sigma, tree.max_norm(directions.x)),
            report={
                "sigma": sigma,
                "penalty_value": shared + gap / span,
                "lower_gap": gap,
                "lower_residual": residual,
            },
            counts={"value": cost, "gradient": cost},
        )

    def _loop(self, visit, start):
        """`lower_steps` visits, or with `_apart` one more that moves x only; one call site."""
        last = self.lower_steps - 1 + self._apart
        if last == 0:
            return visit(0, start)
        blank = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(lambda c: visit(0, c)[1], start)
        )

        def body(number, carry):
            here, _ = carry
            there, seen = visit(number, here)
            if self._apart:
                there = tree.where(number < last, there, here)
            return there, seen

        return jax.lax.fori_loop(0, last + 1, body, (start, blank))

    def _evaluate(self, problem, args, points, key, sigma, state):
        """Values and gradients at the points, by momentum if there is any."""
        eta = self._eta(state.steps, sigma.dtype)
        if eta is None:
            values, pieces = self._pieces(problem, args, points, key)
            return values, self._combined(pieces, sigma), None
        previous, estimate = state.memory
        both = jax.tree.map(lambda *leaves: jnp.stack(leaves), points, previous)
        values, pieces = jax.vmap(lambda p: self._pieces(problem, args, p, key))(both)
        new, old = (jax.tree.map(lambda leaf, i=i: leaf[i], pieces) for i in (0, 1))
        eta = jnp.where(state.steps == 0, 1, eta)
        estimate = optax.tree.add(new, combine(1 - eta, optax.tree.sub(estimate, old), _zeros(new)))
        values = jax.tree.map(lambda leaf: leaf[0], values)
        return values, self._combined(estimate, sigma), (points, estimate)

    def _memory(self, points):
        if self._eta(jnp.zeros((), jnp.int32), tree.dtype_of(points)) is None:
            return None
        x, y, _ = points
        upper_y = (y, y) if self._central else (y,)
        return points, _zeros(Pieces(x, x, upper_y, (y, y)))

    def _pieces(self, problem, args, points, key) -> tuple[Values, Pieces]:
        """One evaluation: f at (x, y), g at (x, y) and (x, z), from one call of each function."""
        x, y, z = points
        pair = jax.tree.map(lambda *leaves: jnp.stack(leaves), y, z)
        keys = None if key is None else jax.random.split(key, 3)

        def lower(v, key):
            args_ = self._draw(args, key)
            return jax.value_and_grad(problem.lower, (0, 1))(x, v, args_)

        def upper(v, key):
            args_ = self._draw(args, key)
            evaluate = jax.value_and_grad(
                lambda x, v: problem.objective((x, v), args_), (0, 1), has_aux=True
            )
            return evaluate(x, v)

        if self._independent and keys is not None:
            lower_value, (lower_x, lower_y) = jax.vmap(lower)(pair, keys[:2])
            key = keys[2]
        else:
            lower_value, (lower_x, lower_y) = jax.vmap(lambda v: lower(v, key))(pair)
        if self._central:
            (value, aux), (upper_x, upper_y) = jax.vmap(lambda v: upper(v, key))(pair)
            aux, upper_y = _split(aux)[0], _split(upper_y)
            size, upper_x = tree.max_norm(upper_x), jax.tree.map(lambda u: u.mean(0), upper_x)
        else:
            (value, aux), (upper_x, upper_y) = upper(y, key)
            value, upper_y = jnp.stack([value, jnp.zeros_like(value)]), (upper_y,)
            size = tree.max_norm(upper_x)
        size = jnp.maximum(size, tree.max_norm(lower_x))
        difference = optax.tree.sub(*_split(lower_x))
        values = Values(value[0], value, lower_value, aux, size)
        return values, Pieces(upper_x, difference, upper_y, _split(lower_y))

    def _combined(self, pieces: Pieces, sigma) -> Directions:
        span = 2 * sigma if self._central else sigma
        at_z = pieces.lower_y[1]
        if self._central:
            at_z = combine(-sigma, pieces.upper_y[1], at_z)
        return Directions(
            x=combine(1 / span, pieces.lower_x, pieces.upper_x),
            y=combine(sigma, pieces.upper_y[0], pieces.lower_y[0]),
            z=at_z,
        )


class PenaltyBilevel(PenaltyMethod):
    """First-order penalty method: bilevel optimization without second derivatives.

    With h_σ = σf + g it follows a minimizer y of h_σ(x, ·) and a minimizer z of g(x, ·), and moves
    x along the gradient of the penalty function

        ψ_σ(x) = (min h_σ(x, ·) − min g(x, ·)) / σ,
        ∇ψ_σ(x) = ∇_x f(x, y) + (∇_x g(x, y) − ∇_x g(x, z)) / σ.

    Unlike the implicit gradient it stays right where the lower level has many solutions (it finds
    the one that is best for f) or is constrained. Its error is O(σ), with `difference="central"`
    O(σ²). `value` is (x, y), and z is in `Solution.multipliers`.

    A step is `lower_steps` evaluations of f at (x, y) and of g at (x, y) and (x, z); y and z move
    after each, x after the last. With `lower_steps=1` it is the single-loop method. It is
    successful when the gradient mapping of x, and those of y and z divided by σ, are at most
    atol + rtol · scale, and σ has settled. The scale is the largest size so far of the terms that
    cancel in ∇ψ_σ.

    What y and z have in common cancels in the difference, so both move with the same rule and see
    the same samples.

    Args:
        upper_step: Step size for x: a number > 0, a schedule, or an optimizer of optax. The
            optimizer is followed by the projection; for adaptive ones this is sound on boxes only.
        lower_step: The same for y and z, in units of y² per unit of g; below 2/L for plain
            gradient steps, L a bound on the curvature of h_σ. An accelerated rule
            (`optax.sgd(step, momentum, nesterov=True)`) helps where the lower level has many
            solutions, because h_σ has the curvature O(σ) along them.
        lower_steps: Steps on the lower level per step of the solver, at least 1.
        sampler: Draws the `args` of one evaluation, as a function (key, args) → args of the same
            types, e.g. with other row numbers or another key. The solver then needs a key.
        sigma: σ > 0, dimensionless: a number or a schedule that settles; never below √eps of the
            dtype, where the difference of gradients drowns in rounding errors. Derivatives of the
            solution are those at its final value.
        difference: "forward", or "central" for a unique and strongly convex lower level: y then
            minimizes g + σf, z minimizes g − σf.
        prox: ρ > 0 of the proximal terms ‖y − y_k‖² / (2ρ) on the lower level, where y_k is where
            the step starts; makes the lower steps well-posed for a non-convex g if ρ < 1/L.
            `None` for none.
        averaging: β in (0, 1]: y_k moves by this share of the way to the last lower-level point.
        momentum: η in (0, 1], the weight of the new sample in recursive (STORM) estimates of all
            gradients, which evaluate the sample at the previous point too; a number or a schedule.
            Needs `lower_steps=1`.
        common_samples: Whether y and z see the same samples. Independent ones have a variance
            larger by 1/σ²; they are there to reproduce other methods.
        rescue: Whether z restarts at y where it is a clearly worse lower-level point, as in
            `lower_level_not_solved`: for lower levels with local minima. Not with "central".
        polish: Whether to solve the lower level alone at the end, starting from y: `True` by
            `GradNormSmooth()`, or by a solver of your own, see `lower_minimum`. The y returned is
            then lower-level optimal and still close to the best such point for f, and
            `Solution.multipliers` is the pair of the unpolished y and z. Derivatives of y are of
            the least norm where the lower level has several solutions.
        rtol: Tolerance relative to the scale; `None` means eps.
        atol: Tolerance on the max norm; `None` means eps^(2/3).

    Raises:
        TypeError: An unknown setting, or one of the wrong kind.
        ValueError: A setting outside its range, or settings that exclude each other.

    Reference:
        Kwon, Kwon, Wright, Nowak, "On Penalty Methods for Nonconvex Bilevel Optimization and
        First-Order Stochastic Approximation", ICLR 2024.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> problem = jx.Bilevel(  # every y on a line is lower-level optimal
        ...     upper=lambda x, y, args: jnp.sum(y**2) / 2 + x**2 / 8,
        ...     lower=lambda x, y, args: (x * y[0] + y[1] - 1.0) ** 2 / 2,
        ... )
        >>> solver = solvers.PenaltyBilevel(sigma=1e-2, upper_step=0.2, lower_step=0.3)
        >>> init = jnp.array(2.0), jnp.array([1.0, 0.0])
        >>> x, y = jx.solve(problem, solver, init, max_steps=2000).value
        >>> print(f"{x:.3f}")  # √(1 − σ)
        0.995
    """

    upper_step: Rule = 0.1
    lower_step: Rule = 0.1
    sigma: Schedule = Geometric(0.3, 0.95, 1e-2)
    difference: Literal["forward", "central"] = eqx.field(static=True, default="forward")
    prox: Number | None = None
    averaging: Schedule = 1.0
    momentum: Schedule | None = None
    common_samples: bool = eqx.field(static=True, default=True)
    rescue: bool = eqx.field(static=True, default=True)
    polish: AbstractSolver | bool = False

    def __check_init__(self):
        owner = type(self).__name__
        check_rule(owner, "upper_step", self.upper_step)
        check_rule(owner, "lower_step", self.lower_step)
        check_schedule(owner, "sigma", self.sigma, above=0)
        if self.difference not in ("forward", "central"):
            raise ValueError(
                f"{owner}: difference is {self.difference!r}, expected 'forward' or 'central'"
            )
        if self.prox is not None:
            check.number(owner, "prox", self.prox, above=0)
        for name in ("averaging", "momentum"):
            if getattr(self, name) is not None:
                _check_share(owner, name, getattr(self, name))
        if self.momentum is not None and self.lower_steps != 1:
            raise ValueError(
                f"{owner}: lower_steps is {self.lower_steps}, expected 1 with momentum"
            )
        if self._central and self.prox is not None:
            raise ValueError(
                f"{owner}: prox is {self.prox}, expected None because difference is 'central', "
                "which is for strongly convex lower levels"
            )
        if not isinstance(self.polish, bool | AbstractSolver):
            raise TypeError(
                f"{owner}: polish is a {type(self.polish).__name__}, expected True, False or a "
                "solver such as GradNormSmooth()"
            )

    def init(self, problem, value, args, key=None):
        """See `BilevelSolver.init`."""
        if self._central and problem.lower_set is not None:
            raise ValueError(
                f"{type(self).__name__}: difference is 'central', expected 'forward' because the "
                "problem has a lower_set"
            )
        return super().init(problem, value, args, key)

    def stop(self, problem, args, state, info):
        """See `AbstractSolver.stop`; successful only once σ has settled."""
        done, result = super().stop(problem, args, state, info)
        final = self._sigma(jnp.array(LAST), info.objective.dtype)
        settled = info.extras["sigma"] <= final * (1 + 10 * jnp.finfo(final.dtype).eps)
        return done & (settled | (result != RESULTS.successful)), result

    def condition(self, problem: Any):
        """See `AbstractSolver.condition`: the penalty system at the final σ, polished or not."""
        system = super().condition(problem)
        return system if self.polish is False else PolishedSystem(system)

    def finish(self, problem: Any, args, value, info):
        """See `AbstractSolver.finish`: with `polish`, solve the lower level alone from y."""
        if self.polish is False:
            return value, info
        x, y = value
        solver = None if self.polish is True else self.polish
        adjoint = implicit.ImplicitAdjoint(implicit.MinimumNorm())
        found = minimize_lower(problem, x, y, args, 0.0, solver, POLISHING, adjoint)
        polished = found.value
        objective, aux = problem.objective((x, polished), args)
        gradient = jax.grad(problem.lower, 1)(x, polished, args)
        residual = tree.max_norm(mapping(problem.lower_set, polished, gradient))
        info = eqx.tree_at(
            lambda i: (i.objective, i.aux, i.optimality, i.multipliers, i.counts),
            info,
            (
                objective.astype(info.objective.dtype),
                aux,
                jnp.maximum(info.optimality, residual.astype(info.optimality.dtype)),
                (y, info.multipliers),
                jax.tree.map(jnp.add, info.counts, found.stats.counts),
            ),
            is_leaf=lambda leaf: leaf is None,
        )
        return (x, polished), info

    def _sigma(self, step, dtype):
        return jnp.maximum(scheduled(self.sigma, step, dtype), jnp.finfo(dtype).eps ** 0.5)

    def _rules(self):
        return self.upper_step, self.lower_step, self.lower_step

    @property
    def _central(self):
        return self.difference == "central"

    @property
    def _independent(self):
        return not self.common_samples

    @property
    def _rescues(self):
        # the values of independent samples cannot be compared
        return self.rescue and not self._central and self.common_samples

    def _eta(self, step, dtype):
        return None if self.momentum is None else scheduled(self.momentum, step, dtype)

    def _anchored(self, directions, state_points, y, z):
        if self.prox is None:
            return directions.y, directions.z
        weight = 1 / jnp.asarray(self.prox, tree.dtype_of(y))
        _, centre_y, centre_z = state_points
        return (
            combine(weight, optax.tree.sub(y, centre_y), directions.y),
            combine(weight, optax.tree.sub(z, centre_z), directions.z),
        )

    def _averaged(self, step, old, new):
        beta = scheduled(self.averaging, step, tree.dtype_of(new))
        return combine(beta, optax.tree.sub(new, old), old)


def lower_level_not_solved(state: BilevelState) -> Array:
    """Whether z is a worse lower-level point than y: the lower solver is stuck or stopped early.

    g(x, z) should be the minimum of g(x, ·), so that g(x, y) − g(x, z) ≥ 0; ψ_σ and its gradient
    mean nothing where this fails by more than rounding and the residuals of y and z can explain.

    Args:
        state: The solver's state, `solution.state.solver`, of a penalty method.

    Returns:
        A flag.

    Raises:
        TypeError: `state` is not that of a penalty method.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> problem = jx.Bilevel(
        ...     upper=lambda x, y, args: (y - 1.0) ** 2, lower=lambda x, y, args: (y - x) ** 2
        ... )
        >>> solver = solvers.PenaltyBilevel(upper_step=0.1, lower_step=0.4)
        >>> found = jx.solve(problem, solver, (jnp.array(0.0), jnp.array(3.0)))
        >>> bool(solvers.lower_level_not_solved(found.state.solver))
        False
    """
    if not isinstance(state, BilevelState) or "lower_gap" not in state.report:
        raise TypeError(
            f"lower_level_not_solved: state is a {type(state).__name__}, expected the state of a "
            "penalty method, solution.state.solver"
        )
    report = state.report
    return _worse(
        report["lower_gap"], report["lower_residual"], state.value[1], state.companion,
        state.objective,
    )  # fmt: skip


def _worse(gap, residual, y, z, objective) -> Array:
    """Whether g(x, z) > g(x, y) by more than a convex g with that residual at z allows.

    For convex g it is at most ∇g(x, z)ᵀ(z − y) ≤ ‖∇g(x, z)‖_max ‖z − y‖₁.
    """
    moved = optax.tree.norm(optax.tree.sub(y, z), ord=1)
    rounding = jnp.finfo(gap.dtype).eps ** 0.75
    return ~(gap >= -(residual * moved + rounding * jnp.maximum(1, jnp.abs(objective))))


def _check_share(owner, name, setting):
    check_schedule(owner, name, setting, above=0)
    known = isinstance(setting, float | int) or (eqx.is_array(setting) and setting.ndim == 0)
    if known and not isinstance(setting, Tracer) and float(setting) > 1:
        raise ValueError(f"{owner}: {name} is {setting}, expected a number > 0 and <= 1")


def _dtype(problem: Any) -> Any:
    """The dtype of the objective of a traced problem."""
    lower = problem.lower
    return lower.out_shape.dtype if isinstance(lower, implicit.Hoisted) else jnp.zeros(()).dtype


def _numbered(key, number):
    return None if key is None else jax.random.fold_in(key, number)


def _split(pair: PyTree) -> tuple[PyTree, PyTree]:
    """The two halves of stacked trees."""
    return jax.tree.map(lambda u: u[0], pair), jax.tree.map(lambda u: u[1], pair)


def _zeros(point: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, point)
