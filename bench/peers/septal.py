"""septal's SQP with its default filter and exact Hessian. It computes in float64 always.

Default settings only: its README names no other set. Its import sets JAX to 64 bits.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_ext.bench.contender import Answer, Budget, Contender
from jaxopt_ext.bench.problem import Problem


def _make(problem: Problem, budget: Budget):
    from septal.jax.sqp import ParametricNLPProblem, SQPConfig
    from septal.jax.sqp.solver import sqp_solve_single

    parts = [fun for fun in (problem.equality, problem.inequality) if fun is not None]
    sizes = [int(jax.eval_shape(fun, problem.init, problem.data).size) for fun in parts]
    least = [0.0 if fun is problem.equality else -np.inf for fun in parts]
    settings: Any = {
        "max_iter": min(budget.steps, 500),
        "tol_stationarity": budget.tolerance,
        "tol_feasibility": budget.tolerance,
    }

    def solve(start, data):
        constraints: Any = {}
        if parts:
            constraints = {
                "constraints": lambda y, _: jnp.concatenate([fun(y, data) for fun in parts]),
                "constraint_lhs": np.repeat(least, sizes),
                "constraint_rhs": np.zeros(sum(sizes)),
            }
        program = ParametricNLPProblem(
            objective=lambda y, _: problem.fun(y, data),
            bounds=list(problem.box),
            n_decision=problem.size,
            n_params=0,
            **constraints,
        )
        found = sqp_solve_single(program, start, jnp.zeros(0), SQPConfig(**settings))
        return Answer(found.x, found.iteration)

    return solve


CONTENDERS = (Contender("septal", "SQP", ("program",), _make, module="septal"),)
