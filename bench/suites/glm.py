"""Regularized generalized linear models on data sets."""

from jaxopt_ext.bench import measure
from jaxopt_ext.bench.contender import Contender
from jaxopt_ext.bench.problem import Entry
from jaxopt_ext.bench.record import Row
from jaxopt_ext.bench.suite import Suite, Task
from jaxopt_ext.bench.suites import smooth


def entries() -> dict[str, Entry]:
    """Logistic, softmax and Huber regression on the data sets that are there.

    Returns:
        Entries by name.
    """
    from jaxopt_ext.bench.problems import glm

    return glm.ENTRIES


def execute(row: Row, entry: Entry, contender: Contender, task: Task) -> None:
    """Solve until the gradient is small; the distance to the known minimum is an extra."""
    smooth.execute(row, entry, contender, task)
    problem = measure.built(entry.build)
    if problem.optimum is not None and row.f is not None:
        row.extras["gap"] = row.f - problem.optimum


SUITE = Suite(
    name="glm",
    title="Generalized linear models",
    summary="l2-regularized logistic, softmax and Huber regression: synthetic twins of known data "
    "sets, data that come with scikit-learn, and further ones from a folder. Solved: the max norm "
    "of the gradient, evaluated by us, is at most 1e-8 in float64, 1e-3 in float32.",
    entries=entries,
    kinds=("smooth", "glm"),
    execute=execute,
)
