"""Supervised learning as a loss of a model's output, in minibatches: for stochastic methods."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxopt_ext.bench import datasets
from jaxopt_ext.bench.problem import Entry

KIND = "supervised"
SETS = ("mushrooms", "a9a", "rcv1_small")
COSTS = (0, 10, 100, 1000)


@dataclasses.dataclass(frozen=True, eq=False)
class Supervised:
    """A problem min ℓ(m(w)) over samples.

    Attributes:
        name: Its name within the suite.
        loss: ℓ(target, data), the mean over the samples in data.
        model: m(variables, data), the targets of the samples in data.
        init: The starting point, a PyTree of NumPy arrays.
        data: All samples, a PyTree of NumPy arrays with a common leading axis.
        batch: Samples per oracle call; all of them where it equals their number.
        smoothness: L of the loss of one sample as a function of its target.
        optimum: The least objective over all samples, `None` if unknown.
        calls: Oracle calls of a run.
        cost: How often the oracle repeats a piece of work whose result does not matter.
        meta: Facts for the report.
    """

    name: str
    loss: Callable[[Any, Any], Any]
    model: Callable[[Any, Any], Any]
    init: PyTree
    data: PyTree
    batch: int
    smoothness: float
    optimum: float | None
    calls: int
    cost: int | None = None
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def samples(self) -> int:
        """The number of all samples."""
        return len(jax.tree.leaves(self.data)[0])

    @property
    def size(self) -> int:
        """The number of variables."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.init))

    def fun(self, w: PyTree, data: PyTree) -> Any:
        """The objective over the samples in data."""
        return self.loss(self.model(w, data), data)

    def digest(self) -> str:
        """Twelve hexadecimal digits that change with the start or the data."""
        sha = hashlib.sha256(f"{self.name}{self.batch}{self.calls}".encode())
        for leaf in jax.tree.leaves((self.init, self.data)):
            sha.update(np.ascontiguousarray(leaf).tobytes())
        return sha.hexdigest()[:12]


class Method(NamedTuple):
    """A stochastic method, as the contenders of this kind return it.

    Attributes:
        init: (w, batch, rate) → state.
        step: (state, batch) → state; asks the oracle once.
        point: state → the newest iterate.
        rates: Settings to be tried; the one that is solved first counts, else the one with the
            least final objective. Empty for a method that is not tuned.
        further: state → what it says of its evaluations, by kind.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]
    point: Callable[[Any], Any]
    rates: tuple[float, ...] = ()
    further: Callable[[Any], dict[str, Any]] = lambda state: {}


def linear(w, data):
    """Scores xᵀw; of sparse rows, where X is a pair of values and their columns."""
    if isinstance(data["X"], tuple):
        values, columns = data["X"]
        return jnp.sum(values * w[columns], axis=1)
    return data["X"] @ w


def logistic(z, data):
    """Mean of log(1 + exp(z)) − y z with labels y of 0 and 1; L = 1/4."""
    return jnp.mean(jax.nn.softplus(z) - data["y"] * z)


def squares(z, data):
    """Mean over the samples of ½‖z − y‖²; L = 1."""
    return jnp.sum((z - data["y"]) ** 2) / (2 * z.shape[0])


LOSSES = {"logistic": (logistic, 0.25), "squared": (squares, 1.0)}


def _matrix(name: str) -> tuple[np.ndarray, np.ndarray]:
    loaded = datasets.load(name)
    X = loaded.features.dense() if isinstance(loaded.features, datasets.CSR) else loaded.features
    X = np.asarray(X)[:, np.any(X != 0, axis=0)]  # columns without entries say nothing
    return np.column_stack([X, np.ones(len(X))]), (np.asarray(loaded.labels) > 0).astype(float)


def _sparse(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The stored values of each row and their columns, filled up with zeros to the longest."""
    length = int(np.max(np.sum(X != 0, axis=1)))
    columns = np.argsort(X == 0, axis=1, kind="stable")[:, :length]
    return np.take_along_axis(X, columns, axis=1), columns.astype(np.int32)


def _least(loss: str, X: np.ndarray, y: np.ndarray) -> float | None:
    """The least objective, where it is quick to find."""
    if X.shape[1] > len(X):
        return 0.0  # fits the labels exactly, or separates them
    if loss == "squared":
        residual = X @ np.linalg.lstsq(X, y, rcond=None)[0] - y
        return float(residual @ residual / (2 * len(y)))
    return _least_logistic(X, y)


def _least_logistic(X: np.ndarray, y: np.ndarray) -> float:
    """By Newton's method with a ridge that vanishes."""
    w = np.zeros(X.shape[1])
    for ridge in np.logspace(-3, -11, 33):
        z = np.clip(X @ w, -500, 500)
        p = 1 / (1 + np.exp(-z))
        H = X.T @ (X * (p * (1 - p))[:, None]) / len(y) + ridge * np.eye(len(w))
        w = w - np.linalg.solve(H, X.T @ (p - y) / len(y) + ridge * w)
    z = X @ w
    return float(np.mean(np.logaddexp(0, z) - y * z))


def classification(loss: str, name: str, batch: int | None, calls: int) -> Supervised:
    """A linear model with an intercept on a data set with two classes.

    Args:
        loss: A key of `LOSSES`.
        name: A data set.
        batch: Samples per oracle call; `None` means all.
        calls: Oracle calls of a run.

    Returns:
        The problem, labels 0 and 1.

    Raises:
        ValueError: No such data set.
    """
    X, y = _matrix(name)
    fun, smoothness = LOSSES[loss]
    size = len(y) if batch is None else batch
    return Supervised(
        name=f"{loss}-{name}-{'full' if batch is None else f'batch{batch}'}",
        loss=fun,
        model=linear,
        init=np.zeros(X.shape[1]),
        data={"X": _sparse(X) if X.shape[1] > len(X) else X, "y": y},
        batch=size,
        smoothness=smoothness,
        optimum=_least(loss, X, y),
        calls=calls,
        meta={"samples": len(y), "batch": size, "smoothness": smoothness},
    )


def factorization(rank: int, batch: int | None, calls: int) -> Supervised:
    """A linear network with one hidden layer for a linear map of condition number 1e10.

    Args:
        rank: Width of the hidden layer.
        batch: Samples per oracle call; `None` means all.
        calls: Oracle calls of a run.

    Returns:
        The problem: 1000 normal inputs of size 6, outputs of size 10.
    """
    random = np.random.RandomState(10)
    X = random.standard_normal((1000, 6))
    Y = X @ (np.linspace(1, 1e-10, 10)[:, None] * random.uniform(size=(10, 6))).T
    init = {
        "first": random.uniform(-1, 1, (6, rank)) / np.sqrt(6),
        "second": random.uniform(-1, 1, (rank, 10)) / np.sqrt(rank),
    }
    residue = np.linalg.svd(Y, compute_uv=False)[rank:]
    size = 1000 if batch is None else batch
    return Supervised(
        name=f"factorization-rank{rank}-{'full' if batch is None else f'batch{batch}'}",
        loss=squares,
        model=lambda w, data: (data["X"] @ w["first"]) @ w["second"],
        init=init,
        data={"X": X, "y": Y},
        batch=size,
        smoothness=1.0,
        # of all targets of that rank, a little less than the model can reach
        optimum=float(np.sum(residue**2) / 2000),
        calls=calls,
        meta={"samples": 1000, "batch": size, "smoothness": 1.0},
    )


def expensive(cost: int) -> Supervised:
    """Logistic regression whose oracle turns its target to and fro before it answers.

    Args:
        cost: Rotations in either direction.

    Returns:
        The problem: 256 samples, 32 features, all in one batch.
    """
    random = np.random.RandomState(0)
    X = random.standard_normal((256, 32))
    y = (X @ random.standard_normal(32) + random.standard_normal(256) > 0).astype(float)
    turn = np.linalg.qr(random.standard_normal((256, 256)))[0]

    def loss(z, data):
        Q = data["turn"]
        z = jax.lax.scan(lambda v, _: (Q @ v, None), z, length=cost)[0]
        z = jax.lax.scan(lambda v, _: (Q.T @ v, None), z, length=cost)[0]
        return logistic(z, data)

    return Supervised(
        name=f"cost-{cost}",
        loss=loss,
        model=linear,
        init=np.zeros(32),
        data={"X": X, "y": y, "turn": turn},
        batch=256,
        smoothness=0.25,
        optimum=None,
        calls=50,
        cost=cost,
        meta={"samples": 256, "batch": 256, "cost": cost},
    )


def entries() -> dict[str, Entry]:
    """The problems: real data sets where a local folder has them, else their twins.

    Returns:
        Entries by name.
    """
    local = datasets.local()
    found: dict[str, Entry] = {}

    def add(name: str, build: Callable[[], Supervised], quick: bool = False) -> None:
        found[name] = Entry((KIND,), build, quick)

    for short in SETS:
        name = short if short in local else f"{short}-twin"
        for loss in LOSSES:
            sizes = {100: 200} if short == "rcv1_small" else {125: 1000}
            sizes |= {None: 300} if short == "mushrooms" else {}
            for batch, calls in sizes.items():
                build = functools.partial(classification, loss, name, batch, calls)
                label = "full" if batch is None else f"batch{batch}"
                add(f"{loss}-{name}-{label}", build, short == "mushrooms" and batch == 125)
    for rank in (4, 10):
        add(f"factorization-rank{rank}-batch100", functools.partial(factorization, rank, 100, 1000))
    for cost in COSTS:
        add(f"cost-{cost}", functools.partial(expensive, cost), quick=cost in (0, 1000))
    return found
