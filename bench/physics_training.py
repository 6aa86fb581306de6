"""Train networks with a differential equation as a penalty, as one hard constraint, or per expert.

    python -m jaxopt_ext.bench.physics_training diffusion --out runs
    python -m jaxopt_ext.bench.physics_training --report runs

A network proposes basis functions on a space-time grid. `soft` takes one of them as the solution
and has the equation in the loss. `global` solves for the coefficients of all of them by one
constraint layer, `experts` by one layer per part of the domain, each with all initial and boundary
rows as in the paper, `coupled` with its own ones and rows at the interfaces. No method sees a
solution: the loss is the residual of the assembled field. A run writes checkpoints, and goes on
from the last one when it is started again.

Reference: Chalapathi, Du, Krishnapriyan, "Scaling physics-informed hard constraints with
mixture-of-experts", ICLR 2024.
"""

import argparse
import functools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

import jaxopt_ext as jx
from jaxopt_ext import layers, solvers
from jaxopt_ext.bench.neural_operator import FourierOperator
from jaxopt_ext.bench.problems.grid_equations import DiffusionSorption, GridEquation, NavierStokes

EQUATIONS: dict[str, GridEquation] = {
    "diffusion": DiffusionSorption(),
    "navier_stokes": NavierStokes((8, 32, 32)),
}
RIDGE = 1e-4
LAYER_STEPS = 100  # of the solver in a constraint layer
RADIUS = 100.0  # where its search begins; coefficients of an untrained basis are large
ACCURACY = 1e-6  # of the layers, relative to the gradient at their start
CHUNK = 50  # training steps between two looks
TESTS = 6  # parameters that no training step sees; their keys begin here
TEST_KEY = 10_000
JUMP_WEIGHTS = {"value": 10.0, "slope": 1.0}  # of all interface rows together, by block


class Setting(NamedTuple):
    """One run.

    Attributes:
        equation: Name of the equation.
        method: "soft", "global", "experts" or "coupled".
        splits: Experts along each axis of the grid.
        weights: Of the equation and of the other blocks, in layer and loss.
        seed: Of the network and the training parameters.
        steps: Training steps.
        functions: Basis functions, for all methods but "soft".
        width: Channels of the network.
        depth: Layers of the network.
        batch: Parameters per training step.
    """

    equation: str
    method: str
    splits: tuple[int, ...]
    weights: tuple[float, float]
    seed: int
    steps: int
    functions: int = 8
    width: int = 16
    depth: int = 3
    batch: int = 2

    @property
    def name(self) -> str:
        """Of its files."""
        experts = "x".join(map(str, self.splits))
        scale = "-".join(f"{w:g}" for w in self.weights)
        return f"{self.equation}_{self.method}_{experts}_w{scale}_s{self.seed}"

    @property
    def experts(self) -> int:
        """Number of parts."""
        return int(np.prod(self.splits))


class Cut(NamedTuple):
    """Who solves where; NumPy, fixed for a run.

    Attributes:
        label: The expert of each node.
        index: Nodes of the equation by expert, padded.
        mask: Which of these count.
        others: For each further block, which of its rows an expert has.
        pairs: The two experts of each pair of neighbouring nodes across an interface.
        nodes: Those nodes.
        spacing: Their distance, with every axis scaled to [0, 1].
    """

    label: np.ndarray
    index: np.ndarray
    mask: np.ndarray
    others: dict[str, np.ndarray]
    pairs: np.ndarray
    nodes: np.ndarray
    spacing: np.ndarray


def cut(equation: GridEquation, splits: tuple[int, ...], own_rows: bool) -> Cut:
    """Cut the grid into boxes.

    Args:
        equation: What is solved.
        splits: Boxes along each axis of the grid.
        own_rows: Whether an expert has the initial and boundary rows of its own nodes only; else
            all of them, as in the paper.

    Returns:
        Who solves where.
    """
    places = equation.coordinates()
    axes = places.shape[1]
    boxes = layers.BoxPartition((0.0,) * axes, (1.0,) * axes, splits)
    label = np.asarray(boxes.assign(jnp.asarray(places)))
    blocks = equation.blocks()
    inner = label[blocks["equation"]]
    groups = layers.group(jnp.asarray(inner[None, :] == np.arange(boxes.experts)[:, None]))
    others = {
        name: (label[nodes][None, :] == np.arange(boxes.experts)[:, None])
        if own_rows
        else np.ones((boxes.experts, nodes.size), bool)
        for name, nodes in blocks.items()
        if name != "equation"
    }
    numbers = np.arange(equation.size).reshape(equation.shape)
    nodes, spacing = [], []
    for axis, n in enumerate(equation.shape):
        wraps = equation.periodic and axis > 0
        here = numbers if wraps else np.take(numbers, range(n - 1), axis)
        there = np.roll(numbers, -1, axis) if wraps else np.take(numbers, range(1, n), axis)
        both = np.stack([here.ravel(), there.ravel()], 1)
        both = both[label[both[:, 0]] != label[both[:, 1]]]
        nodes.append(both)
        spacing.append(np.full(len(both), 1 / n if wraps else 1 / (n - 1)))
    across = np.concatenate(nodes)
    return Cut(
        label,
        blocks["equation"][np.asarray(groups.index)],
        np.asarray(groups.mask),
        others,
        label[across],
        across,
        np.concatenate(spacing),
    )


class Problem(NamedTuple):
    """An equation with a cut: how a network's output becomes a field, and how good that is."""

    setting: Setting
    equation: GridEquation
    cut: Cut

    def solve(
        self, network: FourierOperator, parameter: Array, weights: Float[Array, "2"]
    ) -> tuple[Float[Array, " nodes"], dict[str, Array]]:
        """The field of one parameter, and how the layers fared."""
        equation = self.equation
        basis = equation.basis(network(equation.inputs(parameter)))
        terms, base = equation.terms(basis), equation.base(parameter)
        field = next(iter(terms))
        if self.setting.method == "soft":
            zero = jnp.zeros(())
            info = {"steps": zero, "slowest": zero, "failed": zero, "jump": zero}
            return base[field] + terms[field][:, 0], info
        found, jump = self._coefficients(terms, base, equation.data(parameter), weights)
        mine = found.value[self.cut.label]
        info = {
            "steps": jnp.mean(found.report.steps.astype(float)),
            "slowest": jnp.max(found.report.steps).astype(float),
            "failed": jnp.sum(~found.report.ok).astype(float),
            "jump": jump(found.value),
        }
        return base[field] + jnp.sum(terms[field] * mine, axis=1), info

    def _coefficients(self, terms, base, data, weights):
        """One solve per expert, and the largest jump of the field across the interfaces."""
        equation, cut = self.equation, self.cut
        blocks = equation.blocks()
        places = jnp.asarray(cut.index)
        n = next(iter(terms.values())).shape[1]

        def pick(nodes):
            return jax.tree.map(lambda leaf: leaf[nodes], (terms, base, data))

        def rows(block, c, at):
            own, start, known = at
            values = {name: start[name] + own[name] @ c for name in own}
            return equation.rows(block, values, known)

        def residual(c, args):
            local, shared = args
            others = {name: rows(name, c, at) for name, at in shared.items()}
            return {"equation": rows("equation", c, local)} | others

        shared = {name: pick(jnp.asarray(blocks[name])) for name in cut.others}
        mask = {"equation": jnp.asarray(cut.mask)} | jax.tree.map(jnp.asarray, cut.others)
        first, rest = weights
        by_block: dict[str, Any] = {"equation": first} | {name: rest for name in cut.others}
        # the rows do not vanish before the basis is good, and Gauss-Newton is slow until then
        solver = solvers.GradNormSmooth(solvers.ExactHessian(), radius=RADIUS, rtol=ACCURACY)
        layer = layers.HardConstraint(
            residual, solver, ridge=RIDGE, weights=by_block, max_steps=LAYER_STEPS
        )
        field = next(iter(terms))
        left, right = (terms[field][cut.nodes[:, side]] for side in (0, 1))
        faces = {"value": (left + right) / 2, "slope": (right - left) / cut.spacing[:, None]}
        coupling = None
        if self.setting.method == "coupled":
            several = max(len(cut.pairs), 1) ** 0.5
            coupling = layers.Interface(
                lambda c, args: {name: row @ c for name, row in args[0].items()},
                cut.pairs,
                {name: rest * w / several for name, w in JUMP_WEIGHTS.items()},
            )
        experts = layers.MixtureOfExperts(layer, coupling)
        found = experts(
            jnp.ones((self.setting.experts, n)),
            pick(places),
            shared,
            mask,
            None if coupling is None else faces,
        )

        def jump(value):
            apart = value[cut.pairs[:, 0]] - value[cut.pairs[:, 1]]
            return jnp.max(jnp.abs(jnp.sum(faces["value"] * apart, axis=1)), initial=0)

        return found, jump

    def judge(self, field: Float[Array, " nodes"], parameter: Array) -> dict[str, Array]:
        """The rows of a field by block, with derivatives across the interfaces."""
        equation = self.equation
        values = {
            name: term[:, 0]
            for name, term in equation.terms(field.reshape(1, *equation.shape)).items()
        }
        data = equation.data(parameter)

        def at(name, nodes):
            return equation.rows(name, {k: v[nodes] for k, v in values.items()}, data[nodes])

        return {name: at(name, nodes) for name, nodes in equation.blocks().items()}

    def loss(
        self, network: FourierOperator, parameters: Array, weights: Float[Array, "2"]
    ) -> tuple[Array, dict[str, Array]]:
        """Mean over a batch of the weighted norms of the blocks."""
        first, rest = weights

        def one(parameter):
            field, info = self.solve(network, parameter, weights)
            blocks = self.judge(field, parameter)
            norms = {name: jnp.sqrt(jnp.sum(r**2) + 1e-24) for name, r in blocks.items()}
            return sum((first if b == "equation" else rest) * v for b, v in norms.items()), info

        losses, info = jax.vmap(one)(parameters)
        return jnp.mean(losses), jax.tree.map(jnp.mean, info)


def network_of(setting: Setting) -> FourierOperator:
    """A fresh network."""
    equation = EQUATIONS[setting.equation]
    outputs = 1 if setting.method == "soft" else setting.functions
    modes = tuple(min(8, n // 4) for n in equation.shape)
    key = jax.random.key(setting.seed)
    return FourierOperator(equation.channels, outputs, setting.width, setting.depth, modes, key)


def problem_of(setting: Setting) -> Problem:
    """The problem of a run."""
    equation = EQUATIONS[setting.equation]
    return Problem(setting, equation, cut(equation, setting.splits, setting.method == "coupled"))


def optimizer(steps: int) -> optax.GradientTransformation:
    """Adam with clipped gradients; the rate is halved four times, from 1e-3."""
    every = max(steps // 5, 1)
    rate = optax.exponential_decay(1e-3, every, 0.5, staircase=True, end_value=1e-4)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


class Training(eqx.Module):
    """What a checkpoint holds."""

    network: FourierOperator
    memory: PyTree
    step: Array


def begin(setting: Setting) -> Training:
    """The state before the first step."""
    network = network_of(setting)
    memory = optimizer(setting.steps).init(eqx.filter(network, eqx.is_array))
    return Training(network, memory, jnp.zeros((), jnp.int32))


class Programs(NamedTuple):
    """What is compiled once for all seeds and weights.

    Attributes:
        advance: f(state, count, key, weights) → state after `count` steps, means over them.
        test: f(network, weights) → errors by test parameter.
    """

    advance: Any
    test: Any


@functools.cache
def programs(setting: Setting) -> Programs:
    """The compiled functions of a run.

    Args:
        setting: The run; its seed and weights do not matter.

    Returns:
        The functions.
    """
    problem = problem_of(setting)
    equation, update = problem.equation, optimizer(setting.steps).update

    def batch(key, step):
        each = jax.random.split(jax.random.fold_in(key, step), setting.batch)
        return jax.vmap(equation.sample)(each)

    @jax.jit
    def advance(state, count, key, weights):
        def body(_, carry):
            state, sums = carry
            (loss, info), slope = jax.value_and_grad(problem.loss, has_aux=True)(
                state.network, batch(key, state.step), weights
            )
            change, memory = update(slope, state.memory)
            network: Any = optax.apply_updates(state.network, change)
            sums = jax.tree.map(jnp.add, sums, {"loss": loss} | info)
            return Training(network, memory, state.step + 1), sums

        zero = dict.fromkeys(("loss", "steps", "slowest", "failed", "jump"), jnp.zeros(()))
        state, sums = jax.lax.fori_loop(0, count, body, (state, zero))
        return state, jax.tree.map(lambda v: v / jnp.maximum(count, 1).astype(v.dtype), sums)

    parameters = test_parameters(equation)
    exact = jax.jit(jax.vmap(equation.reference))(parameters).reshape(TESTS, -1)

    @jax.jit
    def test(network, weights):
        def one(parameter, exact):
            field, info = problem.solve(network, parameter, weights)
            blocks = problem.judge(field, parameter)
            return {
                "error": jnp.linalg.norm(field - exact) / jnp.linalg.norm(exact),
                "residual": jnp.max(jnp.abs(blocks["equation"])),
            } | info

        return jax.vmap(one)(parameters, exact)

    return Programs(advance, test)


def test_parameters(equation: GridEquation) -> Array:
    """Parameters that no training step sees."""
    return jax.vmap(equation.sample)(jax.random.split(jax.random.key(TEST_KEY), TESTS))


def train(setting: Setting, folder: Path, stop_after: int | None = None) -> dict[str, Any]:
    """Train from the last checkpoint on, or from the start.

    Args:
        setting: The run.
        folder: Where checkpoints and results go.
        stop_after: Steps after which to stop early, as if killed.

    Returns:
        What the run wrote: its setting, curve and test errors.
    """
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, result = folder / f"{setting.name}.eqx", folder / f"{setting.name}.json"
    state, curve = begin(setting), []
    if checkpoint.exists():
        state = eqx.tree_deserialise_leaves(checkpoint, state)
        curve = json.loads(result.read_text())["curve"]
    advance, test = programs(setting._replace(seed=0, weights=(1.0, 1.0)))
    key, weights = jax.random.key(1000 + setting.seed), jnp.asarray(setting.weights, float)
    last = setting.steps if stop_after is None else min(stop_after, setting.steps)
    if int(state.step) < last:  # compile before anything is timed
        jax.block_until_ready(advance(state, jnp.zeros((), jnp.int32), key, weights))
    with tqdm(total=setting.steps, initial=int(state.step), desc=setting.name) as bar:
        while int(state.step) < last:
            count = min(CHUNK, last - int(state.step))
            clock = time.process_time()
            state, means = jax.block_until_ready(
                advance(state, jnp.asarray(count, jnp.int32), key, weights)
            )
            seconds = (time.process_time() - clock) / count
            curve.append(
                {name: float(v) for name, v in means.items()}
                | {"step": int(state.step), "cpu_s": seconds}
            )
            bar.update(count)
            bar.set_postfix(loss=f"{curve[-1]['loss']:.3g}", steps=f"{curve[-1]['steps']:.1f}")
            _save(checkpoint, state)
            _write(result, setting, curve, None)
    tests = {name: np.asarray(v).tolist() for name, v in test(state.network, weights).items()}
    return _write(result, setting, curve, tests)


def _save(path: Path, state: Training) -> None:
    """Through another file, so that a killed run leaves the old checkpoint or the new one."""
    part = path.with_suffix(".part")
    eqx.tree_serialise_leaves(part, state)
    os.replace(part, path)


def _write(path: Path, setting: Setting, curve: list, tests: Any) -> dict[str, Any]:
    content = {"setting": setting._asdict(), "curve": curve, "tests": tests}
    part = path.with_suffix(".part.json")
    part.write_text(json.dumps(content))
    os.replace(part, path)
    return content


def discretization_floor(equation: GridEquation, weights: tuple[float, float]) -> float:
    """Mean test error of the grid function that minimizes the rows of all blocks.

    No method that is trained on these rows can be expected to do better.

    Args:
        equation: The equation.
        weights: Of the equation and of the other blocks.

    Returns:
        Mean relative error on the test parameters.
    """
    setting = Setting("", "soft", (1,) * len(equation.shape), weights, 0, 0)
    problem = Problem(setting, equation, cut(equation, setting.splits, False))
    parameters = test_parameters(equation)

    def rows(field, parameter):
        blocks = problem.judge(field, parameter)
        first, rest = weights
        return {b: (first if b == "equation" else rest) * r for b, r in blocks.items()}

    @jax.jit
    def one(parameter):
        exact = equation.reference(parameter).ravel()
        solver = solvers.GradNormSmooth(solvers.GaussNewton())
        found = jx.solve(jx.LeastSquares(rows), solver, exact, parameter, max_steps=50)
        return jnp.linalg.norm(found.value - exact) / jnp.linalg.norm(exact)

    return float(np.mean([float(one(parameter)) for parameter in parameters]))


# ---- the experiment and its report -----------------------------------------------------------

SCALINGS = {"diffusion": ((1.0, 1.0), (500.0, 5.0)), "navier_stokes": ((1.0, 1.0),)}
SPLITS = {
    "diffusion": ((1, 2), (1, 4), (1, 8)),
    "navier_stokes": ((1, 2, 2),),
}


def settings(equation: str, seeds: int, steps: int) -> Iterator[Setting]:
    """All runs of an equation, seed by seed.

    Args:
        equation: Name of the equation.
        seeds: How many.
        steps: Training steps of each.

    Yields:
        The settings.
    """
    whole = (1,) * len(EQUATIONS[equation].shape)
    for seed in range(seeds):
        for method, splits in (
            ("soft", whole),
            ("global", whole),
            *(("experts", s) for s in SPLITS[equation]),
            *(("coupled", s) for s in SPLITS[equation]),
        ):
            for weights in SCALINGS[equation]:
                yield Setting(equation, method, splits, weights, seed, steps)


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table: means over seeds and test parameters, with the range over seeds.

    Args:
        results: What runs wrote.

    Returns:
        The table.
    """
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for one in results:
        setting = one["setting"]
        groups.setdefault(
            (
                setting["equation"],
                tuple(setting["weights"]),
                setting["method"],
                int(np.prod(setting["splits"])),
            ),
            [],
        ).append(one)
    lines = [
        "| equation | weights | method | experts | seeds | relative error | largest residual "
        "| largest jump | solver steps | failed solves | CPU ms per training step |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (equation, weights, method, experts), runs in groups.items():
        errors = np.array([np.mean(run["tests"]["error"]) for run in runs])

        def mean(name, runs=runs):
            return np.mean([np.mean(run["tests"][name]) for run in runs])

        cost = np.median([point["cpu_s"] for run in runs for point in run["curve"]])
        hard = method != "soft"
        cells = [
            equation,
            "/".join(f"{w:g}" for w in weights),
            method,
            f"{experts}",
            f"{len(runs)}",
            f"{errors.mean():.3f} [{errors.min():.3f}, {errors.max():.3f}]",
            f"{mean('residual'):.2g}",
            f"{mean('jump'):.2g}" if experts > 1 else "-",
            f"{mean('steps'):.1f}" if hard else "-",
            f"{mean('failed') / experts:.0%}" if hard else "-",
            f"{1e3 * cost:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def read(folder: Path) -> list[dict[str, Any]]:
    """The finished runs in a folder, in the order of `settings`."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*_s*.json"))]
    results = [one for one in results if one["tests"] is not None]
    order = ("soft", "global", "experts", "coupled")

    def place(one):
        setting = one["setting"]
        return (
            setting["equation"],
            setting["weights"],
            order.index(setting["method"]),
            int(np.prod(setting["splits"])),
            setting["seed"],
        )

    return sorted(results, key=place)


def picture(results: list[dict[str, Any]], folder: Path, name: Path) -> None:
    """Draw solution, error and residual of a test parameter, one row per run of one equation.

    Of a field over time and two coordinates, the last time is shown.

    Args:
        results: The runs to show.
        folder: Where their checkpoints are.
        name: The file to write.
    """
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        len(results), 3, figsize=(9, 2 * len(results)), squeeze=False, layout="constrained"
    )
    for row, one in zip(axes, results, strict=True):
        splits = tuple(one["setting"]["splits"])
        setting = Setting(**one["setting"])._replace(
            splits=splits, weights=tuple(one["setting"]["weights"])
        )
        problem = problem_of(setting)
        equation = problem.equation
        state = eqx.tree_deserialise_leaves(folder / f"{setting.name}.eqx", begin(setting))
        parameter = test_parameters(equation)[0]
        weights = jnp.asarray(setting.weights)
        field = jax.jit(problem.solve)(state.network, parameter, weights)[0]
        exact = equation.reference(parameter).ravel()
        residual = jnp.full(equation.size, jnp.nan)
        nodes = equation.blocks()["equation"]
        residual = residual.at[nodes].set(jnp.abs(problem.judge(field, parameter)["equation"]))
        shown = {
            "solution": field,
            "log10 error": jnp.log10(jnp.abs(field - exact) + 1e-8),
            "log10 residual": jnp.log10(residual + 1e-12),
        }
        for panel, (title, values) in zip(row, shown.items(), strict=True):
            plane = np.asarray(values).reshape(-1, *equation.shape[-2:])
            image = panel.imshow(
                plane[-1], origin="lower", aspect="auto", extent=(0, 1, 0, 1), cmap="viridis"
            )
            figure.colorbar(image, ax=panel)
            for line, parts in ((panel.axvline, splits[-1]), (panel.axhline, splits[-2])):
                for edge in range(1, parts):
                    line(edge / parts, color="white", linewidth=0.6)
            panel.set_title(f"{setting.method}, K = {setting.experts}: {title}", fontsize=8)
            panel.set_xticks([0, 1])
            panel.set_yticks([0, 1])
        row[0].set_ylabel("t / 500 s" if len(equation.shape) == 2 else "first coordinate")
    for panel in axes[-1]:
        panel.set_xlabel("x" if len(equation.shape) == 2 else "second coordinate")
    figure.savefig(name, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description="Soft against hard physics constraints.")
    parser.add_argument("equation", nargs="?", choices=list(EQUATIONS))
    parser.add_argument("--out", type=Path, default=Path("physics_runs"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--methods", default="soft,global,experts,coupled")
    parser.add_argument("--report", type=Path, help="print the table of the runs in this folder")
    parser.add_argument("--picture", type=Path, help="with --report, draw the first seed's fields")
    options = parser.parse_args(arguments)
    if options.report is not None:
        results = read(options.report)
        print(table(results), end="")
        if options.picture is not None:
            jax.config.update("jax_enable_x64", True)
            equation = options.equation or "diffusion"
            weights = list(SCALINGS[equation][-1])
            picture(
                [
                    one
                    for one in results
                    if one["setting"]["equation"] == equation
                    and one["setting"]["seed"] == 0
                    and one["setting"]["weights"] == weights
                    and np.prod(one["setting"]["splits"]) in (1, 4)
                ],
                options.report,
                options.picture,
            )
        return
    if options.equation is None:
        parser.error(f"equation is missing, expected one of {', '.join(EQUATIONS)}")
    jax.config.update("jax_enable_x64", True)
    for setting in settings(options.equation, options.seeds, options.steps):
        if setting.method in options.methods.split(","):
            train(setting, options.out)


if __name__ == "__main__":
    main()
