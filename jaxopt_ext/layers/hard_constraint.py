"""A constrained solve as a layer: least squares over the rows of a residual, differentiable."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxopt_ext import implicit
from jaxopt_ext.core import check, tree
from jaxopt_ext.core.drive import solve
from jaxopt_ext.core.problem import LeastSquares
from jaxopt_ext.core.result import RESULTS
from jaxopt_ext.core.solver import AbstractSolver, Number
from jaxopt_ext.implicit.attach import attach_problem
from jaxopt_ext.implicit.hoist import strong, vary_like
from jaxopt_ext.layers.least_squares import (
    DenseOrZero,
    numerical_rank,
    reduce_rows,
    singular_values,
    solve_stacked,
)
from jaxopt_ext.solvers.gauss_newton import GaussNewton
from jaxopt_ext.solvers.grad_norm_smooth import GradNormSmooth


class ConstraintReport(eqx.Module):
    """How well the constraint holds, and what may be wrong; one entry per solve of a batch.

    Attributes:
        ok: Whether the solve succeeded. Where it did not, `value` is the best finite point and
            carries no derivative.
        result: How the solve ended, a member of `RESULTS`.
        steps: Steps of the solver; 1 for linear rows.
        optimality: max_j |J_jᵀr| / (‖J_j‖ ‖r‖), the largest cosine between a column of the
            Jacobian and the residual; dimensionless.
        max_residual: Largest absolute residual by block, in the block's own units.
        rms_residual: Root mean square residual by block.
        rows: Number of rows that count.
        rank: Numerical rank of the Jacobian of the rows, without the ridge.
        condition_number: Ratio of its singular values, with columns scaled to unit length.
        unknowns: Number of unknowns.
    """

    ok: Bool[Array, "*batch"]
    result: RESULTS
    steps: Int[Array, "*batch"]
    optimality: Float[Array, "*batch"]
    max_residual: dict[str, Array]
    rms_residual: dict[str, Array]
    rows: Int[Array, "*batch"]
    rank: Int[Array, "*batch"]
    condition_number: Float[Array, "*batch"]
    unknowns: int = eqx.field(static=True)

    @property
    def empty(self) -> Array:
        """Whether no row counts: the answer is that of the ridge alone."""
        return self.rows == 0

    @property
    def underdetermined(self) -> Array:
        """Whether there are fewer rows than unknowns: a small residual is then no evidence."""
        return self.rows < self.unknowns

    @property
    def rank_deficient(self) -> Array:
        """Whether the rows leave some direction to the ridge."""
        return self.rank < self.unknowns


class Constrained(eqx.Module):
    """What a constraint layer returns.

    Attributes:
        value: The solution, with its derivative.
        report: How good it is.
    """

    value: PyTree
    report: ConstraintReport


class Packed(eqx.Module):
    """Everything that the rows depend on, as one argument.

    Attributes:
        residual: The user's function, traced.
        args: Its arguments.
        mask: Rows that count, by block.
        weights: Weights by block.
        ridge: Weight of the unknowns themselves.
        ok: Where false, the rows are zero and pass no derivative.
    """

    residual: implicit.Hoisted
    args: PyTree
    mask: dict[str, Array]
    weights: dict[str, Array]
    ridge: Array
    ok: Array


def gate(ok: Array, value: PyTree) -> PyTree:
    """The value, with its derivative where `ok` and without elsewhere.

    A selection stops cotangents in the backward pass even if they are NaN, which a product with
    zero does not.
    """

    def one(leaf):
        if not eqx.is_inexact_array(leaf):
            return leaf
        return jnp.where(ok, leaf, jax.lax.stop_gradient(leaf))

    return jax.tree.map(one, value)


class HardConstraint(eqx.Module):
    """The point that satisfies a residual best, as a layer.

    It minimizes ½ Σ_b w_b² ‖r_b(y, args)‖² / m_b + ½ ρ² ‖y‖². The residual has named blocks (a
    differential equation, boundary and initial conditions). Each is divided by the square root of
    its number of rows m_b, so that a block does not gain weight by having more points. "Hard" means
    that the residual is minimized at every call, not that it is zero: with more rows than unknowns
    it is not, and `report` says how large it is.

    The derivative is that of the stationarity condition Jᵀr = 0 with the exact Hessian, whatever
    solver found the point and however many steps it took. A solve that fails passes none: its
    cotangents are dropped, so in a batch it does not spoil the gradient of the others.

    Args:
        residual: r(variables, args) → array, or dict of arrays by block.
        solver: For nonlinear residuals; `None` means `GradNormSmooth(GaussNewton())`.
        linear: Declares that r is affine in the variables: one direct solve by QR, no iteration.
        ridge: ρ, in units of a (weighted) residual per unit of a variable, ≥ 0; `None` means
            eps^(3/8) of the dtype, 1.3e-6 in float64. It decides directions that the rows do not.
        weights: w_b by block; a block that is not named has 1.
        normalize: Whether blocks are divided by the square root of their number of rows.
        max_steps: Steps of the solver at most.

    Raises:
        TypeError: `residual` is no function, or `solver` no solver for least squares.
        ValueError: A setting is out of its range.

    Reference:
        Négiar, Mahoney, Krishnapriyan, "Learning differentiable solvers for systems with hard
        constraints", ICLR 2023.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxopt_ext import layers
        >>> x = jnp.linspace(0.0, 1.0, 20)
        >>> def residual(c, slope):  # u = c₀ + c₁ x solves u' = slope, u(0) = 1
        ...     return {"equation": jnp.full(20, c[1] - slope), "boundary": c[:1] - 1.0}
        >>> layer = layers.HardConstraint(residual, linear=True, ridge=1e-6)
        >>> print(jnp.round(layer(jnp.zeros(2), 3.0).value, 2))
        [1. 3.]
        >>> print(jnp.round(jax.grad(lambda s: layer(jnp.zeros(2), s).value[1])(3.0), 2))
        1.0
    """

    residual: Callable
    solver: AbstractSolver | None = None
    linear: bool = eqx.field(static=True, default=False, kw_only=True)
    ridge: Number | None = eqx.field(default=None, kw_only=True)
    weights: dict[str, Number] | None = eqx.field(default=None, kw_only=True)
    normalize: bool = eqx.field(static=True, default=True, kw_only=True)
    max_steps: int = eqx.field(static=True, default=100, kw_only=True)

    def __check_init__(self):
        name = type(self).__name__
        check.function(name, "residual", self.residual)
        if self.solver is not None:
            if not isinstance(self.solver, AbstractSolver):
                raise TypeError(
                    f"{name}: solver is a {type(self.solver).__name__}, expected a solver such as "
                    "solvers.GradNormSmooth(solvers.GaussNewton())"
                )
            if not issubclass(LeastSquares, self.solver.accepts):
                raise TypeError(
                    f"{name}: {type(self.solver).__name__} does not accept LeastSquares problems"
                )
            if self.linear:
                raise ValueError(f"{name}: solver is given, expected None because linear=True")
        if self.ridge is not None:
            check.number(name, "ridge", self.ridge, at_least=0)
        for block, weight in (self.weights or {}).items():
            check.number(name, f"weights[{block!r}]", weight, at_least=0)
        check.count(name, "max_steps", self.max_steps)

    def __call__(
        self, init: PyTree, args: PyTree = None, mask: dict[str, Array] | None = None
    ) -> Constrained:
        """Solve.

        Args:
            init: Starting point, e.g. the value of the previous training step; it has no influence
                on the derivative, and none at all on linear rows.
            args: Second argument of the residual.
            mask: Rows that count, by block: booleans along the first axis. Blocks without a mask
                count whole.

        Returns:
            The solution and its report.

        Raises:
            TypeError: `init` has a leaf that is not floating.
            ValueError: The residual does not fit, or `mask` names an unknown block.
        """
        value, packed = self.pack(init, args, mask)
        problem = LeastSquares(rows).trace(value, packed)
        found, result, steps, inverse = self._solve(problem, value, packed)
        report = self.report(found, packed, result, steps)
        found = tree.where(report.ok, found, value)
        packed = eqx.tree_at(lambda p: p.ok, packed, report.ok)
        found = attach_problem(problem.condition(), found, (packed,), inverse)
        return Constrained(gate(report.ok, found), implicit.detach(report))

    def check(
        self, value: PyTree, args: PyTree = None, mask: dict[str, Array] | None = None
    ) -> ConstraintReport:
        """Judge a point on rows that may be others than those it was solved on.

        Args:
            value: The point, e.g. `layer(...).value`.
            args: Second argument of the residual, e.g. with points that were held out.
            mask: See `__call__`.

        Returns:
            The report; `ok` says whether everything is finite.
        """
        value, packed = self.pack(value, args, mask)
        zero = jnp.zeros((), jnp.int32)
        report = self.report(value, packed, RESULTS.max_steps_reached, zero)
        finite = jnp.isfinite(report.optimality)
        return eqx.tree_at(lambda r: r.ok, report, finite)

    def pack(self, init: PyTree, args: PyTree, mask: Any) -> tuple[PyTree, Packed]:
        """The start and everything that the rows depend on, typed and checked; one trace."""
        name = type(self).__name__
        value = check.variables("init", init)
        dtype = tree.dtype_of(value)
        args = strong(args, dtype)
        dynamic, static = eqx.partition(args, eqx.is_array)
        value, dynamic, mask = vary_like((value, dynamic, mask or {}))
        args = eqx.combine(dynamic, static)
        residual = check.call(
            name, "residual", lambda: implicit.hoist(self.residual, value, args), value, args
        )
        blocks = named(residual.out_shape)
        for given, what in ((mask, "mask"), (self.weights or {}, "weights")):
            unknown = sorted(set(given) - set(blocks))
            if unknown:
                raise ValueError(
                    f"{name}: {what} names {unknown}, expected blocks of the residual: "
                    f"{sorted(blocks)}"
                )
        for block, rows_mask in mask.items():
            if jnp.shape(rows_mask) != blocks[block].shape[:1]:
                raise ValueError(
                    f"{name}: mask[{block!r}] has shape {list(jnp.shape(rows_mask))}, expected "
                    f"{list(blocks[block].shape[:1])}, one entry per row of the block"
                )
        scales = {}
        for block, shape in blocks.items():
            scale = jnp.asarray((self.weights or {}).get(block, 1.0), dtype)
            if self.normalize:
                count = _count(shape, mask.get(block)).astype(dtype)
                scale = scale / jnp.sqrt(jnp.maximum(count, 1))
            scales[block] = scale
        ridge = float(jnp.finfo(dtype).eps) ** 0.375 if self.ridge is None else self.ridge
        packed = Packed(residual, args, mask, scales, jnp.asarray(ridge, dtype), jnp.array(True))
        dynamic, static = eqx.partition(packed, eqx.is_array)
        value, dynamic = vary_like((value, dynamic))
        return value, eqx.combine(dynamic, static)

    def _solve(self, problem, value, packed):
        """The solution, how it was found, and the linear solver of its derivative."""
        value, packed, problem = implicit.detach((value, packed, problem))
        if not self.linear:
            solver = GradNormSmooth(GaussNewton()) if self.solver is None else self.solver
            found = solve(
                problem, solver, value, packed,
                max_steps=self.max_steps, adjoint=implicit.DetachedAdjoint(),
            )  # fmt: skip
            return found.value, found.result, found.stats.steps, DenseOrZero()
        flat, unravel = ravel_pytree(value)
        origin = jnp.zeros_like(flat)
        matrix, constant = jacobian(lambda v: problem.residual(unravel(v), packed), origin)
        n = flat.size
        triangle = reduce_rows(matrix[:-n], -constant[:-n])
        stacked = jnp.concatenate([triangle.matrix, matrix[-n:]])
        target = jnp.concatenate([triangle.target, jnp.zeros_like(flat)])
        found, inverse = solve_stacked(stacked, target)
        finite = jnp.all(jnp.isfinite(found))
        result = RESULTS.where(finite, RESULTS.successful, RESULTS.linear_solve_failed)
        found = unravel(jnp.where(finite, found, flat))
        return found, result, jnp.ones((), jnp.int32), inverse

    def report(self, value: PyTree, packed: Packed, result: RESULTS, steps: Array):
        """Judge a point: residuals, rank, and whether it is stationary."""
        value, packed = implicit.detach((value, packed))
        flat, unravel = ravel_pytree(value)
        n = flat.size
        matrix, r = jacobian(lambda v: rows(unravel(v), packed), flat)
        length = jnp.sqrt(jnp.sum(matrix**2, axis=0)) * jnp.sqrt(jnp.sum(r**2))
        cosine = jnp.max(jnp.abs(matrix.T @ r) / jnp.where(length > 0, length, 1))
        values = singular_values(reduce_rows(matrix[:-n], r[:-n]).matrix)
        finite = jnp.isfinite(cosine) & tree.all_finite(value)
        # a solver that stands still at a stationary point has done all that the precision allows
        stationary = cosine <= float(jnp.finfo(flat.dtype).eps) ** 0.5
        ok = finite & ((result == RESULTS.successful) | stationary)
        blocks = _blocks(value, packed)
        counts = {b: _count(v, packed.mask.get(b)) for b, v in blocks.items()}
        return ConstraintReport(
            ok=ok,
            result=result,
            steps=steps,
            optimality=cosine,
            max_residual={b: jnp.max(jnp.abs(v), initial=0) for b, v in blocks.items()},
            rms_residual={
                b: jnp.sqrt(jnp.sum(v**2) / jnp.maximum(counts[b], 1).astype(v.dtype))
                for b, v in blocks.items()
            },
            rows=jnp.sum(jnp.stack(list(counts.values())), dtype=jnp.int32),
            rank=numerical_rank(values),
            condition_number=jnp.max(values, initial=0) / jnp.min(values, initial=jnp.inf),
            unknowns=n,
        )


def named(residual: PyTree) -> dict[str, Any]:
    """The blocks of a residual by name.

    Raises:
        ValueError: The residual is neither an array nor a dict of arrays.
    """
    if isinstance(residual, dict) and all(hasattr(v, "shape") for v in residual.values()):
        return residual
    if hasattr(residual, "shape"):
        return {"residual": residual}
    raise ValueError(
        f"residual returned {tree.describe(residual)}, expected an array or a dict of arrays by "
        "name of the block"
    )


def rows(variables: PyTree, packed: Packed) -> tuple[dict[str, Array], PyTree]:
    """Weighted rows by block, and the ridge rows."""
    weighted = {b: packed.weights[b] * v for b, v in _blocks(variables, packed).items()}
    return weighted, jax.tree.map(lambda v: packed.ridge.astype(v.dtype) * v, variables)


def _blocks(variables, packed):
    """The residual by block, zero in rows that do not count."""
    variables, fun, args = gate(packed.ok, (variables, packed.residual, packed.args))
    blocks = named(fun(variables, args))

    def counted(block, v):
        mask = packed.mask.get(block)
        if mask is not None:
            v = jnp.where(mask.reshape(mask.shape + (1,) * (v.ndim - 1)), v, 0)
        return jnp.where(packed.ok, v, 0)

    return {b: counted(b, jnp.asarray(v)) for b, v in blocks.items()}


def _count(block, mask):
    """Rows of a block that count, as an integer array."""
    if mask is None or not block.shape:
        return jnp.asarray(block.size, jnp.int32)
    each = block.size // max(block.shape[0], 1)
    return jnp.sum(mask, dtype=jnp.int32) * each


def jacobian(fun: Callable, point: Array) -> tuple[Array, Array]:
    """The Jacobian of a PyTree-valued function of a vector, and its raveled value there."""

    def flat(v):
        return ravel_pytree(fun(v))[0]

    value, push = jax.linearize(flat, point)
    basis = vary_like(jnp.eye(point.size, dtype=point.dtype), point)
    return jax.vmap(push, out_axes=1)(basis), value
