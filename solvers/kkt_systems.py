"""The linear systems of a Newton step on a nonlinear program, and how their curvature is corrected.

After the slack variables are eliminated every step is one symmetric system

    [ W   Jᵀ ] [ dy ]     [ r ]
    [ J  −Δ ] [ dλ ] = − [ q ],

W = H + Σ + τI with the barrier's Σ ≥ 0 and a shift τ, and Δ ≥ 0 diagonal.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxopt_ext.implicit.hoist import cond, vary_like
from jaxopt_ext.solvers.flat_program import Scaling


class Derivatives(NamedTuple):
    """First and second derivatives of a scaled program at a point; fixed variables do not count.

    Attributes:
        gradient: ∇f.
        hessian: dy → H dy, H that of the Lagrangian.
        push: dy → J dy.
        pull: dλ → Jᵀ dλ.
        both: (dy, dλ) → (H dy + Jᵀ dλ, J dy), at the cost of one of them.
        matrices: H and J, or `None` where only products are at hand.
    """

    gradient: Float[Array, " n"]
    hessian: Callable[[Array], Array]
    push: Callable[[Array], Array]
    pull: Callable[[Array], Array]
    both: Callable[[Array, Array], tuple[Array, Array]]
    matrices: tuple[Float[Array, "n n"], Float[Array, "m n"]] | None


class Units(NamedTuple):
    """What the vectors of a system stand for.

    Attributes:
        variables: From flat variables to the user's.
        constraints: From flat values to what the user's constraints return; a pair where there are
            equalities and inequalities.
        scaling: Of the program.
        equalities: Number of equalities, which are the first rows.
    """

    variables: Callable[[Array], PyTree]
    constraints: Callable[[Array], PyTree]
    scaling: Scaling
    equalities: int


class KKTSystem(NamedTuple):
    """The matrix K of one step.

    Attributes:
        product: v → K v.
        matrix: K, or `None` where only products are at hand.
        diagonal: Of W, or of what is known of it.
        push: dy → J dy.
        pull: dλ → Jᵀ dλ.
        jacobian: J, or `None`.
        relaxation: The diagonal of Δ.
        units: What the vectors stand for, if anything.
    """

    product: Callable[[Array], Array]
    matrix: Float[Array, "n n"] | None
    diagonal: Float[Array, " n"]
    push: Callable[[Array], Array]
    pull: Callable[[Array], Array]
    jacobian: Float[Array, "m n"] | None
    relaxation: Float[Array, " m"]
    units: Units | None = None

    @property
    def size(self) -> int:
        """Number of dy."""
        return self.diagonal.size

    @property
    def rows(self) -> int:
        """Number of dλ."""
        return self.relaxation.size


def reduced_hessian(
    hessian: Array, jacobian: Array, relaxation: Array, equalities: int, dependent: Array
) -> Float[Array, "n n"]:
    """W + J_IᵀΔ_I⁻¹J_I on the null space of the equalities J_E, and a positive number beyond it.

    Its being positive definite is the right inertia of K, and makes the step a descent direction
    near feasible points. Where the rows of J_E are dependent their null space is larger than its
    basis here; there J_EᵀΔ_E⁻¹J_E is added instead.

    Args:
        hessian: W.
        jacobian: J, the rows of the equalities first.
        relaxation: The diagonal of Δ; positive for inequalities, and where `dependent`.
        equalities: Number of rows of J_E, at most as many as variables.
        dependent: Whether the rows of J_E are dependent.
    """
    inequality, equality = jacobian[equalities:], jacobian[:equalities]
    full = hessian + inequality.T @ (inequality / relaxation[equalities:, None])
    if equalities == 0:
        return full
    identity = jnp.eye(len(full), dtype=full.dtype)
    ridge = jnp.where(dependent, 1.0, 0.0) * jnp.eye(equalities, dtype=full.dtype)
    factor = jax.scipy.linalg.cho_factor(equality @ equality.T + ridge, lower=True)
    beyond = equality.T @ jax.scipy.linalg.cho_solve(factor, equality)
    projection = identity - beyond
    size = jnp.max(jnp.abs(jnp.diagonal(full)))
    positive = jnp.where(size > 0, size, 1)
    projected = projection @ full @ projection + positive * beyond
    stiffness = jnp.where(dependent, 1 / relaxation[:equalities], 0)
    return jnp.where(dependent, full + equality.T @ (equality * stiffness[:, None]), projected)


def convexifying_shift(matrix: Array, previous: Array) -> Array:
    """A τ for which matrix + τI is positive definite beyond rounding.

    The first τ tried is 1e-4, or a third of the last one that was needed; it grows by 8.

    Args:
        matrix: Symmetric.
        previous: The last τ > 0 that was needed, or 0.

    Returns:
        τ; 0 where the matrix is positive definite.

    Reference:
        Wächter and Biegler, "On the implementation of an interior-point filter line-search
        algorithm", Mathematical Programming 106, 2006, algorithm IC.
    """
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)
    rounding = 100 * len(matrix) * jnp.finfo(matrix.dtype).eps

    def indefinite(shift):
        shifted = matrix + shift * identity
        pivots = jnp.diagonal(jnp.linalg.cholesky(shifted)) ** 2
        return ~(pivots > rounding * jnp.abs(jnp.diagonal(shifted))).all()  # NaN where it failed

    def body(state):
        shift, _ = state
        shift = larger_shift(shift, previous)
        return shift, indefinite(shift) & jnp.isfinite(shift)

    zero = jnp.zeros((), matrix.dtype)
    start = vary_like((zero, indefinite(zero)), matrix, previous)
    shift, _ = jax.lax.while_loop(lambda state: state[1], body, start)
    return shift


def larger_shift(shift: Array, previous: Array) -> Array:
    """The τ to try after `shift`; see `convexifying_shift`."""
    first = jnp.where(previous > 0, jnp.maximum(previous / 3, 1e-20), 1e-4)
    return jnp.where(shift == 0, first, 8 * shift)


def dense_derivatives(gradient: Array, hessian: Array, jacobian: Array) -> Derivatives:
    """From the matrices."""

    def both(dy, drows):
        return hessian @ dy + jacobian.T @ drows, jacobian @ dy

    return Derivatives(
        gradient,
        lambda dy: hessian @ dy,
        lambda dy: jacobian @ dy,
        lambda drows: jacobian.T @ drows,
        both,
        (hessian, jacobian),
    )


def rescaled(derivatives: Derivatives, objective: Array, rows: Array) -> Derivatives:
    """With factors on objective and constraints; H is not touched, no step is taken then."""
    gradient = objective * derivatives.gradient
    if derivatives.matrices is not None:
        hessian, jacobian = derivatives.matrices
        return dense_derivatives(gradient, hessian, rows[:, None] * jacobian)

    def both(dy, drows):
        along, values = derivatives.both(dy, rows * drows)
        return along, rows * values

    return Derivatives(
        gradient,
        derivatives.hessian,
        lambda dy: rows * derivatives.push(dy),
        lambda drows: derivatives.pull(rows * drows),
        both,
        None,
    )


def newton_system(
    derivatives: Derivatives, diagonal: Array, relaxation: Array, newton: Array, units: Units
) -> KKTSystem:
    """K, with H only in Newton's steps."""
    n = diagonal.size
    if derivatives.matrices is not None:
        hessian, jacobian = derivatives.matrices
        block = jnp.where(newton, hessian, 0) + jnp.diag(diagonal)
        matrix = jnp.block([[block, jacobian.T], [jacobian, -jnp.diag(relaxation)]])

        def multiply(v):  # in blocks: where nothing else needs the matrix, it is not built
            dy, drows = v[:n], v[n:]
            along = block @ dy + jacobian.T @ drows
            return jnp.concatenate([along, jacobian @ dy - relaxation * drows])

        return KKTSystem(
            multiply, matrix, jnp.diagonal(block), derivatives.push,
            derivatives.pull, jacobian, relaxation, units,
        )  # fmt: skip

    def apart(dy, drows):
        return derivatives.pull(drows), derivatives.push(dy)

    def product(v):
        dy, drows = v[:n], v[n:]
        along, rows = cond(newton, lambda: derivatives.both(dy, drows), lambda: apart(dy, drows))
        return jnp.concatenate([along + diagonal * dy, rows - relaxation * drows])

    return KKTSystem(
        product, None, diagonal, derivatives.push, derivatives.pull, None, relaxation, units
    )
