"""pycma: CMA-ES on the host, the population evaluated by one compiled function.

It starts at the start of the problem with a third of the box's width. Tuned: restarts with growing
and small populations in turn (BIPOP).
"""

import functools

import jax
import numpy as np

from jaxopt_ext.bench.contender import Answer, Budget, Contender, cast, compiled
from jaxopt_ext.bench.problem import Problem


def _make(problem: Problem, budget: Budget, bipop: bool):
    import cma

    start, data = cast((problem.init, problem.data), budget.dtype)
    program = jax.jit(jax.vmap(problem.fun, (0, None)))

    @functools.cache
    def values(size):  # the populations of BIPOP grow
        return compiled(program, cast(np.zeros((size, problem.size)), budget.dtype), data)

    def fun(population):
        points = np.asarray(population, start.dtype)
        return np.asarray(values(len(points))(points, data), np.float64).tolist()

    first = int(4 + 3 * np.log(problem.size))
    values(first)
    lower, upper = problem.box
    options = {
        "bounds": [lower.tolist(), upper.tolist()],
        "seed": budget.seed + 1,  # zero means a seed from the clock
        "maxfevals": budget.evaluations,
        "verbose": -9,
        "popsize": first,
    }
    width = float(np.mean(upper - lower)) / 3

    def solve():
        found, strategy = cma.fmin2(
            None,
            problem.init.tolist(),
            width,
            options,
            parallel_objective=fun,
            restarts=9 if bipop else 0,
            bipop=bipop,
        )
        message = ", ".join(strategy.stop())
        return Answer(np.asarray(found), strategy.countiter, {}, message)

    return solve


def _contender(setting, bipop, config):
    return Contender(
        "cma",
        "CMA-ES",
        ("blackbox",),
        functools.partial(_make, bipop=bipop),
        traced=False,
        setting=setting,
        config=config,
        random=True,
        module="cma",
    )


CONTENDERS = (
    _contender("default", False, {}),
    _contender("tuned", True, {"restarts": 9, "bipop": True}),
)
