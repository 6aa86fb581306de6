"""What people see while a solve runs: snapshots, the progress bar, callbacks inside `jit`."""

import sys
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxopt_ext.core.solver import Info
from jaxopt_ext.implicit import detach


class Snapshot(eqx.Module):
    """The state of a running solve, as a callback receives it.

    Attributes:
        steps: Steps so far.
        value: The current point.
        objective: The objective there.
        optimality: Optimality residual there.
        tolerance_scale: What a relative tolerance on it multiplies.
        feasibility: Largest constraint violation there.
        step_size: Length of the last step.
    """

    steps: Array
    value: PyTree
    objective: Array
    optimality: Array
    tolerance_scale: Array
    feasibility: Array
    step_size: Array


Callback = Callable[[Snapshot], bool | None]


def snapshot(steps: Array, value: PyTree, info: Info) -> Snapshot:
    """Collect what a person wants to see."""
    return Snapshot(
        steps,
        value,
        info.objective,
        info.optimality,
        info.optimality_scale,
        info.feasibility,
        info.step_size,
    )


class TextProgress:
    """One line per report, at most one every `interval` seconds."""

    def __init__(self, interval: float = 0.5):
        """Start the clock."""
        self.start = time.perf_counter()
        self.last = float("-inf")
        self.interval = interval

    def update(self, now: Snapshot, *, final: bool = False) -> None:
        """Print a line if it is time for one."""
        clock = time.perf_counter()
        if not final and clock - self.last < self.interval:
            return
        self.last = clock
        print(
            f"step {int(now.steps):6d}  objective {float(now.objective):+.8e}  "
            f"optimality {float(now.optimality):.2e}  feasibility {float(now.feasibility):.2e}  "
            f"step size {float(now.step_size):.2e}  {clock - self.start:7.1f} s",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        """Nothing to close."""


class BarProgress:
    """A tqdm bar of the digits gained on the optimality residual."""

    def __init__(self, tolerance: Callable[[Snapshot], float]):
        """Open the bar; `tolerance` gives the residual at which it is full."""
        from tqdm import tqdm

        self.bar = tqdm(
            total=100,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} {postfix}",
            desc="solve",
            leave=True,
        )
        self.tolerance = tolerance
        self.first: float | None = None

    def update(self, now: Snapshot, *, final: bool = False) -> None:
        """Move the bar."""
        residual, goal = float(now.optimality), self.tolerance(now)
        if self.first is None and np.isfinite(residual) and residual > 0:
            self.first = residual
        done = 0.0
        if self.first is not None and np.isfinite(residual):
            total = max(np.log(self.first / max(goal, 1e-300)), 1e-12)
            done = float(np.clip(np.log(self.first / max(residual, 1e-300)) / total, 0, 1))
        self.bar.n = max(self.bar.n, round(100 * done))
        self.bar.set_postfix_str(
            f"step {int(now.steps)}, objective {float(now.objective):.6g}, "
            f"optimality {residual:.1e}",
            refresh=final,
        )
        self.bar.update(0)

    def close(self) -> None:
        """Leave the bar where it is."""
        self.bar.refresh()
        self.bar.close()


def progress_sink(kind: Any, tolerance: Callable[[Snapshot], float]) -> Any:
    """The sink for `progress=`: None, "text", "tqdm", or True for tqdm where it is installed.

    Raises:
        ValueError: Another value.
        ImportError: "tqdm" was asked for and is not installed.
    """
    if kind is None or kind is False:
        return None
    if kind == "text":
        return TextProgress()
    if kind == "tqdm":
        return BarProgress(tolerance)
    if kind is True:
        try:
            return BarProgress(tolerance)
        except ImportError:
            return TextProgress()
    raise ValueError(f"solve: progress is {kind!r}, expected None, True, 'text' or 'tqdm'")


def emit(listener: Callback, now: Snapshot) -> Array:
    """Call the host from compiled code once per step, whatever batch the step runs in.

    In a batch, the listener sees the lane with the largest optimality residual, and its answer
    holds for all lanes. Without the reduction a `vmap` would call the host once per lane.

    Returns:
        Whether the listener asked to stop.
    """

    def on_host(now):
        try:
            return np.asarray(bool(listener(now)))
        except Exception as error:  # an exception here would take the whole process' results down
            print(f"jaxopt_ext: callback raised {error!r}; the solve is stopped", file=sys.stderr)
            return np.asarray(True)

    now = detach(now)
    leaves, structure = jax.tree.flatten(now)
    residual_index = next(i for i, leaf in enumerate(leaves) if leaf is now.optimality)

    @jax.custom_batching.custom_vmap
    def call(*leaves):
        # not io_callback: a while loop whose lanes stop one by one refuses its effect. The answer
        # decides when the loop ends, so this call cannot be dropped as unused.
        return jax.pure_callback(
            lambda *leaves: on_host(jax.tree.unflatten(structure, leaves)),
            jax.ShapeDtypeStruct((), jnp.bool_),
            *leaves,
        )

    @call.def_vmap
    def _(axis_size, in_batched, *leaves):
        residual = leaves[residual_index]
        lane = jnp.argmax(residual) if in_batched[residual_index] else 0
        one = [leaf[lane] if b else leaf for leaf, b in zip(leaves, in_batched, strict=True)]
        return call(*one), False

    return call(*leaves)
