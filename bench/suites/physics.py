"""Constraint layers: a least-squares solve and its derivative, forward and backward together."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_ext import layers, solvers
from jaxopt_ext.bench.contender import OURS, Budget, Contender, cast, temporary_bytes
from jaxopt_ext.bench.measure import built, repeated, timed
from jaxopt_ext.bench.problem import Entry
from jaxopt_ext.bench.problems import constraint_layers
from jaxopt_ext.bench.problems.constraint_layers import LayerProblem
from jaxopt_ext.bench.record import Row
from jaxopt_ext.bench.suite import Suite, Task

TOLERANCE = {"float64": 1e-6, "float32": 1e-2}  # relative error of the gradient
ASKED = {"float64": 1e-10, "float32": 1e-5}  # of the solves, in the library's own sense
STEPS = 100


def layer(solver: Any = None, linear: bool = False) -> Any:
    """A contender: our layer with a solver.

    Args:
        solver: See `HardConstraint`.
        linear: See `HardConstraint`.

    Returns:
        The `make` of a contender.
    """

    def make(problem: LayerProblem, budget: Budget):
        # the rows come weighted and with their ridge, the same for everybody
        constraint = layers.HardConstraint(
            problem.residual,
            solver,
            linear=linear,
            ridge=0.0,
            normalize=False,
            max_steps=budget.steps,
        )
        return lambda init, args: constraint(init, args).value

    return make


def execute(row: Row, entry: Entry, contender: Contender, task: Task) -> None:
    """Compile value and gradient, time them, and compare with dense linear algebra."""
    problem: LayerProblem = built(entry.build)
    budget = Budget(ASKED[task.dtype], STEPS, 0, task.seed, task.dtype)
    inputs = cast((problem.parameters, problem.init, problem.levels), task.dtype)
    row.n, row.tolerance = problem.init.size, TOLERANCE[task.dtype]
    row.m = int(jax.eval_shape(problem.residual, inputs[1], (inputs[0], inputs[2][0])).size)
    row.params = {"batch": problem.levels.size, "parameters": problem.parameters.size}

    fun = jax.jit(constraint_layers.gradient(problem, contender.make(problem, budget)))
    fun.lower(*inputs)  # first use imports and sets up what is not to be timed
    jax.clear_caches()
    lowered, lower, _ = timed(lambda: fun.lower(*inputs))
    program, compile_, _ = timed(lowered.compile)
    row.compile_cpu_s, row.extras = lower + compile_, {"lower_cpu_s": lower}
    row.peak_bytes = temporary_bytes(program)
    slope, found = jax.block_until_ready(program(*inputs))
    if not (np.all(np.isfinite(slope)) and np.all(np.isfinite(found))):
        row.status = "nonfinite"
        return
    c, expected = exact(entry)
    row.error = float(np.linalg.norm(slope - expected) / np.linalg.norm(expected))
    row.extras["solution_error"] = float(np.max(np.abs(np.asarray(found) - c)))
    row.status = "ok" if row.error <= row.tolerance else "missed"
    row.run_cpu_s, row.run_wall_s = repeated(
        lambda: jax.block_until_ready(program(*inputs)), 4 * task.repeats
    )


def exact(entry: Entry) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients and gradient of a problem, from a solve far beyond what is asked.

    Args:
        entry: The problem.

    Returns:
        Two arrays in float64.
    """
    problem: LayerProblem = built(entry.build)
    with jax.enable_x64(True):
        rule = layer(solvers.GradNormSmooth(solvers.ExactHessian()))(
            problem, Budget(0.0, 500, 0, 0, "float64")
        )
        parameters, init, levels = map(
            jnp.asarray, (problem.parameters, problem.init, problem.levels)
        )
        found = jax.jit(jax.vmap(lambda level: rule(init, (parameters, level))))(levels)
        c, slope = constraint_layers.exact_gradient(problem, found)
        return np.asarray(c), np.asarray(slope)


def _ours(name: str, kind: str, setting: str = "default", **more: Any) -> Contender:
    return Contender(OURS, name, (kind,), layer(**more), setting=setting)


SUITE = Suite(
    name="physics",
    title="Constraint layers",
    summary="A layer that solves a differential equation for the coefficients of a basis by least "
    "squares, and the gradient of a loss with respect to the basis: one compiled program for both, "
    "for a batch of initial conditions. Every library gets the same rows and the same start. Error "
    "is that of the gradient, relative to dense linear algebra at the solution; accurate: at most "
    "1e-6 in float64, 1e-2 in float32.",
    entries=lambda: constraint_layers.ENTRIES,
    kinds=("layer", "affine layer", "nonlinear layer"),
    execute=execute,
    own=(
        _ours("HardConstraint", "layer"),
        _ours(
            "HardConstraint",
            "nonlinear layer",
            "exact Hessian",
            solver=solvers.GradNormSmooth(solvers.ExactHessian()),
        ),
        _ours("HardConstraint", "affine layer", "linear", linear=True),
    ),
)
