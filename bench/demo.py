"""The demo: tune thirty regularization weights by gradients through the training itself.

Run it as `python -m jaxopt_ext.bench.demo`.

Training is l2-regularized logistic regression with one weight per feature, solved nearly to
rounding error by `GradNormSmooth`. The validation loss of the trained model is a function of the
thirty weights; `jax.grad` differentiates it through the solver, finite differences check the
gradient, and Adam tunes the weights with it. Thirty numbers chosen by 142 samples can overfit
them, so the result is set against the best single weight, on several splits of the data. All
figures are measured in the run that prints them.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

import jaxopt_ext as jx
from jaxopt_ext import solvers
from jaxopt_ext.bench.datasets import Dataset, breast_cancer

# Finite differences divide the error of the solves by their width, so the training problem is
# solved close to rounding error. A relative tolerance would make that depend on the warm start.
SOLVED = jx.Optimality(rtol=0.0, atol=1e-13)
LEARNING_RATE = 0.2
DIFFERENCE_WIDTH = 1e-3  # in the log weights: truncation and rounding are both near 1e-9 there
SINGLE_LOG_WEIGHTS = np.log(10.0) * np.linspace(-4, 0, 13)


class Data(NamedTuple):
    """Samples and their labels.

    Attributes:
        features: One row per sample, standardized.
        labels: 0 or 1, as floating numbers.
    """

    features: Float[Array, "samples features"]
    labels: Float[Array, " samples"]


class Split(NamedTuple):
    """The three parts of the data: to fit, to choose the weights, to judge the result."""

    train: Data
    validation: Data
    test: Data


def split_data(dataset: Dataset, seed: int) -> Split:
    """Split 50/25/25, stratified by label; standardize by the training part.

    Args:
        dataset: What to split.
        seed: Seed of the shuffle.

    Returns:
        The three parts. No statistic of the validation or test part enters the scaling.
    """
    from sklearn.model_selection import train_test_split

    labels = dataset.labels
    train, rest = train_test_split(
        np.arange(len(labels)), train_size=0.5, stratify=labels, random_state=seed
    )
    validation, test = train_test_split(
        rest, train_size=0.5, stratify=labels[rest], random_state=seed
    )
    mean, deviation = dataset.features[train].mean(0), dataset.features[train].std(0)

    def part(rows):
        features = (dataset.features[rows] - mean) / deviation
        return Data(jnp.asarray(features), jnp.asarray(labels[rows], features.dtype))

    return Split(part(train), part(validation), part(test))


# ---- the two levels ------------------------------------------------------------------------


def scores(variables: PyTree, features: Float[Array, "samples features"]) -> Array:
    """Log odds of label 1."""
    return features @ variables["w"] + variables["b"]


def logistic_loss(variables: PyTree, data: Data) -> Float[Array, ""]:
    """Mean negative log likelihood, in nats per sample."""
    z = scores(variables, data.features)
    return jnp.mean(jax.nn.softplus(z) - data.labels * z)


def accuracy(variables: PyTree, data: Data) -> Float[Array, ""]:
    """Share of samples whose more likely label is the true one."""
    return jnp.mean((scores(variables, data.features) > 0) == (data.labels > 0.5))


def training_loss(variables: PyTree, args: tuple[Float[Array, " n"], Data]) -> Float[Array, ""]:
    """Logistic loss + ½ Σⱼ exp(θⱼ) wⱼ²; the intercept is not regularized."""
    log_weights, data = args
    penalty = jnp.sum(jnp.exp(log_weights) * variables["w"] ** 2) / 2
    return logistic_loss(variables, data) + penalty


def fit(log_weights: Float[Array, " n"], data: Data, start: PyTree) -> jx.Solution:
    """Train: minimize the training loss from `start`.

    Args:
        log_weights: θ, the logarithm of each feature's regularization weight.
        data: The training part.
        start: Starting point {"w", "b"}; the derivative with respect to it is zero.

    Returns:
        The solution; its value is differentiable with respect to θ.
    """
    problem = jx.Minimization(training_loss)
    return jx.solve(problem, solvers.GradNormSmooth(), start, (log_weights, data), stop=SOLVED)


def validation_loss(
    log_weights: Float[Array, " n"], split: Split, start: PyTree
) -> tuple[Float[Array, ""], jx.Solution]:
    """Validation loss of the model that was trained with these weights, and the training solve."""
    solution = fit(log_weights, split.train, start)
    return logistic_loss(solution.value, split.validation), solution


hypergradient = jax.value_and_grad(validation_loss, has_aux=True)
"""((validation loss, solution), its gradient in θ), with the arguments of `validation_loss`."""


def zero_start(split: Split) -> PyTree:
    """The model that gives every sample even odds."""
    features = split.train.features
    return {"w": jnp.zeros(features.shape[1], features.dtype), "b": jnp.zeros((), features.dtype)}


# ---- measure -------------------------------------------------------------------------------


class Compiled(NamedTuple):
    """A compiled function and what it took, in seconds."""

    call: Callable[..., Any]
    lower: float
    compile: float


def compiled(fun: Callable, *args: PyTree) -> Compiled:
    """Compile `fun` for arguments like these, timing tracing and compilation apart."""
    began = time.perf_counter()
    lowered = jax.jit(fun).lower(*args)
    between = time.perf_counter()
    call = lowered.compile()
    return Compiled(call, between - began, time.perf_counter() - between)


def run_time(call: Callable, *args: PyTree, repeats: int = 20) -> float:
    """Median wall-clock seconds of a call, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(call(*args))
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:]))


# ---- check ---------------------------------------------------------------------------------


def central_differences(fun: Callable[[Any], Any], x: Any, width: float) -> Float[np.ndarray, " n"]:
    """Gradient of `fun` at `x` by the five-point rule; the error is O(width⁴) + rounding / width.

    Args:
        fun: A scalar function of a vector.
        x: Where.
        width: Distance of neighbouring points, in units of `x`.

    Returns:
        The gradient, at the cost of four evaluations per component.
    """
    x = np.asarray(x)

    def slope(direction):
        far, near, minus_near, minus_far = (
            float(fun(x + k * width * direction)) for k in (2, 1, -1, -2)
        )
        return (minus_far - 8 * minus_near + 8 * near - far) / (12 * width)

    return np.array([slope(direction) for direction in np.eye(x.size, dtype=x.dtype)])


def relative_error(computed: Any, expected: Any) -> float:
    """Largest |computed − expected| / |expected| over the components."""
    computed, expected = np.asarray(computed), np.asarray(expected)
    return float(np.max(np.abs(computed - expected) / np.abs(expected)))


class GradientCheck(NamedTuple):
    """The hypergradient at one point, computed twice.

    Attributes:
        implicit: By the implicit function theorem.
        differences: By central finite differences.
        difference_time: Wall-clock seconds of the finite differences.
        solution: The training solve at that point.
    """

    implicit: Float[np.ndarray, " n"]
    differences: Float[np.ndarray, " n"]
    difference_time: float
    solution: jx.Solution

    @property
    def error(self) -> float:
        """Largest relative error over the components."""
        return relative_error(self.implicit, self.differences)


def check_gradient(
    loss: Callable[..., tuple[Array, jx.Solution]],
    gradient: Callable[..., tuple[tuple[Array, jx.Solution], Array]],
    log_weights: Float[Array, " n"],
    split: Split,
    start: PyTree,
) -> GradientCheck:
    """Compare the hypergradient with finite differences, which retrain from the trained model.

    Args:
        loss: `validation_loss` or a compiled version of it.
        gradient: `hypergradient` or a compiled version of it.
        log_weights: θ at which to compare.
        split: The data.
        start: Starting point of the training.

    Returns:
        Both gradients.

    Raises:
        SolveError: The training at θ was not successful.
    """
    (_, solution), implicit = gradient(log_weights, split, start)
    solution.check()
    began = time.perf_counter()
    differences = central_differences(
        lambda theta: loss(theta, split, solution.value)[0], log_weights, DIFFERENCE_WIDTH
    )
    took = time.perf_counter() - began
    return GradientCheck(np.asarray(implicit), differences, took, solution)


# ---- tune ----------------------------------------------------------------------------------


def best_single_weight(
    loss: Callable[..., tuple[Array, jx.Solution]],
    split: Split,
    start: PyTree,
    candidates: Sequence[float] | np.ndarray = SINGLE_LOG_WEIGHTS,
) -> tuple[float, PyTree]:
    """Choose one weight for all features by validation loss: what one does without a gradient.

    Args:
        loss: `validation_loss` or a compiled version of it.
        split: The data.
        start: Starting point of each training.
        candidates: The log weights to try.

    Returns:
        The chosen log weight and the model trained with it.
    """
    trials = []
    for candidate in candidates:
        value, solution = loss(jnp.full_like(start["w"], candidate), split, start)
        trials.append((float(value), float(candidate), solution.value))
    _, chosen, variables = min(trials, key=lambda trial: trial[0])
    return chosen, variables


class Tuning(NamedTuple):
    """What tuning did.

    Attributes:
        log_weights: θ with the least validation loss.
        variables: The model trained with it.
        best: The step at which it was seen.
        validation: Validation loss at each step, the start included.
        test: Test loss at each step; watched, never used.
        inner_steps: Steps of the training solve at each step.
        solved: Whether each training solve was successful.
    """

    log_weights: Float[Array, " n"]
    variables: PyTree
    best: int
    validation: Float[np.ndarray, " steps"]
    test: Float[np.ndarray, " steps"]
    inner_steps: np.ndarray
    solved: np.ndarray


@jax.jit
def adam_step(log_weights, state, direction, learning_rate):
    """One step of Adam: the new θ and the optimizer's new state."""
    change, state = optax.adam(learning_rate).update(direction, state)
    return optax.apply_updates(log_weights, change), state


def tune(
    gradient: Callable[..., tuple[tuple[Array, jx.Solution], Array]],
    log_weights: Float[Array, " n"],
    split: Split,
    start: PyTree,
    steps: int,
    learning_rate: float = LEARNING_RATE,
    progress: bool = False,
) -> Tuning:
    """Minimize the validation loss over the log weights with Adam, keeping the best.

    Each training starts from the previous one's model.

    Args:
        gradient: `hypergradient` or a compiled version of it.
        log_weights: θ to start from.
        split: The data.
        start: Starting point of the first training.
        steps: Updates of θ.
        learning_rate: Adam's, in units of θ.
        progress: Whether to show a bar with the remaining time.

    Returns:
        The best weights and the whole path.
    """
    from tqdm import tqdm

    test_loss = jax.jit(logistic_loss)
    state = optax.adam(learning_rate).init(log_weights)
    best_weights, best_variables, best, least = log_weights, start, 0, np.inf
    path = []
    bar = tqdm(range(steps + 1), desc="tuning", unit="step", disable=not progress)
    for step in bar:
        (loss, solution), direction = gradient(log_weights, split, start)
        start = solution.value
        path.append(
            (
                float(loss),
                float(test_loss(start, split.test)),
                int(solution.stats.steps),
                bool(solution.success),
            )
        )
        if path[-1][0] < least:
            best_weights, best_variables, best, least = log_weights, start, step, path[-1][0]
        bar.set_postfix_str(f"validation loss {least:.4f}", refresh=False)
        log_weights, state = adam_step(log_weights, state, direction, learning_rate)
    validation, test, inner_steps, solved = (np.array(c) for c in zip(*path, strict=True))
    return Tuning(best_weights, best_variables, best, validation, test, inner_steps, solved)


class Comparison(NamedTuple):
    """Test losses on one split: weights of 1, the best single weight, one weight per feature."""

    before: float
    single: float
    tuned: float


def compare(tuning: Tuning, single_variables: PyTree, split: Split) -> Comparison:
    """The test losses of one split; each choice was made by validation loss."""
    single = float(jax.jit(logistic_loss)(single_variables, split.test))
    return Comparison(float(tuning.test[0]), single, float(tuning.test[tuning.best]))


# ---- show ----------------------------------------------------------------------------------


def result_table(models: dict[str, PyTree], split: Split) -> str:
    """Loss and accuracy of each model on each part, as text.

    Args:
        models: Trained models {"w", "b"} by name.
        split: The data.

    Returns:
        One line per model.
    """
    width = max(map(len, models))
    parts = "".join(f"{name:>11}" for name in split._fields)
    lines = [
        f"{'':{width}}  {'loss (nats per sample)':>33}   {'accuracy (%)':>33}",
        f"{'':{width}}  {parts}   {parts}",
    ]
    loss_of, accuracy_of = jax.jit(logistic_loss), jax.jit(accuracy)
    for name, variables in models.items():
        losses = "".join(f"{float(loss_of(variables, part)):11.4f}" for part in split)
        shares = "".join(f"{100 * float(accuracy_of(variables, part)):11.1f}" for part in split)
        lines.append(f"{name:{width}}  {losses}   {shares}")
    return "\n".join(lines)


def verdict(results: Sequence[Comparison]) -> str:
    """Say in how many splits tuning won on the test part, and by how much in the median."""
    lines = [f"Test loss of one weight per feature, tuned, on {len(results)} random splits:"]
    for name, other in (("before tuning", "before"), ("best single weight", "single")):
        ratios = np.array([result.tuned / getattr(result, other) for result in results])
        wins, losses = int(np.sum(ratios < 1)), int(np.sum(ratios > 1))
        lines.append(
            f"  against {name:20} lower {wins}, higher {losses}; "
            f"ratio {np.min(ratios):.2f} to {np.max(ratios):.2f}, median {np.median(ratios):.2f}"
        )
    return "\n".join(lines)


def effort_table(
    loss: Compiled,
    gradient: Compiled,
    check: GradientCheck,
    tuning: Tuning,
    run_times: tuple[float, float, float],
) -> str:
    """Gradient error, steps and times, as text.

    Args:
        loss: The compiled validation loss.
        gradient: The compiled hypergradient.
        check: What `check_gradient` returned.
        tuning: What `tune` returned.
        run_times: Seconds of one loss, one hypergradient, and the tuning.
    """
    loss_time, gradient_time, tuning_time = run_times
    size = len(check.implicit)
    sections = {
        f"Hypergradient of the validation loss, {size} log weights, every weight 1": {
            "max relative error against finite differences": f"{check.error:.1e}",
            "training: gradient, max norm": f"{float(check.solution.optimality):.1e}",
            "training: steps from zero": f"{int(check.solution.stats.steps)}",
        },
        "Time": {
            "hypergradient: trace and lower": f"{gradient.lower:.2f} s",
            "hypergradient: compile": f"{gradient.compile:.2f} s",
            "hypergradient: run, training included": f"{1e3 * gradient_time:.2f} ms",
            "loss alone: trace, lower and compile": f"{loss.lower + loss.compile:.2f} s",
            "loss alone: run, training included": f"{1e3 * loss_time:.2f} ms",
            f"finite differences: {4 * size} trainings": f"{1e3 * check.difference_time:.0f} ms",
        },
        "Tuning": {
            "steps, the best of them": f"{len(tuning.solved) - 1}, {tuning.best}",
            "trainings, successful": f"{len(tuning.solved)}, {int(np.sum(tuning.solved))}",
            "training steps: sum, largest": (
                f"{int(np.sum(tuning.inner_steps))}, {int(np.max(tuning.inner_steps))}"
            ),
            "run": f"{tuning_time:.2f} s",
        },
    }
    lines = []
    for title, rows in sections.items():
        lines += [title, *(f"  {name:48} {value}" for name, value in rows.items())]
    return "\n".join(lines)


def draw(
    path: Path,
    tuning: Tuning,
    single_losses: tuple[float, float],
    check: GradientCheck,
    names: Sequence[str],
) -> None:
    """Write the picture: losses during tuning, gradient check, tuned weights.

    Args:
        path: File to write; its suffix says the format.
        tuning: What `tune` returned.
        single_losses: Validation and test loss of the best single weight, drawn for comparison.
        check: What `check_gradient` returned.
        names: Names of the features.
    """
    # The object interface with an explicit canvas needs no display and no global backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blue, orange, grey = "#1f5fa8", "#d1661b", "#777777"
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic([["loss", "weights"], ["check", "weights"]], width_ratios=[5, 6])

    loss = axes["loss"]
    loss.plot(tuning.validation, color=blue, label="validation")
    loss.plot(tuning.test, color=orange, label="test (watched, never used)")
    for value, color in zip(single_losses, (blue, orange), strict=True):
        loss.axhline(value, color=color, linestyle=":", linewidth=1.2)
    loss.plot([], color=grey, linestyle=":", linewidth=1.2, label="the same, best single weight")
    loss.plot(tuning.best, tuning.validation[tuning.best], "o", color=blue, label="chosen")
    loss.set(
        title="Loss while tuning one weight per feature",
        xlabel="tuning step",
        ylabel="logistic loss (nats per sample)",
        ylim=(0, None),
    )
    loss.legend(frameon=False)

    panel = axes["check"]
    differences, implicit = 1e3 * check.differences, 1e3 * check.implicit
    ends = [np.min(differences), np.max(differences)]
    panel.plot(ends, ends, color=grey, linewidth=1, label="equal")
    panel.plot(
        differences,
        implicit,
        "o",
        color=blue,
        markersize=5,
        alpha=0.7,
        label="one log weight",
    )
    panel.set(
        title=f"Hypergradient (max relative error {check.error:.1e})",
        xlabel="central finite differences (10⁻³ nats)",
        ylabel="implicit (10⁻³ nats)",
    )
    panel.legend(frameon=False)

    weights = axes["weights"]
    values = np.exp(np.asarray(tuning.log_weights))
    order = np.argsort(-values)
    rows = np.arange(len(order))
    weights.axvline(1, color=grey, linestyle=":", linewidth=1.2)
    weights.hlines(rows, 1, values[order], color=blue, linewidth=1, alpha=0.5)
    weights.plot(values[order], rows, "o", color=blue, markersize=5)
    weights.set_xscale("log")
    weights.set_yticks(rows)
    weights.set_yticklabels([names[int(i)] for i in order])
    weights.set(
        title="Tuned l2 weight of each feature",
        xlabel="exp(θ), log scale; small: the feature is used freely; dotted: start",
        ylim=(-0.7, len(order) - 0.3),
    )
    for panel in axes.values():
        panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo: fit, check the gradient, tune, print the tables, write the picture.

    Args:
        argv: Command line; `None` means that of the process.
    """
    from tqdm import tqdm

    parser = argparse.ArgumentParser(prog="python -m jaxopt_ext.bench.demo", description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="updates of the weights")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data split")
    parser.add_argument("--splits", type=int, default=10, help="splits in the final comparison")
    options = parser.parse_args(argv)
    for name, least in (("steps", 0), ("seed", 0), ("splits", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} is {getattr(options, name)}, expected at least {least}")
    began = time.perf_counter()
    jax.config.update("jax_enable_x64", True)

    dataset = breast_cancer()
    split = split_data(dataset, options.seed)
    sizes = ", ".join(f"{len(part.labels)} {name}" for name, part in split._asdict().items())
    print("Logistic regression on the breast cancer data, one l2 weight per feature")
    print(f"{len(dataset.feature_names)} features; samples: {sizes}; float64", flush=True)

    log_weights = jnp.zeros(split.train.features.shape[1])  # every weight 1
    zero = zero_start(split)
    loss = compiled(validation_loss, log_weights, split, zero)
    gradient = compiled(hypergradient, log_weights, split, zero)
    check = check_gradient(loss.call, gradient.call, log_weights, split, zero)
    loss_time = run_time(loss.call, log_weights, split, zero)
    gradient_time = run_time(gradient.call, log_weights, split, zero)

    clock = time.perf_counter()
    tuning = tune(gradient.call, log_weights, split, zero, options.steps, progress=True)
    tuning_time = time.perf_counter() - clock
    single, single_variables = best_single_weight(loss.call, split, zero)

    results = [compare(tuning, single_variables, split)]
    others = range(options.seed + 1, options.seed + options.splits)
    for seed in tqdm(others, desc="other splits", unit="split"):
        # stratified parts have the same sizes whatever the seed, so nothing compiles again
        other = split_data(dataset, seed)
        other_tuning = tune(gradient.call, log_weights, other, zero, options.steps)
        results.append(compare(other_tuning, best_single_weight(loss.call, other, zero)[1], other))

    models = {
        "before: every weight 1": check.solution.value,
        "after: one weight per feature, tuned": tuning.variables,
        f"for comparison: best single weight, {np.exp(single):.1e}": single_variables,
    }
    print("\n" + result_table(models, split))
    print("\n" + verdict(results))
    times = (loss_time, gradient_time, tuning_time)
    print("\n" + effort_table(loss, gradient, check, tuning, times))

    path = Path("demo_output") / "demo.png"
    parts = (split.validation, split.test)
    validation, test = (float(logistic_loss(single_variables, part)) for part in parts)
    draw(path, tuning, (validation, test), check, dataset.feature_names)
    print(f"\nPicture: {path}")
    print(f"Total after imports: {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
