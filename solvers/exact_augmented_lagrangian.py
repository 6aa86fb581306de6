"""The merit function of `SketchedNewtonAL`, its penalties, and how exact a step has to be.

With the Lagrangian L = f + λᵀc, the distances d from the walls and the barrier μ,

    M = L − μ Σ log d + η₁/2 ‖c‖² + η₂/2 ‖D ∇(L − μ Σ log d)‖²,

where D shrinks an entry with its distances from the walls; without walls D = I. A solution is a
local minimizer of M in variables and multipliers together, so a Newton step can be accepted whole.
Where there are bounds only, η₂ would only make steps shorter along curved valleys: its term is left
out, and M is the barrier function.
"""

import abc
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxopt_ext.core import check
from jaxopt_ext.core.solver import Number
from jaxopt_ext.solvers.flat_program import FlatProgram

PENALTY_CAP = 1e10
GRADIENT_PENALTY_CAP = 1e-10


def merit_parts(
    program: FlatProgram,
    barrier: Array,
    objective: Array,
    gradient: Array,
    rows: Array,
    w: Array,
    multipliers: Array,
) -> Float[Array, " 4"]:
    """L, −μ Σ log d, ½‖c‖² and ½‖D ∇(L − μ Σ log d)‖², whose weighted sum is M.

    Args:
        program: The program.
        barrier: μ.
        objective: Scaled f.
        gradient: Of the scaled Lagrangian in y.
        rows: Scaled constraints without slack variables.
        w: Variables and slack variables.
        multipliers: Of the rows; where there are none, the last part is 0.
    """
    c = program.with_slack(rows, w[program.size :])
    distances = program.walls.distances(w)
    logs = barrier * program.walls.barrier(distances)
    residual = jnp.concatenate([gradient, multipliers[program.equalities :]])
    residual -= program.walls.pull(barrier * program.walls.push(distances))
    scaled = program.free * program.walls.closeness(w) * residual
    return jnp.stack(
        [
            objective + jnp.vdot(multipliers, c),
            logs,
            jnp.vdot(c, c) / 2,
            jnp.vdot(scaled, scaled) / 2 if rows.size else jnp.zeros_like(logs),
        ]
    )


def descends(merit: Array, slope: Array, penalty: Array, gradient_penalty: Array) -> Array:
    """Whether ⟨∇M, d⟩ ≤ −η₂/2 · (‖c‖² + ‖D∇L‖²).

    Args:
        merit: The parts of M.
        slope: Their derivatives along d.
        penalty: η₁.
        gradient_penalty: η₂.
    """
    along = slope[0] + slope[1] + penalty * slope[2] + gradient_penalty * slope[3]
    return along <= -gradient_penalty * (merit[2] + merit[3])


def capped(penalty: Array, gradient_penalty: Array) -> Array:
    """Whether the penalties have left the range in which they mean something."""
    return (penalty > PENALTY_CAP) | (gradient_penalty < GRADIENT_PENALTY_CAP)


class Sizes(NamedTuple):
    """What a rule for the accuracy may depend on.

    Attributes:
        residual: Norm of the right-hand side of the system.
        optimality: The KKT residual R.
        hessian: Frobenius norm of W, or NaN where W is not dense.
        jacobian: Of J.
        matrix: Of K.
        least: Smallest eigenvalue of J_E J_Eᵀ.
        decrease: The constant of the line search.
        penalty: η₁.
        gradient_penalty: η₂.
    """

    residual: Array
    optimality: Array
    hessian: Array
    jacobian: Array
    matrix: Array
    least: Array
    decrease: Number
    penalty: Array
    gradient_penalty: Array


class Accuracy(eqx.Module):
    """Base: how small the residual of an inner solve must be.

    The state of a rule is one number, the sharpness. It only falls, and does so with every change
    of the penalties, because η₁ amplifies the error in the constraints.
    """

    @property
    def first(self) -> Number:
        """The sharpness at the start."""
        return 1.0

    def update(self, sharpness: Array, sizes: Sizes) -> Array:
        """The sharpness at a new point, or with new penalties."""
        return sharpness

    @abc.abstractmethod
    def tolerance(self, sharpness: Array, sizes: Sizes) -> Array:
        """What the residual must not exceed."""


class RelativeAccuracy(Accuracy):
    """‖K d − b‖ ≤ sharpness · min(fraction, R) ‖b‖: superlinear convergence at the least cost.

    Args:
        fraction: Relative residual far from the solution, dimensionless, in (0, 1).
        superlinear: Whether the KKT residual R bounds it too; else convergence is linear at the
            rate `fraction`.

    Raises:
        ValueError: `fraction` is out of its range.

    Example:
        >>> from jaxopt_ext import solvers
        >>> print(solvers.kkt.RelativeAccuracy(0.1).fraction)
        0.1
    """

    fraction: Number = 0.01
    superlinear: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        check.number("RelativeAccuracy", "fraction", self.fraction, above=0, below=1)

    def tolerance(self, sharpness, sizes):
        """See `Accuracy`."""
        relative = jnp.asarray(self.fraction, sharpness.dtype)
        if self.superlinear:
            relative = jnp.minimum(relative, sizes.optimality)
        floor = 1e3 * jnp.finfo(sharpness.dtype).eps
        return jnp.maximum(sharpness * relative, floor) * sizes.residual


class PublishedAccuracy(Accuracy):
    """The rule of the paper's code: ‖K‖ Ψ ‖K d − b‖ ≤ δ R, Ψ a bound on ‖K⁻¹‖, all norms Frobenius.

    δ follows from the condition that unit steps are accepted near the solution, and has the floor
    1e-6 of the code. With the published constants it sits on that floor from the first step on, so
    that what is asked for is rounding error or beyond; kept for comparison. Needs a dense K.

    Args:
        first: δ at the start, dimensionless, > 0.
        convexity: ξ_B, the lower bound on the curvature that the code assumes.

    Raises:
        ValueError: A setting is out of its range.

    Reference:
        Hong, Na, Mahoney, Kolar, ICML 2023, released code.

    Example:
        >>> from jaxopt_ext import solvers
        >>> print(solvers.kkt.PublishedAccuracy().first)
        0.1
    """

    first: Number = 0.1  # pyright: ignore
    convexity: Number = 0.1

    def __check_init__(self):
        check.number("PublishedAccuracy", "first", self.first, above=0)
        check.number("PublishedAccuracy", "convexity", self.convexity, above=0)

    def inverse_bound(self, sizes: Sizes) -> Array:
        """Ψ."""
        least = jnp.minimum(sizes.least, 1) * jnp.minimum(self.convexity, 1)
        tiny = jnp.finfo(sizes.residual.dtype).tiny
        return 20 * jnp.maximum(sizes.hessian**2, 1) / jnp.maximum(least, tiny)

    def update(self, sharpness, sizes):
        """See `Accuracy`: δ."""
        bound = jnp.maximum(jnp.maximum(sizes.jacobian, sizes.hessian), 1)
        total = 1 + sizes.penalty + sizes.gradient_penalty
        room = (0.5 - sizes.decrease) * sizes.gradient_penalty
        trial = room / (total * bound**2 * self.inverse_bound(sizes) ** 2)
        return jnp.maximum(jnp.minimum(sharpness, trial), 1e-6)

    def tolerance(self, sharpness, sizes):
        """See `Accuracy`."""
        return sharpness * sizes.optimality / (sizes.matrix * self.inverse_bound(sizes))
