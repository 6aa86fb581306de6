"""Reference optima of logistic regression on real data, if there is any.

The folder named by the environment variable JAXOPT_EXT_DATA holds `ref_optima.json`, a list of
{name, lam_value, standardised, f_star, ...}, and `<name>.npz` with labels `y` and either dense
features `X`, or sparse ones by rows: `indptr`, `indices`, `data` (one number if all are equal) and
`shape`. The objective is mean log(1 + exp(−yᵢ⟨xᵢ, w⟩)) + (lam/2) ‖w‖².
"""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse

import jaxopt_ext as jx
from jaxopt_ext import solvers

pytestmark = pytest.mark.slow

FOLDER = os.environ.get("JAXOPT_EXT_DATA")
CASES = []
if FOLDER:
    CASES = json.loads((pathlib.Path(FOLDER) / "ref_optima.json").read_text())
CG = solvers.ConjugateGradient()
MODELS = {
    "dense": solvers.GaussNewton(),
    "matrix-free": solvers.GaussNewton(linear_solver=CG),
    "exact-matrix-free": solvers.ExactHessian(linear_solver=CG),
}


def features(case):
    """The design matrix, sparse where the file is, and the labels in ±1."""
    with np.load(pathlib.Path(FOLDER) / f"{case['name']}.npz") as file:
        labels = file["y"].astype(float)
        labels = np.where(labels == labels.max(), 1.0, -1.0)
        if "X" in file.files:
            X = file["X"].astype(float)
        else:
            indices, rows = file["indices"].astype(np.int32), np.diff(file["indptr"])
            data = np.broadcast_to(file["data"].astype(float), indices.shape)
            pairs = np.stack([np.repeat(np.arange(rows.size, dtype=np.int32), rows), indices], 1)
            X = sparse.BCOO((jnp.asarray(data), jnp.asarray(pairs)), shape=tuple(file["shape"]))
    if case["standardised"]:
        X = X.todense() if isinstance(X, sparse.BCOO) else X
        X = np.asarray(X)
        spread = X.std(axis=0)
        X = (X - X.mean(axis=0)) / np.where(spread > 0, spread, 1)
    return X if isinstance(X, sparse.BCOO) else jnp.asarray(X), jnp.asarray(labels)


def loss(z, args):
    _, labels, lam = args
    margins = -labels * z["margins"]
    losses = jnp.logaddexp(jnp.zeros_like(margins), margins)
    return jnp.mean(losses) + lam / 2 * jnp.sum(z["weights"] ** 2)


def model(w, args):
    return {"margins": args[0] @ w, "weights": w}


PROBLEM = jx.ComposedMinimization(loss, model)


@pytest.mark.skipif(not CASES, reason="JAXOPT_EXT_DATA names no folder with ref_optima.json")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['name']}-{c['lam'].replace(' ', '')}")
def test_reference_optimum_is_reached(case, name):
    X, labels = features(case)
    if isinstance(X, sparse.BCOO) and name == "dense":
        X = X.todense()
    with jax.numpy_dtype_promotion("standard"):
        found = jx.solve(
            PROBLEM,
            solvers.GradNormSmooth(MODELS[name]),
            jnp.zeros(X.shape[1]),
            (X, labels, jnp.asarray(case["lam_value"])),
        ).check()
    gap = float(found.objective) - case["f_star"]
    print(case["name"], name, type(X).__name__, int(found.stats.steps), found.stats.counts.hvp, gap)
    assert abs(gap) <= 1e-10 * case["f_star"]
