"""How a solve is differentiated: settings that `jaxopt_ext.solve` reads."""

import equinox as eqx

from jaxopt_ext.implicit.linear_solvers import LinearSolver


class ImplicitAdjoint(eqx.Module):
    """Differentiate the optimality conditions at the solution; exact at a solution.

    Forward and reverse mode, any order, under every transformation. Memory and time do not depend
    on the number of steps. The derivative with respect to the starting point is zero.

    Args:
        linear_solver: A callable `(operator, rhs) -> solution`; `None` means `Auto()`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import implicit, solvers
        >>> problem = jx.Minimization(lambda y, t: jnp.sum((y - t) ** 2))
        >>> def solution(t):
        ...     adjoint = implicit.ImplicitAdjoint(linear_solver=implicit.Dense())
        ...     solver = solvers.GradNormSmooth()
        ...     return jx.solve(problem, solver, jnp.zeros(2), t, adjoint=adjoint).value
        >>> print(jax.jacobian(solution)(jnp.array([1.0, 2.0])))
        [[1. 0.]
         [0. 1.]]
    """

    linear_solver: LinearSolver | None = None


class UnrolledAdjoint(eqx.Module):
    """Differentiate the iterations themselves; the derivative of what was computed.

    Right when the loop is stopped early on purpose or the starting point matters. Reverse mode
    only, first order; memory is that of `checkpoints` states.

    Args:
        checkpoints: Number of states kept for the backward pass; `None` lets Equinox choose about
            the square root of `max_steps`.

    Reference:
        Stumm and Walther, "New Algorithms for Optimal Online Checkpointing", 2010, as implemented
        in Equinox.
    """

    checkpoints: int | None = eqx.field(static=True, default=None)


class OneStepAdjoint(eqx.Module):
    """Differentiate the last `steps` iterations only, started at the detached solution.

    Exact in the limit for a superlinear method (its map has no derivative at the solution); else
    the relative error is about ρ^steps with ρ the rate of the method. The solver must offer its
    iteration as a map (`AbstractSolver.iteration_map`).

    Args:
        steps: Number of iterations that are differentiated, at least 1.

    Raises:
        ValueError: `steps` is less than 1.

    Reference:
        Bolte, Pauwels, Vaiter, "One-step differentiation of iterative algorithms", NeurIPS 2023.
    """

    steps: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        if self.steps < 1:
            raise ValueError(f"OneStepAdjoint: steps is {self.steps}, expected at least 1")


class DetachedAdjoint(eqx.Module):
    """No derivative: the solution is a constant to everything that differentiates it."""


Adjoint = ImplicitAdjoint | UnrolledAdjoint | OneStepAdjoint | DetachedAdjoint
