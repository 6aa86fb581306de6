"""Linear solvers of lineax for the implicit rule, and ours for lineax and optimistix.

Needs the package `lineax`; nothing else in `jaxopt_ext.implicit` does. Import it as
`from jaxopt_ext.implicit import lineax_adapter`.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from jaxopt_ext.implicit.linear_solvers import (
    LinearOperator,
    LinearSolver,
    MinimumNorm,
    _as_inverse,
    _times,
    _unit,
)


def _like_arrays(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), tree)


class _FromLineax(eqx.Module):
    solver: lx.AbstractLinearSolver

    def __call__(self, operator: LinearOperator, rhs: PyTree) -> PyTree:
        """Return x with operator(x) = rhs."""
        tags: Any = ()
        if operator.positive_definite:
            tags = (lx.symmetric_tag, lx.positive_semidefinite_tag)
        elif operator.symmetric:
            tags = lx.symmetric_tag

        def solve(mv, b):
            unit, scale = _unit(b)  # absolute tolerances see a right-hand side of size 1
            system = lx.FunctionLinearOperator(mv, _like_arrays(b), tags)
            return _times(scale, lx.linear_solve(system, unit, self.solver, throw=False).value)

        if not self.solver.assume_full_rank():
            return solve(operator.mv, rhs)  # a pseudo-inverse: lineax has the rule for it
        return _as_inverse(operator, rhs, solve)


class _ToLineax(lx.AbstractLinearSolver):
    solver: LinearSolver

    def init(self, operator, options):
        if operator.in_size() != operator.out_size():
            raise ValueError(
                f"to_lineax: the operator maps {operator.in_size()} numbers to "
                f"{operator.out_size()}, expected a square operator"
            )
        return operator

    def compute(self, state, vector, options):
        hints = dict(
            symmetric=bool(lx.is_symmetric(state)),
            positive_definite=bool(lx.is_positive_semidefinite(state)),
        )
        into, out = state.in_structure(), state.out_structure()
        if eqx.tree_equal(into, out) is True:
            x = self.solver(LinearOperator(state.mv, into, **hints), vector)
            return x, lx.RESULTS.successful, {}
        # x and b are unlike: solve on raveled vectors
        flat, _ = ravel_pytree(vector)
        _, unravel = ravel_pytree(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), into))
        system = LinearOperator(lambda v: ravel_pytree(state.mv(unravel(v)))[0], flat, **hints)
        return unravel(self.solver(system, flat)), lx.RESULTS.successful, {}

    def transpose(self, state, options):
        return state.transpose(), {}

    def conj(self, state, options):
        return lx.conj(state), {}

    def assume_full_rank(self):
        return not isinstance(self.solver, MinimumNorm)


def from_lineax(lineax_solver: lx.AbstractLinearSolver) -> LinearSolver:
    """Use a linear solver of lineax in the implicit rule.

    The hints of the operator become tags. The right-hand side is scaled to size 1, so that
    absolute tolerances hold for small cotangents too. A solve that fails raises nothing; it keeps
    what lineax returns, and `solve_linear` reports its residual. Solvers that assume full rank
    (LU, QR, Cholesky, CG, GMRES, BiCGStab, ...) are differentiated by JAX's own rule and can be
    exported. The others (SVD, LSMR, ...) keep lineax's rule, which raises when a
    tangent solve fails and which cannot be exported. Neither kind runs inside
    `shard_map(..., check_vma=True)`.

    Args:
        lineax_solver: The solver, for instance `lineax.CG(rtol=1e-8, atol=1e-8)`. CG and
            Cholesky need an operator that is declared positive definite.

    Returns:
        A linear solver `(operator, rhs) -> x`.

    Raises:
        ValueError: It is not a lineax solver.

    Reference:
        Rader, Lyons, Kidger, "Lineax: Unified Linear Solves and Linear Least-Squares in JAX and
        Equinox", arXiv:2311.17283 (2023).

    Example:
        >>> import jax.numpy as jnp, lineax
        >>> from jaxopt_ext.implicit import LinearOperator
        >>> from jaxopt_ext.implicit.lineax_adapter import from_lineax
        >>> operator = LinearOperator(lambda v: 2.0 * v, jnp.zeros(2))
        >>> print(from_lineax(lineax.LU())(operator, jnp.array([2.0, 4.0])))
        [1. 2.]
    """
    if not isinstance(lineax_solver, lx.AbstractLinearSolver):
        raise ValueError(
            f"from_lineax: lineax_solver is {lineax_solver!r}, expected a lineax solver such as "
            "lineax.LU()"
        )
    return _FromLineax(lineax_solver)


def to_lineax(solver: LinearSolver) -> lx.AbstractLinearSolver:
    """Use a linear solver of this library in lineax and optimistix.

    For square operators. It reports success always: lineax alone raises, where the answer is not
    finite.

    Args:
        solver: A linear solver `(operator, rhs) -> x`.

    Returns:
        A lineax solver, for `lineax.linear_solve` and
        `optimistix.ImplicitAdjoint(linear_solver=...)`.

    Raises:
        ValueError: `solver` is not callable.

    Reference:
        Rader, Lyons, Kidger, "Lineax: Unified Linear Solves and Linear Least-Squares in JAX and
        Equinox", arXiv:2311.17283 (2023).

    Example:
        >>> import jax.numpy as jnp, lineax
        >>> from jaxopt_ext.implicit import MINRES
        >>> from jaxopt_ext.implicit.lineax_adapter import to_lineax
        >>> A = lineax.MatrixLinearOperator(jnp.diag(jnp.array([1.0, -2.0])), lineax.symmetric_tag)
        >>> x = lineax.linear_solve(A, jnp.array([3.0, 4.0]), to_lineax(MINRES())).value
        >>> print(jnp.round(x, 4))
        [ 3. -2.]
    """
    if not callable(solver) or isinstance(solver, type):
        raise ValueError(
            f"to_lineax: solver is {solver!r}, expected a linear solver such as MINRES()"
        )
    return _ToLineax(solver)
