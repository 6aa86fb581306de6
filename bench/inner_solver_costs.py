"""What each inner solver of `SketchedNewtonAL` costs on the two problem families of its paper.

    python -m jaxopt_ext.bench.inner_solver_costs poisson-3 ionosphere sonar --data FOLDER

`poisson-N`: control of a Poisson equation on a grid of N x N, min ½‖s − wanted‖² + ‖c‖²/20 s.t.
A s + c = 0. A data set: logistic regression, min mean log(1 + exp(−y xᵀw)) s.t. A w = b with ten
random rows, ‖w‖² = 1, from w = 1; labels are −1 and +1. Printed are steps, matrix-vector products
with the whole system (a step of a sketch as its share of one), CPU seconds after compilation, and
the largest KKT residual in the end.

Reference:
    Hong, Na, Mahoney, Kolar, "Constrained optimization via exact augmented Lagrangian and
    randomized iterative sketching", ICML 2023, section 5.
"""

import argparse
import fnmatch
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxopt_ext as jx
from jaxopt_ext import implicit, solvers
from jaxopt_ext.bench.problems import glm
from jaxopt_ext.solvers import kkt

ROWS = 10


def inner_solvers(max_sweeps: int) -> dict[str, Any]:
    """The inner solvers that are compared, by the name for the table.

    Args:
        max_sweeps: Most sweeps of a sketch through all rows in one solve.

    Returns:
        Inner solvers.
    """

    def sketch(kind, block=1):
        return kkt.SketchAndProject(kind, block, max_sweeps=max_sweeps)

    return {
        "Direct()": kkt.Direct(),
        "MINRES()": kkt.MINRES(),
        'MINRES("schur")': kkt.MINRES("schur"),
        "GMRES(30)": kkt.GMRES(30),
        "ProjectedCG()": kkt.ProjectedCG(),
        "coordinate, block of 8": sketch("coordinate", 8),
        "coordinate": sketch("coordinate"),
        "countsketch, block of 8": sketch("countsketch", 8),
        "SRHT, block of 8": sketch("srht", 8),
        "Gaussian": sketch("gaussian"),
    }


def program(name: str) -> tuple[jx.NonlinearProgram, Any, Any]:
    """A program, its start and its data.

    Args:
        name: `poisson-N`, or that of a data set.

    Returns:
        The three.
    """
    if name.startswith("poisson-"):
        return poisson_control(int(name.removeprefix("poisson-")))
    return constrained_logistic(name)


def poisson_control(size: int) -> tuple[jx.NonlinearProgram, Any, None]:
    """State and control on a grid of size x size in the square of side 2, zero beyond it.

    Args:
        size: N.

    Returns:
        The program, its start, and no data.
    """
    h = 2.0 / (size + 1)
    i = jnp.arange(1.0, size + 1) - (size + 1) / 2
    scale = 0.1 / jnp.sqrt(15.0)
    wanted = jnp.sin(4 + scale * i)[:, None] + jnp.cos(3 + scale * i)[None, :]

    def equality(y, data):
        state = jnp.pad(y["state"], 1)
        four = state[:-2, 1:-1] + state[2:, 1:-1] + state[1:-1, :-2] + state[1:-1, 2:]
        return (four - 4 * y["state"]) / h**2 + y["control"]

    def fun(y, data):
        return jnp.sum((y["state"] - wanted) ** 2) / 2 + 0.05 * jnp.sum(y["control"] ** 2)

    ones = jnp.ones((size, size))
    return jx.NonlinearProgram(fun, equality), {"state": ones, "control": ones}, None


def constrained_logistic(name: str) -> tuple[jx.NonlinearProgram, jax.Array, tuple]:
    """The regression on one data set.

    Args:
        name: Of the data set.

    Returns:
        The program, its start and its data.
    """
    loaded = glm.build("logistic", name, "1overn")
    X, y = loaded.data["X"], jnp.asarray(loaded.data["y"])
    if isinstance(X, np.ndarray):
        X = jnp.asarray(X)
    n = X.shape[1]
    rng = np.random.default_rng(0)
    A, b = jnp.asarray(rng.normal(size=(ROWS, n))), jnp.asarray(rng.normal(size=ROWS))

    def loss(w, data):
        X, y = data
        return jnp.mean(jax.nn.softplus(-y * (X @ w)))

    def equality(w, data):
        return A @ w - b, jnp.sum(w**2) - 1

    return jx.NonlinearProgram(loss, equality), jnp.ones(n), (X, y)


def main(arguments: list[str] | None = None) -> None:
    """Print one table row for each problem and inner solver."""
    parser = argparse.ArgumentParser(description="Costs of the inner solvers of SketchedNewtonAL.")
    parser.add_argument("problems", nargs="+")
    parser.add_argument("--inner", default="*", help="pattern of inner solvers")
    parser.add_argument("--tolerance", type=float, default=1e-6)
    parser.add_argument("--sweeps", type=int, default=10_000, help="most of a sketch in one solve")
    parser.add_argument("--data", help="folder with further data sets")
    options = parser.parse_args(arguments)
    if options.data:
        os.environ["JAXOPT_EXT_DATA"] = options.data
    jax.config.update("jax_enable_x64", True)
    print("| problem | unknowns | inner solver | steps | products | CPU s | KKT residual |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in options.problems:
        problem, start, data = program(name)
        equality: Any = problem.equality
        shapes = jax.eval_shape(equality, start, data)
        unknowns = sum(leaf.size for leaf in jax.tree.leaves((start, shapes)))
        for label, inner in inner_solvers(options.sweeps).items():
            if not fnmatch.fnmatchcase(label, options.inner):
                continue
            solver = solvers.SketchedNewtonAL(inner, rtol=0.0, atol=options.tolerance)
            key = jax.random.key(0) if solver.needs_key else None

            def solve(data, solver=solver, problem=problem, start=start, key=key):
                return jx.solve(
                    problem, solver, start, data, key=key, max_steps=200,
                    adjoint=implicit.DetachedAdjoint(),
                )  # fmt: skip

            compiled = jax.jit(solve).lower(data).compile()
            before = time.process_time()
            found = jax.block_until_ready(compiled(data))
            seconds = time.process_time() - before
            error = float(jnp.maximum(found.optimality, found.feasibility))
            print(
                f"| {name} | {unknowns} | {label} | {int(found.stats.steps)} "
                f"| {int(found.stats.counts.hvp)} | {seconds:.2f} | {error:.0e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
