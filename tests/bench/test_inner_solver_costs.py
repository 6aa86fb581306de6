"""Costs of the inner solvers: they are compared on programs that they solve alike."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxopt_ext as jx
from jaxopt_ext import solvers
from jaxopt_ext.bench import inner_solver_costs


def test_inner_solvers_agree_and_the_constraints_hold():
    problem, start, data = inner_solver_costs.program("sonar-twin")
    found = {}
    for name in ("Direct()", "ProjectedCG()"):
        solver = solvers.SketchedNewtonAL(inner_solver_costs.inner_solvers(100)[name])
        solution = jax.jit(lambda data, s=solver: jx.solve(problem, s, start, data))(data)
        assert bool(solution.success)
        found[name] = solution.value
    first, second = found.values()
    np.testing.assert_allclose(first, second, atol=1e-5)
    rows, sphere = problem.equality(first, data)
    np.testing.assert_allclose(rows, 0, atol=1e-6)
    assert abs(float(sphere)) < 1e-6 and float(jnp.sum(first**2)) > 0.99
