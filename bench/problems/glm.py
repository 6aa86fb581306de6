"""Generalized linear models: logistic, softmax and Huber regression, l2-regularized.

The loss is the mean over the samples plus λ/2 ‖w‖², without an intercept, at λ = 1/n and
λ = 10⁻³ L with L = λ_max(XᵀX/n) / 4. By default the data are twins and those that scikit-learn
ships; where the environment variable JAXOPT_EXT_DATA names a folder, its sets are added.

Features stay sparse where less than `SPARSE` of them is stored. Measured on one core, value and
gradient through a `BCOO` cost 1.4 times those of an array at a density of 11 % (a9a) and 0.4 times
at 4 % (w8a).
"""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from jaxopt_ext.bench import datasets
from jaxopt_ext.bench.problem import Entry, Problem

SPARSE = 0.05
HUBER = 1.35  # where the loss turns linear, in standard deviations of the target

# centred and scaled to unit variance, as their columns have units of their own
STANDARDISED = {
    *("breast_cancer", "wine", "efron_diabetes", "splice", "german_numer", "ionosphere"),
    *("sonar", "diabetes", "fourclass_scale", "svmguide1", "svmguide3"),
}
SCALE = {"digits": 16.0, "mnist5k": 255.0, "fashion6k": 255.0}  # largest value of a pixel
SOFTMAX = ("digits", "wine", "mnist5k", "fashion6k")
HUBER_SETS = ("efron_diabetes", "outliers-twin")
DEFAULT = {
    "logistic": ("breast_cancer", *datasets.TWINS),
    "softmax": ("digits", "wine"),
    "huber": HUBER_SETS,
}
QUICK = {
    *("logistic-breast_cancer-1overn", "softmax-wine-1overn"),
    *("logistic-a1a-twin-1e-3L", "huber-efron_diabetes-1overn"),
    *("logistic-heart_scale-1overn", "logistic-ionosphere-1overn", "logistic-sonar-1overn"),
    "logistic-diabetes-1overn",
}
LAMBDAS = ("1overn", "1e-3L")


def _ridge(w, data):
    return data["lam"] / 2 * jnp.sum(w**2)


def logistic(w, data):
    """Mean of log(1 + exp(−y xᵀw)) with labels y of −1 and +1, plus λ/2 ‖w‖²."""
    return jnp.mean(jax.nn.softplus(-data["y"] * (data["X"] @ w))) + _ridge(w, data)


def softmax(w, data):
    """Mean cross-entropy of classes 0, ..., k−1 with weights w = W.ravel(), plus λ/2 ‖w‖²."""
    scores = data["X"] @ w.reshape(data["X"].shape[1], -1)
    own = jnp.take_along_axis(scores, data["y"][:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(scores, axis=1) - own) + _ridge(w, data)


def huber(w, data):
    """Mean Huber loss of xᵀw − y, linear beyond `delta`, plus λ/2 ‖w‖²."""
    size, delta = jnp.abs(data["X"] @ w - data["y"]), data["delta"]
    small = jnp.minimum(size, delta)
    return jnp.mean(small * (size - small / 2)) + _ridge(w, data)


LOSSES = {"logistic": logistic, "softmax": softmax, "huber": huber}


@functools.cache
def reference_optima() -> dict[str, dict[str, Any]]:
    """Least objectives and λ by the name of the problem, from `reference_optima.json`."""
    text = Path(__file__).with_name("reference_optima.json").read_text(encoding="utf-8")
    return json.loads(text)["problems"]


def outliers_twin() -> datasets.Dataset:
    """A linear model in 40 correlated features with one target in ten far off."""
    random = np.random.RandomState(40)
    features = random.standard_normal((1000, 40)) @ (np.eye(40) + 0.9 * np.eye(40, k=1))
    target = features @ random.standard_normal(40) + 0.5 * random.standard_normal(1000)
    wrong = random.uniform(size=1000) < 0.1
    target = target + wrong * 50 * random.standard_normal(1000)
    return datasets.Dataset(features, target, meta={"source": "synthetic"})


def _standardise(array: np.ndarray) -> np.ndarray:
    deviation = array.std(axis=0)
    return (array - array.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)


def _features(name: str, features: Any) -> Any:
    sparse = isinstance(features, datasets.CSR)
    if name in STANDARDISED:
        return _standardise(features.dense() if sparse else features)
    if sparse:
        return features if features.density < SPARSE else features.dense()
    return features / SCALE.get(name, 1.0)


def _bcoo(features: datasets.CSR) -> BCOO:
    indices = np.stack([features.rows, features.indices], axis=1).astype(np.int32)
    # rows are in order and columns increase within each, as the loaders make sure
    arrays: Any = (features.data, indices)
    return BCOO(arrays, shape=features.shape, indices_sorted=True, unique_indices=True)


def _target(model: str, name: str, labels: np.ndarray) -> np.ndarray:
    if model == "huber":
        return _standardise(labels.astype(np.float64))
    classes, index = np.unique(labels, return_inverse=True)
    if model == "softmax":
        return index.astype(np.int32)
    if len(classes) != 2:
        raise ValueError(f"{name} has {len(classes)} different labels, expected two")
    return np.where(index == 1, 1.0, -1.0)


def build(model: str, dataset: str, lam: str) -> Problem:
    """One model on one data set.

    Args:
        model: A key of `LOSSES`.
        dataset: A name that `datasets.load` knows, or "outliers-twin".
        lam: One of `LAMBDAS`.

    Returns:
        The problem; its data are `X`, an array or a `BCOO`, `y`, `lam` and for Huber `delta`.

    Raises:
        ValueError: The data are malformed, or have not two classes for logistic regression.
        ImportError: The package that holds the data is not installed.
        OSError: The file of the data cannot be read.
    """
    loaded = outliers_twin() if dataset == "outliers-twin" else datasets.load(dataset)
    X = _features(dataset, loaded.features)
    y = _target(model, dataset, loaded.labels)
    name = f"{model}-{dataset}-{lam}"
    known = reference_optima().get(name, {})
    if "lam" not in known:
        L, _ = datasets.smoothness(X)
        known = known | {"lam": 1 / len(y) if lam == "1overn" else 1e-3 * L, "L": L}
    density = X.density if isinstance(X, datasets.CSR) else 1.0
    data = {
        "X": _bcoo(X) if isinstance(X, datasets.CSR) else X,
        "y": y,
        "lam": np.float64(known["lam"]),
    }
    if model == "huber":
        data["delta"] = np.float64(HUBER)
    outputs = int(y.max()) + 1 if model == "softmax" else 1
    return Problem(
        name=f"glm-{name}",
        fun=LOSSES[model],
        init=np.zeros(X.shape[1] * outputs),
        data=data,
        optimum=known.get("optimum"),
        meta={
            "model": model,
            "samples": X.shape[0],
            "density": density,
            "L": known.get("L"),
            "lam": known["lam"],
            "source": loaded.meta.get("source"),
        },
    )


def entries(folder: str | None = None) -> dict[str, Entry]:
    """The problems on the default data sets and on those of a folder.

    Args:
        folder: As in `datasets.local`.

    Returns:
        Entries by name. A file of unknown content is taken for two classes.

    Raises:
        FileNotFoundError: The folder does not exist.
    """
    sets = {model: list(names) for model, names in DEFAULT.items()}
    for name in datasets.local(folder):
        model = "softmax" if name in SOFTMAX else "logistic"
        if name not in sets[model] and name not in HUBER_SETS:
            sets[model].append(name)
    return {
        f"glm-{model}-{name}-{lam}": Entry(
            ("smooth", "glm") if model == "logistic" else ("smooth",),
            functools.partial(build, model, name, lam),
            f"{model}-{name}-{lam}" in QUICK,
        )
        for model, names in sets.items()
        for name in names
        for lam in LAMBDAS
    }


ENTRIES = entries()
