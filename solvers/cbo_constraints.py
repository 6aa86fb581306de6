"""Constraints of consensus-based optimization: penalty, drift, sphere and Stiefel manifold."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from jaxopt_ext import implicit
from jaxopt_ext.core import check
from jaxopt_ext.core.solver import Number, default_tolerance


class PenaltyState(NamedTuple):
    """What adapts while a `Penalty` is used.

    Attributes:
        weight: Of the violation in the energy.
        strictness: θ: a mean violation up to 1/√θ is tolerated at present.
        violation: Of the best particle.
    """

    weight: Float[Array, ""]
    strictness: Float[Array, ""]
    violation: Float[Array, ""]


class Penalty(eqx.Module):
    """General constraints by an exact penalty whose weight adapts.

    The particles are weighted by f + μ · violation, the violation being Σ |equality| +
    Σ max(inequality, 0). After each step, if the weighted mean violation is at most 1/√θ, θ grows
    by `growth`; else θ shrinks and μ grows by it. `value` is the feasible particle with the least
    objective ever seen, or the one with the least violation as long as none is feasible.

    Args:
        equality: c_E(variables, args) → PyTree, zero where feasible; or `None`.
        inequality: c_I(variables, args) → PyTree, ≤ 0 where feasible; or `None`.
        weight: μ at the start, in units of the objective per unit of violation, > 0.
        growth: > 1.
        tolerance: Violation up to which a particle counts as feasible; `None` means eps^(2/3).

    Raises:
        TypeError: A constraint is not a function.
        ValueError: No constraint, or a number outside its range.

    Reference:
        Borghi, Herty, Pareschi, "Constrained consensus-based optimization", 2023.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> disc = solvers.cbo.Penalty(inequality=lambda y, args: jnp.sum(y**2) - 1.0)
        >>> problem = jx.Minimization(lambda y, args: -jnp.sum(y))
        >>> found = jx.solve(
        ...     problem, solvers.CBO(penalty=disc), jnp.zeros(2), key=jax.random.key(0)
        ... )
        >>> print(f"{found.objective:.2f}", float(found.feasibility) < 1e-4)
        -1.41 True
    """

    equality: Callable[[PyTree, Any], PyTree] | None = None
    inequality: Callable[[PyTree, Any], PyTree] | None = None
    weight: Number = 1.0
    growth: Number = 1.1
    tolerance: Number | None = None

    def __check_init__(self):
        for name in ("equality", "inequality"):
            check.function("Penalty", name, getattr(self, name), optional=True)
        if self.equality is None and self.inequality is None:
            raise ValueError(
                "Penalty: equality and inequality are both None, expected at least one constraint"
            )
        check.number("Penalty", "weight", self.weight, above=0)
        check.number("Penalty", "growth", self.growth, above=1)
        if self.tolerance is not None:
            check.number("Penalty", "tolerance", self.tolerance, at_least=0)

    def init(self, dtype: Any) -> PenaltyState:
        """The state before the first step."""
        return PenaltyState(
            jnp.asarray(self.weight, dtype), jnp.ones((), dtype), jnp.array(jnp.inf, dtype)
        )

    def violation(self, value: PyTree, args: Any) -> Float[Array, ""]:
        """Σ |equality| + Σ max(inequality, 0) of one particle; +∞ where that is not a number."""
        total = jnp.zeros((), ravel_pytree(value)[0].dtype)
        if self.equality is not None:
            total += jnp.sum(jnp.abs(ravel_pytree(self.equality(value, args))[0]))
        if self.inequality is not None:
            total += jnp.sum(jnp.maximum(ravel_pytree(self.inequality(value, args))[0], 0))
        return jnp.where(jnp.isnan(total), jnp.inf, total)

    def ranked(
        self, energies: Float[Array, " particles"], violations: Float[Array, " particles"]
    ) -> Float[Array, "2 particles"]:
        """Violation beyond the tolerance, and the objective of those that have none.

        A particle is better than another if its pair is smaller in the lexicographic order.
        """
        dtype = energies.dtype
        tolerance = default_tolerance(dtype) if self.tolerance is None else self.tolerance
        beyond = jnp.where(violations <= tolerance, 0, violations)
        return jnp.stack([beyond, jnp.where(jnp.isnan(energies), jnp.inf, energies)])

    def adapted(
        self, state: PenaltyState, weights: Array, violations: Array, best: Array
    ) -> PenaltyState:
        """The state after a step.

        Args:
            state: Before it.
            weights: Of the particles in the consensus.
            violations: Of the particles.
            best: Violation of the best particle.
        """
        mean = jnp.sum(jnp.where(weights > 0, weights * violations, 0))
        growth = jnp.asarray(self.growth, mean.dtype)
        tolerated = mean <= 1 / jnp.sqrt(state.strictness)
        return PenaltyState(
            jnp.where(tolerated, state.weight, state.weight * growth),
            jnp.where(tolerated, state.strictness * growth, state.strictness / growth),
            best,
        )


class ConstraintDrift(eqx.Module):
    """Equality constraints by a stiff drift to their set, without bias of the consensus.

    x gains the drift −∇‖c(x)‖² / width, taken semi-implicitly with the Gauss–Newton matrix
    H = 2 JᵀJ: step ← (I + dt/width · H)⁻¹ (step − dt/width · ∇‖c(x)‖²). It costs derivatives of
    the constraint and an n × n solve for each particle; f is not differentiated.

    Args:
        equality: c(variables, args) → PyTree, zero where feasible. For c_I ≤ 0 give its positive
            part.
        width: Time scale of the drift over the square of the constraint's unit, > 0; the smaller,
            the nearer to the set.

    Raises:
        TypeError: `equality` is not a function.
        ValueError: `width` is not positive.

    Reference:
        Carrillo, Jin, Zhang, Zhu, "An interacting particle consensus method for constrained global
        optimization", 2024.
    """

    equality: Callable[[PyTree, Any], PyTree]
    width: Number = 1e-3

    def __check_init__(self):
        check.function("ConstraintDrift", "equality", self.equality)
        check.number("ConstraintDrift", "width", self.width, above=0)

    def corrected(self, value: PyTree, args: Any, change: Float[Array, " n"], dt: Array):
        """The step of one particle at `value`, given what it would be without constraint."""
        row, unravel = ravel_pytree(value)

        def constraint(row):
            return ravel_pytree(self.equality(unravel(row), args))[0]

        c, jacobian = constraint(row), jax.jacobian(constraint)(row)
        rate = dt / jnp.asarray(self.width, row.dtype)
        matrix = jnp.eye(row.size, dtype=row.dtype) + 2 * rate * jacobian.T @ jacobian
        return jnp.linalg.solve(matrix, change - 2 * rate * (c @ jacobian))


class Sphere(eqx.Module):
    """Projection to the sphere ‖x‖ = radius whose particles move along it.

    As `projection` of `CBO`: each step is projected to the tangent space, then back to the sphere.

    Args:
        radius: > 0.

    Raises:
        ValueError: `radius` is not positive.

    Reference:
        Fornasier, Huang, Pareschi, Sünnen, "Consensus-based optimization on the sphere:
        convergence to global minimizers and machine learning", 2021.
    """

    radius: Number = 1.0

    def __check_init__(self):
        check.number("Sphere", "radius", self.radius, above=0)

    def __call__(self, value: PyTree) -> PyTree:
        """The nearest point of the sphere."""
        return implicit.projections.projection_l2_sphere(value, self.radius)

    def tangent(self, value: PyTree, direction: PyTree) -> PyTree:
        """The part of `direction` that is tangent at `value`."""
        (row, unravel), across = ravel_pytree(value), ravel_pytree(direction)[0]
        return unravel(across - row * (row @ across) / (row @ row))


class Stiefel(eqx.Module):
    """Projection to the Stiefel manifold of matrices with orthonormal columns.

    As `projection` of `CBO`: each step is projected to the tangent space, then back to the
    manifold by the polar factor. Every leaf of a particle is such a matrix, rows ≥ columns.

    Reference:
        Ha, Kang, Kim, Kim, Yang, "Stochastic consensus dynamics for nonconvex optimization on the
        Stiefel manifold: mean-field limit and convergence", 2022.
    """

    def __call__(self, value: PyTree) -> PyTree:
        """The nearest point of the manifold."""

        def polar(matrix):
            if matrix.ndim != 2 or matrix.shape[0] < matrix.shape[1]:
                raise ValueError(
                    f"Stiefel: a leaf has shape {matrix.shape}, expected a matrix with at least "
                    "as many rows as columns"
                )
            left, _, right = jnp.linalg.svd(matrix, full_matrices=False)
            return left @ right

        return jax.tree.map(polar, value)

    def tangent(self, value: PyTree, direction: PyTree) -> PyTree:
        """The part of `direction` that is tangent at `value`."""

        def one(x, d):
            inner = x.T @ d
            return d - x @ (inner + inner.T) / 2

        return jax.tree.map(one, value, direction)
