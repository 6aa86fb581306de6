"""A thousand nonlinear programs of one form: one compiled batch against a loop over IPOPT.

    python -m jaxopt_ext.bench.batch_of_programs

Twenty variables with bounds, two equalities, one inequality; objective and right-hand sides are
parameters. CPU seconds after compilation; the batch runs on one core if XLA is told so by
`XLA_FLAGS=--xla_cpu_multi_thread_eigen=false`.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jaxopt_ext as jx
from jaxopt_ext import implicit, solvers
from jaxopt_ext.bench.contender import Budget
from jaxopt_ext.bench.peers import ipopt
from jaxopt_ext.bench.problem import Problem

N = 20
TOLERANCE = 1e-8


def family(instances: int, seed: int = 0) -> tuple[Problem, np.ndarray]:
    """The program, and a row of parameters per instance.

    Args:
        instances: Number of rows.
        seed: Of the random numbers.

    Returns:
        The problem with the first instance's parameters as its data, and all parameters.
    """
    rng = np.random.default_rng(seed)
    rows, root = rng.normal(size=(2, N)), rng.normal(size=(N, N))
    curvature = root @ root.T / N + 0.1 * np.eye(N)
    parameters = np.concatenate(
        [
            rng.normal(size=(instances, N)),
            0.3 * rng.normal(size=(instances, 2)),
            rng.uniform(2, 6, size=(instances, 1)),
        ],
        axis=1,
    )

    def objective(y, t):
        return y @ curvature @ y / 2 + t[:N] @ y + 0.1 * jnp.sum(jnp.cos(3 * y))

    problem = Problem(
        name="family",
        fun=objective,
        init=np.zeros(N),
        data=parameters[0],
        equality=lambda y, t: rows @ jnp.sin(y) - t[N : N + 2],
        inequality=lambda y, t: jnp.sum(y**2)[None] - t[N + 2 :],
        lower=np.full(N, -1.0),
        upper=np.full(N, 1.0),
    )
    return problem, parameters


def ours(problem: Problem, parameters: np.ndarray, batch: Callable) -> dict[str, float]:
    """All instances in one compiled call, by `jax.vmap` or `jax.lax.map`."""
    program = jx.NonlinearProgram(
        problem.fun, problem.equality, problem.inequality, problem.lower, problem.upper
    )
    solver = solvers.SketchedNewtonAL(rtol=TOLERANCE, atol=TOLERANCE)

    def one(t):
        found = jx.solve(
            program, solver, jnp.asarray(problem.init), t, adjoint=implicit.DetachedAdjoint()
        )
        return found.objective, found.success, found.stats.steps

    rows = jnp.asarray(parameters)
    before = time.process_time()
    compiled = jax.jit(batch(one)).lower(rows).compile()
    ready = time.process_time()
    values, success, steps = jax.block_until_ready(compiled(rows))
    seconds = time.process_time() - ready
    return {
        "compile": ready - before,
        "run": seconds,
        "solved": int(success.sum()),
        "mean objective": float(jnp.mean(values)),
        "mean steps": float(jnp.mean(steps)),
        "most steps": int(jnp.max(steps)),
    }


def loop_over_ipopt(problem: Problem, parameters: np.ndarray) -> dict[str, float]:
    """One instance after the other, with derivatives compiled once."""
    import cyipopt

    before = time.process_time()
    callbacks = ipopt.Callbacks(problem, Budget(TOLERANCE, 3000, 0, 0, "float64"))
    ready = time.process_time()
    values, solved = [], 0
    for t in parameters:
        callbacks.data = t
        program = cyipopt.Problem(  # type: ignore[attr-defined]
            n=N,
            m=len(callbacks.upper_rows),
            problem_obj=callbacks,
            lb=problem.lower,
            ub=problem.upper,
            cl=callbacks.lower_rows,
            cu=callbacks.upper_rows,
        )
        for name, value in (("print_level", 0), ("sb", "yes"), ("tol", TOLERANCE)):
            program.add_option(name, value)
        _, info = program.solve(problem.init)
        values.append(info["obj_val"])
        solved += info["status"] == 0
    return {
        "compile": ready - before,
        "run": time.process_time() - ready,
        "solved": solved,
        "mean objective": float(np.mean(values)),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print one line for each way."""
    jax.config.update("jax_enable_x64", True)
    parser = argparse.ArgumentParser(description="A batch of programs against a loop over IPOPT.")
    parser.add_argument("--instances", type=int, default=1000)
    options = parser.parse_args(arguments)
    problem, parameters = family(options.instances)

    def mapped(one):
        return lambda rows: jax.lax.map(one, rows)

    ways = {
        "vmap": lambda: ours(problem, parameters, jax.vmap),
        "lax.map": lambda: ours(problem, parameters, mapped),
        "loop over IPOPT": lambda: loop_over_ipopt(problem, parameters),
    }
    for name, way in ways.items():
        figures = ", ".join(f"{key} {value:.4g}" for key, value in way().items())
        print(f"{name}: {figures}", flush=True)


if __name__ == "__main__":
    main()
