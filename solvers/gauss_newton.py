"""Gauss–Newton and Fisher models, from the structure of least squares and composed problems."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from jaxopt_ext.core import check, tree
from jaxopt_ext.core.problem import ComposedMinimization, LeastSquares
from jaxopt_ext.solvers.hessian_models import LocalProblem, OperatorModel


class GaussNewton(OperatorModel):
    """H = Jᵀ W J: Gauss–Newton, and its generalization to losses of a model's output.

    For `LeastSquares`, J is the Jacobian of the residual and W = I. For `ComposedMinimization`, J
    is the Jacobian of the model and W = ∇²ℓ the Hessian of the loss at the target. If the loss is
    a negative log-likelihood in its natural parameters (squares, logistic, softmax, Poisson), H is
    the true Fisher information; for ℓ(u) = ‖u‖ᵖ/p it is ‖u‖^(p−2) JᵀJ plus a term of rank one.

    It is positive semidefinite for convex ℓ, and exact where the model is linear. With `Direct()`
    and a target of m < n numbers, a trial costs O(n m).

    Args:
        weights: For `ComposedMinimization`, another W: a function `(target, args)` to nonnegative
            weights like the target, W = diag(weights). For log Σ exp with weights softmax(target)
            it is weighted Gauss–Newton, which leaves out the term −∇ℓ ∇ℓᵀ.
        linear_solver: `Direct()`, `Eigendecomposition()` or `ConjugateGradient()`.

    Raises:
        TypeError: A setting is of the wrong kind, or (from `solve`) the problem is neither
            `LeastSquares` nor `ComposedMinimization`.

    Reference:
        Schraudolph, "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent",
        Neural Computation 14 (2002).

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> t = jnp.arange(5.0)
        >>> decay = jx.LeastSquares(lambda y, args: y[0] * jnp.exp(-y[1] * t) - args)
        >>> data = 2.0 * jnp.exp(-0.5 * t)
        >>> solver = solvers.GradNormSmooth(solvers.GaussNewton())
        >>> print(jnp.round(jx.solve(decay, solver, jnp.ones(2), data).value, 3))
        [2.  0.5]
    """

    weights: Callable[[PyTree, PyTree], PyTree] | None = None

    def __check_init__(self):
        check.function("GaussNewton", "weights", self.weights, optional=True)

    def check(self, problem):
        """See `HessianModel`."""
        super().check(problem)
        kinds = ComposedMinimization if self.weights else (ComposedMinimization, LeastSquares)
        _require_kind(self, problem, kinds)

    def product(self, local):
        """See `OperatorModel`."""
        inner, target = _inner(local)
        _, push = jax.linearize(inner, local.origin)
        pull = jax.linear_transpose(push, local.origin)
        weigh = self._weigh(local, target)
        return lambda v: pull(weigh(push(v)))[0]

    def matrix(self, local):
        """See `OperatorModel`."""
        inner, target = _inner(local)
        rows = _jacobian(inner, local.origin).T
        return rows @ jax.vmap(self._weigh(local, target))(rows).T

    def rank(self, local):
        """See `OperatorModel`."""
        return jax.eval_shape(_inner(local)[0], local.origin).size

    def factor(self, local):
        """See `OperatorModel`."""
        inner, target = _inner(local)
        rows = _jacobian(inner, local.origin).T
        if isinstance(local.problem, LeastSquares):
            return rows
        if self.weights is not None:
            return rows * jnp.sqrt(self._diagonal(local, target))[None, :]
        weigh = self._weigh(local, target)
        values, vectors = jnp.linalg.eigh(jax.vmap(weigh)(jnp.eye(target.size, dtype=target.dtype)))
        return (rows @ vectors) * jnp.sqrt(jnp.maximum(values, 0))[None, :]

    def _weigh(self, local, target):
        """The map z ↦ W z on raveled targets."""
        if isinstance(local.problem, LeastSquares):
            return lambda z: z
        if self.weights is not None:
            diagonal = self._diagonal(local, target)
            return lambda z: diagonal * z
        return jax.linearize(jax.grad(_loss(local)), target)[1]

    def _diagonal(self, local, target):
        assert self.weights is not None
        shape = _target(local, local.origin)
        weights = self.weights(ravel_pytree(shape)[1](target), local.args)
        if not tree.same_types(weights, shape):
            raise ValueError(
                f"GaussNewton: weights returned {tree.describe(weights)}, expected a PyTree like "
                f"the target, {tree.describe(shape)}"
            )
        return ravel_pytree(weights)[0]


class EmpiricalFisher(OperatorModel):
    """H = Σᵢ wᵢ ∇ℓᵢ ∇ℓᵢᵀ from per-example gradients, w the derivative of the loss.

    For `ComposedMinimization(loss=jnp.mean, model=losses)`, where `losses(variables, args)` are
    the losses of N examples, this is (1/N) Σ ∇ℓᵢ ∇ℓᵢᵀ. The loss must not decrease in any of them.
    Its error is large where the losses do not vanish at the solution; then convergence is slow.
    The *true* Fisher information is `GaussNewton`.

    Args:
        linear_solver: `Direct()`, `Eigendecomposition()` or `ConjugateGradient()`.

    Raises:
        TypeError: (from `solve`) the problem is not `ComposedMinimization`.

    Reference:
        Kunstner, Balles, Hennig, "Limitations of the Empirical Fisher Approximation for Natural
        Gradient Descent", NeurIPS 2019.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> def losses(y, X):  # of a separable classification problem
        ...     return jnp.logaddexp(0.0, -X @ y)
        >>> problem = jx.ComposedMinimization(lambda z, X: jnp.mean(z), losses)
        >>> X = jnp.array([[1.0, 0.5], [0.5, 2.0], [1.0, 1.0]])
        >>> solver = solvers.GradNormSmooth(solvers.EmpiricalFisher(), atol=1e-3)
        >>> bool(jx.solve(problem, solver, jnp.zeros(2), X).success)
        True
    """

    def check(self, problem):
        """See `HessianModel`."""
        super().check(problem)
        _require_kind(self, problem, ComposedMinimization)

    def product(self, local):
        """See `OperatorModel`."""
        inner, target = _inner(local)
        _, push = jax.linearize(inner, local.origin)
        pull = jax.linear_transpose(push, local.origin)
        weights = jax.grad(_loss(local))(target)
        return lambda v: pull(weights * push(v))[0]

    def matrix(self, local):
        """See `OperatorModel`."""
        factor = self.factor(local)
        return factor @ factor.T

    def rank(self, local):
        """See `OperatorModel`."""
        return jax.eval_shape(_inner(local)[0], local.origin).size

    def factor(self, local):
        """See `OperatorModel`."""
        inner, target = _inner(local)
        weights = jax.grad(_loss(local))(target)
        return _jacobian(inner, local.origin).T * jnp.sqrt(jnp.maximum(weights, 0))[None, :]


def _require_kind(model, problem, kinds):
    if not isinstance(problem, kinds):
        names = (
            kinds.__name__ if isinstance(kinds, type) else " or ".join(k.__name__ for k in kinds)
        )
        raise TypeError(
            f"{type(model).__name__} needs the structure of a {names}, and the problem is a "
            f"{type(problem).__name__}; take ExactHessian() or state the problem as one"
        )


def _target(local, u):
    problem = local.problem
    if isinstance(problem, LeastSquares):
        out = problem.residual(local.variables(u), local.args)
        return out[0] if problem.has_aux else out
    return problem.model(local.variables(u), local.args)


def _inner(local: LocalProblem):
    """The residual, or the target, as a function of u, raveled; and its value at u = 0."""

    def inner(u):
        return ravel_pytree(_target(local, u))[0]

    return inner, inner(local.origin)


def _loss(local: LocalProblem):
    """The loss as a function of the raveled target."""
    problem: Any = local.problem
    unravel = ravel_pytree(_target(local, local.origin))[1]

    def loss(z):
        out = problem.loss(unravel(z), local.args)
        return (out[0] if problem.has_aux else out).astype(z.dtype)

    return loss


def _jacobian(fun, u):
    """Dense, in the mode with fewer products."""
    wide = jax.eval_shape(fun, u).size < u.size
    return (jax.jacrev if wide else jax.jacfwd)(fun)(u)
