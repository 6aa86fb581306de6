"""Several objectives at once: a swarm that spreads over the Pareto front."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxopt_ext.core import check
from jaxopt_ext.core.problem import Minimization
from jaxopt_ext.core.solver import Number
from jaxopt_ext.solvers.cbo_consensus import exponents, scheduled, temperature
from jaxopt_ext.solvers.cbo_noise import fold
from jaxopt_ext.solvers.cbo_solver import CBO


class ParetoFront(eqx.Module):
    """A swarm on the Pareto front.

    Attributes:
        values: The particles, a PyTree like `init` with a leading axis.
        objectives: Their objectives.
        preferences: The weights of the objectives that each particle stands for; rows sum to 1.
        efficient: Which particles no other particle dominates.
        evaluations: Of the vector of objectives.
    """

    values: PyTree
    objectives: Float[Array, "particles objectives"]
    preferences: Float[Array, "particles objectives"]
    efficient: Bool[Array, " particles"]
    evaluations: Int[Array, ""]


def efficient(objectives: Float[Array, "particles objectives"]) -> Bool[Array, " particles"]:
    """Which rows no other row dominates (is nowhere larger and somewhere smaller).

    Args:
        objectives: One row a particle; rows with NaN are never efficient.

    Returns:
        A mask.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.solvers import cbo
        >>> print(cbo.efficient(jnp.array([[0.0, 2.0], [1.0, 1.0], [1.0, 2.0]])))
        [ True  True False]
    """
    no_larger = jnp.all(objectives[:, None] <= objectives[None], axis=-1)
    smaller = jnp.any(objectives[:, None] < objectives[None], axis=-1)
    dominated = jnp.any(no_larger & smaller, axis=0)
    return ~dominated & ~jnp.any(jnp.isnan(objectives), axis=1)


def preferences(
    key: Key[Array, ""], particles: int, objectives: int, dtype: Any
) -> Float[Array, "particles objectives"]:
    """Weights in the unit simplex: evenly spaced for two objectives, else uniformly random.

    Args:
        key: Random key.
        particles: How many.
        objectives: Of how many objectives, at least 2.
        dtype: Of the result.

    Returns:
        Rows that sum to 1.
    """
    if objectives == 2:
        first = (jnp.arange(particles, dtype=dtype) + 0.5) / particles
        return jnp.stack([first, 1 - first], axis=1)
    return jax.random.dirichlet(key, jnp.ones(objectives, dtype), (particles,), dtype)


def repelled(
    weight: Float[Array, "particles objectives"],
    values: Float[Array, "particles objectives"],
    rate: Number,
) -> Float[Array, "particles objectives"]:
    """Weights after one step apart from each other, as seen in the space of the objectives.

    wᵢ moves by rate · (mean over j of (gⱼ − gᵢ) / ‖gⱼ − gᵢ‖²), and back into the simplex. On the
    front of the Chebyshev scalarization a larger weight means a smaller objective, so that moving
    the weight towards the others' objectives moves its own objectives away from theirs; near ones
    count most. Distances are relative to the ranges of the objectives.

    Args:
        weight: The weights; rows sum to 1.
        values: The objectives g of the particles.
        rate: Of the motion, >= 0, dimensionless.

    Returns:
        New weights; rows sum to 1.
    """
    finite = jnp.all(jnp.isfinite(values), axis=1)
    usable = jnp.where(finite[:, None], values, 0)
    low = jnp.min(jnp.where(finite[:, None], values, jnp.inf), axis=0)
    high = jnp.max(jnp.where(finite[:, None], values, -jnp.inf), axis=0)
    extent = jnp.where(high > low, high - low, 1)
    apart = (usable[None] - usable[:, None]) / extent[None, None]
    pairs = finite[:, None] & finite[None]
    # nearer than a hundredth of the spacing of an even front counts as that far
    least = (0.01 / len(weight)) ** 2
    squared = jnp.maximum(jnp.sum(apart**2, axis=-1), least)
    push = jnp.mean(jnp.where(pairs[..., None], apart / squared[..., None], 0), axis=1)
    push -= jnp.mean(push, axis=1, keepdims=True)  # along the simplex
    moved = jnp.maximum(weight + jnp.asarray(rate, weight.dtype) * push, 0)
    return moved / jnp.sum(moved, axis=1, keepdims=True)


def pareto_front(
    objectives: Callable[[PyTree, Any], Float[Array, " objectives"]],
    solver: CBO,
    init: PyTree,
    args: Any = None,
    *,
    key: Key[Array, ""],
    max_steps: int = 1000,
    repulsion: Number | None = None,
) -> ParetoFront:
    """Minimize several objectives: each particle has its own weights and its own consensus.

    Particle i minimizes the Chebyshev scalarization max_l w_il |g_l(x)| and drifts to the
    consensus of the whole swarm under it. So all minimizers are found in one run, those of
    nonconvex fronts too. Time and memory grow with the square of the number of particles. The
    objectives should be non-negative and of similar size. The weights stay as they are, which may
    leave parts of the front thinly covered; with `repulsion` they adapt, so that the particles
    spread evenly over it, see `repelled`.

    Args:
        objectives: g(variables, args) → vector.
        solver: Particles, start, drift, σ, α, noise, increments and `projection` are taken from
            it.
        init: As for `solve`.
        args: As for `solve`.
        key: Random key.
        max_steps: Steps.
        repulsion: Rate at which the weights move apart, > 0, dimensionless: about 6e-5 for 50
            particles and three objectives; much more shakes them off the front. For two objectives
            the weights are evenly spaced already, and it did not help. `None` keeps the weights.

    Returns:
        The swarm.

    Raises:
        ValueError: The solver has another setting, there are fewer than two objectives, or
            `repulsion` is not positive.

    Reference:
        Borghi, Herty, Pareschi, "A consensus-based algorithm for multi-objective optimization and
        its mean-field description", 2022; the adaptive weights follow the idea of their "An
        adaptive consensus based method for multi-objective optimization with uniform Pareto front
        approximation", 2023, with a repulsion of our own.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxopt_ext import solvers
        >>> def both(y, args):
        ...     return jnp.stack([jnp.sum((y - 1.0) ** 2), jnp.sum((y + 1.0) ** 2)])
        >>> solver = solvers.CBO(particles=50, sigma=4.0, alpha=1e5)
        >>> front = solvers.cbo.pareto_front(both, solver, jnp.zeros(2), key=jax.random.key(0))
        >>> bool(jnp.all(jnp.abs(front.values) < 1.1))  # the segment between the two minimizers
        True
    """
    kept = {"memory", "gradient", "cutoff", "batch", "polarized", "jumps", "kick", "penalty"}
    for name in sorted(kept | {"constraint_drift", "mirror", "polish", "mesh"}):
        if getattr(solver, name) is not None:
            raise ValueError(f"pareto_front: solver.{name} is given, expected None")
    check.count("pareto_front", "max_steps", max_steps)
    if repulsion is not None:
        check.number("pareto_front", "repulsion", repulsion, above=0)
    value = check.variables("init", init)
    scalar = Minimization(lambda value, args: jnp.sum(objectives(value, args)))
    state = solver.init(scalar, value, args, key)
    unravel = ravel_pytree(value)[1]

    def evaluate(swarm):
        return jax.vmap(lambda row: objectives(unravel(row), args))(swarm)

    shape = jax.eval_shape(evaluate, state.swarm).shape
    if len(shape) != 2 or shape[1] < 2:
        raise ValueError(
            f"pareto_front: objectives returns shape {shape[1:]}, expected a vector of at least 2"
        )
    dtype = state.swarm.dtype
    weight = preferences(fold(key, 2), solver.particles, shape[1], dtype)

    @jax.vmap
    def softmax(energies, step):
        alpha = temperature(solver.alpha, energies, step)
        return jax.nn.softmax(exponents(energies, alpha))

    def step(number, carry):
        swarm, weight = carry
        values = evaluate(swarm)
        energies = jnp.max(weight[:, None] * jnp.abs(values)[None], axis=-1)
        share = softmax(energies, jnp.full(solver.particles, number))
        distance = swarm - share @ swarm
        draws = solver.increments(fold(key, 8 + number), swarm.shape).astype(dtype)
        dt = jnp.asarray(solver.dt, dtype)
        scale = scheduled(solver.sigma, number, dtype) * jnp.sqrt(dt)
        noise = solver.noise(distance, draws, jnp.mean(share, axis=0))
        moved = swarm - jnp.asarray(solver.drift, dtype) * dt * distance + scale * noise
        moved = jnp.where(jnp.isfinite(moved), moved, swarm)
        project = solver.projection
        if project is not None:
            moved = jax.vmap(lambda row: ravel_pytree(project(unravel(row)))[0])(moved)
        return moved, weight if repulsion is None else repelled(weight, values, repulsion)

    swarm, weight = jax.lax.fori_loop(0, max_steps, step, (state.swarm, weight))
    values = evaluate(swarm)
    return ParetoFront(
        values=jax.vmap(unravel)(swarm),
        objectives=values,
        preferences=weight,
        efficient=efficient(values),
        evaluations=jnp.asarray((max_steps + 1) * solver.particles),
    )
