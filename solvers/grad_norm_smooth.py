"""Gradient-normalized smoothness: regularized Newton steps with one adaptive radius.

Semenov, Jaggi, Doikov, "Gradient-Normalized Smoothness for Optimization with Approximate
Hessians", arXiv 2506.13710.
"""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from jaxopt_ext.core import check, tree
from jaxopt_ext.core.problem import ComposedMinimization, LeastSquares, Minimization
from jaxopt_ext.core.result import RESULTS
from jaxopt_ext.core.solver import AbstractSolver, Counts, Info, Number
from jaxopt_ext.solvers.hessian_models import ExactHessian, HessianModel


class GradNormSmoothState(eqx.Module):
    """State of `GradNormSmooth`.

    Attributes:
        value: The last accepted point.
        objective: f there.
        gradient: ∇f there, raveled.
        squared: ‖∇f‖² there.
        gradient_scale: Max norm of the gradient at the start.
        model: The Hessian model's data there.
        stale: Whether `model` still belongs to an earlier point.
        evaluated: Whether `value` has been evaluated (not before the first step).
        radius: γ of the next trial.
        aux: Auxiliary output at `value`.
        counts: Evaluations so far.
    """

    value: PyTree
    objective: Float[Array, ""]
    gradient: Float[Array, " n"]
    squared: Float[Array, ""]
    gradient_scale: Float[Array, ""]
    model: PyTree
    stale: Bool[Array, ""]
    evaluated: Bool[Array, ""]
    radius: Float[Array, ""]
    aux: PyTree
    counts: Counts


class GradNormSmooth(AbstractSolver):
    """Regularized Newton method with a step bound γ found by an adaptive search.

    A trial from x with gradient g and Hessian model H ⪰ 0 is

        x⁺ = x − (H + λI)⁻¹ g,    λ = ‖g‖ / γ,

    so that ‖x⁺ − x‖ ≤ γ. It is accepted if f(x) − f(x⁺) ≥ decrease · ‖∇f(x⁺)‖² / λ, and γ grows;
    else γ shrinks and the trial is repeated with the same H. Where the change of f drowns in its
    rounding error, gradients decide instead: ‖∇f(x⁺)‖ < ‖g‖ and −⟨∇f(x⁺), x⁺ − x⟩ ≥
    ‖∇f(x⁺)‖² / (4λ), or ‖∇f(x⁺)‖ ≤ ‖g‖ / 2 where that inner product is rounding error too. A
    factorization that fails (H + λI not positive definite) or a non-finite trial is a rejection.

    Every trial is one step and costs one value, one gradient and one linear solve; the Hessian is
    computed once per accepted point. The first step evaluates the starting point. Convergence is
    global for bounded-below objectives with H ⪰ 0 (gradient ≤ ε within O(1/(γ ε)) steps), linear
    to quadratic where the model is exact and f is (quasi-)self-concordant or strongly convex.

    Args:
        hessian: The Hessian model.
        radius: First γ, in the variables' units, Euclidean norm, > 0.
        grow: Factor on γ after an accepted trial, > 1.
        shrink: Factor on γ after a rejected trial, in (0, 1).
        decrease: Constant of the acceptance test, dimensionless; 1/8 is what theory guarantees.
        max_radius: Upper clamp of γ, in the variables' units.
        rtol: Tolerance relative to the gradient at the start; `None` means eps.
        atol: Tolerance on the gradient's max norm; `None` means eps^(2/3).

    Raises:
        TypeError: An unknown setting, or one that is not a number.
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

    accepts: ClassVar = (Minimization, ComposedMinimization, LeastSquares)
    monotone: ClassVar[bool] = True

    hessian: HessianModel = ExactHessian()
    radius: Number = 1.0
    grow: Number = 2.0
    shrink: Number = 0.5
    decrease: Number = 0.125
    max_radius: Number = 1e16

    def __check_init__(self):
        check.number("GradNormSmooth", "radius", self.radius, above=0)
        check.number("GradNormSmooth", "grow", self.grow, above=1)
        check.number("GradNormSmooth", "shrink", self.shrink, above=0, below=1)
        check.number("GradNormSmooth", "decrease", self.decrease, above=0, below=1)
        check.number("GradNormSmooth", "max_radius", self.max_radius, above=0)

    def init(self, problem, value, args, key=None):
        """See `AbstractSolver.init`; the problem's functions are not evaluated."""
        flat = ravel_pytree(value)[0]
        _, aux = jax.eval_shape(lambda value: problem.objective(value, args), value)
        return GradNormSmoothState(
            value=value,
            objective=jnp.array(jnp.nan, flat.dtype),
            gradient=jnp.zeros_like(flat),
            squared=jnp.zeros((), flat.dtype),
            gradient_scale=jnp.zeros((), flat.dtype),
            model=self.hessian.zero(flat),
            stale=jnp.array(False),
            evaluated=jnp.array(False),
            radius=jnp.asarray(self.radius, flat.dtype),
            aux=jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), aux),
            counts=Counts.zero(),
        )

    def step(self, problem, args, state):
        """See `AbstractSolver.step`: one trial."""
        point, unravel = ravel_pytree(state.value)
        dtype, eps = point.dtype, jnp.finfo(point.dtype).eps

        def objective(flat):
            value, aux = problem.objective(unravel(flat), args)
            return value.astype(dtype), aux

        model = jax.lax.cond(
            state.stale,
            lambda: self.hessian.build(lambda flat: objective(flat)[0], point),
            lambda: state.model,
        )
        shift = jnp.where(state.evaluated, jnp.sqrt(state.squared) / state.radius, 1)
        direction, solved = self.hessian.direction(model, shift, state.gradient)
        trial = point + direction  # the point itself before the first evaluation
        (value, aux), gradient = jax.value_and_grad(objective, has_aux=True)(trial)

        squared = jnp.sum(gradient**2)
        finite = jnp.isfinite(value) & jnp.isfinite(squared)
        change = state.objective - value
        enough = change >= self.decrease * squared / shift
        rounding = jnp.abs(change) <= 10 * eps * jnp.maximum(1, jnp.abs(state.objective))
        slope = -jnp.dot(gradient, direction)
        halved = squared <= state.squared / 4
        better = halved | ((slope >= squared / (4 * shift)) & (squared < state.squared))
        accepted = solved & finite & (enough | (rounding & better))
        start = ~state.evaluated
        take = accepted | (start & finite)

        grown = jnp.minimum(self.grow * state.radius, self.max_radius)
        radius = jnp.where(accepted, grown, self.shrink * state.radius)
        radius = jnp.where(start, state.radius, radius).astype(dtype)
        # a shorter step would not change the point: nothing smaller is worth a trial
        resolution = eps * jnp.maximum(jnp.linalg.norm(point), jnp.finfo(dtype).tiny / eps)
        stuck = ~take & ~start & (radius < resolution)

        counts = state.counts.add(
            value=1, gradient=1, hessian=state.stale, linear_solve=state.evaluated
        )
        scale = jnp.where(start, jnp.max(jnp.abs(gradient)), state.gradient_scale)
        new = GradNormSmoothState(
            value=unravel(jnp.where(take, trial, point)),
            objective=jnp.where(take, value, state.objective),
            gradient=jnp.where(take, gradient, state.gradient),
            squared=jnp.where(take, squared, state.squared),
            gradient_scale=scale,
            model=model,
            stale=take,
            evaluated=state.evaluated | finite,
            radius=radius,
            aux=tree.where(take, aux, state.aux),
            counts=counts,
        )
        failure = RESULTS.where(stuck, RESULTS.stagnated, RESULTS.successful)
        failure = RESULTS.where(start & ~finite, RESULTS.nonfinite_start, failure)
        info = Info(
            objective=new.objective,
            optimality=jnp.where(
                new.evaluated, jnp.max(jnp.abs(new.gradient)), jnp.array(jnp.nan, dtype)
            ),
            optimality_scale=scale,
            feasibility=jnp.zeros((), dtype),
            step_size=jnp.linalg.norm(direction),
            value_change=jnp.where(start, jnp.inf, change).astype(dtype),
            accepted=take,
            counts=counts,
            failure=failure,
            aux=new.aux,
            extras={"radius": radius, "shift": shift},
        )
        return new, info

    def resume(self, problem, args, state):
        """See `AbstractSolver.resume`: compares f and ∇f with what the state remembers of them.

        If they differ, the next step evaluates the current point again; γ is kept.
        """
        point, unravel = ravel_pytree(state.value)

        def objective(flat):
            return problem.objective(unravel(flat), args)[0].astype(point.dtype)

        value, gradient = jax.value_and_grad(objective)(point)
        rounding = 1e3 * jnp.finfo(point.dtype).eps
        scale = jnp.maximum(state.gradient_scale, jnp.max(jnp.abs(gradient)))
        same = (jnp.abs(value - state.objective) <= rounding * jnp.maximum(1, jnp.abs(value))) & (
            jnp.max(jnp.abs(gradient - state.gradient)) <= rounding * scale
        )
        return eqx.tree_at(
            lambda s: (s.evaluated, s.stale),
            state,
            (state.evaluated & same, state.stale & same),
        )

    def iteration_map(self, problem, args, state, value):
        """X − (H(x) + λI)⁻¹ ∇f(x) with the last λ; its derivative is nearly the exact one."""
        point, unravel = ravel_pytree(value)

        def objective(flat):
            return problem.objective(unravel(flat), args)[0].astype(point.dtype)

        gradient = jax.grad(objective)(point)
        model = self.hessian.build(objective, point)
        shift = jnp.sqrt(state.squared) / state.radius
        direction, _ = self.hessian.direction(model, shift, gradient)
        return unravel(point + direction)
