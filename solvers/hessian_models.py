"""Hessian models: approximations H of ∇²f, each with the linear algebra that fits it.

A model is asked to `build` what it keeps of H at every new point, and gives `at` a point the form
(see `curvature`) that solves (H + λI) u = −g. Models with a memory get back what they kept at the
previous point. Models whose H is given by products (`OperatorModel`) leave a choice: `Direct`,
`Eigendecomposition` or `ConjugateGradient`, their argument `linear_solver`; this is the one place
where linear algebra is chosen.

Functions given to a model take `(variables, args)`; data must come through `args`.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jaxopt_ext.core import check, tree
from jaxopt_ext.core.problem import Problem
from jaxopt_ext.core.solver import Number
from jaxopt_ext.implicit.hoist import vary_like
from jaxopt_ext.solvers.curvature import (
    Curvature,
    Diagonal,
    Matrix,
    MatrixFree,
    Spectrum,
    check_psd,
)
from jaxopt_ext.solvers.metrics import Coordinates


@dataclasses.dataclass(frozen=True)
class LocalProblem:
    """A problem seen from a point x, in the coordinates u of the metric: variables x + S u.

    Attributes:
        problem: The problem.
        args: Second argument of its functions.
        objective_fun: The (smooth part of the) objective, `(variables, args)` to a scalar.
        point: x, raveled.
        unravel: Back to a PyTree.
        coordinates: The maps of the metric.
        gradient: Sᵀ∇f(x).
        draw: A number that changes from point to point, for random models.
    """

    problem: Problem
    args: PyTree
    objective_fun: Callable[[PyTree, PyTree], Array]
    point: Float[Array, " n"]
    unravel: Callable[[Array], PyTree]
    coordinates: Coordinates
    gradient: Float[Array, " n"]
    draw: Int[Array, ""]

    @property
    def size(self) -> int:
        """Number of variables."""
        return self.point.size

    @property
    def origin(self) -> Float[Array, " n"]:
        """The point itself, u = 0."""
        return jnp.zeros_like(self.point)

    @property
    def value(self) -> PyTree:
        """The point as a PyTree."""
        return self.unravel(self.point)

    def variables(self, u: Float[Array, " n"]) -> PyTree:
        """X + S u as a PyTree."""
        return self.unravel(self.point + self.coordinates.scale(u))

    def objective(self, u: Float[Array, " n"]) -> Float[Array, ""]:
        """The (smooth part of the) objective at x + S u."""
        return self.objective_fun(self.variables(u), self.args).astype(self.point.dtype)

    def key(self, key: PRNGKeyArray) -> PRNGKeyArray:
        """A key of this point."""
        return jax.random.fold_in(key, self.draw)


class HessianModel(eqx.Module, metaclass=check.SettingsMeta):
    """Base of the Hessian models; H in the coordinates of the metric is Sᵀ H S.

    Attributes:
        theta: Relative error of the steps (class constant 0 unless they are inexact).
    """

    theta: ClassVar[Any] = 0.0

    def evaluations(self, size: int) -> dict[str, int]:
        """What `build` costs for `size` variables, by kind of `Counts`."""
        return {}

    def check(self, problem: Problem) -> None:
        """Raise TypeError if the model needs another kind of problem."""

    def init(self, local: LocalProblem) -> PyTree:
        """Data of the shapes that `build` returns, before there is any."""
        shapes = jax.eval_shape(lambda: self.build(local, None))
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    @abc.abstractmethod
    def build(self, local: LocalProblem, data: PyTree) -> PyTree:
        """What to keep of H at a new point, given what was kept at the previous one."""

    def at(self, local: LocalProblem, data: PyTree) -> Curvature:
        """The form of H at the point, from what was kept."""
        return data


# ---- models that leave a choice of linear algebra -------------------------------------------


class LinearSolver(eqx.Module, metaclass=check.SettingsMeta):
    """Base: chooses the form in which a model's H is kept and solved with."""

    theta: ClassVar[Any] = 0.0  # relative error of the steps; direct solves have none

    def check(self, problem: Problem) -> None:
        """Raise TypeError if something in it needs another kind of problem."""

    def evaluations(self, size: int) -> dict[str, int]:
        """What building the form costs, by kind of `Counts`."""
        return {"hessian": 1}

    @abc.abstractmethod
    def build(self, model: Any, local: LocalProblem, data: Any) -> Any:
        """What is kept of H at a new point, given what was kept at the previous one."""

    def at(self, model: Any, local: LocalProblem, data: Any) -> Curvature:
        """The form, from what was kept."""
        return data


class Direct(LinearSolver):
    """Dense: Cholesky; or, for a model of rank r < n, its factor in O(n r) per trial.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> model = solvers.ExactHessian(linear_solver=solvers.Direct())
        >>> problem = jx.Minimization(lambda y, args: jnp.sum((y - 1.0) ** 4))
        >>> bool(jx.solve(problem, solvers.GradNormSmooth(model), jnp.zeros(2)).success)
        True
    """

    def build(self, model, local, data):
        """See `LinearSolver`."""
        rank = model.rank(local)
        if rank is not None and rank < local.size:
            return Spectrum.of_factor(model.factor(local))
        return Matrix(model.matrix(local))


class Eigendecomposition(LinearSolver):
    """One eigendecomposition per point, reused by its trials, with a choice for indefinite H.

    The theory needs H ⪰ 0. `psd="abs"` replaces eigenvalues by their absolute values, `"clip"`
    negative ones by zero. `"none"` leaves them: a trial with H + λI not positive definite is
    rejected, as with `Direct`.

    Args:
        psd: `"abs"`, `"clip"` or `"none"`.

    Raises:
        ValueError: `psd` is none of these.

    Reference:
        Paternain, Mokhtari, Ribeiro, "A Newton-Based Method for Nonconvex Optimization with Fast
        Evasion of Saddle Points", SIAM J. Optim. 29 (2019), for absolute values.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> model = solvers.ExactHessian(linear_solver=solvers.Eigendecomposition(psd="abs"))
        >>> double_well = jx.Minimization(lambda y, args: (y**2 - 1.0) ** 2)
        >>> print(jnp.round(jx.solve(double_well, solvers.GradNormSmooth(model), 0.1).value, 3))
        1.0
    """

    psd: str = eqx.field(static=True, default="abs")

    def __check_init__(self):
        check_psd("Eigendecomposition", self.psd)

    def build(self, model, local, data):
        """See `LinearSolver`."""
        return Spectrum.of_matrix(model.matrix(local), self.psd)


class ConjugateGradient(LinearSolver):
    """Matrix-free: conjugate gradients on Hessian-vector products; no matrix is ever formed.

    A solve stops as soon as its step is sure to give (1 − θ) of the decrease that exact steps
    would give, which is what the acceptance test of the method then asks for: at
    ‖(H + λB) h + g‖_*² ≤ ρ λ ⟨−g, h⟩ with (1 + √(1 + ρ))² = 4 / (1 − θ). Memory O(n).

    Args:
        theta: θ in [0, 1), dimensionless.
        max_steps: Products per solve at most; `None` means min(10 n, 1000). The step so far is
            then tried.
        preconditioner: A Hessian model with a cheap solve, for instance `DiagonalHessian` or
            `NystromHessian`, brought up to date at every accepted point.

    Raises:
        TypeError: `preconditioner` is not a Hessian model.
        ValueError: A setting is outside its range.

    Reference:
        Hestenes, Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", J. Res.
        Nat. Bur. Standards 49 (1952); Frangella, Tropp, Udell, "Randomized Nyström
        Preconditioning", SIAM J. Matrix Anal. Appl. 44 (2023).

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> model = solvers.ExactHessian(linear_solver=solvers.ConjugateGradient())
        >>> problem = jx.Minimization(lambda y, args: jnp.sum(jnp.cosh(y)))
        >>> solution = jx.solve(problem, solvers.GradNormSmooth(model), jnp.ones(1000))
        >>> bool(solution.success), int(solution.stats.counts.hessian)
        (True, 0)
    """

    theta: Number = 0.5
    max_steps: int | None = eqx.field(static=True, default=None)
    preconditioner: HessianModel | None = None

    def __check_init__(self):
        check.number("ConjugateGradient", "theta", self.theta, at_least=0, below=1)
        if self.max_steps is not None:
            check.count("ConjugateGradient", "max_steps", self.max_steps)
        if not isinstance(self.preconditioner, HessianModel | None):
            raise TypeError(
                f"ConjugateGradient: preconditioner is a {type(self.preconditioner).__name__}, "
                "expected a Hessian model such as DiagonalHessian()"
            )

    def check(self, problem):
        """See `LinearSolver`."""
        if self.preconditioner is not None:
            self.preconditioner.check(problem)

    def evaluations(self, size):
        """See `LinearSolver`."""
        return {} if self.preconditioner is None else self.preconditioner.evaluations(size)

    def build(self, model, local, data):
        """See `LinearSolver`."""
        if self.preconditioner is None:
            return None
        kept = self.preconditioner.init(local) if data is None else data
        return self.preconditioner.build(local, kept)

    def at(self, model, local, data):
        """See `LinearSolver`."""
        approximation = None
        if self.preconditioner is not None:
            approximation = self.preconditioner.at(local, data)
        limit = min(10 * local.size, 1000) if self.max_steps is None else self.max_steps
        return MatrixFree(model.product(local), approximation, self.theta, limit)


class OperatorModel(HessianModel):
    """Base of the models whose H is given by its products with vectors.

    Args:
        linear_solver: `Direct()`, `Eigendecomposition()` or `ConjugateGradient()`.
    """

    linear_solver: LinearSolver = eqx.field(default=Direct(), kw_only=True)

    def __check_init__(self):
        if not isinstance(self.linear_solver, LinearSolver):
            raise TypeError(
                f"{type(self).__name__}: linear_solver is a {type(self.linear_solver).__name__}, "
                "expected Direct(), Eigendecomposition() or ConjugateGradient()"
            )

    @property
    def theta(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `HessianModel`."""
        return self.linear_solver.theta

    def check(self, problem):
        """See `HessianModel`."""
        self.linear_solver.check(problem)

    def evaluations(self, size):
        """See `HessianModel`."""
        return self.linear_solver.evaluations(size)

    def build(self, local, data):
        """See `HessianModel`."""
        return self.linear_solver.build(self, local, data)

    def at(self, local, data):
        """See `HessianModel`."""
        return self.linear_solver.at(self, local, data)

    @abc.abstractmethod
    def product(self, local: LocalProblem) -> Callable[[Array], Array]:
        """The map v ↦ H v."""

    def matrix(self, local: LocalProblem) -> Float[Array, "n n"]:
        """H, by default from n products."""
        basis = vary_like(jnp.eye(local.size, dtype=local.point.dtype), local.origin)
        return jax.vmap(self.product(local))(basis)

    def rank(self, local: LocalProblem) -> int | None:
        """A bound r on the rank of H if `factor` is available, else `None`."""
        return None

    def factor(self, local: LocalProblem) -> Float[Array, "n r"]:
        """U with H = U Uᵀ, for models that have a `rank`.

        Raises:
            TypeError: The model has none.
        """
        raise TypeError(
            f"{type(self).__name__} has no factor U with H = U Uᵀ; a model that defines `rank` "
            "defines `factor` too"
        )


class ExactHessian(OperatorModel):
    """H = ∇²f.

    With `Direct()`, a shifted Hessian that is not positive definite makes the Cholesky
    factorization fail; the trial is rejected, which raises the shift. For indefinite problems
    `Eigendecomposition(psd="abs")` makes use of negative curvature instead. With
    `ConjugateGradient()` no matrix is formed.

    Args:
        linear_solver: `Direct()` (memory n², time n³/3 a trial), `Eigendecomposition()` or
            `ConjugateGradient()`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> problem = jx.Minimization(lambda y, args: jnp.sum((y - 1.0) ** 2))
        >>> solver = solvers.GradNormSmooth(solvers.ExactHessian())
        >>> print(jnp.round(jx.solve(problem, solver, jnp.zeros(2)).value, 3))
        [1. 1.]
    """

    def product(self, local):
        """See `OperatorModel`."""
        return jax.linearize(jax.grad(local.objective), local.origin)[1]


class UserHessian(OperatorModel):
    """H from a function of yours; `GradNormSmooth(hessian=function)` is the same.

    Args:
        fun: fun(variables, args) → H, symmetric: an array [n, n] on the raveled variables, or a
            linear function v ↦ H v on PyTrees like the variables.
        linear_solver: `Direct()`, `Eigendecomposition()` or `ConjugateGradient()`.

    Raises:
        TypeError: A setting is of the wrong kind.
        ValueError: (from `solve`) `fun` returns neither.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> problem = jx.Minimization(lambda y, t: jnp.sum(jnp.cosh(y - t)))
        >>> def hessian(y, t):
        ...     return lambda v: jnp.cosh(y - t) * v
        >>> print(jnp.round(jx.solve(problem, solvers.GradNormSmooth(hessian), 0.0, 2.0).value, 3))
        2.0
    """

    fun: Callable[[PyTree, PyTree], Any]

    def __check_init__(self):
        check.function("UserHessian", "fun", self.fun)

    def _call(self, local):
        out = self.fun(local.value, local.args)
        if callable(out):
            return out
        if jnp.shape(out) != (local.size, local.size):
            raise ValueError(
                f"UserHessian: fun returned {tree.describe(out)}, expected an array of shape "
                f"{(local.size, local.size)} or a function v -> H v"
            )
        return jnp.asarray(out, local.point.dtype)

    def product(self, local):
        """See `OperatorModel`."""
        given, (scale, dual, _) = self._call(local), local.coordinates
        if not callable(given):
            return lambda v: dual(given @ scale(v))
        return lambda v: dual(ravel_pytree(given(local.unravel(scale(v))))[0])


class LowRank(HessianModel):
    """H = U Uᵀ for a factor U of yours with r columns; O(n r²) per point, O(n r) per trial.

    Args:
        factor: factor(variables, args) → U: a PyTree like the variables whose leaves have one more
            axis, the last, of length r; or exactly like the variables for rank one, H = u uᵀ.

    Raises:
        TypeError: `factor` is not a function.
        ValueError: (from `solve`) it returns something else.

    Reference:
        Woodbury, "Inverting Modified Matrices", Princeton (1950).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> def fourth_power(y, A):
        ...     return jnp.sum((A @ y - 1.0) ** 2) ** 2 / 4
        >>> def fisher(y, A):  # rank one: √2 ‖u‖⁻² ∇f
        ...     return 2**0.5 / jnp.sum((A @ y - 1.0) ** 2) * jax.grad(fourth_power)(y, A)
        >>> A = jnp.array([[1.0, 0.5], [0.0, 1.0]])
        >>> solver = solvers.GradNormSmooth(solvers.LowRank(fisher), atol=1e-4)
        >>> bool(jx.solve(jx.Minimization(fourth_power), solver, jnp.zeros(2), A).success)
        True
    """

    factor: Callable[[PyTree, PyTree], PyTree]

    def __check_init__(self):
        check.function("LowRank", "factor", self.factor)

    def evaluations(self, size):
        """See `HessianModel`."""
        return {"hessian": 1}

    def build(self, local, data):
        """See `HessianModel`."""
        value = local.value
        out = self.factor(value, local.args)
        if not tree.same_types(out, value):
            columns = jax.tree.map(lambda leaf: leaf[..., 0], out)
            if not tree.same_types(columns, value):
                raise ValueError(
                    f"LowRank: factor returned {tree.describe(out)}, expected a PyTree like init, "
                    f"{tree.describe(value)}, with or without one more axis at the end"
                )
            rows = jax.vmap(lambda u: ravel_pytree(u)[0], in_axes=-1)(out)
        else:
            rows = ravel_pytree(out)[0][None]
        return Spectrum.of_factor(jax.vmap(local.coordinates.dual)(rows).T)


class ZeroHessian(HessianModel):
    """H = 0: the normalized gradient method, x⁺ = x − γ B⁻¹∇f / ‖∇f‖_*; O(n).

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> problem = jx.Minimization(lambda y, t: jnp.sum(jnp.cosh(y - t)))
        >>> solver = solvers.GradNormSmooth(solvers.ZeroHessian())
        >>> print(jnp.round(jx.solve(problem, solver, jnp.zeros(2), 2.0).value, 3))
        [2. 2.]
    """

    def build(self, local, data):
        """See `HessianModel`."""
        return Diagonal(jnp.zeros((), local.point.dtype))
