"""IPOPT through cyipopt, with exact first and second derivatives from JAX, dense.

Default: its own options with the asked tolerance. Tuned: the adaptive barrier strategy.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_ext.bench.contender import Answer, Budget, Contender, cast, compiled
from jaxopt_ext.bench.problem import Problem

INFINITE = 1e20  # what IPOPT takes as no bound


class Callbacks:
    """The functions that IPOPT calls, compiled for one problem."""

    def __init__(self, problem: Problem, budget: Budget):
        start, self.data = cast((problem.init, problem.data), budget.dtype)
        self.dtype, self.size = start.dtype, problem.size
        equality = problem.equality or (lambda y, data: jnp.zeros((0,), y.dtype))
        inequality = problem.inequality or (lambda y, data: jnp.zeros((0,), y.dtype))

        def constraints(y, data):
            return jnp.concatenate([equality(y, data), inequality(y, data)])

        def lagrangian(y, multipliers, factor, data):
            return factor * problem.fun(y, data) + jnp.vdot(multipliers, constraints(y, data))

        rows = [int(jax.eval_shape(f, start, self.data).size) for f in (equality, inequality)]
        multipliers = jnp.zeros(sum(rows), start.dtype)
        one = jnp.ones((), start.dtype)
        self.lower_rows = np.concatenate([np.zeros(rows[0]), np.full(rows[1], -INFINITE)])
        self.upper_rows = np.zeros(sum(rows))
        self._fun = compiled(problem.fun, start, self.data)
        self._gradient = compiled(jax.grad(problem.fun), start, self.data)
        self._rows = compiled(constraints, start, self.data)
        self._jacobian = compiled(jax.jacrev(constraints), start, self.data)
        self._hessian = compiled(jax.hessian(lagrangian), start, multipliers, one, self.data)
        self._triangle = np.tril_indices(problem.size)

    def _in(self, y):
        return np.asarray(y, self.dtype)

    def objective(self, y):
        """f(y)."""
        return float(self._fun(self._in(y), self.data))

    def gradient(self, y):
        """∇f(y)."""
        return np.asarray(self._gradient(self._in(y), self.data), np.float64)

    def constraints(self, y):
        """The rows, equalities first."""
        return np.asarray(self._rows(self._in(y), self.data), np.float64)

    def jacobian(self, y):
        """Of the rows, row by row."""
        return np.asarray(self._jacobian(self._in(y), self.data), np.float64).ravel()

    def hessianstructure(self):
        """Places of the lower triangle."""
        return self._triangle

    def hessian(self, y, multipliers, factor):
        """Of factor · f plus multipliers times rows, in these places."""
        factor = np.asarray(factor, self.dtype)
        matrix = self._hessian(self._in(y), self._in(multipliers), factor, self.data)
        return np.asarray(matrix, np.float64)[self._triangle]


def _make(problem: Problem, budget: Budget, options: dict[str, Any]):
    import cyipopt

    callbacks = Callbacks(problem, budget)
    lower, upper = problem.box

    def solve():
        program = cyipopt.Problem(  # type: ignore[attr-defined]
            n=problem.size,
            m=len(callbacks.upper_rows),
            problem_obj=callbacks,
            lb=np.clip(lower, -INFINITE, INFINITE),
            ub=np.clip(upper, -INFINITE, INFINITE),
            cl=callbacks.lower_rows,
            cu=callbacks.upper_rows,
        )
        program.add_option("print_level", 0)
        program.add_option("sb", "yes")
        program.add_option("tol", budget.tolerance)
        program.add_option("max_iter", min(budget.steps, 3000))
        for name, value in options.items():
            program.add_option(name, value)
        found, info = program.solve(problem.init)
        return Answer(found, None, {}, info["status_msg"].decode())

    return solve


def _contender(setting, options):
    return Contender(
        "cyipopt-wheels",
        "IPOPT",
        ("program",),
        functools.partial(_make, options=options),
        traced=False,
        setting=setting,
        config=options,
        module="cyipopt",
    )


CONTENDERS = (_contender("default", {}), _contender("tuned", {"mu_strategy": "adaptive"}))
