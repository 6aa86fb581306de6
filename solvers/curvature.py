"""The linear algebra of regularized Newton steps: forms of H, and how to solve with H + λI.

A form is what is kept of H at one point. It serves all trials from that point, each of which
solves (H + λI) u = −g with another λ:

* `Matrix`: a Cholesky factorization per trial, n³/3;
* `Spectrum`: eigenvalues on an orthonormal basis of r vectors and one number on its complement,
  computed once per point; O(n r) per trial. Rank one, low rank, limited memory and the full
  eigendecomposition (r = n) are all of this form;
* `Diagonal`: O(n);
* `MatrixFree`: conjugate gradients, stopped by the inexactness rule of the method.

All vectors are raveled, in the coordinates of the metric.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxopt_ext.core.solver import Number
from jaxopt_ext.implicit.linear_solvers import coordinates_and_rest


class Direction(NamedTuple):
    """The solution of (H + λI) u = −g.

    Attributes:
        step: u, or zero where there is none.
        ok: Whether it could be computed; not if H + λI is not positive definite.
        products: Hessian-vector products that it took.
    """

    step: Float[Array, " n"]
    ok: Bool[Array, ""]
    products: Int[Array, ""] | int


class Curvature(eqx.Module):
    """Base of the forms of H at one point."""

    @abc.abstractmethod
    def direction(self, shift: Array, gradient: Float[Array, " n"]) -> Direction:
        """Solve (H + shift·I) u = −gradient."""

    @abc.abstractmethod
    def product(self, v: Float[Array, " n"]) -> Float[Array, " n"]:
        """H v."""


class Matrix(Curvature):
    """H as a dense matrix.

    Attributes:
        matrix: H; only its lower triangle is read by `direction`.
    """

    matrix: Float[Array, "n n"]

    def direction(self, shift, gradient):
        """See `Curvature`; one Cholesky factorization."""
        shifted = self.matrix + shift * jnp.eye(gradient.size, dtype=gradient.dtype)
        factor = jnp.linalg.cholesky(shifted, symmetrize_input=False)
        ok = jnp.isfinite(factor[-1, -1])  # a failed factorization is NaN throughout
        step = -jax.scipy.linalg.cho_solve((factor, True), gradient)
        return Direction(jnp.where(ok, step, 0), ok, 0)

    def product(self, v):
        """See `Curvature`."""
        return self.matrix @ v


class Spectrum(Curvature):
    """H = Q diag(values) Qᵀ + rest · (I − Q Qᵀ).

    Attributes:
        basis: Q, orthonormal columns.
        values: Eigenvalues on them.
        rest: The eigenvalue on their complement.
    """

    basis: Float[Array, "n r"]
    values: Float[Array, " r"]
    rest: Float[Array, ""]

    @classmethod
    def of_factor(cls, factor: Float[Array, "n r"]) -> "Spectrum":
        """The spectrum of U Uᵀ."""
        zero = jnp.zeros((), factor.dtype)
        if factor.shape[1] == 1:
            squared = jnp.sum(factor**2)
            return cls(factor / jnp.sqrt(jnp.where(squared > 0, squared, 1)), squared[None], zero)
        basis, singular, _ = jnp.linalg.svd(factor, full_matrices=False)
        return cls(basis, singular**2, zero)

    @classmethod
    def of_matrix(cls, matrix: Float[Array, "n n"], psd: str = "none") -> "Spectrum":
        """The spectrum of a symmetric matrix; negative eigenvalues according to `psd`."""
        values, basis = jnp.linalg.eigh(matrix)
        return cls(basis, semidefinite(values, psd), jnp.zeros((), matrix.dtype))

    def direction(self, shift, gradient):
        """See `Curvature`."""
        values, rest = self.values + shift, self.rest + shift
        ok = (jnp.min(values) > 0) & (rest > 0)
        inside, outside = self._parts(gradient)
        step = -(
            self.basis @ (inside / jnp.where(ok, values, 1)) + outside / jnp.where(ok, rest, 1)
        )
        return Direction(jnp.where(ok, step, 0), ok, 0)

    def product(self, v):
        """See `Curvature`."""
        inside, outside = self._parts(v)
        return self.basis @ (self.values * inside) + self.rest * outside

    def _parts(self, v):
        """Coordinates in the basis and what is left of v, which must be accurate: it meets 1/λ."""
        n, r = self.basis.shape
        return (
            coordinates_and_rest(self.basis, v) if r < n else (self.basis.T @ v, jnp.zeros_like(v))
        )


class Diagonal(Curvature):
    """H diagonal.

    Attributes:
        values: The diagonal, or one number for all of it.
    """

    values: Float[Array, "*n"]

    def direction(self, shift, gradient):
        """See `Curvature`."""
        values = self.values + shift
        ok = jnp.min(values) > 0
        return Direction(jnp.where(ok, -gradient / jnp.where(ok, values, 1), 0), ok, 0)

    def product(self, v):
        """See `Curvature`."""
        return self.values * v


class MatrixFree(Curvature):
    """H by its products; solved by preconditioned conjugate gradients.

    The iteration stops as soon as its residual r = (H + λI) u + g has ‖r‖² ≤ ρ λ ⟨−g, u⟩, up to
    rounding, with (1 + √(1 + ρ))² = 4 / (1 − θ). Since r is orthogonal to u, the step then
    decreases f by at least (1 − θ) times what the exact one guarantees. ‖r‖ ≤ θ λ ‖u‖ would do as
    well, but asks for more where H is large compared with λ.

    Attributes:
        matvec: v ↦ H v.
        preconditioner: A form of an approximation of H, or `None`.
        theta: θ in [0, 1).
        max_steps: Products at most; the step so far is then tried.
    """

    matvec: Callable[[Array], Array]
    preconditioner: Curvature | None
    theta: Number
    max_steps: int

    def product(self, v):
        """See `Curvature`."""
        return self.matvec(v)

    def direction(self, shift, gradient):
        """See `Curvature`; not ok where it meets negative curvature of H + λI."""
        rhs = -gradient
        floor = (10 * jnp.finfo(rhs.dtype).eps) ** 2 * jnp.sum(rhs**2)
        slack = ((2 / jnp.sqrt(1 - self.theta) - 1) ** 2 - 1) * shift  # ρ λ

        def precondition(residual):
            if self.preconditioner is None:
                return residual
            step, ok, _ = self.preconditioner.direction(shift, residual)
            return jnp.where(ok, -step, residual)

        def going(carry):
            steps, step, residual, _, _, ok = carry
            goal = jnp.maximum(slack * jnp.dot(rhs, step), floor)
            return ok & (steps < self.max_steps) & (jnp.sum(residual**2) > goal)

        def body(carry):
            steps, step, residual, search, size, _ = carry
            image = self.matvec(search) + shift * search
            bend = jnp.dot(search, image)
            ok = bend > 0  # also False for NaN
            length = jnp.where(ok, size / jnp.where(ok, bend, 1), 0)
            step, residual = step + length * search, residual - length * image
            image = precondition(residual)
            new_size = jnp.dot(residual, image)
            search = image + new_size / jnp.where(size > 0, size, 1) * search
            return steps + 1, step, residual, search, new_size, ok

        first = precondition(rhs)
        zero = jnp.zeros((), jnp.int32)
        start = (zero, jnp.zeros_like(rhs), rhs, first, jnp.dot(rhs, first), jnp.array(True))
        steps, step, _, _, _, ok = jax.lax.while_loop(going, body, start)
        return Direction(jnp.where(ok, step, 0), ok, steps)


def semidefinite(values: Array, psd: str) -> Array:
    """Eigenvalues without their negative part: `clip` to 0, `abs`, or `none` to leave them."""
    return {"none": lambda v: v, "clip": lambda v: jnp.maximum(v, 0), "abs": jnp.abs}[psd](values)


def check_psd(owner: str, psd: Any) -> None:
    """Raise ValueError unless `psd` is one of its three words."""
    if psd not in ("none", "clip", "abs"):
        raise ValueError(f"{owner}: psd is {psd!r}, expected 'none', 'clip' or 'abs'")
