"""scikit-learn: logistic regression with an l2 penalty and no intercept, as the problems state it.

It has no count of evaluations that could be audited, so its rows have no work. Tuned:
newton-cholesky instead of L-BFGS.
"""

import functools

import numpy as np

from jaxopt_ext.bench.contender import Answer, Budget, Contender
from jaxopt_ext.bench.problem import Problem


def _make(problem: Problem, budget: Budget, solver: str):
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    features, labels = problem.data["X"], np.asarray(problem.data["y"])
    if not isinstance(features, np.ndarray):  # BCOO
        from scipy.sparse import csr_matrix

        rows, columns = np.asarray(features.indices).T
        features = csr_matrix((np.asarray(features.data), (rows, columns)), features.shape)
    features = features.astype(budget.dtype)
    model = LogisticRegression(
        C=1 / (len(labels) * float(problem.data["lam"])),
        fit_intercept=False,
        tol=budget.tolerance,
        max_iter=budget.steps,
        solver=solver,
    )

    def solve():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the row tells
            model.fit(features, labels)
        return Answer(model.coef_.ravel(), int(np.max(model.n_iter_)))

    return solve


def _contender(setting, solver):
    return Contender(
        "scikit-learn",
        "LogisticRegression",
        ("glm",),
        functools.partial(_make, solver=solver),
        traced=False,
        setting=setting,
        config={"solver": solver},
        module="sklearn",
        dense=solver == "newton-cholesky",
    )


CONTENDERS = (_contender("default", "lbfgs"), _contender("tuned", "newton-cholesky"))
