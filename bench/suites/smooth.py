"""Unconstrained smooth problems, nonconvex and small to medium."""

from jaxopt_ext.bench import measure
from jaxopt_ext.bench.contender import Budget, Contender
from jaxopt_ext.bench.problem import Entry, Problem
from jaxopt_ext.bench.record import Row
from jaxopt_ext.bench.suite import Suite, Task

TOLERANCE = {"float64": 1e-8, "float32": 1e-3}
STEPS = 5_000
EVALUATIONS = 100_000


def entries() -> dict[str, Entry]:
    """The problems: More, Garbow and Hillstrom's, synthetic ones, and CUTEst's where installed.

    Returns:
        Entries by name.
    """
    from jaxopt_ext.bench.problems import cutest, mgh, synthetic

    smooth = {name: e for name, e in cutest.ENTRIES.items() if "smooth" in e.kinds}
    return {**mgh.ENTRIES, **synthetic.ENTRIES, **smooth}


def gradient_norm(problem: Problem, there: dict[str, float]) -> float:
    """What is compared with the tolerance: the max norm of the gradient."""
    return there["grad_norm"]


def execute(row: Row, entry: Entry, contender: Contender, task: Task) -> None:
    """Solve until the gradient is small; see `measure.solve`."""
    problem = measure.built(entry.build)
    start = measure.evaluate(problem, problem.init, task.dtype)
    rounding = 1e-14 if task.dtype == "float64" else 1e-5
    budget = Budget(
        # what rounding allows: a gradient of 1e8 at the start cannot go down to 1e-8
        tolerance=max(TOLERANCE[task.dtype], rounding * start["grad_norm"]),
        steps=STEPS,
        evaluations=task.evaluations or EVALUATIONS,
        seed=task.seed,
        dtype=task.dtype,
    )
    measure.solve(row, problem, contender, budget, task.repeats, gradient_norm)


SUITE = Suite(
    name="smooth",
    title="Smooth unconstrained problems",
    summary="Nonconvex test functions, most of them small. Solved: the max norm of the gradient, "
    "evaluated by us at the point returned, is at most 1e-8 in float64, 1e-3 in float32.",
    entries=entries,
    kinds=("smooth", "least_squares"),
    execute=execute,
)
