"""Compile time against other libraries, on the extended Rosenbrock function.

Run it as `python -m jaxopt_ext.bench.compile_time`.

Each measurement runs in a fresh process on the CPU, so nobody profits from what another one
traced or compiled; any persistent compilation cache is off. The process first compiles two tiny
unrelated functions, so that two costs of start-up are charged to nobody: that of XLA, and that of
LAPACK, whose bindings import SciPy the first time a factorization is lowered in a process. A
method without factorizations never pays the second one, so it is printed too. What is timed is
`jax.jit(solve).lower(x)` (tracing and lowering) and `.compile()`. The compiled solve is then run
once to show that it solves the problem.

The stopping tests are each library's own at the same number and do not mean the same: ours and
optax's bound the gradient (max norm and Euclidean), jaxopt's the Euclidean norm of the gradient,
optimistix's the change of the variables and of the objective.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import jaxopt_ext as jx
from jaxopt_ext import solvers

TOLERANCE = 1e-8
MAX_STEPS = 1000
SIZE = 10

Solve = Callable[[Float[Array, " n"]], tuple[Array, Array]]


def extended_rosenbrock(x: Float[Array, " n"], args: Any = None) -> Float[Array, ""]:
    """Σ over pairs of 100 (x₂ᵢ − x₂ᵢ₋₁²)² + (1 − x₂ᵢ₋₁)²; the minimum is 0 at (1, …, 1).

    Reference:
        Moré, Garbow, Hillstrom, "Testing Unconstrained Optimization Software", 1981, problem 21.
    """
    odd, even = x[0::2], x[1::2]
    return jnp.sum(100 * (even - odd**2) ** 2 + (1 - odd) ** 2)


def start(size: int = SIZE) -> Float[Array, " n"]:
    """The usual starting point (−1.2, 1, −1.2, 1, …)."""
    return jnp.tile(jnp.array([-1.2, 1.0]), size // 2)


# ---- contenders: each returns a function from the start to (solution, steps) -----------------


def ours() -> Solve:
    """`GradNormSmooth` with the exact Hessian."""
    problem = jx.Minimization(extended_rosenbrock)
    stop = jx.Optimality(rtol=0.0, atol=TOLERANCE)

    def solve(x):
        found = jx.solve(problem, solvers.GradNormSmooth(), x, max_steps=MAX_STEPS, stop=stop)
        return found.value, found.stats.steps

    return solve


def optimistix_bfgs() -> Solve:
    """BFGS of optimistix."""
    import optimistix

    solver = optimistix.BFGS(rtol=TOLERANCE, atol=TOLERANCE)

    def solve(x):
        found = optimistix.minimise(
            extended_rosenbrock, solver, x, max_steps=MAX_STEPS, throw=False
        )
        return found.value, found.stats["num_steps"]

    return solve


def jaxopt_bfgs() -> Solve:
    """BFGS of jaxopt."""
    import jaxopt

    solver = jaxopt.BFGS(extended_rosenbrock, maxiter=MAX_STEPS, tol=TOLERANCE)

    def solve(x):
        found, state = solver.run(x)
        return found, state.iter_num

    return solve


def optax_lbfgs() -> Solve:
    """L-BFGS of optax in the loop that its documentation gives."""
    import optax

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(extended_rosenbrock)

    def solve(x):
        def going(carry):
            _, _, gradient, steps = carry
            far = jnp.linalg.norm(gradient) > TOLERANCE
            return (steps == 0) | ((steps < MAX_STEPS) & far)

        def step(carry):
            x, state, _, steps = carry
            value, gradient = value_and_grad(x, state=state)
            change, state = optimizer.update(
                gradient, state, x, value=value, grad=gradient, value_fn=extended_rosenbrock
            )
            # the line search keeps the gradient at the new point in the state
            gradient = optax.tree.get(state, "grad")
            return optax.apply_updates(x, change), state, gradient, steps + 1

        carry = (x, optimizer.init(x), jnp.zeros_like(x), jnp.zeros((), jnp.int32))
        x, _, _, steps = jax.lax.while_loop(going, step, carry)
        return x, steps

    return solve


OURS = "jaxopt_ext GradNormSmooth"
REFERENCE = "optimistix BFGS"
CONTENDERS: dict[str, tuple[Callable[[], Solve], str]] = {
    OURS: (ours, "jaxopt_ext"),
    REFERENCE: (optimistix_bfgs, "optimistix"),
    "jaxopt BFGS": (jaxopt_bfgs, "jaxopt"),
    "optax L-BFGS": (optax_lbfgs, "optax"),
}


# ---- one measurement, in its own process -------------------------------------------------------


class Measurement(NamedTuple):
    """What one process measured.

    Attributes:
        lower: Seconds of tracing and lowering.
        compile: Seconds of compilation.
        steps: Iterations as the library counts them.
        error: max |xᵢ − 1| at the point returned.
        version: The library's version.
        lapack: Seconds until the first factorization was lowered; in no other figure.
    """

    lower: float
    compile: float
    steps: int
    error: float
    version: str
    lapack: float

    @property
    def total(self) -> float:
        """Seconds from the Python function to the executable."""
        return self.lower + self.compile


class Skipped(NamedTuple):
    """Why there is no measurement."""

    reason: str


def start_up() -> float:
    """Start XLA, then load LAPACK; return the seconds of the second."""
    jax.jit(lambda a: jnp.sum(jnp.sin(a))).lower(jnp.ones(3)).compile()
    matrix = jnp.eye(2)
    began = time.perf_counter()
    factorize = jax.jit(jnp.linalg.cholesky).lower(matrix)
    took = time.perf_counter() - began
    factorize.compile()
    return took


def measure(name: str) -> Measurement | Skipped:
    """Measure one contender in this process; meaningful only if the process is fresh.

    Args:
        name: A key of `CONTENDERS`.

    Returns:
        The measurement, or the reason why the library cannot be imported.
    """
    build, package = CONTENDERS[name]
    try:
        solve = build()
    except ImportError as error:
        return Skipped(f"{error}")
    lapack = start_up()
    x = start()
    began = time.perf_counter()
    lowered = jax.jit(solve).lower(x)
    between = time.perf_counter()
    executable = lowered.compile()
    ended = time.perf_counter()
    found, steps = executable(x)
    version = jx.__version__ if package == "jaxopt_ext" else importlib.metadata.version(package)
    error = float(jnp.max(jnp.abs(found - 1)))
    return Measurement(between - began, ended - between, int(steps), error, version, lapack)


def measure_in_new_process(name: str) -> Measurement | Skipped:
    """Run `measure` in a fresh interpreter.

    Args:
        name: A key of `CONTENDERS`.

    Returns:
        Its answer, or the last line of its error output where it failed.
    """
    command = [sys.executable, "-m", "jaxopt_ext.bench.compile_time", "--worker", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return Skipped(f"failed: {last}")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    return Skipped(**answer) if "reason" in answer else Measurement(**answer)


# ---- all of them -------------------------------------------------------------------------------


def fastest(runs: Sequence[Measurement | Skipped]) -> Measurement | Skipped:
    """The run with the least total; a skipped one only if no run succeeded."""
    measured = [run for run in runs if isinstance(run, Measurement)]
    return min(measured, key=lambda run: run.total) if measured else runs[0]


def table(results: dict[str, Measurement | Skipped]) -> str:
    """The results as text, with the ratio of the totals to optimistix and the verdict in words.

    Args:
        results: Measurement or reason by contender.

    Returns:
        One line per contender; a skipped one says why.
    """
    reference = results.get(REFERENCE)
    lines = [
        f"{'':26} {'version':>8} {'lower (s)':>10} {'compile (s)':>12} {'total (s)':>10} "
        f"{'ratio':>7} {'steps':>6} {'error':>8}"
    ]
    for name, run in results.items():
        if isinstance(run, Skipped):
            lines.append(f"{name:26} skipped: {run.reason}")
            continue
        ratio = "-"
        if isinstance(reference, Measurement):
            ratio = f"{run.total / reference.total:.2f}"
        lines.append(
            f"{name:26} {run.version:>8} {run.lower:10.3f} {run.compile:12.3f} {run.total:10.3f} "
            f"{ratio:>7} {run.steps:6d} {run.error:8.1e}"
        )
    mine = results.get(OURS)
    if isinstance(mine, Measurement):
        for name, run in results.items():
            if name != OURS and isinstance(run, Measurement):
                outcome = "win" if mine.total < run.total else "loss"
                lines.append(
                    f"against {name}: {mine.total / run.total:.2f} times its total, {outcome}"
                )
        lines.append(f"not counted above: start-up of LAPACK, {mine.lapack:.3f} s in our process")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every contender and print the table.

    Args:
        argv: Command line; `None` means that of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m jaxopt_ext.bench.compile_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes per contender")
    parser.add_argument("--worker", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker is not None:
        # without 64 bits no method gets to the tolerance; a cache would hide what is measured
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_enable_compilation_cache", False)
        print(json.dumps(measure(options.worker)._asdict()))
        return
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}, expected at least 1")

    runs: dict[str, list[Measurement | Skipped]] = {name: [] for name in CONTENDERS}
    for repeat in range(options.repeats):  # round robin, so a busy spell hits everyone
        for name in CONTENDERS:
            print(f"\rrun {repeat + 1} of {options.repeats}: {name:30}", end="", file=sys.stderr)
            runs[name].append(measure_in_new_process(name))
    print(f"\r{'':60}\r", end="", file=sys.stderr)

    print(f"Compile time, extended Rosenbrock function in {SIZE} variables, float64 on the CPU")
    print(f"fresh process each, XLA and LAPACK started before; fastest of {options.repeats} runs")
    print(f"tolerance {TOLERANCE:g}, each library's own stopping test; ratio: total to {REFERENCE}")
    print("error: max |x - 1| at the point found\n")
    print(table({name: fastest(of_one) for name, of_one in runs.items()}))


if __name__ == "__main__":
    main()
