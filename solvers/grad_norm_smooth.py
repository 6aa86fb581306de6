"""Gradient-normalized smoothness: regularized Newton steps with one adaptive radius.

Semenov, Jaggi, Doikov, "Gradient-Normalized Smoothness for Optimization with Approximate
Hessians", arXiv 2506.13710.
"""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from jaxopt_ext.core import check, tree
from jaxopt_ext.core.problem import (
    ComposedMinimization,
    CompositeMinimization,
    LeastSquares,
    Minimization,
)
from jaxopt_ext.core.result import RESULTS
from jaxopt_ext.core.solver import AbstractSolver, Counts, Info, Number
from jaxopt_ext.solvers.curvature import Curvature
from jaxopt_ext.solvers.hessian_models import (
    ExactHessian,
    HessianModel,
    LocalProblem,
    UserHessian,
)
from jaxopt_ext.solvers.metrics import EuclideanMetric, Metric
from jaxopt_ext.solvers.proximal_step import proximal_direction, residual, start

PROXIMAL_THETA = 0.5  # relative error of the steps on a composite problem


class GradNormSmoothState(eqx.Module):
    """State of `GradNormSmooth` and of the other regularized Newton methods.

    Attributes:
        value: The last accepted point.
        objective: f there (f + ψ for a composite problem).
        gradient: ∇f there, raveled.
        subgradient: For a composite problem the element of ∂ψ there that belongs to the last
            step, raveled; else `None`.
        squared: ‖∇f‖² there (of ∇f plus the subgradient), in the dual norm of the metric.
        optimality: Max norm of the optimality conditions there.
        optimality_scale: The same at the start.
        model: What the Hessian model keeps of H.
        stale: Whether `model` still belongs to an earlier point.
        evaluated: Whether `value` has been evaluated (not before the first step).
        radius: γ of the next trial.
        aux: Auxiliary output at `value`.
        counts: Evaluations so far.
    """

    value: PyTree
    objective: Float[Array, ""]
    gradient: Float[Array, " n"]
    subgradient: Float[Array, " n"] | None
    squared: Float[Array, ""]
    optimality: Float[Array, ""]
    optimality_scale: Float[Array, ""]
    model: PyTree
    stale: Bool[Array, ""]
    evaluated: Bool[Array, ""]
    radius: Float[Array, ""]
    aux: PyTree
    counts: Counts


class Trial(eqx.Module):
    """What the acceptance test of a method sees of one trial.

    Attributes:
        change: Decrease of the objective.
        slope: −⟨∇f(x⁺), x⁺ − x⟩, with the new subgradient for a composite problem.
        squared: ‖∇f(x⁺)‖² in the dual norm, likewise.
        shift: λ.
        length: ‖x⁺ − x‖ in the metric.
        descent: −⟨∇f(x), x⁺ − x⟩.
    """

    change: Float[Array, ""]
    slope: Float[Array, ""]
    squared: Float[Array, ""]
    shift: Float[Array, ""]
    length: Float[Array, ""]
    descent: Float[Array, ""]


# ---- rules for the radius ---------------------------------------------------------------------


class RadiusRule(eqx.Module):
    """Base: the radius of the first trial from a point. Rejected trials shrink it in any case."""

    @abc.abstractmethod
    def first(self, gradient_norm: Array) -> Array:
        """γ for the dual norm of the gradient at the point."""


class ConstantRadius(RadiusRule):
    """γ the same at every point.

    Args:
        radius: γ > 0, in the variables' units (in the metric).

    Raises:
        ValueError: `radius` is not positive.
    """

    radius: Number

    def __check_init__(self):
        check.number("ConstantRadius", "radius", self.radius, above=0)

    def first(self, gradient_norm):
        """See `RadiusRule`."""
        return jnp.full_like(gradient_norm, self.radius)


class LipschitzHessian(RadiusRule):
    """γ = √(2 ‖∇f‖_* / L), right where the model is the Hessian and that is L-Lipschitz.

    Args:
        constant: L > 0, in units of the objective / variables³.

    Raises:
        ValueError: `constant` is not positive.
    """

    constant: Number

    def __check_init__(self):
        check.number("LipschitzHessian", "constant", self.constant, above=0)

    def first(self, gradient_norm):
        """See `RadiusRule`."""
        return jnp.sqrt(2 * gradient_norm / self.constant)


class QuasiSelfConcordant(RadiusRule):
    """γ = 1 / M, right where |D³f(x)[h, h, v]| ≤ M ⟨∇²f(x) h, h⟩ ‖v‖.

    For instance logistic regression with M = max ‖aᵢ‖_*, and μ log Σ exp(·/μ) with M = 2/μ times
    the norm of its linear map.

    Args:
        constant: M > 0, in units of 1 / variables.

    Raises:
        ValueError: `constant` is not positive.
    """

    constant: Number

    def __check_init__(self):
        check.number("QuasiSelfConcordant", "constant", self.constant, above=0)

    def first(self, gradient_norm):
        """See `RadiusRule`."""
        return jnp.full_like(gradient_norm, 1 / self.constant)


# ---- the step ----------------------------------------------------------------------------------


def _as_model(hessian: Any) -> Any:
    if isinstance(hessian, HessianModel | type) or not callable(hessian):
        return hessian
    function: Any = hessian
    return UserHessian(function)


class RegularizedNewton(AbstractSolver):
    """Base of the methods x⁺ = x − (H + λB)⁻¹∇f(x) with a λ that is searched for.

    A method says how λ follows from the state (`direction`) and which trials it accepts
    (`accepts_trial`); γ grows after an accepted trial and shrinks after a rejected one, and λ falls
    as γ grows. Every trial is one step.
    """

    accepts: ClassVar = (Minimization, ComposedMinimization, LeastSquares)

    hessian: HessianModel = eqx.field(default=ExactHessian(), converter=_as_model)
    radius: Number | RadiusRule = 1.0
    grow: Number = 2.0
    shrink: Number = 0.5
    metric: Metric = EuclideanMetric()
    min_radius: Number = 0.0
    max_radius: Number = 1e16

    def __check_init__(self):
        name = type(self).__name__
        if not isinstance(self.hessian, HessianModel):
            raise TypeError(
                f"{name}: hessian is a {type(self.hessian).__name__}, expected a Hessian model "
                "such as ExactHessian(), or a function (variables, args) -> H"
            )
        if not isinstance(self.metric, Metric):
            raise TypeError(
                f"{name}: metric is a {type(self.metric).__name__}, expected a metric such as "
                "DiagonalMetric(d)"
            )
        if not isinstance(self.radius, RadiusRule):
            check.number(name, "radius", self.radius, above=0)
        check.number(name, "grow", self.grow, above=1)
        check.number(name, "shrink", self.shrink, above=0, below=1)
        check.number(name, "min_radius", self.min_radius, at_least=0)
        check.number(name, "max_radius", self.max_radius, above=0)

    # what distinguishes the methods

    def direction(self, curvature: Curvature, state: GradNormSmoothState, gradient: Array):
        """λ, and the solution of (H + λI) u = −gradient."""
        shift = self.shift(state)
        return shift, curvature.direction(shift, gradient)

    def shift(self, state: GradNormSmoothState) -> Array:
        """λ where it does not depend on H."""
        return jnp.sqrt(state.squared) / state.radius

    @abc.abstractmethod
    def accepts_trial(self, trial: Trial, state: GradNormSmoothState) -> Bool[Array, ""]:
        """Whether the trial makes the progress that the theory of the method asks for."""

    # what they share

    def init(self, problem, value, args, key=None):
        """See `AbstractSolver.init`; the problem's functions are not evaluated."""
        self.hessian.check(problem)
        flat = ravel_pytree(value)[0]
        zero, unknown = jnp.zeros((), flat.dtype), jnp.array(jnp.nan, flat.dtype)
        _, aux = jax.eval_shape(lambda value: problem.objective(value, args), value)
        local = self._local(problem, args, value, jnp.zeros_like(flat), jnp.zeros((), jnp.int32))
        if _is_composite(problem) and local.coordinates.unscale is None:
            raise ValueError(
                f"{type(self).__name__}: CompositeMinimization needs a metric with an inverse, "
                f"and metric is a {type(self.metric).__name__}"
            )
        radius = self.radius
        if isinstance(radius, RadiusRule):
            radius = radius.first(jnp.ones((), flat.dtype))  # replaced once ∇f is known
        return GradNormSmoothState(
            value=value,
            objective=unknown,
            gradient=jnp.zeros_like(flat),
            subgradient=jnp.zeros_like(flat) if _is_composite(problem) else None,
            squared=zero,
            optimality=unknown,
            optimality_scale=zero,
            model=self.hessian.init(local),
            stale=jnp.array(False),
            evaluated=jnp.array(False),
            radius=jnp.asarray(radius, flat.dtype),
            aux=jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), aux),
            counts=Counts.zero(),
        )

    def step(self, problem, args, state):
        """See `AbstractSolver.step`: one trial."""
        local = self._local(problem, args, state.value, state.gradient, state.counts.value)
        start_here = ~state.evaluated
        model = jax.lax.cond(
            state.stale, lambda: self.hessian.build(local, state.model), lambda: state.model
        )
        curvature = self.hessian.at(local, model)
        shift, found, trial, displacement, subgradient = self._propose(local, curvature, state)
        (value, aux), gradient, optimality = _evaluate(local, trial)

        total = gradient if subgradient is None else gradient + subgradient
        here = state.gradient if subgradient is None else state.gradient + state.subgradient
        squared = jnp.sum(local.coordinates.dual(total) ** 2)
        finite = jnp.isfinite(value) & jnp.isfinite(squared)
        change = state.objective - value
        slope = -jnp.dot(total, displacement)
        descent = -jnp.dot(here, displacement)
        length = jnp.linalg.norm(found.step)
        seen = Trial(change, slope, squared, shift, length, descent)
        enough = self.accepts_trial(seen, state)
        accepted = found.ok & finite & (enough | _better_in_rounding(seen, state))
        take = accepted | (start_here & finite)

        radius, stuck = self._next_radius(local.point, state, squared, accepted, take)
        costs = self.hessian.evaluations(local.size)
        counts = state.counts.add(
            value=1, gradient=1, linear_solve=state.evaluated, hvp=found.products
        ).add(**{kind: jnp.where(state.stale, n, 0) for kind, n in costs.items()})
        scale = jnp.where(start_here, optimality, state.optimality_scale)
        new = GradNormSmoothState(
            value=local.unravel(jnp.where(take, trial, local.point)),
            objective=jnp.where(take, value, state.objective),
            gradient=jnp.where(take, gradient, state.gradient),
            subgradient=None
            if subgradient is None
            else jnp.where(take, subgradient, state.subgradient),
            squared=jnp.where(take, squared, state.squared),
            optimality=jnp.where(take, optimality, state.optimality),
            optimality_scale=scale,
            model=model,
            stale=take,
            evaluated=state.evaluated | finite,
            radius=radius,
            aux=tree.where(take, aux, state.aux),
            counts=counts,
        )
        failure = RESULTS.where(stuck, RESULTS.stagnated, RESULTS.successful)
        failure = RESULTS.where(start_here & ~finite, RESULTS.nonfinite_start, failure)
        info = Info(
            objective=new.objective,
            optimality=new.optimality,
            optimality_scale=scale,
            feasibility=jnp.zeros_like(value),
            step_size=jnp.linalg.norm(displacement),
            value_change=jnp.where(start_here, jnp.inf, change).astype(value.dtype),
            accepted=take,
            counts=counts,
            failure=failure,
            aux=new.aux,
            extras={"radius": radius, "shift": shift},
        )
        return new, info

    def resume(self, problem, args, state):
        """See `AbstractSolver.resume`: compares f and ∇f with what the state remembers of them.

        If they differ, the next step evaluates the current point again; γ and what the Hessian
        model keeps stay.
        """
        local = self._local(problem, args, state.value, state.gradient, state.counts.value)
        (value, _), gradient, _ = _evaluate(local, local.point)
        rounding = 1e3 * jnp.finfo(local.point.dtype).eps
        largest = jnp.maximum(jnp.max(jnp.abs(state.gradient)), jnp.max(jnp.abs(gradient)))
        scale = jnp.maximum(state.optimality_scale, largest)
        same = (jnp.abs(value - state.objective) <= rounding * jnp.maximum(1, jnp.abs(value))) & (
            jnp.max(jnp.abs(gradient - state.gradient)) <= rounding * scale
        )
        return eqx.tree_at(
            lambda s: (s.evaluated, s.stale),
            state,
            (state.evaluated & same, state.stale & same),
        )

    def iteration_map(self, problem, args, state, value):
        """X − (H + λB)⁻¹∇f(x) with the last λ and H held fixed, since ∇f = 0 at a solution."""
        if _is_composite(problem):
            return super().iteration_map(problem, args, state, value)
        local = self._local(problem, args, value, state.gradient, state.counts.value)
        gradient = jax.grad(local.objective)(local.origin)
        fixed = jax.lax.stop_gradient(local.point)
        frozen = self._local(
            problem, jax.lax.stop_gradient(args), local.unravel(fixed), gradient, local.draw
        )
        shift = jnp.sqrt(state.squared) / state.radius
        model = jax.lax.stop_gradient(self.hessian.build(frozen, state.model))
        curvature = self.hessian.at(frozen, model)
        step = jax.lax.custom_linear_solve(
            lambda v: curvature.product(v) + shift * v,
            -gradient,
            lambda _, rhs: curvature.direction(shift, -rhs).step,
            symmetric=True,
        )
        return local.unravel(local.point + local.coordinates.scale(step))

    def _local(self, problem, args, value, gradient, draw):
        """The problem at a point; `gradient` is ∇f there, before the metric."""
        flat, unravel = ravel_pytree(value)
        coordinates = self.metric.coordinates(value)
        smooth = problem.smooth if _is_composite(problem) else problem.objective

        def fun(value, args):
            return smooth(value, args)[0]

        return LocalProblem(
            problem, args, fun, flat, unravel, coordinates, coordinates.dual(gradient), draw
        )

    def _propose(self, local, curvature, state):
        """λ, the step in the metric's coordinates, trial, displacement, subgradient there."""
        if state.subgradient is None:
            shift, found = self.direction(curvature, state, local.gradient)
            shift = jnp.where(state.evaluated, shift, 1)
            step = jnp.where(state.evaluated, found.step, 0)  # the point itself at first
            displacement = local.coordinates.scale(step)
            trial = local.point + displacement
            return shift, found._replace(step=step), trial, displacement, None
        shift = jnp.where(state.evaluated, self.shift(state), 1)
        found, moved, at_moved = proximal_direction(
            local, curvature, shift, PROXIMAL_THETA, state.evaluated
        )
        first, at_first = start(local, state.subgradient)
        trial = jnp.where(state.evaluated, moved, first)
        subgradient = jnp.where(state.evaluated, at_moved, at_first)
        return shift, found, trial, trial - local.point, subgradient

    def _next_radius(self, point, state, squared, accepted, take):
        """γ of the next trial, and whether no smaller one is worth a trial."""
        eps, tiny = jnp.finfo(point.dtype).eps, jnp.finfo(point.dtype).tiny
        if isinstance(self.radius, RadiusRule):
            grown = self.radius.first(jnp.sqrt(squared))
            radius = jnp.where(take, grown, self.shrink * state.radius)
        else:
            radius = jnp.where(accepted, self.grow * state.radius, self.shrink * state.radius)
            radius = jnp.where(state.evaluated, radius, state.radius)
        clamped = jnp.clip(radius, self.min_radius, self.max_radius).astype(point.dtype)
        # a shorter step would not change the point
        resolution = eps * jnp.maximum(jnp.linalg.norm(point), tiny / eps)
        stuck = (clamped < resolution) | (state.radius <= self.min_radius)
        return clamped, stuck & ~take & state.evaluated


def _is_composite(problem):
    return isinstance(problem, CompositeMinimization)


def _evaluate(local: LocalProblem, point: Array):
    """Objective, aux, gradient of the smooth part, and the max norm of the conditions."""
    problem: Any = local.problem
    composite = _is_composite(problem)
    smooth = problem.smooth if composite else problem.objective

    def objective(flat):
        value, aux = smooth(local.unravel(flat), local.args)
        return value.astype(flat.dtype), aux

    (value, aux), gradient = jax.value_and_grad(objective, has_aux=True)(point)
    if not composite:
        return (value, aux), gradient, jnp.max(jnp.abs(gradient))
    if problem.penalty is not None:
        value += problem.penalty(local.unravel(point), local.args).astype(value.dtype)
    return (value, aux), gradient, jnp.max(jnp.abs(residual(local, point, gradient)))


def _better_in_rounding(trial: Trial, state) -> Bool[Array, ""]:
    """Gradients decide where the change of f is rounding error."""
    eps = jnp.finfo(trial.change.dtype).eps
    drowned = jnp.abs(trial.change) <= 10 * eps * jnp.maximum(1, jnp.abs(state.objective))
    halved = trial.squared <= state.squared / 4
    progress = trial.slope >= trial.squared / (4 * trial.shift)
    return drowned & (halved | (progress & (trial.squared < state.squared)))


class GradNormSmooth(RegularizedNewton):
    """Regularized Newton method with a step bound γ found by an adaptive search.

    A trial from x with gradient g and Hessian model H ⪰ 0 is

        x⁺ = x − (H + λB)⁻¹ g,    λ = ‖g‖_* / γ,

    so that ‖x⁺ − x‖ ≤ γ. It is accepted if f(x) − f(x⁺) ≥ decrease · ‖∇f(x⁺)‖_*² / λ, and γ grows;
    else γ shrinks and the trial is repeated with the same H. Where the change of f drowns in its
    rounding error, gradients decide instead: ‖∇f(x⁺)‖_* < ‖g‖_* and −⟨∇f(x⁺), x⁺ − x⟩ ≥
    ‖∇f(x⁺)‖_*² / (4λ), or ‖∇f(x⁺)‖_* ≤ ‖g‖_* / 2 where that inner product is rounding error too. A
    linear system that is not positive definite or a non-finite trial is a rejection.

    Every trial is one step and costs one value, one gradient and one linear solve; the model is
    built once per accepted point. The first step evaluates the starting point. Convergence is
    global for bounded-below objectives with H ⪰ 0 (gradient ≤ ε within O(1/(γ ε)) steps), linear
    to quadratic where the model is exact and f is (quasi-)self-concordant or strongly convex.

    For `CompositeMinimization`, min f + ψ, the step is that of the proximal Newton method,
    x⁺ = argmin ⟨g, y⟩ + ½⟨H(y − x), y − x⟩ + (λ/2)‖y − x‖² + ψ(y), found by an inner accelerated
    proximal gradient loop, and the gradient is replaced by an element of the subdifferential.

    Args:
        hessian: The Hessian model, or a function (variables, args) → H (see `UserHessian`).
        radius: First γ of the adaptive search, in the variables' units (in the metric), > 0; or a
            rule: `ConstantRadius`, `LipschitzHessian` or `QuasiSelfConcordant`.
        grow: Factor on γ after an accepted trial, > 1; not used with a rule.
        shrink: Factor on γ after a rejected trial, in (0, 1).
        decrease: Constant of the acceptance test, dimensionless; `None` means (1 − θ)/8 as theory
            guarantees, where θ is the relative error of the model's steps (0 for direct solves).
        metric: B, in which steps are measured: `EuclideanMetric()`, `DiagonalMetric(d)`,
            `MatrixMetric(B)` or `OperatorMetric(S)`.
        min_radius: Lower clamp of γ; a trial rejected there ends the solve.
        max_radius: Upper clamp of γ.
        rtol: Tolerance relative to the optimality residual at the start; `None` means eps.
        atol: Tolerance on the max norm of the optimality residual; `None` means eps^(2/3).

    Raises:
        TypeError: An unknown setting, or one that is of the wrong kind.
        ValueError: A setting outside its range.

    Reference:
        Semenov, Jaggi, Doikov, arXiv 2506.13710: adaptive algorithm and main lemma.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> def rosenbrock(y, args):
        ...     return 100.0 * (y[1] - y[0] ** 2) ** 2 + (1.0 - y[0]) ** 2
        >>> solution = jx.solve(
        ...     jx.Minimization(rosenbrock), solvers.GradNormSmooth(), jnp.array([-2.0, 2.0])
        ... )
        >>> print(jnp.round(solution.value, 2))
        [1. 1.]
    """

    accepts: ClassVar = (Minimization, ComposedMinimization, LeastSquares, CompositeMinimization)
    monotone: ClassVar[bool] = True

    decrease: Number | None = None

    def __check_init__(self):
        if self.decrease is not None:
            check.number("GradNormSmooth", "decrease", self.decrease, above=0, below=1)

    def accepts_trial(self, trial, state):
        """See `RegularizedNewton`."""
        theta = self.hessian.theta if state.subgradient is None else PROXIMAL_THETA
        constant = (1 - theta) / 8 if self.decrease is None else self.decrease
        return trial.change >= constant * trial.squared / trial.shift
