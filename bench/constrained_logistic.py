"""Logistic regression with constraints on real data: which inner solver needs what.

    python -m jaxopt_ext.bench.constrained_logistic ionosphere sonar --data FOLDER

min mean log(1 + exp(−y xᵀw)) s.t. A w = b with ten random rows, ‖w‖² = 1, from w = 1, as in Hong et
al.; labels are −1 and +1. For each inner solver of `SketchedNewtonAL`: steps, matrix-vector
products with the whole system (a step of a sketch as its share of one), CPU seconds after
compilation, and the largest KKT residual in the end.

Reference:
    Hong, Na, Mahoney, Kolar, "Constrained optimization via exact augmented Lagrangian and
    randomized iterative sketching", ICML 2023, section 5.
"""

import argparse
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
TOLERANCE = 1e-6
INNER: dict[str, Any] = {
    "Direct()": kkt.Direct(),
    "MINRES()": kkt.MINRES(),
    'MINRES("schur")': kkt.MINRES("schur"),
    "GMRES(30)": kkt.GMRES(30),
    "ProjectedCG()": kkt.ProjectedCG(),
    "coordinate, block of 8": kkt.SketchAndProject("coordinate", 8),
}


def program(name: str) -> tuple[jx.NonlinearProgram, jax.Array, tuple]:
    """The program on one data set, its start and its data."""
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
    """Print one table row for each data set and inner solver."""
    parser = argparse.ArgumentParser(
        description="Inner solvers on constrained logistic regression."
    )
    parser.add_argument("datasets", nargs="+")
    parser.add_argument("--data", help="folder with further data sets")
    options = parser.parse_args(arguments)
    if options.data:
        os.environ["JAXOPT_EXT_DATA"] = options.data
    jax.config.update("jax_enable_x64", True)
    print("| data | unknowns | inner solver | steps | products | CPU s | KKT residual |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in options.datasets:
        problem, start, data = program(name)
        for label, inner in INNER.items():
            solver = solvers.SketchedNewtonAL(inner, rtol=TOLERANCE, atol=TOLERANCE)
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
                f"| {name} | {start.size + ROWS + 1} | {label} | {int(found.stats.steps)} "
                f"| {int(found.stats.counts.hvp)} | {seconds:.2f} | {error:.0e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
