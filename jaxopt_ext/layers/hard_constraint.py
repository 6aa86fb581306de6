"""A constrained solve as a layer: least squares over the rows of a residual, differentiable."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from jaxopt_ext import implicit
from jaxopt_ext.core import check, tree
from jaxopt_ext.core.drive import solve as run_solver
from jaxopt_ext.core.problem import LeastSquares, NonlinearProgram
from jaxopt_ext.core.result import RESULTS
from jaxopt_ext.core.solver import AbstractSolver, Number
from jaxopt_ext.implicit.attach import attach_problem
from jaxopt_ext.implicit.hoist import strong, vary_like
from jaxopt_ext.layers.audit import Audit, audit
from jaxopt_ext.layers.least_squares import (
    DenseOrZero,
    numerical_rank,
    reduce_rows,
    singular_values,
    solve_stacked,
    solve_with_equalities,
)
from jaxopt_ext.layers.report import ConstraintReport
from jaxopt_ext.solvers.gauss_newton import GaussNewton
from jaxopt_ext.solvers.grad_norm_smooth import GradNormSmooth
from jaxopt_ext.solvers.sketched_newton_al import SketchedNewtonAL


class Constrained(eqx.Module):
    """What a constraint layer returns.

    Attributes:
        value: The solution, with its derivative.
        report: How good it is.
        multipliers: Of equalities, inequalities and bounds, with their derivatives; `None` without.
    """

    value: PyTree
    report: ConstraintReport
    multipliers: implicit.Multipliers | None = None


class Packed(eqx.Module):
    """Everything that the rows depend on, as one argument.

    Attributes:
        residual: The user's function, traced.
        args: Its arguments.
        mask: Rows that count, by block.
        weights: Weights by block.
        ridge: Weight of the unknowns themselves.
        ok: Where false, the rows are zero and pass no derivative.
        equality: The user's function, traced, or `None`.
        inequality: Likewise.
    """

    residual: implicit.Hoisted
    args: PyTree
    mask: dict[str, Array]
    weights: dict[str, Array]
    ridge: Array
    ok: Array
    equality: implicit.Hoisted | None = None
    inequality: implicit.Hoisted | None = None


class Found(NamedTuple):
    """What a solver hands to the layer.

    Attributes:
        variables: The unknowns of the optimality conditions: y, or (y, multipliers).
        result: How it ended.
        steps: Of the solver.
        optimality: Residual of the conditions as the solver measures it, or `None`.
        inverse: The linear solver of the derivative.
    """

    variables: PyTree
    result: RESULTS
    steps: Array
    optimality: Array | None
    inverse: Callable


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

    It minimizes ½ Σ_b w_b² ‖r_b(y, args)‖² / m_b + ½ ρ² ‖y‖², and where they are given subject to
    c_E(y, args) = 0, c_I(y, args) ≤ 0 and l ≤ y ≤ u. The residual has named blocks (a
    differential equation, boundary and initial conditions). Each is divided by the square root of
    its number of rows m_b, so that a block does not gain weight by having more points. "Hard" means
    that the residual is minimized at every call, not that it is zero: with more rows than unknowns
    it is not, and `report` says how large it is. What must hold exactly is an equality.

    The derivative is that of the stationarity condition Jᵀr = 0 (of the KKT conditions where there
    are constraints) with the exact Hessian, whatever solver found the point and however many steps
    it took. A solve that fails passes none: its
    cotangents are dropped, so in a batch it does not spoil the gradient of the others.

    Args:
        residual: r(variables, args) → array, or dict of arrays by block.
        solver: For nonlinear residuals; `None` means `GradNormSmooth(GaussNewton())`, and
            `SketchedNewtonAL()` where there are constraints.
        linear: Declares that r, and c_E if given, are affine in the variables: one direct solve by
            QR, no iteration; dependent equalities are recognized. Not with inequalities or bounds.
        ridge: ρ, in units of a (weighted) residual per unit of a variable, ≥ 0; `None` means
            eps^(3/8) of the dtype, 1.3e-6 in float64. It decides directions that the rows do not.
        weights: w_b by block; a block that is not named has 1.
        normalize: Whether blocks are divided by the square root of their number of rows.
        max_steps: Steps of the solver at most.
        equality: c_E(variables, args) → PyTree, zero where it holds; or `None`.
        inequality: c_I(variables, args) → PyTree, ≤ 0 where it holds; or `None`.
        lower: l: a PyTree like the variables, one number for all of them, or `None`.
        upper: u, likewise.

    Raises:
        TypeError: A function is none, or `solver` no solver for the problem.
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
    equality: Callable | None = eqx.field(default=None, kw_only=True)
    inequality: Callable | None = eqx.field(default=None, kw_only=True)
    lower: PyTree = eqx.field(default=None, kw_only=True)
    upper: PyTree = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        name = type(self).__name__
        check.function(name, "residual", self.residual)
        check.function(name, "equality", self.equality, optional=True)
        check.function(name, "inequality", self.inequality, optional=True)
        kind = NonlinearProgram if self.constraints else LeastSquares
        if self.solver is not None:
            if not isinstance(self.solver, AbstractSolver):
                raise TypeError(
                    f"{name}: solver is a {type(self.solver).__name__}, expected a solver such as "
                    "solvers.GradNormSmooth(solvers.GaussNewton())"
                )
            if not issubclass(kind, self.solver.accepts):
                raise TypeError(
                    f"{name}: solver is {type(self.solver).__name__}, expected one that accepts "
                    f"{kind.__name__} problems"
                )
            if self.linear:
                raise ValueError(f"{name}: solver is given, expected None because linear=True")
        if self.linear and self.constraints - {"equality"}:
            raise ValueError(
                f"{name}: linear is True, expected False with inequalities or bounds, which need "
                "an iterative solver"
            )
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
        return self.solve(init, args, mask)[0]

    def solve(
        self, init: PyTree, args: PyTree, mask: dict[str, Array] | None, key: Array | None = None
    ) -> tuple[Constrained, Audit | None]:
        """As `__call__`, and with a random key an audit of the derivative's linear system."""
        value, packed = self.pack(init, args, mask)
        problem = self._problem().trace(value, packed)
        found = self._solve(problem, value, packed)
        y, multipliers = problem.split(found.variables)
        report = self.report(
            y, packed, found.result, found.steps, found.optimality, _violation(problem, y, packed)
        )
        y = tree.where(tree.all_finite(y), y, value)  # the best point found, even if not solved
        packed = eqx.tree_at(lambda p: p.ok, packed, report.ok)
        condition, unknowns = problem.condition(), problem.variables(y, multipliers)
        checked = None if key is None else audit(condition, unknowns, packed, found.inverse, key)
        unknowns = attach_problem(condition, unknowns, (packed,), found.inverse)
        y, multipliers = problem.split(gate(report.ok, unknowns))
        return Constrained(y, implicit.detach(report), multipliers), checked

    @property
    def constraints(self) -> frozenset[str]:
        """Which of `equality`, `inequality` and `bounds` are present."""
        bounds = self.lower is not None or self.upper is not None
        present = {
            "equality": self.equality is not None,
            "inequality": self.inequality is not None,
            "bounds": bounds,
        }
        return frozenset(kind for kind, here in present.items() if here)

    def _problem(self) -> LeastSquares | NonlinearProgram:
        if not self.constraints:
            return LeastSquares(rows)
        return NonlinearProgram(
            half_square,
            equality=None if self.equality is None else _equalities,
            inequality=None if self.inequality is None else _inequalities,
            lower=self.lower,
            upper=self.upper,
        )

    def check(
        self, value: PyTree, args: PyTree = None, mask: dict[str, Array] | None = None
    ) -> ConstraintReport:
        """Judge a point on rows that may be others than those it was solved on.

        Args:
            value: The point, e.g. `layer(...).value`.
            args: Second argument of the residual, e.g. with points that were held out.
            mask: See `__call__`.

        Returns:
            The report; `ok` says whether everything is finite, `optimality` is that of the rows
            alone.
        """
        value, packed = self.pack(value, args, mask)
        zero = jnp.zeros((), jnp.int32)
        problem = self._problem().trace(value, packed)
        violation = _violation(problem, value, packed)
        report = self.report(value, packed, RESULTS.max_steps_reached, zero, violation=violation)
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
        equality, inequality = (
            None if fun is None else check.call(
                name, what, lambda fun=fun: implicit.hoist(fun, value, args), value, args
            )
            for what, fun in (("equality", self.equality), ("inequality", self.inequality))
        )  # fmt: skip
        packed = Packed(
            residual, args, mask, scales, jnp.asarray(ridge, dtype), jnp.array(True), equality,
            inequality,
        )  # fmt: skip
        dynamic, static = eqx.partition(packed, eqx.is_array)
        value, dynamic = vary_like((value, dynamic))
        return value, eqx.combine(dynamic, static)

    def _solve(self, problem, value, packed) -> Found:
        value, packed, problem = implicit.detach((value, packed, problem))
        if self.linear:
            return self._direct(problem, value, packed)
        found = run_solver(
            problem, self.iterative_solver(), value, packed,
            max_steps=self.max_steps, adjoint=implicit.DetachedAdjoint(),
        )  # fmt: skip
        variables = problem.variables(found.value, found.multipliers)
        optimality = found.optimality if self.constraints else None
        return Found(variables, found.result, found.stats.steps, optimality, DenseOrZero())

    def iterative_solver(self) -> AbstractSolver:
        """The solver of nonlinear rows."""
        if self.solver is not None:
            return self.solver
        return SketchedNewtonAL() if self.constraints else GradNormSmooth(GaussNewton())

    def _direct(self, problem, value, packed) -> Found:
        """Linear rows, with equalities or without."""
        flat, unravel = ravel_pytree(value)
        origin = jnp.zeros_like(flat)
        matrix, constant = jacobian(lambda v: rows(unravel(v), packed), origin)
        n = flat.size
        triangle = reduce_rows(matrix[:-n], -constant[:-n])
        stacked = jnp.concatenate([triangle.matrix, matrix[-n:]])
        target = jnp.concatenate([triangle.target, jnp.zeros_like(flat)])
        multipliers = optimality = None
        if self.equality is None:
            found, inverse = solve_stacked(stacked, target)
            feasible = jnp.array(True)
        else:
            shape = packed.equality.out_shape
            equality, offset = jacobian(lambda v: _equalities(unravel(v), packed), origin)
            found, dual, inverse = solve_with_equalities(stacked, target, equality, -offset)
            to_tree = ravel_pytree(jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shape))[1]
            multipliers = implicit.Multipliers(equality=to_tree(dual))
            gradient = stacked.T @ (stacked @ found - target) + equality.T @ dual
            optimality = jnp.max(jnp.abs(gradient))
            missing = jnp.abs(equality @ found + offset)
            length = jnp.sum(jnp.abs(equality), axis=1) * jnp.max(jnp.abs(found)) + jnp.abs(offset)
            feasible = jnp.all(missing <= float(jnp.finfo(flat.dtype).eps) ** 0.5 * length)
        finite = jnp.all(jnp.isfinite(found))
        result = RESULTS.where(feasible, RESULTS.successful, RESULTS.infeasible_stationary)
        result = RESULTS.where(finite, result, RESULTS.linear_solve_failed)
        found = unravel(jnp.where(finite, found, flat))
        one = jnp.ones((), jnp.int32)
        return Found(problem.variables(found, multipliers), result, one, optimality, inverse)

    def report(
        self,
        value: PyTree,
        packed: Packed,
        result: RESULTS,
        steps: Array,
        optimality: Array | None = None,
        violation: Array | None = None,
        slope: tuple[Array, Array] | None = None,
    ) -> ConstraintReport:
        """Judge a point: residuals, rank, and whether it is stationary.

        Args:
            value: The point.
            packed: Its rows.
            result: How the solve ended.
            steps: Of the solver.
            optimality: As the solver measured it; `None` takes the cosine of the rows alone.
            violation: Of constraints; `None` where there are none.
            slope: Gradient and norm of all rows, if others have the same unknowns.

        Returns:
            The report.
        """
        value, packed = implicit.detach((value, packed))
        flat, unravel = ravel_pytree(value)
        n = flat.size
        matrix, r = jacobian(lambda v: rows(unravel(v), packed), flat)
        gradient, size = (matrix.T @ r, jnp.sqrt(jnp.sum(r**2))) if slope is None else slope
        length = jnp.sqrt(jnp.sum(matrix**2, axis=0)) * size
        cosine = jnp.max(jnp.abs(gradient) / jnp.where(length > 0, length, 1))
        matrix, r = matrix[:-n], r[:-n]
        if self.equality is not None:
            exact = jacobian(lambda v: _equalities(unravel(v), packed), flat)
            matrix, r = jnp.concatenate([matrix, exact[0]]), jnp.concatenate([r, exact[1]])
        values = singular_values(reduce_rows(matrix, r).matrix)
        finite = jnp.isfinite(cosine) & tree.all_finite(value)
        ok = result == RESULTS.successful
        if optimality is None:
            # a solver that stands still at a stationary point has done all that the precision
            # allows
            ok |= cosine <= float(jnp.finfo(flat.dtype).eps) ** 0.5
            optimality = cosine
        if violation is None:
            violation = jnp.zeros_like(cosine)
        ok &= finite & jnp.isfinite(violation)
        blocks = _blocks(value, packed)
        counts = {b: _count(v, packed.mask.get(b)) for b, v in blocks.items()}
        return ConstraintReport(
            ok=ok,
            result=result,
            steps=steps,
            optimality=optimality,
            max_residual={b: jnp.max(jnp.abs(v), initial=0) for b, v in blocks.items()},
            rms_residual={
                b: jnp.sqrt(jnp.sum(v**2) / jnp.maximum(counts[b], 1).astype(v.dtype))
                for b, v in blocks.items()
            },
            rows=jnp.sum(jnp.stack(list(counts.values())), dtype=jnp.int32),
            rank=numerical_rank(values),
            condition_number=jnp.max(values, initial=0) / jnp.min(values, initial=jnp.inf),
            violation=violation,
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
    ridge = ridge_of(packed)
    return weighted, jax.tree.map(lambda v: ridge.astype(v.dtype) * v, variables)


def ridge_of(packed: Packed) -> Array:
    """ρ, and 1 where there are no other rows because the solve failed: never a singular system."""
    return jnp.where(packed.ok, packed.ridge, 1)


def half_square(variables, packed):
    """The objective of the constrained solve."""
    squares = [jnp.sum(v**2) for v in jax.tree.leaves(rows(variables, packed))]
    return sum(squares[1:], squares[0]) / 2


def _equalities(variables, packed):
    return _gated(packed.equality, variables, packed)


def _inequalities(variables, packed):
    return _gated(packed.inequality, variables, packed)


def _gated(fun, variables, packed):
    """A constraint, zero and without derivative where the solve failed."""
    variables, fun, args = gate(packed.ok, (variables, fun, packed.args))
    return jax.tree.map(lambda v: jnp.where(packed.ok, v, 0), fun(variables, args))


def _violation(problem, value, packed):
    if isinstance(problem, LeastSquares):
        return None
    return problem.feasibility(value, packed)


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
