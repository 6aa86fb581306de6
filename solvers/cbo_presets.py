"""Published variants of consensus-based optimization, as settings of `CBO`."""

from typing import Any

import jax.numpy as jnp

from jaxopt_ext.core import check
from jaxopt_ext.core.solver import Number
from jaxopt_ext.solvers.cbo_consensus import EffectiveSampleSize, Schedule
from jaxopt_ext.solvers.cbo_noise import Constant, Covariance, Isotropic
from jaxopt_ext.solvers.cbo_solver import CBO
from jaxopt_ext.solvers.cbo_start import Normal


def consensus_hopping(
    width: Schedule,
    alpha: Schedule | EffectiveSampleSize,
    particles: int = 100,
    **settings: Any,
) -> CBO:
    """Consensus hopping: sample around the consensus, take the new consensus, repeat.

    xₖ = Σ wᵢ zᵢ with zᵢ ~ N(xₖ₋₁, width² I) and wᵢ ∝ exp(−α f(zᵢ)): CBO with λ = 1/dt and constant
    noise. It is gradient descent with step size τ = α · width², up to O(τ²) and the sampling error
    of order width / √N: in the limit of many particles it is exactly gradient descent with step τ
    on the local entropy −log E[exp(−α f(x + width · ξ))] / α, and as α → ∞ at fixed τ it becomes
    the proximal point method. Those relations hold while the hop α · width · ‖∇f‖ is below about
    1.5 widths for 100 particles; beyond, a hop is at most about width · √(2 log N).

    Args:
        width: Standard deviation of the samples, in the variables' units; may be a schedule.
        alpha: Inverse temperature, a schedule, or `EffectiveSampleSize`.
        particles: N, samples per step.
        settings: Further settings of `CBO`.

    Returns:
        The solver. The noise does not vanish, so it runs to `max_steps` or to the criterion that
        `solve` is given.

    Reference:
        Riedl, Klock, Geldhauser, Fornasier, "Gradient is All You Need?", arXiv 2306.09778.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext.solvers import cbo
        >>> # τ = 0.5 on x²/2: one step divides x by 1 + τ
        >>> solver = cbo.consensus_hopping(width=0.1, alpha=50.0, particles=10_000)
        >>> problem = jx.Minimization(lambda y, args: y**2 / 2)
        >>> found = jx.solve(problem, solver, 0.3, key=jax.random.key(0), max_steps=1)
        >>> print(f"{found.state.solver.consensus:.1f}")
        0.2
    """
    first = width(jnp.zeros((), jnp.int32)) if callable(width) else width
    settings = {"start": Normal(first), **settings}
    return CBO(
        particles=particles,
        drift=1.0,
        dt=1.0,
        sigma=width,
        alpha=alpha,
        noise=Constant(),
        **settings,
    )


def consensus_based_sampling(
    alpha: Number = 1.0, dt: Number = 0.5, particles: int = 1000, **settings: Any
) -> CBO:
    """Consensus-based sampling: the swarm becomes a sample of the density ∝ exp(−f).

    x ← c + β (x − c) + √((1 − β²)(1 + α)) C^(1/2) ξ with β = exp(−dt). For a quadratic f the
    stationary law is exactly the normal law with that density; otherwise it is its approximation
    near a minimizer. The sample is `solver.ask(solution.state.solver)`.

    Args:
        alpha: Inverse temperature of the weights, > 0; a number.
        dt: Time step, > 0.
        particles: N.
        settings: Further settings of `CBO`.

    Returns:
        The solver. Its noise does not vanish, so it runs to `max_steps`.

    Raises:
        ValueError: A number is not positive.

    Reference:
        Carrillo, Hoffmann, Stuart, Vaes, "Consensus-based sampling", 2022.
    """
    check.number("consensus_based_sampling", "alpha", alpha, above=0)
    check.number("consensus_based_sampling", "dt", dt, above=0)
    return CBO(
        particles=particles,
        drift=-jnp.expm1(-jnp.asarray(dt)),
        dt=1.0,
        sigma=jnp.sqrt(-jnp.expm1(-2 * jnp.asarray(dt)) * (1 + jnp.asarray(alpha))),
        alpha=alpha,
        noise=Covariance(regularization=0.0),
        **settings,
    )


def truncated_cbo(bound: Number = 1.0, sigma: Number = 0.9, **settings: Any) -> CBO:
    """CBO with truncated isotropic noise: large σ without divergence.

    Args:
        bound: No particle counts as farther from the consensus than this.
        sigma: σ.
        settings: Further settings of `CBO`.

    Returns:
        The solver.

    Reference:
        Fornasier, Richtárik, Riedl, Sun, "Consensus-based optimization with truncated noise",
        arXiv 2310.16610.
    """
    settings = {"alpha": 1e5, **settings}
    return CBO(noise=Isotropic(bound=bound), sigma=sigma, **settings)
