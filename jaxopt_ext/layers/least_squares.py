"""Dense least squares by two QR factorizations: of the rows, then of what they amount to.

The first takes the rows of one expert, B ω ≈ d, to a triangle R ω ≈ c with the same minimizer. The
second takes triangles, ridge and coupling rows together. No normal equations: the solution keeps
the accuracy of B and not that of BᵀB.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from jaxopt_ext.implicit.hoist import vary_like
from jaxopt_ext.implicit.linear_solvers import Dense, LinearOperator


class Triangle(eqx.Module):
    """Rows B ω ≈ d reduced to R ω ≈ c: ‖B ω − d‖ = ‖R ω − c‖ for all ω.

    Attributes:
        matrix: R, at most n + 1 rows.
        target: c.
    """

    matrix: Float[Array, "*batch p n"]
    target: Float[Array, "*batch p"]


def reduce_rows(matrix: Float[Array, "m n"], target: Float[Array, " m"]) -> Triangle:
    """The triangle of B ω ≈ d, from the R factor of [B d]; Q is never formed."""
    both = jnp.linalg.qr(jnp.concatenate([matrix, target[:, None]], axis=1), mode="r")
    return Triangle(both[:, :-1], both[:, -1])


def singular_values(matrix: Float[Array, "p n"]) -> Float[Array, " k"]:
    """Of the matrix with columns of unit length, so that the units of the unknowns do not matter.

    Zero columns stay zero.
    """
    return jnp.linalg.svd(matrix / _lengths(matrix)[None, :], compute_uv=False)


def numerical_rank(values: Float[Array, " k"]) -> Int[Array, ""]:
    """The number of singular values above rounding; 0 where they are not finite."""
    eps = jnp.finfo(values.dtype).eps
    above = values > 100 * eps * jnp.max(values, initial=0)
    return jnp.sum(above & jnp.isfinite(values), dtype=jnp.int32)


class NormalInverse(eqx.Module):
    """(MᵀM)⁻¹ from the R factor of M diag(1/scale); a linear solver of the implicit rule.

    Attributes:
        factor: R, upper triangular.
        scale: The lengths of the columns of M.
    """

    factor: Float[Array, "n n"]
    scale: Float[Array, " n"]

    def __call__(self, operator: LinearOperator, rhs: PyTree) -> PyTree:
        """Return x with operator(x) = rhs; zero where that is not finite."""

        def solve(_, b):
            flat, unravel = ravel_pytree(b)
            half = _triangular(self.factor, flat / self.scale, transpose=True)
            return unravel(finite_or_zero(_triangular(self.factor, half) / self.scale))

        return _as_inverse(operator, rhs, solve)


class DenseOrZero(eqx.Module):
    """`implicit.Dense`, and zero where its answer is not finite (a singular Hessian, a NaN)."""

    def __call__(self, operator: LinearOperator, rhs: PyTree) -> PyTree:
        """Return x with operator(x) = rhs."""

        def solve(mv, b):
            inner = LinearOperator(mv, operator.structure, operator.symmetric)
            flat, unravel = ravel_pytree(Dense()(inner, b))
            return unravel(finite_or_zero(flat))

        return _as_inverse(operator, rhs, solve)


def solve_stacked(
    matrix: Float[Array, "q n"], target: Float[Array, " q"]
) -> tuple[Float[Array, " n"], NormalInverse]:
    """Argmin ‖M ω − c‖ for M of full column rank, and the inverse of MᵀM for its derivative."""
    scale = _lengths(matrix)
    q, r = jnp.linalg.qr(matrix / scale[None, :])
    return _triangular(r, q.T @ target) / scale, NormalInverse(r, scale)


def finite_or_zero(vector: Array) -> Array:
    """The vector, or zero if one entry is not finite."""
    return jnp.where(jnp.all(jnp.isfinite(vector)), vector, 0)


def _lengths(matrix):
    squares = jnp.sum(matrix**2, axis=0)
    return jnp.sqrt(jnp.where(squares > 0, squares, 1))


def _triangular(factor, b, transpose=False):
    return jax.scipy.linalg.solve_triangular(factor, b, trans=1 if transpose else 0)


def _as_inverse(operator, rhs, solve):
    rhs = vary_like(rhs, operator.structure)
    return jax.lax.custom_linear_solve(
        operator.mv, rhs, solve, transpose_solve=solve, symmetric=True
    )
