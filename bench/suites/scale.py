"""Cost against size: how the time of a solve grows with the number of variables."""

import functools

import numpy as np

from jaxopt_ext.bench.contender import Contender
from jaxopt_ext.bench.problem import Entry, Problem
from jaxopt_ext.bench.problems import glm
from jaxopt_ext.bench.record import Row
from jaxopt_ext.bench.suite import Suite, Task
from jaxopt_ext.bench.suites import smooth

SIZES = (16, 64, 256, 1024, 4096)
QUICK = (16, 64, 256)
# Exponent of the dominating term in the number of variables n, with the data's n² entries:
# a dense factorization is n³, a product with the data n².
THEORY = {"dense": 3.0, "products": 2.0}


def _build(n: int) -> Problem:
    rng = np.random.default_rng(n)
    X = rng.standard_normal((2 * n, n)) / np.sqrt(n)
    y = np.sign(X @ rng.standard_normal(n) + rng.standard_normal(2 * n) / 2)
    name = f"logistic-n{n}"
    data = {"X": X, "y": y, "lam": np.asarray(0.01)}
    meta = {"family": "logistic", "source": "seeded normal features"}
    return Problem(name, glm.logistic, np.zeros(n), data, meta=meta)


def entries() -> dict[str, Entry]:
    """Logistic regression with twice as many samples as variables, in growing size.

    Returns:
        Entries by name.
    """
    return {
        f"logistic-n{n}": Entry(("smooth",), functools.partial(_build, n), quick=n in QUICK)
        for n in SIZES
    }


def execute(row: Row, entry: Entry, contender: Contender, task: Task) -> None:
    """Solve until the gradient is small; the theoretical exponent is an extra."""
    smooth.execute(row, entry, contender, task)
    dense = "hvp" in row.counts and row.counts["hvp"] >= (row.n or 0)
    row.extras["theory"] = {"cpu": THEORY["dense" if dense else "products"]}


SUITE = Suite(
    name="scale",
    title="Cost against size",
    summary="l2-regularized logistic regression with n variables and 2n samples. The slope is that "
    "of CPU seconds against n in logarithms; theory says 2 where only products with the data are "
    "made and 3 where a Hessian is built or factorized.",
    entries=entries,
    kinds=("smooth",),
    execute=execute,
)
