"""The history of a swarm, for pictures."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, Key, PyTree

from jaxopt_ext.core import check
from jaxopt_ext.core.problem import Problem
from jaxopt_ext.core.solver import check_compatible
from jaxopt_ext.solvers.cbo_solver import CBO


class SwarmHistory(eqx.Module):
    """What a swarm did; the first axis of each array is the step.

    Attributes:
        particles: The particles that were evaluated, a PyTree like `init` with axes step, particle.
        consensus: The consensus of the step, a PyTree like `init`.
        objective: Best objective so far.
        alpha: Inverse temperature.
        spread: Typical distance to the consensus.
    """

    particles: PyTree
    consensus: PyTree
    objective: Float[Array, "*steps"]
    alpha: Float[Array, "*steps"]
    spread: Float[Array, "*steps"]


def record(
    problem: Problem,
    solver: CBO,
    init: PyTree,
    args: Any = None,
    *,
    key: Key[Array, ""],
    steps: int = 100,
) -> SwarmHistory:
    """Run CBO for some steps and keep every swarm.

    The same swarms as those of `solve` with this key, without its stopping tests; memory grows
    with steps · particles.

    Args:
        problem: As for `solve`.
        solver: The solver.
        init: As for `solve`.
        args: As for `solve`.
        key: Random key.
        steps: How many.

    Returns:
        The history; `jaxopt_ext.bench.swarm_plot.swarm_figure` draws it.

    Raises:
        TypeError: As `solve`.
        ValueError: As `solve`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> problem = jx.Minimization(lambda y, args: jnp.sum(y**2))
        >>> history = solvers.cbo.record(
        ...     problem, solvers.CBO(), jnp.ones(2), key=jax.random.key(0), steps=5
        ... )
        >>> history.particles.shape, history.consensus.shape
        ((5, 100, 2), (5, 2))
    """
    check_compatible(problem, solver, key)
    check.count("record", "steps", steps)
    value = check.variables("init", init)
    problem = problem.trace(value, args)

    def step(state, _):
        particles = solver.ask(state)
        state, _ = solver.step(problem, args, state)
        return state, SwarmHistory(
            particles, state.consensus, state.objective, state.alpha, state.spread
        )

    @jax.jit
    def run(key):
        state = solver.init(problem, value, args, key)
        return jax.lax.scan(step, state, None, length=steps)[1]

    return run(key)
