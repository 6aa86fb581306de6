"""What a solve costs as a JAX program: compile time, and throughput of batches by `vmap`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_ext.bench.contender import Budget, Contender, cast, temporary_bytes
from jaxopt_ext.bench.measure import built, repeated, timed
from jaxopt_ext.bench.problem import Entry, Problem
from jaxopt_ext.bench.problems import glm, mgh
from jaxopt_ext.bench.record import Row
from jaxopt_ext.bench.suite import Suite, Task

BATCHES = (1, 32, 1024)
TOLERANCE = {"float64": 1e-8, "float32": 1e-3}


def _batchable(name: str) -> Problem:
    if name == "rosenbrock":
        larger = mgh.ENTRIES["mgh-rosenbrock-n100"].build()
        return dataclasses.replace(larger, name=name, init=larger.init[:10])
    rng = np.random.default_rng(0)
    X = rng.standard_normal((100, 10))
    y = np.sign(X @ rng.standard_normal(10) + rng.standard_normal(100) / 2)
    return Problem(name, glm.logistic, np.zeros(10), {"X": X, "y": y, "lam": np.asarray(0.01)})


def entries() -> dict[str, Entry]:
    """Two problems in ten variables, each alone and in batches.

    Returns:
        Entries by name.
    """
    return {
        f"{name}-batch{batch}": Entry(
            ("smooth",), functools.partial(_build, name, batch), quick=batch <= 32
        )
        for name in ("rosenbrock", "logistic")
        for batch in BATCHES
    }


def _build(name: str, batch: int) -> tuple[Problem, int]:
    return _batchable(name), batch


def starts(problem: Problem, batch: int) -> np.ndarray:
    """A batch of starting points: the problem's own, then ones around it.

    Args:
        problem: The problem.
        batch: How many.

    Returns:
        One per row.
    """
    rng = np.random.default_rng(1)
    spread = 0.1 * rng.standard_normal((batch, problem.size))
    spread[0] = 0
    return problem.init + spread


def execute(row: Row, entry: Entry, contender: Contender, task: Task) -> None:
    """Lower, compile and run one batch; the error is the largest gradient in the batch."""
    problem, batch = built(entry.build)
    row.n, row.params, row.problem_hash = problem.size, {"batch": batch}, problem.digest()
    row.tolerance = TOLERANCE[task.dtype]
    budget = Budget(row.tolerance, 1000, 100_000, task.seed, task.dtype)
    points, data = cast((starts(problem, batch), problem.data), task.dtype)
    solve = contender.make(problem, budget)

    def solve_all(points, data):
        if batch == 1:
            return solve(points[0], data)[0][None]
        return jax.vmap(lambda start: solve(start, data)[0])(points)

    jax.jit(solve_all).lower(points, data)  # first use imports what is not to be timed
    jax.clear_caches()
    lowered, lower, _ = timed(lambda: jax.jit(solve_all).lower(points, data))
    program, compile_, _ = timed(lowered.compile)
    row.compile_cpu_s = lower + compile_
    row.peak_bytes = temporary_bytes(program)
    found = jax.block_until_ready(program(points, data))
    gradients = jax.vmap(jax.grad(problem.fun), (0, None))(found, data)
    norms = jnp.max(jnp.abs(gradients), axis=1)
    row.error = float(jnp.max(norms))
    row.status = "ok" if row.error <= row.tolerance else "missed"
    row.run_cpu_s, row.run_wall_s = repeated(
        lambda: jax.block_until_ready(program(points, data)), 4 * task.repeats
    )
    row.extras = {
        "lower_cpu_s": lower,
        "batch": batch,
        "instances_per_s": batch / min(row.run_wall_s),
        "batch_share_solved": float(jnp.mean(norms <= row.tolerance)),
    }


SUITE = Suite(
    name="transform",
    title="Compile time and batches",
    summary="Whole solves in ten variables as one compiled program: CPU seconds to trace, lower "
    "and compile, temporary memory, and instances per second in batches of 1, 32 and 1024 by vmap. "
    "Solved: the largest gradient in the batch is at most 1e-8 in float64, 1e-3 in float32.",
    entries=entries,
    kinds=("smooth",),
    traced=True,
    execute=execute,
)
