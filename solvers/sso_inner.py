"""How the surrogate is minimized: gradient steps, optax, another of our solvers, exactly."""

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Int, PyTree

from jaxopt_ext.core import check, tree
from jaxopt_ext.core.problem import ComposedMinimization
from jaxopt_ext.core.solver import AbstractSolver, Number
from jaxopt_ext.solvers.sso_metrics import dot
from jaxopt_ext.solvers.sso_surrogate import Surrogate

# of the search of `GradientSteps`
DECREASE, SHRINK, GROW = 0.5, 0.5, 1.5
TRIALS = 64  # trials beyond the steps themselves, before a search is given up


class Inner(NamedTuple):
    """What an inner solver returns.

    Attributes:
        value: Where it ended.
        memory: For its next run.
        models: Evaluations of the model; a product with its Jacobian counts as one.
        gradients: Gradients of the surrogate, each of them with an evaluation of the model.
        linear_solves: Linear systems solved.
    """

    value: PyTree
    memory: PyTree
    models: Int[Array, ""]
    gradients: Int[Array, ""]
    linear_solves: Int[Array, ""]


def _result(value, memory, models: Any, gradients: Any = 0, linear_solves: Any = 0) -> Inner:
    counts = (jnp.asarray(n, jnp.int32) for n in (models, gradients, linear_solves))
    return Inner(value, memory, *counts)


class InnerSolver(eqx.Module):
    """Base of the inner solvers. None of them asks the oracle."""

    def init(self, value: PyTree) -> PyTree:
        """What is remembered from one surrogate to the next, a PyTree of arrays."""
        return None

    @abc.abstractmethod
    def run(self, surrogate: Surrogate, value: PyTree, gradient: PyTree, memory: PyTree) -> Inner:
        """Reduce the surrogate.

        Args:
            surrogate: What to minimize; 0 at `value`.
            value: The point at which it was made.
            gradient: Its gradient there.
            memory: From `init` or the last run.

        Returns:
            The end point and what it took.
        """


def _moved(value, direction, factor):
    return jax.tree.map(lambda y, d: y - factor.astype(y.dtype) * d, value, direction)


class Descent(NamedTuple):
    """What the loop of `GradientSteps` carries."""

    value: PyTree
    objective: Array
    gradient: PyTree
    squared: Array
    alpha: Array
    good: Array  # the last α that was accepted
    steps: Array
    trials: Array


class GradientSteps(InnerSolver):
    """Gradient descent on the surrogate, ω ← ω − α∇g(ω).

    Args:
        steps: m, steps for each surrogate, at least 1; give an array to change it without
            recompiling.
        step_size: α: "armijo", a search that remembers its last α; "lipschitz", 1/β with
            β the largest eigenvalue of Jᵀ∇²D J/η, found by power iteration (for a linear model
            this is the smoothness of the surrogate); or a number, then m = 1 is gradient descent.
            The first two never increase the surrogate.
        tolerance: Stop where ‖∇g‖ is at most this times ‖∇g‖ at the start.

    Raises:
        TypeError: A setting of the wrong type.
        ValueError: A setting outside its range.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> from jaxopt_ext.solvers import sso
        >>> problem = jx.ComposedMinimization(
        ...     loss=lambda z, args: jnp.sum(jnp.cosh(z - 1.0)), model=lambda y, args: args @ y
        ... )
        >>> X = jnp.array([[1.0, 0.5], [0.5, 2.0]])
        >>> solver = solvers.SSO(inner=sso.GradientSteps(20, "lipschitz"), atol=1e-3)
        >>> print([f"{x:.2f}" for x in jx.solve(problem, solver, jnp.zeros(2), X).check().value])
        ['0.86', '0.29']
    """

    steps: int | Array = 10
    step_size: str | Number = "armijo"
    tolerance: Number = 1e-6

    def __check_init__(self):
        if not eqx.is_array(self.steps):
            check.count("GradientSteps", "steps", self.steps)
        check.number("GradientSteps", "tolerance", self.tolerance, at_least=0)
        if isinstance(self.step_size, str):
            if self.step_size not in ("armijo", "lipschitz"):
                raise ValueError(
                    f"GradientSteps: step_size is {self.step_size!r}, expected 'armijo', "
                    "'lipschitz' or a number"
                )
        else:
            check.number("GradientSteps", "step_size", self.step_size, above=0)

    def init(self, value):
        """See `InnerSolver`: the last α, or the last eigenvector."""
        flat = ravel_pytree(value)[0]
        if isinstance(self.step_size, str) and self.step_size == "lipschitz":
            # any vector that is not orthogonal to the eigenvector
            return jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)
        return jnp.ones((), flat.dtype)

    def run(self, surrogate, value, gradient, memory):
        """See `InnerSolver`."""
        dtype = surrogate.eta.dtype
        products = jnp.zeros((), jnp.int32)
        if not isinstance(self.step_size, str):
            alpha = jnp.asarray(self.step_size, dtype)
        elif self.step_size == "armijo":
            alpha = memory.astype(dtype)
        else:
            unravel = ravel_pytree(value)[1]
            curve = surrogate.curvature(value)
            largest, memory, products = _largest_eigenvalue(
                lambda v: ravel_pytree(curve(unravel(v)))[0], memory
            )
            alpha = jnp.where(largest > 0, 1 / jnp.where(largest > 0, largest, 1), 1)
        end = self._descend(surrogate, value, gradient, alpha.astype(dtype))
        if isinstance(self.step_size, str) and self.step_size == "armijo":
            memory = jnp.where(end.steps > 0, end.good, end.alpha).astype(memory.dtype)
        return _result(end.value, memory, end.trials + 2 * products, end.trials)

    def _descend(self, surrogate, value, gradient, alpha) -> Descent:
        """One evaluation of the surrogate per round: a step, or a trial that was not accepted."""
        dtype, zero = alpha.dtype, jnp.zeros((), jnp.int32)
        noise, limit = surrogate.noise, jnp.asarray(self.steps, jnp.int32)
        searched = isinstance(self.step_size, str)
        armijo = searched and self.step_size == "armijo"
        start = dot(gradient, gradient, dtype)
        enough = (self.tolerance**2 * start).astype(dtype)

        def going(now: Descent):
            far = (now.squared > enough) & (now.squared > 0)
            return far & (now.steps < limit) & (now.trials < limit + TRIALS)

        def body(now: Descent):
            trial = _moved(now.value, now.gradient, now.alpha)
            objective, slope = surrogate.value_and_grad(trial)
            squared = dot(slope, slope, dtype)
            accepted = jnp.isfinite(objective) & jnp.isfinite(squared)
            if searched:
                wanted = now.alpha * now.squared * (DECREASE if armijo else 0)
                change = now.objective - objective
                # below the rounding error the gradients know more (all, for a linear model)
                slopes = now.alpha * (now.squared + dot(slope, now.gradient, dtype)) / 2
                accepted &= jnp.where(jnp.abs(change) <= noise, slopes, change) >= wanted
            alpha = (now.alpha * GROW if armijo else now.alpha).astype(dtype)
            steps = now.steps + 1
            step = Descent(trial, objective, slope, squared, alpha, alpha, steps, now.trials)
            retry = now._replace(alpha=(now.alpha * SHRINK).astype(dtype))
            return tree.where(accepted, step, retry)._replace(trials=now.trials + 1)

        none = jnp.zeros((), dtype)
        first = Descent(value, none, gradient, start, alpha, alpha, zero, zero)
        return jax.lax.while_loop(going, body, first)


def _largest_eigenvalue(product, vector):
    """By power iteration from `vector`: an upper estimate, the vector, and the products used."""

    def going(carry):
        _, _, change, products = carry
        return (change > 1e-3) & (products < 100)

    def body(carry):
        vector, old, _, products = carry
        norm = jnp.linalg.norm(vector)
        unit = vector / jnp.where(norm > 0, norm, 1)
        new = product(unit)
        size = jnp.linalg.norm(new)
        change = jnp.where(size > 0, jnp.abs(size - old) / jnp.where(size > 0, size, 1), 0)
        # the components that a start orthogonal to the eigenvector lacks come from rounding
        return jnp.where(size > 0, new, unit), size, change.astype(size.dtype), products + 1

    zero, inf = jnp.zeros((), vector.dtype), jnp.array(jnp.inf, vector.dtype)
    carry = (vector, zero, inf, jnp.zeros((), jnp.int32))
    vector, size, _, products = jax.lax.while_loop(going, body, carry)
    return 1.02 * size, vector / jnp.where(size > 0, size, 1), products


class OptaxSteps(InnerSolver):
    """Steps of an optax optimizer on the surrogate, from a fresh state each time.

    The best point is kept, so the surrogate never increases.

    Args:
        optimizer: An `optax.GradientTransformation`, e.g. `optax.adam(1e-2)` or `optax.lbfgs()`.
        steps: m, at least 1; give an array to change it without recompiling.
        tolerance: Stop where ‖∇g‖ is at most this times ‖∇g‖ at the start.

    Raises:
        TypeError: `optimizer` is not one of optax.
        ValueError: A setting outside its range.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> from jaxopt_ext.solvers import sso
        >>> problem = jx.ComposedMinimization(
        ...     loss=lambda z, args: jnp.sum((z - 1.0) ** 2), model=lambda y, args: args @ y
        ... )
        >>> X = jnp.array([[1.0, 0.5], [0.5, 2.0]])
        >>> solver = solvers.SSO(0.5, sso.OptaxSteps(optax.lbfgs(), 20), atol=1e-3)
        >>> print([f"{x:.2f}" for x in jx.solve(problem, solver, jnp.zeros(2), X).check().value])
        ['0.86', '0.29']
    """

    optimizer: Any
    steps: int | Array = 10
    tolerance: Number = 1e-6

    def __check_init__(self):
        if not isinstance(self.optimizer, optax.GradientTransformation):
            raise TypeError(
                f"OptaxSteps: optimizer is a {type(self.optimizer).__name__}, expected an "
                "optimizer of optax such as optax.adam(1e-2)"
            )
        if not eqx.is_array(self.steps):
            check.count("OptaxSteps", "steps", self.steps)
        check.number("OptaxSteps", "tolerance", self.tolerance, at_least=0)

    def run(self, surrogate, value, gradient, memory):
        """See `InnerSolver`."""
        optimizer = optax.with_extra_args_support(self.optimizer)
        dtype, zero = surrogate.eta.dtype, jnp.zeros((), jnp.int32)
        start = dot(gradient, gradient, dtype)
        enough = (self.tolerance**2 * start).astype(dtype)
        noise, limit = surrogate.noise, jnp.asarray(self.steps, jnp.int32)

        def objective(point):
            return surrogate.at(surrogate.model(point, surrogate.args))

        def going(carry):
            *_, squared, steps, _ = carry
            return (squared > enough) & (squared > 0) & (steps < limit)

        def body(carry):
            point, now, slope, state, best, squared, steps, trials = carry
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                update, state = optimizer.update(
                    slope, state, point, value=now, grad=slope, value_fn=objective
                )
            update = jax.tree.map(lambda u, y: u.astype(y.dtype), update, point)
            # a line search of optax evaluates the surrogate too, and says how often
            found = optax.tree.get_all_with_path(state, "num_linesearch_steps")
            trials += sum((number.astype(zero.dtype) for _, number in found), zero)
            point = optax.apply_updates(point, update)
            now, slope = surrogate.value_and_grad(point)
            squared = dot(slope, slope, dtype)
            _, least, flattest = best
            drowned = (now <= least + noise) & (squared <= flattest)
            best = tree.where((now < least - noise) | drowned, (point, now, squared), best)
            squared = jnp.where(jnp.isfinite(squared), squared, 0)  # ends the loop
            return point, now, slope, state, best, squared, steps + 1, trials

        none = jnp.zeros((), dtype)
        best = (value, none, start)
        carry = (value, none, gradient, optimizer.init(value), best, start, zero, zero)
        *_, (best, _, _), _, steps, trials = jax.lax.while_loop(going, body, carry)
        return _result(best, memory, steps + trials, steps)


class _SurrogateLoss(eqx.Module):
    """The surrogate as the loss of a `ComposedMinimization`."""

    surrogate: Surrogate

    def __call__(self, target, args):
        return self.surrogate.at(target)


class Subsolver(InnerSolver):
    """Another solver of ours on the surrogate, e.g. `GradNormSmooth(GaussNewton())`.

    In a quadratic metric the surrogate is the least-squares distance of the model to the
    pseudo-labels z − ηG/w, and Gauss–Newton has the exact Hessian of a linear model.

    Args:
        solver: A solver without random key that accepts `ComposedMinimization`. It stops by its
            own tolerances.
        max_steps: Steps of the solver at most, for each surrogate; at least 2, as the first
            evaluates the start.

    Raises:
        TypeError: `solver` is not a solver, or does not accept `ComposedMinimization`.
        ValueError: `solver` needs a key, or `max_steps` is less than 2.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> from jaxopt_ext.solvers import sso
        >>> problem = jx.ComposedMinimization(
        ...     loss=lambda z, args: jnp.sum((z - 1.0) ** 2), model=lambda y, args: args @ y
        ... )
        >>> X = jnp.array([[1.0, 0.5], [0.5, 2.0]])
        >>> newton = solvers.GradNormSmooth(solvers.GaussNewton())
        >>> solver = solvers.SSO(0.5, sso.Subsolver(newton), atol=1e-3)
        >>> print([f"{x:.2f}" for x in jx.solve(problem, solver, jnp.zeros(2), X).check().value])
        ['0.86', '0.29']
    """

    solver: AbstractSolver
    max_steps: int | Array = 20

    def __check_init__(self):
        if not isinstance(self.solver, AbstractSolver):
            raise TypeError(
                f"Subsolver: solver is a {type(self.solver).__name__}, expected a solver such as "
                "solvers.GradNormSmooth(solvers.GaussNewton())"
            )
        if not issubclass(ComposedMinimization, self.solver.accepts):
            raise TypeError(
                f"Subsolver: solver is {type(self.solver).__name__}, expected one that accepts "
                "ComposedMinimization"
            )
        if self.solver.needs_key:
            raise ValueError(
                f"Subsolver: solver is {type(self.solver).__name__}, expected a solver that needs "
                "no random key"
            )
        if not eqx.is_array(self.max_steps):
            check.count("Subsolver", "max_steps", self.max_steps, at_least=2)

    def run(self, surrogate, value, gradient, memory):
        """See `InnerSolver`."""
        args = surrogate.args
        problem = ComposedMinimization(_SurrogateLoss(surrogate), surrogate.model)
        state = self.solver.init(problem, value, args)
        _, shape = jax.eval_shape(lambda s: self._step(problem, args, s), state)
        info = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)

        def going(carry):
            _, _, done, steps = carry
            return ~done & (steps < jnp.asarray(self.max_steps, jnp.int32))

        def body(carry):
            state, _, _, steps = carry
            state, info = self._step(problem, args, state)
            done, _ = self.solver.stop(problem, args, state, info)
            return state, info, done, steps + 1

        carry = (state, info, jnp.array(False), jnp.zeros((), jnp.int32))
        state, info, *_ = jax.lax.while_loop(going, body, carry)
        better = info.objective <= surrogate.noise  # False for NaN
        best = tree.where(better, state.value, value)
        counts = info.counts
        # a dense Jacobian by its shorter side, a product of a Gauss-Newton matrix by two of it
        targets = sum(leaf.size for leaf in jax.tree.leaves(surrogate.target))
        dense = min(targets, sum(leaf.size for leaf in jax.tree.leaves(value)))
        models = counts.value + dense * counts.hessian + 2 * counts.hvp
        return _result(best, memory, models, counts.gradient, counts.linear_solve)

    @eqx.filter_jit
    def _step(self, problem, args, state):
        """Under `jit`, so that its type and the loop share one trace."""
        return self.solver.step(problem, args, state)


class ExactLeastSquares(InnerSolver):
    """The minimizer of the surrogate of a linear model, by a singular value decomposition.

    ω = θ − η (Jᵀ W J)⁺ ∇h(θ), with W the weights of a quadratic metric: the least-squares fit of
    the pseudo-labels, of minimal norm. For a model that is not linear it is one Gauss–Newton step.
    J is formed as a dense matrix, of all targets times all variables.

    Args:
        cutoff: Singular values below this times the largest count as zero; `None` means eps times
            the larger side of the matrix.

    Raises:
        ValueError: `cutoff` is negative; from `solve` if the metric is not quadratic.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> from jaxopt_ext.solvers import sso
        >>> problem = jx.ComposedMinimization(
        ...     loss=lambda z, args: jnp.sum((z - 1.0) ** 2) / 2, model=lambda y, args: args @ y
        ... )
        >>> X = jnp.array([[1.0, 0.5], [0.5, 2.0]])
        >>> found = jx.solve(problem, solvers.SSO(1.0, sso.ExactLeastSquares()), jnp.zeros(2), X)
        >>> print([f"{x:.2f}" for x in found.value], found.stats.counts.oracle)
        ['0.86', '0.29'] 2
    """

    cutoff: Number | None = None

    def __check_init__(self):
        if self.cutoff is not None:
            check.number("ExactLeastSquares", "cutoff", self.cutoff, at_least=0)

    def run(self, surrogate, value, gradient, memory):
        """See `InnerSolver`."""
        if not surrogate.metric.quadratic:
            raise ValueError(
                f"ExactLeastSquares: metric is {type(surrogate.metric).__name__}, expected a "
                "quadratic one such as Euclidean()"
            )
        flat, unravel = ravel_pytree(value)
        roots = jax.tree.map(
            lambda w, z: jnp.broadcast_to(jnp.sqrt(w), z.shape), surrogate.weights, surrogate.target
        )

        def weighted(point):
            target = surrogate.model(unravel(point), surrogate.args)
            return ravel_pytree(jax.tree.map(jnp.multiply, roots, target))[0].astype(flat.dtype)

        wide = jax.eval_shape(weighted, flat).size < flat.size
        matrix = (jax.jacrev if wide else jax.jacfwd)(weighted)(flat)
        _, sizes, rows = jnp.linalg.svd(matrix, full_matrices=False)
        relative = self.cutoff
        if relative is None:
            relative = float(jnp.finfo(flat.dtype).eps) * max(matrix.shape)
        used = sizes > relative * jnp.max(sizes)
        inverse = jnp.where(used, 1 / jnp.where(used, sizes, 1), 0)
        direction = rows.T @ (inverse**2 * (rows @ ravel_pytree(gradient)[0]))
        moved = unravel(flat - surrogate.eta.astype(flat.dtype) * direction)
        moved = tree.where(tree.all_finite(moved), moved, value)
        products = min(flat.size, matrix.shape[0])
        return _result(moved, memory, products, 0, 1)
