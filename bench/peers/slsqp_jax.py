"""slsqp-jax. It takes inequalities as nonnegative and stops by its own tolerance on the KKT system.

Default settings only: its README names no other set.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_ext.bench.contender import Answer, Budget, Contender
from jaxopt_ext.bench.problem import Problem


def _rows(fun, problem: Problem) -> int:
    return 0 if fun is None else int(jax.eval_shape(fun, problem.init, problem.data).size)


def _make(problem: Problem, budget: Budget):
    import optimistix
    from slsqp_jax import SLSQP, SLSQPConfig, ToleranceConfig

    inequality = problem.inequality

    def nonnegative(y, data):
        return -inequality(y, data)  # type: ignore[misc]

    bounds = None
    if problem.lower is not None or problem.upper is not None:
        bounds = jnp.asarray(np.stack(problem.box, axis=1), budget.dtype)
    tolerances: Any = {"rtol": budget.tolerance, "atol": budget.tolerance, "max_steps": 500}
    make_solver: Any = SLSQP
    solver = make_solver(
        config=SLSQPConfig(tolerance=ToleranceConfig(**tolerances)),
        eq_constraint_fn=problem.equality,
        ineq_constraint_fn=None if inequality is None else nonnegative,
        n_eq_constraints=_rows(problem.equality, problem),
        n_ineq_constraints=_rows(inequality, problem),
        bounds=bounds,
    )

    def solve(start, data):
        found = optimistix.minimise(
            problem.fun, solver, start, args=data, max_steps=min(budget.steps, 500), throw=False
        )
        return Answer(found.value, found.stats["num_steps"])

    return solve


CONTENDERS = (Contender("slsqp-jax", "SLSQP", ("program",), _make, module="slsqp_jax"),)
