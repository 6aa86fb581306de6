"""Recompute `reference_optima.json`, the least objectives of the models of `glm`.

Run it as `python -m jaxopt_ext.bench.problems.reference`. Each optimum is the least value that
Newton's method meets in float64, with the exact Hessian for up to 1000 variables and by conjugate
gradients beyond. A problem that is already in the file is left as it is; delete its entry to have
it computed again.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_ext.bench.problem import Problem
from jaxopt_ext.bench.problems import glm

FILE = Path(__file__).with_name("reference_optima.json")


def newton(problem: Problem, steps: int = 100) -> tuple[float, float]:
    """Minimize a strongly convex problem to rounding error.

    Args:
        problem: The problem, best in float64.
        steps: At most so many Newton steps.

    Returns:
        The least value met, and the max norm of the gradient at the last point.
    """
    data = problem.data
    value = jax.jit(problem.fun)
    gradient = jax.jit(jax.grad(problem.fun))

    @jax.jit
    def direction(y, data):
        if problem.size <= 1000:
            hessian = jax.hessian(problem.fun)(y, data)
            return jnp.linalg.solve(hessian, gradient(y, data))
        image, product = jax.linearize(lambda y: jax.grad(problem.fun)(y, data), y)
        return jax.scipy.sparse.linalg.cg(product, image, tol=1e-10, maxiter=5000)[0]

    y = jnp.asarray(problem.init)
    best, norm = float(value(y, data)), np.inf
    for _ in range(steps):
        d = direction(y, data)
        t, before = 1.0, float(value(y, data))
        while float(value(y - t * d, data)) > before and t > 1e-3:
            t /= 2
        y = y - t * d
        best = min(best, float(value(y, data)))
        norm = float(jnp.max(jnp.abs(gradient(y, data))))
        if norm < 1e-15:
            break
        if t < 1 and norm < 1e-13:  # the value cannot fall any more
            break
    return best, norm


def main() -> None:
    """Compute what is missing in the file."""
    jax.config.update("jax_enable_x64", True)
    table = json.loads(FILE.read_text(encoding="utf-8"))
    for key, entry in glm.ENTRIES.items():
        name = key.removeprefix("glm-")
        if name in table["problems"]:
            continue
        try:
            problem = entry.build()
        except ImportError as error:
            print(f"{name}: {error}")
            continue
        best, norm = newton(problem)
        print(f"{name}: {best!r}, gradient {norm:.1e}", flush=True)
        if norm < 1e-13:
            facts = {"lam": problem.meta["lam"], "L": problem.meta["L"]}
            table["problems"][name] = {"optimum": best, **facts, "gradient": norm}
            FILE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
