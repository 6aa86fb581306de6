"""Linear solves for the implicit rule.

A linear solver is a callable `(operator, rhs) -> solution` on PyTrees. It must be built from
operations that JAX can transpose: dense factorizations from `jnp.linalg`, or an iterative method
inside `jax.lax.custom_linear_solve`. Then one rule in forward mode gives all the others.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from jaxopt_ext.implicit.hoist import vary_like


class LinearOperator(eqx.Module):
    """A square linear map on PyTrees with what is known of its structure.

    Attributes:
        mv: The map, PyTree to PyTree of the same structure.
        structure: A PyTree with the shapes and dtypes of its argument.
        symmetric: Whether the matrix equals its transpose.
        positive_definite: Whether it is, besides, symmetric positive definite. It is believed,
            not checked.
    """

    mv: Callable[[PyTree], PyTree]
    structure: PyTree
    symmetric: bool = eqx.field(static=True, default=False)
    positive_definite: bool = eqx.field(static=True, default=False)

    @property
    def size(self) -> int:
        """Number of unknowns."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.structure))

    def as_matrix(self) -> Float[Array, "n n"]:
        """The dense matrix on raveled PyTrees; costs `n` products."""
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.structure)
        flat, unravel = ravel_pytree(zeros)
        columns = jax.vmap(lambda v: ravel_pytree(self.mv(unravel(v)))[0])
        return columns(vary_like(jnp.eye(flat.size, dtype=flat.dtype), self.structure)).T


@runtime_checkable
class LinearSolver(Protocol):
    """The protocol: any callable `(operator, rhs) -> solution` that JAX can transpose."""

    def __call__(self, operator: LinearOperator, rhs: PyTree) -> PyTree:
        """Return x with operator(x) = rhs."""
        ...


class Dense(eqx.Module):
    """Direct solve with the dense matrix: Cholesky if positive definite, else LU.

    Costs `n` operator products and O(n³) operations; one factorization serves all right-hand
    sides of a `vmap` over cotangents.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import Dense, LinearOperator
        >>> A = jnp.array([[2.0, 1.0], [1.0, 3.0]])
        >>> operator = LinearOperator(lambda v: A @ v, jnp.zeros(2), symmetric=True)
        >>> print(Dense()(operator, jnp.array([3.0, 4.0])))
        [1. 1.]
    """

    def __call__(self, operator: LinearOperator, rhs: PyTree) -> PyTree:
        """Return x with operator(x) = rhs."""
        matrix = operator.as_matrix()
        flat, unravel = ravel_pytree(rhs)
        if operator.positive_definite:
            factor = jax.scipy.linalg.cho_factor(matrix, lower=True)
            return unravel(jax.scipy.linalg.cho_solve(factor, flat))
        return unravel(jnp.linalg.solve(matrix, flat))


class _Krylov(eqx.Module):
    """Shared by the iterative methods: scaled right-hand side, JAX's own transposable solve.

    The right-hand side is divided by its largest entry first. Cotangents can be as small as the
    loss that a user chose, and squared norms of theirs underflow.
    """

    rtol: float | None = None
    max_steps: int | None = eqx.field(static=True, default=None)

    def method(self, mv, rhs, tol, max_steps) -> PyTree:
        raise NotImplementedError  # the subclasses below

    def __call__(self, operator: LinearOperator, rhs: PyTree) -> PyTree:
        """Return x with operator(x) = rhs to relative residual `rtol`."""
        dtype = jnp.result_type(*jax.tree.leaves(rhs))
        tol = jnp.finfo(dtype).eps ** 0.75 if self.rtol is None else self.rtol
        max_steps = min(10 * operator.size, 1000) if self.max_steps is None else self.max_steps

        def solve(mv, b):
            largest = jnp.max(jnp.stack([jnp.max(jnp.abs(v)) for v in jax.tree.leaves(b)]))
            scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
            unit = jax.tree.map(lambda v: v / scale.astype(v.dtype), b)
            x = self.method(mv, unit, tol, max_steps)
            return jax.tree.map(lambda v: v * scale.astype(v.dtype), x)

        symmetric = operator.symmetric or operator.positive_definite
        return jax.lax.custom_linear_solve(
            operator.mv, rhs, solve, transpose_solve=solve, symmetric=symmetric
        )


class CG(_Krylov):
    """Conjugate gradients (JAX's own), for positive definite operators; matrix-free.

    Args:
        rtol: Relative residual, dimensionless; `None` means eps^(3/4) of the dtype.
        max_steps: Iterations at most; `None` means min(10 n, 1000).

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import CG, LinearOperator
        >>> d = jnp.array([1.0, 2.0, 4.0])
        >>> operator = LinearOperator(lambda v: d * v, d, positive_definite=True)
        >>> x = CG()(operator, jnp.array([1e-30, 2e-30, 4e-30]))
        >>> bool(jnp.allclose(x, 1e-30, rtol=1e-5, atol=0.0))
        True
    """

    def method(self, mv, rhs, tol, max_steps) -> PyTree:
        """Run the iteration on a right-hand side of unit size."""
        return jax.scipy.sparse.linalg.cg(mv, rhs, tol=tol, maxiter=max_steps)[0]


class GMRES(_Krylov):
    """Restarted GMRES (JAX's own), for any nonsingular operator; matrix-free.

    Args:
        rtol: Relative residual, dimensionless; `None` means eps^(3/4) of the dtype.
        max_steps: Restarts at most; `None` means min(10 n, 1000).
        restart: Size of the Krylov space between restarts.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import GMRES, LinearOperator
        >>> operator = LinearOperator(lambda v: jnp.array([v[0] + v[1], -v[1]]), jnp.zeros(2))
        >>> print(jnp.round(GMRES()(operator, jnp.array([3.0, -1.0])), 4))
        [2. 1.]
    """

    restart: int = eqx.field(static=True, default=20)

    def method(self, mv, rhs, tol, max_steps) -> PyTree:
        """Run the iteration on a right-hand side of unit size."""
        return jax.scipy.sparse.linalg.gmres(
            mv, rhs, tol=tol, maxiter=max_steps, restart=self.restart, solve_method="batched"
        )[0]


class Auto(eqx.Module):
    """Dense up to a size, matrix-free above it.

    Above `direct_below` unknowns: CG where the operator is positive definite, else GMRES.

    Args:
        direct_below: Largest number of unknowns that is solved by a dense factorization.
    """

    direct_below: int = eqx.field(static=True, default=512)

    def __call__(self, operator: LinearOperator, rhs: PyTree) -> PyTree:
        """Return x with operator(x) = rhs."""
        solver: Any
        if operator.size <= self.direct_below:
            solver = Dense()
        elif operator.positive_definite:
            solver = CG()
        else:
            solver = GMRES()
        return solver(operator, rhs)
