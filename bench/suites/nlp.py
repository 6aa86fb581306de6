"""Constrained problems: equalities, inequalities and bounds."""

import jax
import numpy as np

from jaxopt_ext.bench import measure
from jaxopt_ext.bench.contender import Budget, Contender, cast
from jaxopt_ext.bench.problem import Entry, Problem
from jaxopt_ext.bench.record import Row
from jaxopt_ext.bench.suite import Suite, Task

TOLERANCE = {"float64": 1e-6, "float32": 1e-3}
ACTIVE = 1e-5  # a constraint this close to its bound may have a multiplier


def entries() -> dict[str, Entry]:
    """Hock and Schittkowski's problems, and CUTEst's where installed.

    Returns:
        Entries by name.
    """
    from jaxopt_ext.bench.problems import cutest, programs

    constrained = {name: e for name, e in cutest.ENTRIES.items() if "program" in e.kinds}
    return {**programs.ENTRIES, **constrained}


def stationarity(problem: Problem, x: np.ndarray, dtype: str) -> float:
    """How far a point is from stationary, with the multipliers that suit it best.

    No contender's own multipliers are needed: with the columns A of the gradients of the equalities
    and of the constraints that are active or violated, the multipliers minimise ‖∇f + A m‖ subject
    to their signs.

    Args:
        problem: The problem.
        x: The point.
        dtype: That of the run.

    Returns:
        Max norm of the remaining gradient, divided by that of ∇f where it is larger than 1.
    """
    from scipy.optimize import lsq_linear

    point, data = cast((x, problem.data), dtype)
    gradient = np.asarray(jax.grad(problem.fun)(point, data), np.float64)
    columns, least = [], []
    if problem.equality is not None:
        jacobian = np.asarray(jax.jacrev(problem.equality)(point, data), np.float64)
        columns.append(jacobian)
        least.append(np.full(len(jacobian), -np.inf))
    if problem.inequality is not None:
        values = np.asarray(problem.inequality(point, data), np.float64)
        jacobian = np.asarray(jax.jacrev(problem.inequality)(point, data), np.float64)
        columns.append(jacobian[values >= -ACTIVE])
        least.append(np.zeros(len(columns[-1])))
    for bound, sign in ((problem.lower, -1.0), (problem.upper, 1.0)):
        if bound is not None:
            near = np.flatnonzero(np.abs(np.asarray(x) - bound) <= ACTIVE * (1 + np.abs(bound)))
            columns.append(sign * np.eye(problem.size)[near])
            least.append(np.zeros(len(near)))
    rest = gradient
    if sum(map(len, least)):
        matrix = np.concatenate(columns).T
        signs = (np.concatenate(least), np.full(matrix.shape[1], np.inf))
        rest = gradient + matrix @ lsq_linear(matrix, -gradient, signs, tol=1e-14).x
    return float(np.max(np.abs(rest)) / max(1.0, np.max(np.abs(gradient))))


def execute(row: Row, entry: Entry, contender: Contender, task: Task) -> None:
    """Solve to KKT accuracy; see `measure.solve`."""
    problem = measure.built(entry.build)
    tolerance = TOLERANCE[task.dtype]
    # asked for a hundredth: what libraries test is scaled, each in its own way
    budget = Budget(tolerance / 100, 3000, task.evaluations or 100_000, task.seed, task.dtype)

    def accuracy(problem, there):
        row.extras["stationarity"] = stationarity(problem, there["x"], task.dtype)
        return max(there["violation"], row.extras["stationarity"])

    measure.solve(row, problem, contender, budget, task.repeats, accuracy, tolerance)
    if row.f is not None and problem.optimum is not None:
        row.extras["gap"] = row.f - problem.optimum


SUITE = Suite(
    name="nlp",
    title="Nonlinear programs",
    summary="Equality and inequality constraints and bounds. Solved: the largest violation and the "
    "gradient of the Lagrangian, with the multipliers that suit the point best, are both at most "
    "1e-6 in float64 and 1e-3 in float32, evaluated by us at the point returned.",
    entries=entries,
    kinds=("program",),
    execute=execute,
)
