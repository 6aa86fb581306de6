"""Hypergradients: error, run time, compile time and memory of derivative rules."""

import jax
import numpy as np

from jaxopt_ext.bench.contender import Budget, Contender, cast, temporary_bytes
from jaxopt_ext.bench.measure import built, repeated, timed
from jaxopt_ext.bench.problem import Entry
from jaxopt_ext.bench.problems import hypergradients
from jaxopt_ext.bench.record import Row
from jaxopt_ext.bench.suite import Suite, Task

# Relative error of the hypergradient that counts as accurate, and what "tight" linear solvers get.
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}
TIGHT = {"float64": 1e-12, "float32": 1e-6}
BATCH = 10


def relative_error(found, expected) -> float:
    """The largest over the leaves of ‖found − expected‖ / ‖expected‖, in float64.

    Args:
        found: PyTree of arrays.
        expected: The same in NumPy.

    Returns:
        The error, dimensionless.
    """

    def of_leaf(a, b):
        return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)

    return float(np.max(jax.tree.leaves(jax.tree.map(of_leaf, found, expected))))


def execute(row: Row, entry: Entry, contender: Contender, task: Task) -> None:
    """Compile the gradient of the outer loss, time batches of calls, compare with closed form."""
    problem = built(entry.build)
    budget = Budget(TIGHT[task.dtype], 0, 0, task.seed, task.dtype)
    inputs = cast((problem.theta, problem.x, problem.data), task.dtype)
    row.n = sum(leaf.size for leaf in jax.tree.leaves(problem.x))
    row.params, row.tolerance = {"facts": problem.facts}, TOLERANCE[task.dtype]

    gradient = hypergradients.hypergradient(problem, contender.make(problem, budget))
    jax.jit(gradient).lower(*inputs)  # first use imports and sets up what is not to be timed
    jax.clear_caches()
    lowered, lower, _ = timed(lambda: jax.jit(gradient).lower(*inputs))
    program, compile_, _ = timed(lowered.compile)
    row.compile_cpu_s = lower + compile_
    row.extras = {"lower_cpu_s": lower}
    row.peak_bytes = temporary_bytes(program)

    row.error = relative_error(program(*inputs), problem.gradient)
    row.status = "ok" if row.error <= row.tolerance else "missed"

    def calls():
        for _ in range(BATCH):
            jax.block_until_ready(program(*inputs))

    cpu, wall = repeated(calls, 4 * task.repeats)
    row.run_cpu_s = [seconds / BATCH for seconds in cpu]
    row.run_wall_s = [seconds / BATCH for seconds in wall]


SUITE = Suite(
    name="implicit",
    title="Hypergradients at an exact solution",
    summary="The derivative rule alone: each library gets the same conditions and the exact "
    "solution. Error is relative to the closed form; accurate: at most 1e-9 in float64, 1e-5 in "
    "float32. Memory is what the compiled program needs besides its inputs.",
    entries=lambda: hypergradients.ENTRIES,
    kinds=("hypergradient", "ridge", "equilibrium", "kkt", "lasso"),
    execute=execute,
)
