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
            return unravel(finite_or_zero(self.apply(flat)))

        return _as_inverse(operator, rhs, solve)

    def apply(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        """(MᵀM)⁻¹ times a vector."""
        half = _triangular(self.factor, vector / self.scale, transpose=True)
        return _triangular(self.factor, half) / self.scale


class Range(eqx.Module):
    """Equality rows C, by singular values of C with rows of unit length; small ones are dropped.

    Attributes:
        left: Left singular vectors.
        right: Right ones, as rows, zero where dropped: a basis of the rows' span.
        inverses: 1 / singular values, zero where dropped.
        lengths: The lengths of the rows.
    """

    left: Float[Array, "p k"]
    right: Float[Array, "k n"]
    inverses: Float[Array, " k"]
    lengths: Float[Array, " p"]

    def meet(self, level: Float[Array, " p"]) -> Float[Array, " n"]:
        """The shortest z with C z = level, if there is one."""
        return self.right.T @ (self.inverses * (self.left.T @ (level / self.lengths)))

    def dual(self, gradient: Float[Array, " n"]) -> Float[Array, " p"]:
        """A ν with Cᵀν equal to the gradient's part in the span of the rows."""
        return (self.left @ (self.inverses * (self.right @ gradient))) / self.lengths

    def free(self, vector: Array) -> Array:
        """The part, along the last axis, that the equalities leave free."""
        return vector - (vector @ self.right.T) @ self.right


class KKTInverse(eqx.Module):
    """The inverse of [[MᵀM, Cᵀ], [C, 0]], a generalized one where rows of C depend on each other.

    Attributes:
        normal: (MᵀM)⁻¹ on what the equalities leave free.
        range: The equalities.
    """

    normal: NormalInverse
    range: Range

    def __call__(self, operator: LinearOperator, rhs: PyTree) -> PyTree:
        """Return (x, ν) with operator((x, ν)) = rhs; zero where that is not finite."""

        def solve(mv, b):
            flat, unravel = ravel_pytree(b[0])
            level, to_dual = ravel_pytree(b[1])

            def curvature(z):
                return ravel_pytree(mv((unravel(z), to_dual(jnp.zeros_like(level))))[0])[0]

            met = self.range.meet(level)
            inside = self.range.free(flat - curvature(met))
            z = met + self.range.free(self.normal.apply(inside))
            dual = self.range.dual(flat - curvature(z))
            return unravel(finite_or_zero(z)), to_dual(finite_or_zero(dual))

        return _as_inverse(operator, rhs, solve)


class DenseOrZero(eqx.Module):
    """`implicit.Dense`, and zero where its answer is not finite (a singular Hessian, a NaN)."""

    def __call__(self, operator: LinearOperator, rhs: PyTree) -> PyTree:
        """Return x with operator(x) = rhs."""

        def solve(mv, b):
            inner = LinearOperator(mv, operator.structure, operator.symmetric)
            flat, unravel = ravel_pytree(Dense()(inner, b))
            return unravel(finite_or_zero(flat))

        return _as_inverse(operator, rhs, solve, operator.symmetric)


def solve_with_equalities(
    matrix: Float[Array, "q n"],
    target: Float[Array, " q"],
    equality: Float[Array, "p n"],
    level: Float[Array, " p"],
) -> tuple[Float[Array, " n"], Float[Array, " p"], KKTInverse]:
    """Argmin ‖M z − t‖ subject to C z = d, its multipliers, and the inverse of the KKT matrix.

    By the null-space method. M and C together have full column rank. Rows of C that depend on
    others are recognized; if they contradict them, the nearest level that can be met is.
    """
    squares = jnp.sum(equality**2, axis=1)
    lengths = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    left, values, right = jnp.linalg.svd(equality / lengths[:, None], full_matrices=False)
    kept = values > 100 * jnp.finfo(values.dtype).eps * jnp.max(values, initial=0)
    span = Range(
        left,
        jnp.where(kept[:, None], right, 0),
        jnp.where(kept, 1 / jnp.where(kept, values, 1), 0),
        lengths,
    )
    met = span.meet(level)
    # what is not free is held at zero by rows as long as the longest column
    hold = jnp.max(_lengths(matrix)) * span.right
    stacked = jnp.concatenate([span.free(matrix), hold])
    zero = jnp.zeros(hold.shape[0], hold.dtype)
    step, normal = solve_stacked(stacked, jnp.concatenate([target - matrix @ met, zero]))
    found = met + span.free(step)
    dual = -span.dual(matrix.T @ (matrix @ found - target))
    return found, dual, KKTInverse(normal, span)


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


def _as_inverse(operator, rhs, solve, symmetric=True):
    # as one vector: a part of the right-hand side that is constant has no transpose of its own
    flat, unravel = ravel_pytree(vary_like(rhs, operator.structure))

    def on_vectors(fun):
        return lambda v: ravel_pytree(fun(unravel(v)))[0]

    def solve_vector(mv, b):
        return ravel_pytree(solve(lambda v: unravel(mv(ravel_pytree(v)[0])), unravel(b)))[0]

    answer = jax.lax.custom_linear_solve(
        on_vectors(operator.mv), flat, solve_vector, transpose_solve=solve_vector,
        symmetric=symmetric,
    )  # fmt: skip
    return unravel(answer)
