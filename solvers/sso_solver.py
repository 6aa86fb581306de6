"""The solver `SSO`: majorization-minimization with a surrogate in target space."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxopt_ext.core import check, tree
from jaxopt_ext.core.problem import ComposedMinimization, LeastSquares, Minimization
from jaxopt_ext.core.result import RESULTS
from jaxopt_ext.core.solver import AbstractSolver, Counts, Info
from jaxopt_ext.solvers.sso_inner import GradientSteps, InnerSolver
from jaxopt_ext.solvers.sso_metrics import Euclidean, SurrogateMetric, dot
from jaxopt_ext.solvers.sso_steps import EstimatedSmoothness, Oracle, TargetStep, as_rule
from jaxopt_ext.solvers.sso_surrogate import Comparison, Surrogate

PATIENCE = 100  # accepted steps without any progress after which the method gives up


class Parts(eqx.Module):
    """A problem as the composition of a model and a loss of its target.

    Attributes:
        problem: A `ComposedMinimization`, `LeastSquares` (the loss is ½‖·‖²) or `Minimization` (the
            model is the identity).
    """

    problem: Any

    def model(self, value: PyTree, args: PyTree) -> PyTree:
        """The target."""
        return self.evaluate(value, args)[0]

    def evaluate(self, value: PyTree, args: PyTree) -> tuple[PyTree, PyTree]:
        """The target, and the auxiliary output that comes with it."""
        if isinstance(self.problem, ComposedMinimization):
            return self.problem.model(value, args), None
        if isinstance(self.problem, LeastSquares):
            out = self.problem.residual(value, args)
            return out if self.problem.has_aux else (out, None)
        return value, None

    def loss(self, target: PyTree, args: PyTree, dtype) -> tuple[Float[Array, ""], PyTree]:
        """The loss of a target, and the auxiliary output that comes with it."""
        if isinstance(self.problem, LeastSquares):
            return dot(target, target, dtype) / 2, None
        composed = isinstance(self.problem, ComposedMinimization)
        out = (self.problem.loss if composed else self.problem.fun)(target, args)
        value, aux = out if self.problem.has_aux else (out, None)
        return value.astype(dtype), aux


class Answer(eqx.Module):
    """What the oracle answered at a target.

    Attributes:
        value: ℓ.
        gradient: ∇ℓ, like the target.
        aux: Auxiliary output.
    """

    value: Float[Array, ""]
    gradient: PyTree
    aux: PyTree = None


class SSOState(eqx.Module):
    """State of `SSO`.

    Attributes:
        value: The last accepted point θ.
        objective: ℓ there.
        aux: Auxiliary output there.
        target: z = m(θ).
        target_gradient: ∇ℓ(z).
        gradient: Jᵀ∇ℓ, the gradient in θ.
        optimality: Its max norm.
        optimality_scale: The same at the start.
        least_optimality: The least so far.
        trial: Where the oracle is asked next.
        eta: Target step size of the surrogate that `trial` came from.
        weights: What the metric of that surrogate has frozen.
        metric: What the metric remembers.
        inner: What the inner solver remembers.
        evaluated: Whether `value` has been evaluated (not before the first step).
        idle: Accepted steps in a row without any progress.
        model_evaluations: Evaluations of the model so far; a product with its Jacobian counts as
            one.
        surrogate_gradients: Gradients of surrogates so far.
        counts: Other evaluations so far: `oracle` for values and gradients of the loss, `value`
            for values alone, `linear_solve`.
    """

    value: PyTree
    objective: Float[Array, ""]
    aux: PyTree
    target: PyTree
    target_gradient: PyTree
    gradient: PyTree
    optimality: Float[Array, ""]
    optimality_scale: Float[Array, ""]
    least_optimality: Float[Array, ""]
    trial: PyTree
    eta: Float[Array, ""]
    weights: PyTree
    metric: PyTree
    inner: PyTree
    evaluated: Bool[Array, ""]
    idle: Int[Array, ""]
    model_evaluations: Int[Array, ""]
    surrogate_gradients: Int[Array, ""]
    counts: Counts


class Surrogates(AbstractSolver):
    """Base of `SSO` and `StochasticSSO`: their common settings."""

    step_size: TargetStep = eqx.field(default=EstimatedSmoothness(), converter=as_rule)
    inner: InnerSolver = GradientSteps()
    metric: SurrogateMetric = Euclidean()
    safeguard: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        name = type(self).__name__
        kinds = {"step_size": TargetStep, "inner": InnerSolver, "metric": SurrogateMetric}
        examples = {
            "step_size": "a number or a rule such as sso.Smoothness(1.0)",
            "inner": "an inner solver such as sso.GradientSteps(10)",
            "metric": "a metric of targets such as sso.Euclidean()",
        }
        for setting, kind in kinds.items():
            if not isinstance(getattr(self, setting), kind):
                raise TypeError(
                    f"{name}: {setting} is a {type(getattr(self, setting)).__name__}, expected "
                    f"{examples[setting]}"
                )
        if not isinstance(self.safeguard, bool):
            raise TypeError(
                f"{name}: safeguard is a {type(self.safeguard).__name__}, expected True or False"
            )
        if self.step_size.needs_safeguard and not self.safeguard:
            raise ValueError(
                f"{name}: safeguard is False, expected True with "
                f"{type(self.step_size).__name__}, which begins with a step size that is too "
                "large; give a number or Smoothness(...)"
            )

    def ask(self, problem: ComposedMinimization, args: PyTree, state: Any) -> PyTree:
        """The target at which the next step wants the loss and its gradient.

        With `tell` it replaces `step` where the oracle is not a JAX function: a simulator, an
        expert. The loss of the problem is not called.

        Args:
            problem: The problem, of which only the model is used.
            args: Passed to the model.
            state: From `init` or the last `tell`.

        Returns:
            The target.
        """
        return Parts(problem).model(state.trial, args)

    def tell(
        self,
        problem: ComposedMinimization,
        args: PyTree,
        state: Any,
        value: Any,
        gradient: PyTree,
        **more: Any,
    ) -> tuple[Any, Info]:
        """One step, given what the oracle answered at the target of `ask`.

        Args:
            problem: The problem, of which only the model is used.
            args: Passed to the model; the same as in `ask`.
            state: The state that `ask` was given.
            value: The loss at that target.
            gradient: Its gradient there, like the target.
            **more: Further arguments of `step`.

        Returns:
            The next state and what the step reports.

        Raises:
            ValueError: `gradient` does not fit the target, or a setting evaluates the loss itself.
        """
        name = type(self).__name__
        for setting in ("step_size", "metric"):
            if getattr(self, setting).uses_loss:
                raise ValueError(
                    f"{name}.tell: {setting} is {type(getattr(self, setting)).__name__}, which "
                    "evaluates the loss itself, expected one that does not"
                )
        target, pull, _ = self._linearize(problem, args, state)
        gradient = jax.tree.map(jnp.asarray, gradient)
        if jax.tree.map(jnp.shape, gradient) != jax.tree.map(jnp.shape, target):
            raise ValueError(
                f"{name}.tell: gradient is {tree.describe(gradient)}, expected a PyTree like the "
                f"target, {tree.describe(target)}"
            )
        gradient = jax.tree.map(lambda g, z: g.astype(z.dtype), gradient, target)
        answer = Answer(jnp.asarray(value, state.objective.dtype), gradient)
        return self._advance(problem, args, state, target, pull, answer, None, **more)

    def _linearize(self, problem, args, state):
        """The target at the trial, the map from its cotangents to the variables', and aux."""

        def evaluate(point):
            return Parts(problem).evaluate(point, args)

        target, pull, aux = jax.vjp(evaluate, state.trial, has_aux=True)
        return target, lambda cotangent: pull(cotangent)[0], aux

    @abc.abstractmethod
    def _advance(self, problem, args, state, target, pull, answer, loss) -> Any:
        """The next state and its info, from the oracle's answer at the trial."""

    def _aux(self, problem, value, args):
        """Zeros like the auxiliary output; without one the loss is not even traced."""
        if not problem.has_aux:
            return None
        _, aux = jax.eval_shape(lambda value: problem.objective(value, args), value)
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), aux)


class SSO(Surrogates):
    """Surrogate optimization in target space, for losses whose gradient is expensive.

    min ℓ(m(θ)) with an expensive loss ℓ and a cheap model m. Around z = m(θₜ) the loss is replaced
    by g(ω) = ℓ(z) + ⟨∇ℓ(z), m(ω) − z⟩ + D(m(ω), z)/η, which an inner solver reduces without asking
    the oracle again. With η ≤ 1/L, L the smoothness of ℓ in z, g is an upper bound of the objective
    for any model, so the objective decreases, and min ‖∇‖² = O(1/T) after T oracle calls.

    One step is one oracle call (ℓ and ∇ℓ at the trial). The safeguard compares ℓ at the trial with
    g: if it is above, the trial is rejected and the surrogate made again with a smaller η.

    For `LeastSquares` the loss is ½‖·‖² of the residual; for `Minimization` the model is the
    identity, and the method one of gradient descent.

    Args:
        step_size: η: a number, `sso.Smoothness(L)`, `sso.EstimatedSmoothness()` or
            `sso.TargetArmijo()`.
        inner: The inner solver: `sso.GradientSteps`, `sso.OptaxSteps`, `sso.Subsolver` or
            `sso.ExactLeastSquares`.
        metric: D, e.g. `sso.Euclidean()`, `sso.DiagonalHessian()`, `sso.LogSumExp()`.
        safeguard: Whether a trial at which the loss exceeds the surrogate is rejected.
        rtol: Tolerance relative to the optimality residual at the start; `None` means eps.
        atol: Tolerance on the max norm of the optimality residual; `None` means eps^(2/3).

    Raises:
        TypeError: An unknown setting, or one of the wrong kind.
        ValueError: A setting outside its range.

    Reference:
        Lavington, Vaswani, Babanezhad, Schmidt, Le Roux, "Target-based surrogates for stochastic
        optimization", ICML 2023, arXiv 2302.02607.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> from jaxopt_ext.solvers import sso
        >>> def loss(z, data):  # logistic, mean over the samples
        ...     return jnp.mean(jnp.logaddexp(0.0, z) - data["y"] * z)
        >>> data = {
        ...     "X": jnp.array([[1.0, 2.0], [1.0, -1.0], [1.0, 0.5], [1.0, 1.0]]),
        ...     "y": jnp.array([1.0, 0.0, 1.0, 0.0]),
        ... }
        >>> problem = jx.ComposedMinimization(loss, lambda theta, data: data["X"] @ theta)
        >>> solver = solvers.SSO(sso.Smoothness(0.25), sso.GradientSteps(50), atol=1e-4)
        >>> solution = jx.solve(problem, solver, jnp.zeros(2), data)
        >>> print(bool(solution.success), [f"{x:.1f}" for x in solution.value])
        True ['-1.0', '1.5']
    """

    accepts: ClassVar = (ComposedMinimization, LeastSquares, Minimization)

    def init(self, problem, value, args, key=None):
        """See `AbstractSolver.init`; the loss is not evaluated."""
        dtype = tree.dtype_of(value)
        target = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(Parts(problem).model, value, args)
        )
        metric = self.metric.init(target)
        zero, count = jnp.zeros((), dtype), jnp.zeros((), jnp.int32)

        def loss(target):
            return Parts(problem).loss(target, args, dtype)[0]

        weights = jax.eval_shape(
            lambda metric: self.metric.weights(metric, target, None, loss), metric
        )
        return SSOState(
            value=value,
            objective=jnp.array(jnp.inf, dtype),
            aux=self._aux(problem, value, args),
            target=target,
            target_gradient=target,
            gradient=jax.tree.map(jnp.zeros_like, value),
            optimality=jnp.array(jnp.inf, dtype),
            optimality_scale=zero,
            least_optimality=jnp.array(jnp.inf, dtype),
            trial=value,
            eta=jnp.ones((), dtype),
            weights=jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), weights),
            metric=metric,
            inner=self.inner.init(value),
            evaluated=jnp.array(False),
            idle=count,
            model_evaluations=count,
            surrogate_gradients=count,
            counts=Counts.zero(),
        )

    def step(self, problem, args, state):
        """See `AbstractSolver.step`: one oracle call, then the next trial."""
        dtype, parts = state.objective.dtype, Parts(problem)

        def loss(target):
            return parts.loss(target, args, dtype)

        target, pull, aux = self._linearize(problem, args, state)
        (value, own), gradient = jax.value_and_grad(loss, has_aux=True)(target)
        answer = Answer(value, gradient, aux if own is None else own)
        return self._advance(
            problem, args, state, target, pull, answer, lambda target: loss(target)[0]
        )

    def _advance(self, problem, args, state, target, pull, answer, loss):
        gradient = pull(answer.gradient)
        finite = jnp.isfinite(answer.value) & tree.all_finite((answer.gradient, gradient))
        verdict, change = self._compare(problem, args, state, target, answer)
        start_here = ~state.evaluated
        take = finite & (start_here | verdict.majorized | (not self.safeguard))
        optimality = tree.max_norm(gradient).astype(state.optimality.dtype)
        progress = (change > verdict.noise) | (optimality < state.least_optimality)
        accepted = eqx.tree_at(
            lambda s: (
                *(s.value, s.objective, s.aux, s.target, s.target_gradient, s.gradient),
                *(s.optimality, s.least_optimality, s.idle),
            ),
            state,
            (
                *(state.trial, answer.value, answer.aux, target, answer.gradient, gradient),
                *(optimality, jnp.minimum(optimality, state.least_optimality)),
                jnp.where(progress, 0, state.idle + 1).astype(jnp.int32),
            ),
            is_leaf=lambda leaf: leaf is None,
        )
        new = tree.where(take, accepted, state)
        new = self._prepared(state, new, answer, take, verdict, change, loss)
        new = self._next_trial(problem, args, new)
        scale = jnp.where(start_here & finite, optimality, state.optimality_scale)
        new = eqx.tree_at(
            lambda s: (s.optimality_scale, s.evaluated),
            new,
            (scale, state.evaluated | finite),
        )
        return new, self._info(state, new, take, finite, change)

    def _compare(self, problem, args, state, target, answer) -> tuple[Comparison, Array]:
        """Compare the answer with what the surrogate said; and the decrease of the loss."""
        sizes = jnp.maximum(jnp.abs(answer.value), jnp.abs(state.objective))
        rise = answer.value - state.objective
        size = jnp.where(state.evaluated, sizes, 0)
        return self._surrogate(problem, args, state).compare(target, rise, size), -rise

    def _surrogate(self, problem, args, state):
        parts = (state.target, state.target_gradient, self.metric, state.weights, state.eta)
        return Surrogate(Parts(problem).model, args, *parts)

    def _prepared(self, state, new, answer, take, verdict, change, loss):
        """η and the metric for the next surrogate."""
        informative = jnp.abs(change) > verdict.noise
        oracle = Oracle(
            *(new.objective, new.target, new.target_gradient, state.eta),
            *(~state.evaluated, take, informative, loss),
        )
        eta, values = self.step_size(oracle)
        eta = jnp.where(take, eta, jnp.where(state.evaluated, verdict.smaller, state.eta))

        def renewed():
            memory = self.metric.remember(state.metric, answer.gradient, None)
            return memory, self.metric.weights(memory, new.target, None, loss)

        memory, weights = jax.lax.cond(take, renewed, lambda: (state.metric, state.weights))
        products = jnp.where(take, self.metric.products(new.target), 0)
        counts = state.counts.add(oracle=1, value=values, hvp=products)
        return eqx.tree_at(
            lambda s: (s.eta, s.metric, s.weights, s.counts),
            new,
            (eta, memory, weights, counts),
            is_leaf=lambda leaf: leaf is None,
        )

    def _next_trial(self, problem, args, state) -> SSOState:
        surrogate = self._surrogate(problem, args, state)
        run = self.inner.run(surrogate, state.value, state.gradient, state.inner)
        return eqx.tree_at(
            lambda s: (s.trial, s.inner, s.counts, s.model_evaluations, s.surrogate_gradients),
            state,
            (
                run.value,
                run.memory,
                state.counts.add(linear_solve=run.linear_solves),
                state.model_evaluations + run.models + 1,
                state.surrogate_gradients + run.gradients,
            ),
            is_leaf=lambda leaf: leaf is None,
        )

    def _info(self, old, new, take, finite, change):
        first = ~old.evaluated
        # a trial that is the point itself: the steps are below the resolution of the variables
        stuck = tree.max_norm(jax.tree.map(jnp.subtract, new.trial, new.value)) == 0
        stuck |= new.idle >= PATIENCE
        broken = RESULTS.where(finite, RESULTS.stagnated, RESULTS.nonfinite_step)
        failure = RESULTS.where(stuck & ~first, broken, RESULTS.successful)
        failure = RESULTS.where(first & ~finite, RESULTS.nonfinite_start, failure)
        moved = jax.tree.map(jnp.subtract, old.trial, old.value)
        return Info(
            objective=new.objective,
            optimality=new.optimality,
            optimality_scale=new.optimality_scale,
            feasibility=jnp.zeros_like(new.objective),
            step_size=optax.tree.norm(moved).astype(new.objective.dtype),
            value_change=jnp.where(first, jnp.inf, change).astype(new.objective.dtype),
            accepted=take,
            counts=new.counts,
            failure=failure,
            aux=new.aux,
            extras={
                "eta": new.eta,
                "model_evaluations": new.model_evaluations,
                "surrogate_gradients": new.surrogate_gradients,
            },
        )

    def resume(self, problem, args, state):
        """See `AbstractSolver.resume`: asks the oracle at the current point.

        If value or gradients differ from those of the state, the next step evaluates the point
        again and makes its surrogate anew; η stays.
        """
        dtype, parts = state.objective.dtype, Parts(problem)
        target, pull = jax.vjp(lambda point: parts.model(point, args), state.value)
        value, gradient = jax.value_and_grad(lambda z: parts.loss(z, args, dtype)[0])(target)
        rounding = 1e3 * float(jnp.finfo(dtype).eps)

        def close(new, old):
            size = jnp.maximum(tree.max_norm(new), tree.max_norm(old))
            apart = tree.max_norm(jax.tree.map(jnp.subtract, new, old))
            return apart <= rounding * jnp.maximum(1, size)

        same = jnp.abs(value - state.objective) <= rounding * jnp.maximum(1, jnp.abs(value))
        same &= close(target, state.target) & close(gradient, state.target_gradient)
        same &= close(pull(gradient)[0], state.gradient) | ~state.evaluated
        return eqx.tree_at(
            lambda s: (s.evaluated, s.trial, s.least_optimality),
            state,
            (
                state.evaluated & same,
                tree.where(same | ~state.evaluated, state.trial, state.value),
                jnp.where(same, state.least_optimality, jnp.inf).astype(dtype),
            ),
        )


def from_oracle(oracle: Callable[..., tuple[Any, PyTree]]) -> Callable[..., Array]:
    """The loss of which `oracle` returns value and gradient.

    Args:
        oracle: (target, args) → (value, gradient), the gradient like the target. Second
            derivatives, as in the derivative of a solution, exist where JAX can differentiate it.

    Returns:
        A function (target, args) → value for `ComposedMinimization`; each evaluation with its
        gradient calls the oracle once.

    Raises:
        TypeError: `oracle` is not a function.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxopt_ext.solvers import sso
        >>> loss = sso.from_oracle(lambda z, args: (jnp.sum(z**2), 2 * z))
        >>> print(jax.grad(loss)(jnp.array([1.0, 2.0]), None))
        [2. 4.]
    """
    check.function("from_oracle", "oracle", oracle)

    @jax.custom_jvp
    def loss(target, args):
        return jnp.asarray(oracle(target, args)[0])

    def rule(primals, tangents):
        (target, args), (along_target, along_args) = primals, tangents
        fixed = all(isinstance(t, SymbolicZero) for t in jax.tree.leaves(along_args))
        along = 0.0
        if fixed:
            value, gradient = oracle(target, args)
        else:
            along_args = jax.tree.map(_instantiate, along_args)
            (value, gradient), (along, _) = jax.jvp(
                lambda args: oracle(target, args), (args,), (along_args,)
            )
        value = jnp.asarray(value)
        along_target = jax.tree.map(_instantiate, along_target)
        return value, dot(gradient, along_target, value.dtype) + along

    loss.defjvp(rule, symbolic_zeros=True)
    return loss


def _instantiate(tangent: Any) -> Any:
    if not isinstance(tangent, SymbolicZero):
        return tangent
    aval: Any = tangent.aval
    shape, dtype = aval.shape, aval.dtype
    return np.zeros(shape, dtype) if dtype == jax.dtypes.float0 else jnp.zeros(shape, dtype)
