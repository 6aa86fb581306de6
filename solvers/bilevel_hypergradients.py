"""Bilevel solvers by implicit or unrolled hypergradients: AID, ITD, SOBA, BOME.

They are for a lower level with one smooth, well-conditioned solution, and what the penalty methods
are compared with.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jaxopt_ext import implicit
from jaxopt_ext.core import check, tree
from jaxopt_ext.core.problem import Bilevel
from jaxopt_ext.core.solver import Number
from jaxopt_ext.solvers.bilevel_steps import (
    BilevelSolver,
    Rule,
    Trial,
    apply_rule,
    check_rule,
    combine,
    mapping,
    start_rule,
)


class Linearized(NamedTuple):
    """Both levels to first order at a point (x, y).

    Attributes:
        objective: f.
        aux: Auxiliary output of f.
        upper_x: ∇_x f.
        upper_y: ∇_y f.
        residual: Of the lower level: ∇_y g, with a set y − P(y − ∇_y g).
        operator: The derivative of the residual with respect to y.
        pull: Its transposed derivative with respect to x.
    """

    objective: Array
    aux: PyTree
    upper_x: PyTree
    upper_y: PyTree
    residual: PyTree
    operator: implicit.LinearOperator
    pull: Callable[[PyTree], PyTree]

    def direction(self, adjoint: PyTree) -> PyTree:
        """The hypergradient ∇_x f − (∂residual/∂x)ᵀ v for an adjoint v."""
        return optax.tree.sub(self.upper_x, self.pull(adjoint))


def lower_residual(problem: Bilevel, args: PyTree, x: PyTree, y: PyTree) -> PyTree:
    """∇_y g, with a set the gradient mapping y − P(y − ∇_y g)."""
    return mapping(problem.lower_set, y, jax.grad(problem.lower, 1)(x, y, args))


def linearize(problem: Bilevel, args: PyTree, x: PyTree, y: PyTree) -> Linearized:
    """Both levels to first order at (x, y)."""
    (objective, aux), (upper_x, upper_y) = jax.value_and_grad(
        lambda x, y: problem.objective((x, y), args), (0, 1), has_aux=True
    )(x, y)
    derivative: Any
    residual, derivative = jax.linearize(lambda x, y: lower_residual(problem, args, x, y), x, y)
    nothing_x, nothing_y = jax.tree.map(jnp.zeros_like, (x, y))
    transposed = jax.linear_transpose(lambda dx: derivative(dx, nothing_y), x)
    operator = implicit.LinearOperator(
        lambda dy: derivative(nothing_x, dy), y, symmetric=problem.lower_set is None
    )
    return Linearized(
        objective, aux, upper_x, upper_y, residual, operator, lambda v: transposed(v)[0]
    )


class HypergradientSystem(implicit.Condition):
    """Stationarity of a bilevel problem by the implicit gradient; the unknown is (x, y).

    The rows are the hypergradient ∇_x f − (∂r/∂x)ᵀ v, with (∂r/∂y)ᵀ v = ∇_y f, and the lower-level
    residual r. Needs ∂r/∂y to be nonsingular.

    Args:
        problem: The bilevel problem.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> problem = jx.Bilevel(
        ...     upper=lambda x, y, args: (y - 1.0) ** 2 / 2, lower=lambda x, y, args: (y - x) ** 2
        ... )
        >>> three = jnp.array(3.0)
        >>> print(*solvers.HypergradientSystem(problem)((three, three), None))
        2.0 0.0
    """

    problem: Bilevel

    def __call__(self, xy, *args):
        """Return the hypergradient and the lower-level residual."""
        x, y = xy
        here = linearize(self.problem, args[0], x, y)
        adjoint = implicit.Auto()(here.operator.transpose(), here.upper_y)
        return mapping(self.problem.upper_set, x, here.direction(adjoint)), here.residual


class HypergradientMethod(BilevelSolver):
    """Base of the methods that follow one lower-level point."""

    reports: ClassVar = ("lower_residual",)

    upper_step: Rule = 0.1
    lower_step: Rule = 0.1

    def __check_init__(self):
        check_rule(type(self).__name__, "upper_step", self.upper_step)
        check_rule(type(self).__name__, "lower_step", self.lower_step)

    def condition(self, problem: Any):
        """See `AbstractSolver.condition`: exact stationarity, see `HypergradientSystem`."""
        return HypergradientSystem(problem)

    def _points(self, problem, args, x, y):
        return x, y

    def _optimizers(self, points):
        return start_rule(self.upper_step, points[0]), start_rule(self.lower_step, points[1])

    def _lower(self, problem, args, state, x, y, memory, keep=None):
        """`lower_steps` steps on g(x, ·); `keep` wraps the step, e.g. by `jax.checkpoint`."""
        key = state.sample_key()

        def move(carry, number):
            y, memory = carry
            args_ = self._draw(args, None if key is None else jax.random.fold_in(key, number))
            gradient = jax.grad(problem.lower, 1)(x, y, args_)
            rule, set_ = self.lower_step, problem.lower_set
            return apply_rule(rule, y, gradient, memory, state.steps, set_), None

        move = move if keep is None else keep(move)
        return jax.lax.scan(move, (y, memory), jnp.arange(self.lower_steps))[0]

    def _sample(self, args, state):
        """The args of the upper level."""
        key = state.sample_key()
        return self._draw(args, None if key is None else jax.random.fold_in(key, self.lower_steps))

    def _trial(self, problem, state, here: Linearized, x, y, direction, memory_x, **fields):
        """The trial that moves x along `direction`; `ahead` is what follows x."""
        next_x, memory_x = apply_rule(
            self.upper_step, x, direction, memory_x, state.steps, problem.upper_set
        )
        residual = tree.max_norm(here.residual)
        size = tree.max_norm(mapping(problem.upper_set, x, direction))
        report = {"lower_residual": residual} | fields.pop("report", {})
        following, optimizers = fields.pop("following"), fields.pop("optimizers")
        return Trial(
            value=(x, y),
            ahead=(next_x, *following),
            optimizers=(memory_x, *optimizers),
            memory=None,
            objective=here.objective,
            aux=here.aux,
            optimality=jnp.maximum(size, residual),
            scale=jnp.where(state.steps == 0, jnp.maximum(size, residual), 0),
            report=report,
            **fields,
        )


class ImplicitBilevel(HypergradientMethod):
    """Approximate implicit differentiation (AID): lower-level steps, a linear solve, a step of x.

    After `lower_steps` steps on the lower level, the adjoint v solves ∇²_yy g v = ∇_y f, and x
    moves along ∇_x f − ∇²_xy g v. The linear solver names the variant:

    | `linear_solver` | known as |
    |---|---|
    | `CG(max_steps=n)` | AID-CG |
    | `Neumann(terms, step)`, with a sampler | stocBiO |
    | `Nystrom(rank, rho, key)` | Nyström |
    | `JacobianFree(step)` | one-step differentiation, if `warm_start` is off |
    | `MinimumNorm()` | pseudo-inverse, for lower levels with several solutions |

    Successful when the (gradient mapping of the) direction and the lower-level residual are at
    most atol + rtol · their size at the start. The direction is that of the linear solver, so
    with a crude one success does not mean that the exact hypergradient is small.

    Args:
        upper_step: Step size for x: a number > 0, a schedule, or an optimizer of optax.
        lower_step: The same for y.
        lower_steps: Steps on the lower level per step of the solver, at least 1.
        sampler: Draws the `args` of one evaluation, as a function (key, args) → args of the same
            types. The solver then needs a key.
        linear_solver: Of the adjoint system; `None` means `implicit.Auto()`. With a `lower_set` the
            operator is not symmetric, so CG does not apply.
        warm_start: Whether each linear solve starts at the previous adjoint.
        rtol: Tolerance relative to the start; `None` means eps.
        atol: Tolerance on the max norm; `None` means eps^(2/3).

    Raises:
        TypeError: An unknown setting, or one of the wrong kind.
        ValueError: A setting outside its range.

    Reference:
        Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016; Ji, Yang,
        Liang, "Bilevel Optimization: Convergence Analysis and Enhanced Design", ICML 2021.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import implicit, solvers
        >>> problem = jx.Bilevel(
        ...     upper=lambda x, y, t: jnp.sum((y - t) ** 2),
        ...     lower=lambda x, y, t: jnp.sum((y - x) ** 2),
        ... )
        >>> solver = solvers.ImplicitBilevel(linear_solver=implicit.CG(max_steps=5))
        >>> init = jnp.zeros(2), jnp.zeros(2)
        >>> x, y = jx.solve(problem, solver, init, jnp.array([1.0, 2.0])).value
        >>> print(jnp.round(x, 3))
        [1. 2.]
    """

    reports: ClassVar = ("lower_residual", "linear_residual")

    linear_solver: Any = None
    warm_start: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        check.function("ImplicitBilevel", "linear_solver", self.linear_solver, optional=True)

    def _points(self, problem, args, x, y):
        return x, y, jax.tree.map(jnp.zeros_like, y)

    def _companion(self, points):
        return points[2]

    def _advance(self, problem, args, state):
        x, y, adjoint = state.ahead
        memory_x, memory_y = state.optimizers
        y, memory_y = self._lower(problem, args, state, x, y, memory_y)
        here = linearize(problem, self._sample(args, state), x, y)
        solver = implicit.Auto() if self.linear_solver is None else self.linear_solver
        adjoint, status = implicit.solve_linear(
            solver,
            here.operator,
            here.upper_y,
            x0=adjoint if self.warm_start else None,
            transpose=True,
        )
        return self._trial(
            problem,
            state,
            here,
            x,
            y,
            here.direction(adjoint),
            memory_x,
            following=(y, adjoint),
            optimizers=(memory_y,),
            companion=adjoint,
            report={"linear_residual": status.residual},
            counts={
                "value": 1,
                "gradient": self.lower_steps + 2,
                "hvp": products(solver, here.operator) + 1 + self.warm_start,
                "linear_solve": 1,
            },
        )


def products(solver: Any, operator: implicit.LinearOperator) -> int:
    """Most operator products that a linear solver makes."""
    for name in ("terms", "rank", "max_steps"):
        limit = getattr(solver, name, None)
        if limit is not None:
            return limit
    return 0 if isinstance(solver, implicit.JacobianFree) else operator.size


class UnrolledBilevel(HypergradientMethod):
    """Iterative differentiation (ITD): x moves along the derivative of f through the lower steps.

    The derivative of f(x, y_T(x)) with respect to x, where y_T is `lower_steps` steps from the
    previous y. Reverse mode with one checkpoint per step: memory grows with `lower_steps` states.
    The bias falls like ρ^lower_steps with ρ the rate of the lower iteration; where the lower level
    has several solutions it is not a hypergradient at all.

    Args:
        upper_step: Step size for x: a number > 0, a schedule, or an optimizer of optax.
        lower_step: The same for y.
        lower_steps: Steps on the lower level per step of the solver, at least 1.
        sampler: Draws the `args` of one evaluation, as a function (key, args) → args of the same
            types. The solver then needs a key.
        rtol: Tolerance relative to the start; `None` means eps.
        atol: Tolerance on the max norm; `None` means eps^(2/3).

    Raises:
        TypeError: An unknown setting, or one of the wrong kind.
        ValueError: A setting outside its range.

    Reference:
        Franceschi, Donini, Frasconi, Pontil, "Forward and Reverse Gradient-Based Hyperparameter
        Optimization", ICML 2017.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> problem = jx.Bilevel(
        ...     upper=lambda x, y, t: jnp.sum((y - t) ** 2),
        ...     lower=lambda x, y, t: jnp.sum((y - x) ** 2),
        ... )
        >>> init = jnp.zeros(2), jnp.zeros(2)
        >>> x, y = jx.solve(problem, solvers.UnrolledBilevel(), init, jnp.array([1.0, 2.0])).value
        >>> print(jnp.round(x, 3))
        [1. 2.]
    """

    def _advance(self, problem, args, state):
        x, y = state.ahead
        memory_x, memory_y = state.optimizers
        upper_args = self._sample(args, state)

        def outcome(x):
            moved, memory = self._lower(problem, args, state, x, y, memory_y, jax.checkpoint)
            objective, aux = problem.objective((x, moved), upper_args)
            return objective, (aux, moved, memory)

        (objective, (aux, y, memory_y)), direction = jax.value_and_grad(outcome, has_aux=True)(x)
        residual = lower_residual(problem, upper_args, x, y)
        here = Linearized(objective, aux, None, None, residual, None, None)  # type: ignore[arg-type]
        return self._trial(
            problem,
            state,
            here,
            x,
            y,
            direction,
            memory_x,
            following=(y,),
            optimizers=(memory_y,),
            companion=None,
            counts={
                "value": 1,
                "gradient": 2 * self.lower_steps + 2,
                "hvp": 2 * self.lower_steps,
            },
        )


class SOBA(HypergradientMethod):
    """Stochastic bilevel algorithm: y, the adjoint v and x move at once, from the same point.

        y ← y − ρ ∇_y g,    v ← v − ρ (∇²_yy g v − ∇_y f),    x ← x − γ (∇_x f − ∇²_xy g v).

    One gradient of each level and two second-order products per step; no inner loop.

    Args:
        upper_step: γ: a number > 0, a schedule, or an optimizer of optax.
        lower_step: ρ, likewise, for y and v.
        lower_steps: Must be 1.
        sampler: Draws the `args` of one evaluation, as a function (key, args) → args of the same
            types. The solver then needs a key.
        rtol: Tolerance relative to the start; `None` means eps.
        atol: Tolerance on the max norm; `None` means eps^(2/3).

    Raises:
        TypeError: An unknown setting, or one of the wrong kind.
        ValueError: A setting outside its range.

    Reference:
        Dagréou, Ablin, Vaiter, Moreau, "A framework for bilevel optimization that enables
        stochastic and global variance reduction algorithms", NeurIPS 2022.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> problem = jx.Bilevel(
        ...     upper=lambda x, y, t: jnp.sum((y - t) ** 2),
        ...     lower=lambda x, y, t: jnp.sum((y - x) ** 2),
        ... )
        >>> init = jnp.zeros(2), jnp.zeros(2)
        >>> x, y = jx.solve(problem, solvers.SOBA(), init, jnp.array([1.0, 2.0])).value
        >>> print(jnp.round(x, 3))
        [1. 2.]
    """

    reports: ClassVar = ("lower_residual", "linear_residual")

    lower_steps: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        if self.lower_steps != 1:
            raise ValueError(f"SOBA: lower_steps is {self.lower_steps}, expected 1")

    def _points(self, problem, args, x, y):
        return x, y, jax.tree.map(jnp.zeros_like, y)

    def _companion(self, points):
        return points[2]

    def _optimizers(self, points):
        x, y, v = points
        return start_rule(self.upper_step, x), *(start_rule(self.lower_step, p) for p in (y, v))

    def _advance(self, problem, args, state):
        x, y, v = state.ahead
        memory_x, memory_y, memory_v = state.optimizers
        args = self._sample(args, state)
        here = linearize(problem, args, x, y)
        gradient = jax.grad(problem.lower, 1)(x, y, args)
        residual = optax.tree.sub(here.operator.transpose().mv(v), here.upper_y)
        rule, step = self.lower_step, state.steps
        next_y, memory_y = apply_rule(rule, y, gradient, memory_y, step, problem.lower_set)
        next_v, memory_v = apply_rule(rule, v, residual, memory_v, step, None)
        trial = self._trial(
            problem,
            state,
            here,
            x,
            y,
            here.direction(v),
            memory_x,
            following=(next_y, next_v),
            optimizers=(memory_y, memory_v),
            companion=v,
            report={"linear_residual": tree.max_norm(residual)},
            counts={"value": 1, "gradient": 2, "hvp": 2},
        )
        optimality = jnp.maximum(trial.optimality, trial.report["linear_residual"])
        return trial._replace(optimality=optimality)


class BOME(HypergradientMethod):
    """Bilevel optimization made easy: first-order descent with the value function as constraint.

    With w the result of `lower_steps` gradient steps from y and q(x, y) = g(x, y) − g(x, w), w held
    fixed, the pair (x, y) moves along ∇f + λ ∇q, where λ ≥ 0 is the least that makes q decrease at
    the rate η ‖∇q‖².

    Args:
        upper_step: Step size for the pair (x, y): a number > 0, a schedule, or an optimizer of
            optax.
        lower_step: Step size for w, likewise.
        lower_steps: Steps of w, at least 1.
        sampler: Draws the `args` of one evaluation, as a function (key, args) → args of the same
            types. The solver then needs a key.
        control: η > 0, dimensionless.
        rtol: Tolerance relative to the start; `None` means eps.
        atol: Tolerance on the max norm; `None` means eps^(2/3).

    Raises:
        TypeError: An unknown setting, or one of the wrong kind.
        ValueError: A setting outside its range.

    Reference:
        Ye, Liu, Wright, Stone, Liu, "BOME! Bilevel Optimization Made Easy: A Simple First-Order
        Approach", NeurIPS 2022.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> problem = jx.Bilevel(
        ...     upper=lambda x, y, t: jnp.sum((y - t) ** 2),
        ...     lower=lambda x, y, t: jnp.sum((y - x) ** 2),
        ... )
        >>> init = jnp.zeros(2), jnp.ones(2)
        >>> found = jx.solve(problem, solvers.BOME(), init, jnp.array([1.0, 2.0]), max_steps=300)
        >>> print(jnp.round(found.value[0], 2))
        [1. 2.]
    """

    reports: ClassVar = ("lower_residual", "multiplier")

    control: Number = 0.5

    def __check_init__(self):
        check.number("BOME", "control", self.control, above=0)

    def _optimizers(self, points):
        # w starts at y in each step, so its rule has nothing to remember
        return (start_rule(self.upper_step, points),)

    def _advance(self, problem, args, state):
        x, y = state.ahead
        fresh = start_rule(self.lower_step, y)
        w, _ = self._lower(problem, args, state, x, y, fresh)
        args = self._sample(args, state)
        (objective, aux), upper = jax.value_and_grad(
            lambda x, y: problem.objective((x, y), args), (0, 1), has_aux=True
        )(x, y)
        at_y = jax.grad(problem.lower, (0, 1))(x, y, args)
        at_w = jax.grad(problem.lower, 0)(x, w, args)
        gap = optax.tree.sub(at_y[0], at_w), at_y[1]
        squared = optax.tree.norm(gap, squared=True)
        wanted = jnp.asarray(self.control, squared.dtype) * squared - optax.tree.vdot(upper, gap)
        tiny = jnp.asarray(jnp.finfo(squared.dtype).tiny ** 0.5, squared.dtype)
        multiplier = jnp.maximum(wanted / jnp.maximum(squared, tiny), 0)
        direction = combine(multiplier, gap, upper)
        ahead, memory = apply_rule(
            self.upper_step, (x, y), direction, state.optimizers[0], state.steps, None
        )
        sets = problem.upper_set, problem.lower_set
        ahead = tuple(p if s is None else s(p) for s, p in zip(sets, ahead, strict=True))
        mappings = [
            tree.max_norm(mapping(s, p, d)) for s, p, d in zip(sets, (x, y), direction, strict=True)
        ]
        residual = tree.max_norm(mapping(problem.lower_set, y, at_y[1]))
        optimality = jnp.maximum(jnp.maximum(*mappings), residual)
        return Trial(
            value=(x, y),
            companion=None,
            ahead=ahead,
            optimizers=(memory,),
            memory=None,
            objective=objective,
            aux=aux,
            optimality=optimality,
            scale=jnp.where(state.steps == 0, optimality, 0),
            report={"lower_residual": residual, "multiplier": multiplier},
            counts={"value": 1, "gradient": self.lower_steps + 3},
        )


class BilevelHypergradient(eqx.Module):
    """What `hypergradient` returns.

    Attributes:
        gradient: The derivative of the upper objective along the lower-level solution, a PyTree
            like x.
        objective: The upper objective at the point that it belongs to.
        residual: What says whether the method applies: for linear solvers ‖A v − ∇_y f‖ / ‖∇_y f‖
            of the adjoint system; it is of order 1 where the lower level has several solutions
            and y is not the best of them. For "penalty" the larger inner residual over σ. For
            "unroll" the lower-level residual at the end.
    """

    gradient: PyTree
    objective: Float[Array, ""]
    residual: Float[Array, ""]
