"""Bilevel problems: a quadratic in closed form, hyper-cleaning of digits, small BOLIB problems."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

import jaxopt_ext as jx
from jaxopt_ext.bench import datasets
from jaxopt_ext.bench.contender import cast
from jaxopt_ext.bench.problem import Entry

Level = Callable[[PyTree, PyTree, PyTree], Array]  # (x, y, args) -> scalar


class BilevelProblem(NamedTuple):
    """A bilevel problem with its start, its step sizes and what is known of its solution.

    Attributes:
        name: Its name within the suite.
        upper: f(x, y, args).
        lower: g(x, y, args).
        init: The pair (x, y) in float64.
        args: PyTree of NumPy arrays, float64 where real.
        measure: From (x, y) to figures by name; `error` is what the suite tests.
        tolerance: What `error` is compared with.
        lower_step: Step size for y that every method gets, in units of y² per unit of g.
        upper_step: Step size for x after several lower steps.
        single_step: Step size for x where each step moves all variables once.
        gradients: Evaluations of gradients that a run may spend; a second-order product is two.
        facts: Size and conditioning in words, and reference figures.
        upper_set: Projection of x.
        lower_set: Projection of y.
        sampler: Draws args, for the stochastic problems.
    """

    name: str
    upper: Level
    lower: Level
    init: tuple[PyTree, PyTree]
    args: PyTree
    measure: Callable[[PyTree, PyTree], dict[str, float]]
    tolerance: float
    lower_step: float
    upper_step: float
    single_step: float
    gradients: int
    facts: dict[str, Any]
    upper_set: Callable[[PyTree], PyTree] | None = None
    lower_set: Callable[[PyTree], PyTree] | None = None
    sampler: Callable[[Array, PyTree], PyTree] | None = None

    @property
    def bilevel(self) -> jx.Bilevel:
        """The problem for our solvers."""
        return jx.Bilevel(self.upper, self.lower, self.upper_set, self.lower_set)


# ---- quadratic in closed form ------------------------------------------------------------------


def _quadratic(y, x, part, rows):
    """Mean over the rows of ½ yᵀA y + xᵀB y + ½ xᵀC x + aᵀy + cᵀx."""
    A, B, C, a, c = (part[name][rows].mean(0) for name in ("A", "B", "C", "a", "c"))
    return y @ A @ y / 2 + x @ B @ y + x @ C @ x / 2 + a @ y + c @ x


def quadratic_upper(x: Array, y: Array, args: dict[str, Any]) -> Array:
    """The upper level, a mean over the rows in `args`."""
    return _quadratic(y, x, args["upper"], args["rows"])


def quadratic_lower(x: Array, y: Array, args: dict[str, Any]) -> Array:
    """The lower level, a mean over the rows in `args`."""
    return _quadratic(y, x, args["lower"], args["rows"])


def _spectra(rng, samples, size, least):
    """Symmetric matrices whose mean has its eigenvalues between about `least` and 1."""
    basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
    mean = (basis * np.geomspace(least, 1.0, size)) @ basis.T
    noise = rng.standard_normal((samples, size, size)) / (2 * np.sqrt(size))
    noise = (noise + noise.swapaxes(1, 2)) / 2
    return mean + noise - noise.mean(0)


def quadratic(
    lower_size: int = 40,
    upper_size: int = 20,
    samples: int = 256,
    least: float = 0.1,
    batch: int = 0,
    gradients: int = 20_000,
    seed: int = 0,
) -> BilevelProblem:
    """A finite sum of quadratics on both levels, as the one of benchmark_bilevel.

    With the means of the coefficients, y*(x) = −A_g⁻¹(B_gᵀx + a_g), and the gradient of the value
    function is C_f x + B_f y* + c_f − B_g A_g⁻¹(A_f y* + B_fᵀx + a_f). With `batch` the functions
    are seen through random rows; without, through their means.
    """
    rng = np.random.default_rng(seed)

    def part(coupling, size):
        return {
            "A": _spectra(rng, samples, size, least),
            "B": coupling * rng.standard_normal((samples, upper_size, size)) / np.sqrt(size),
            "C": _spectra(rng, samples, upper_size, least),
            "a": rng.standard_normal((samples, size)) / np.sqrt(size),
            "c": rng.standard_normal((samples, upper_size)) / np.sqrt(upper_size),
        }

    parts = {"upper": part(0.2, lower_size), "lower": part(1.0, lower_size)}
    # a common part, so that the samples do not average out; with one in the coupling of the upper
    # level the value function would not be convex
    for level, name in (("lower", "B"), ("lower", "a"), ("upper", "a"), ("upper", "c")):
        common = rng.standard_normal(parts[level][name].shape[1:])
        parts[level][name] += common / np.sqrt(lower_size)
    means = {name: {k: v.mean(0) for k, v in level.items()} for name, level in parts.items()}
    f, g = means["upper"], means["lower"]

    def y_of(x):
        return -np.linalg.solve(g["A"], g["B"].T @ x + g["a"])

    def gradient(x):
        y = y_of(x)
        adjoint = np.linalg.solve(g["A"], f["A"] @ y + f["B"].T @ x + f["a"])
        return f["C"] @ x + f["B"] @ y + f["c"] - g["B"] @ adjoint

    hessian = np.stack([gradient(e) - gradient(0 * e) for e in np.eye(upper_size)])
    curvature = np.linalg.eigvalsh((hessian + hessian.T) / 2)
    largest = np.linalg.eigvalsh(g["A"])[-1] + 0.1
    start = float(np.sum(gradient(np.zeros(upper_size)) ** 2))

    def measure(x, y):
        squared = float(np.sum(gradient(np.asarray(x, np.float64)) ** 2))
        distance = float(np.linalg.norm(np.asarray(y, np.float64) - y_of(np.asarray(x))))
        return {"error": squared / start, "gradient": squared, "distance": distance}

    args: Any = {"rows": np.zeros(1, np.int32)}
    args |= {n: {k: v[None] for k, v in level.items()} for n, level in means.items()}
    sampler = None
    if batch:
        args = {"rows": np.arange(batch, dtype=np.int32), **parts}

        def draw(key, args):
            rows = jax.random.randint(key, (batch,), 0, samples).astype(args["rows"].dtype)
            return {**args, "rows": rows}

        sampler = draw

    return BilevelProblem(
        name="quadratic-stochastic" if batch else "quadratic",
        upper=quadratic_upper,
        lower=quadratic_lower,
        init=(np.zeros(upper_size), np.zeros(lower_size)),
        args=args,
        measure=measure,
        tolerance=1e-2 if batch else 1e-3,
        lower_step=0.9 / largest,
        upper_step=1 / float(curvature[-1]),
        single_step=0.1 / float(curvature[-1]),
        gradients=gradients,
        facts={
            "sizes": f"{upper_size} upper, {lower_size} lower, {samples} samples",
            "cond_lower": float(np.linalg.cond(g["A"])),
            "cond_value": float(curvature[-1] / curvature[0]),
            "start": start,
        },
        sampler=sampler,
    )


# ---- hyper-cleaning ----------------------------------------------------------------------------

RIDGE = 1e-3
CLASSES = 10
RETRAIN = 1000  # accelerated steps, after which the lower level is solved


class Cleaning(NamedTuple):
    """Training data with corrupted labels, clean validation data and test data.

    Attributes:
        train: Features of the training samples, with a column of ones.
        labels: Their labels, partly wrong.
        valid: Features of the validation samples.
        valid_labels: Their labels.
        test: Features of the test samples.
        test_labels: Their labels.
        corrupted: Which training labels were replaced.
    """

    train: Float[np.ndarray, "n d"]
    labels: Int[np.ndarray, " n"]
    valid: Float[np.ndarray, "v d"]
    valid_labels: Int[np.ndarray, " v"]
    test: Float[np.ndarray, "t d"]
    test_labels: Int[np.ndarray, " t"]
    corrupted: np.ndarray


def corrupt(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    train: int,
    valid: int,
    share: float,
    seed: int = 0,
) -> Cleaning:
    """Split at random and replace a share of the training labels by other classes."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    features = np.concatenate([features, np.ones((len(labels), 1))], axis=1)[order]
    labels = np.asarray(labels)[order].astype(np.int32)
    corrupted = rng.random(train) < share
    shifted = (labels[:train] + rng.integers(1, CLASSES, train)) % CLASSES
    noisy = np.where(corrupted, shifted, labels[:train]).astype(np.int32)
    end = train + valid
    return Cleaning(
        features[:train], noisy, features[train:end], labels[train:end],
        features[end:], labels[end:], corrupted,
    )  # fmt: skip


def _losses(weights: Array, features: Array, labels: Array) -> Array:
    """Cross-entropy of each sample under a linear softmax model."""
    logits = features @ weights
    picked = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - picked


def cleaning_upper(x: Array, y: Array, args: dict[str, Array]) -> Array:
    """Mean loss on the validation samples."""
    return jnp.mean(_losses(y, args["valid"], args["valid_labels"]))


def cleaning_lower(x: Array, y: Array, args: dict[str, Array]) -> Array:
    """Training loss with one weight sigmoid(xᵢ) per sample, and a ridge term."""
    losses = _losses(y, args["train"], args["labels"])
    return jnp.mean(jax.nn.sigmoid(x) * losses) + RIDGE / 2 * jnp.sum(y**2)


@functools.partial(jax.jit, static_argnames="steps")
def retrained(x: Array, y: Array, args: dict[str, Array], rate: Array, steps: int) -> Array:
    """The lower-level solution for given weights, by accelerated gradient steps."""
    momentum = jnp.asarray(0.98, y.dtype)

    def step(_, carry):
        y, before = carry
        ahead = y + momentum * (y - before)
        return ahead - rate * jax.grad(cleaning_lower, 1)(x, ahead, args), y

    return jax.lax.fori_loop(0, steps, step, (y, y))[0]


def auc(score: Float[np.ndarray, " n"], positive: np.ndarray) -> float:
    """Area under the ROC curve: the share of pairs that the score orders rightly."""
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[place]
    pairs = positive.sum() * (~positive).sum()
    return float((ranks[positive].sum() - positive.sum() * (positive.sum() + 1) / 2) / pairs)


# Least validation loss of all methods within the budget; what "within 1 %" is measured against.
BEST = {
    "digits-0.3": 0.1991,
    "digits-0.5": 0.2371,
    "mnist5k-0.5": 0.1873,
    "fashion6k-0.5": 0.3162,
}


def cleaning(
    name: str,
    data: Cleaning,
    lower_step: float,
    upper_step: float,
    gradients: int,
) -> BilevelProblem:
    """Hyper-cleaning: weights of the training samples, judged by the validation loss.

    The validation loss is that of a model trained to the end with the weights found, not that of
    the y that a method returned.
    """
    args = {
        "train": data.train, "labels": data.labels,
        "valid": data.valid, "valid_labels": data.valid_labels,
    }  # fmt: skip
    n, d = data.train.shape
    start = np.zeros((d, CLASSES))

    def accuracy(y):
        return float(np.mean(np.argmax(data.test @ np.asarray(y), axis=1) == data.test_labels))

    def train(x):
        here = cast((x, start, args, np.asarray(lower_step)), "float32")
        return retrained(*here, steps=RETRAIN)

    def measure(x, y):
        x = np.asarray(x, np.float64)
        if not np.all(np.isfinite(x)):
            return {"error": float("inf")}
        y = train(x)
        loss = float(cleaning_upper(jnp.asarray(x), y, cast(args, "float32")))
        best = BEST.get(name, loss)
        return {
            "error": loss / best - 1,
            "valid_loss": loss,
            "test_accuracy": accuracy(y),
            "auc": auc(x, ~data.corrupted),
        }

    def references():
        """Test accuracy without cleaning, with the true labels only, of the validation alone."""
        alone = args | {"train": data.valid, "labels": data.valid_labels}
        even = cast((np.full(len(data.valid), 9.0), start, alone, np.asarray(1.0)), "float32")
        figures = {
            "none": train(np.zeros(n)),
            "clean samples only": train(np.where(data.corrupted, -30.0, 30.0)),
            "validation alone": retrained(*even[:3], even[3] * lower_step, steps=RETRAIN),
        }
        return {label: accuracy(y) for label, y in figures.items()}

    return BilevelProblem(
        name=name,
        upper=cleaning_upper,
        lower=cleaning_lower,
        init=(np.zeros(n), start),
        args=args,
        measure=measure,
        tolerance=1e-2,
        lower_step=lower_step,
        upper_step=upper_step,
        single_step=upper_step / 4,
        gradients=gradients,
        facts={
            "sizes": f"{n} train, {len(data.valid)} valid, {len(data.test)} test; {d} features",
            "test accuracy": references(),
        },
    )


def digits(share: float, gradients: int = 12_000) -> BilevelProblem:
    """Hyper-cleaning of the digits of scikit-learn, 8 x 8 pixels."""
    found = datasets.load("digits")
    data = corrupt(found.features / 16, found.labels, 1000, 300, share)
    return cleaning(f"digits-{share:g}", data, 0.8, 2000.0, gradients)


def pictures(name: str, share: float, train: int, valid: int, gradients: int) -> BilevelProblem:
    """Hyper-cleaning of 28 x 28 pictures from the folder of the user."""
    try:
        found = datasets.load(name)
    except ValueError as error:
        raise ImportError(str(error)) from None
    data = corrupt(found.features / 255, found.labels, train, valid, share)
    return cleaning(f"{name}-{share:g}", data, 0.1, 4000.0, gradients)


ENTRIES = {
    "quadratic": Entry(("deterministic",), quadratic, quick=True),
    "quadratic-stochastic": Entry(
        ("stochastic",), functools.partial(quadratic, batch=64), quick=True
    ),
    "digits-0.3": Entry(("deterministic",), functools.partial(digits, 0.3)),
    "digits-0.5": Entry(("deterministic",), functools.partial(digits, 0.5)),
    "mnist5k-0.5": Entry(
        ("deterministic",),
        functools.partial(pictures, "mnist5k", 0.5, 3000, 1000, 9_000),
    ),
    "fashion6k-0.5": Entry(
        ("deterministic",),
        functools.partial(pictures, "fashion6k", 0.5, 4000, 1000, 9_000),
    ),
}
