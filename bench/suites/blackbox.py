"""Derivative-free global optimization: the BBOB functions."""

from jaxopt_ext.bench import measure
from jaxopt_ext.bench.contender import Budget, Contender
from jaxopt_ext.bench.problem import Entry, Problem
from jaxopt_ext.bench.record import Row
from jaxopt_ext.bench.suite import Suite, Task

TOLERANCE = 1e-3
PER_VARIABLE = {True: 500, False: 10_000}  # evaluations, by whether the run is quick


def entries() -> dict[str, Entry]:
    """The BBOB functions in several dimensions and instances.

    Returns:
        Entries by name.
    """
    from jaxopt_ext.bench.problems import blackbox

    return blackbox.ENTRIES


def gap(problem: Problem, there: dict[str, float]) -> float:
    """What is compared with the tolerance: the objective above its minimum."""
    return there["f"] - problem.optimum if problem.optimum is not None else there["f"]


def execute(row: Row, entry: Entry, contender: Contender, task: Task) -> None:
    """Spend the evaluations; see `measure.solve`."""
    problem = measure.built(entry.build)
    budget = Budget(
        tolerance=TOLERANCE,
        steps=1_000_000,
        evaluations=task.evaluations or PER_VARIABLE[task.quick] * problem.size,
        seed=task.seed,
        dtype=task.dtype,
    )
    measure.solve(row, problem, contender, budget, min(task.repeats, 3), gap)


SUITE = Suite(
    name="blackbox",
    title="Black-box global optimization",
    summary="The 24 noiseless BBOB functions with seeded shifts and rotations; every contender may "
    "spend the same number of evaluations, 500 per variable in the quick form, else 10 000. "
    "Solved: the objective is within 1e-3 of its minimum.",
    entries=entries,
    kinds=("blackbox",),
    execute=execute,
    seeds=3,
)
