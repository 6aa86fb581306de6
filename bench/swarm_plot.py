"""A picture of a swarm in the plane: its particles at some steps, and the path of its consensus."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_ext.solvers.cbo_record import SwarmHistory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 4


def swarm_figure(
    history: SwarmHistory,
    fun: Callable[..., Any] | None = None,
    args: Any = None,
    *,
    steps: Sequence[int] | None = None,
    lower: float | None = None,
    upper: float | None = None,
) -> "Figure":
    """Draw the evolution of a swarm in two variables.

    In grey the objective (dark is low), in blue the particles, in red the path of the consensus up
    to that step.

    Args:
        history: From `solvers.cbo.record`, of variables that are one array of two entries.
        fun: The objective, fun(variables, args); `None` leaves the ground white.
        args: Its arguments.
        steps: Which steps, from 1; `None` means eight, evenly spaced on a logarithmic scale.
        lower: Least coordinate shown; `None` fits the first particles.
        upper: Largest coordinate shown.

    Returns:
        A figure of pyplot.

    Raises:
        ValueError: The variables are not one array of two entries, or a step is not in the history.
    """
    import matplotlib.pyplot as plt

    shape = getattr(history.particles, "shape", None)
    if shape is None or len(shape) != 3 or shape[2] != 2:
        raise ValueError(
            f"swarm_figure: history.particles has shape {shape}, expected (steps, particles, 2)"
        )
    length = shape[0]
    if steps is None:
        steps = sorted({int(s) for s in np.rint(np.geomspace(1, length, min(8, length)))})
    if not steps or min(steps) < 1 or max(steps) > length:
        raise ValueError(f"swarm_figure: steps is {list(steps)}, expected steps from 1 to {length}")
    particles, path = np.asarray(history.particles), np.asarray(history.consensus)
    lower = float(np.nanmin(particles[0])) if lower is None else lower
    upper = float(np.nanmax(particles[0])) if upper is None else upper

    rows, columns = -(-len(steps) // COLUMNS), min(COLUMNS, len(steps))
    figure, grid_of_panels = plt.subplots(
        rows,
        columns,
        sharex=True,
        sharey=True,
        squeeze=False,
        figsize=(2.6 * columns, 2.7 * rows),
        layout="constrained",
    )
    panels = grid_of_panels.ravel()
    for panel in panels[len(steps) :]:
        panel.set_axis_off()
    if fun is not None:
        axis = jnp.linspace(lower, upper, 160, dtype=particles.dtype)
        grid = jnp.stack(jnp.meshgrid(axis, axis), axis=-1)
        height = np.asarray(jax.jit(jax.vmap(jax.vmap(lambda y: fun(y, args))))(grid))
    for step, panel in zip(steps, panels, strict=False):
        if fun is not None:
            panel.contourf(axis, axis, height, levels=20, cmap="Greys_r")
        panel.plot(*particles[step - 1].T, ".", color="tab:blue", markersize=4)
        panel.plot(*path[:step].T, color="tab:red", linewidth=1.2)
        panel.plot(*path[step - 1], "o", color="tab:red", markersize=6)
        panel.set(title=f"step {step}", xlim=(lower, upper), ylim=(lower, upper))
    return figure
