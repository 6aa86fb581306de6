"""CBXPy: consensus-based optimization in NumPy, particles uniform in the box.

Default: its own parameters with 50 particles. Tuned: anisotropic noise and an adaptive temperature
with a step of 0.01 and 100 particles, as in its benchmarks.
"""

import functools
from typing import Any

import jax
import numpy as np

from jaxopt_ext.bench.contender import Answer, Budget, Contender, cast, compiled
from jaxopt_ext.bench.problem import Problem


def _make(problem: Problem, budget: Budget, particles: int, options: dict[str, Any]):
    from cbx.dynamics import CBO

    start, data = cast((problem.init, problem.data), budget.dtype)
    shape = (particles, problem.size)
    program = jax.vmap(problem.fun, (0, None))
    values = compiled(program, cast(np.zeros(shape), budget.dtype), data)

    def fun(x):  # one run: (1, particles, n)
        return np.asarray(values(np.asarray(x[0], start.dtype), data), np.float64)[None]

    def solve():
        np.random.seed(budget.seed)  # it draws from NumPy's global generator
        x = np.random.uniform(*problem.box, (1, *shape))
        dynamic = CBO(
            fun,
            x=x,
            f_dim="3D",
            max_it=max(1, budget.evaluations // particles),
            verbosity=0,
            **options,
        )
        best = dynamic.optimize()
        return Answer(np.asarray(best).reshape(problem.size), dynamic.it)

    return solve


def _contender(setting, particles, options):
    return Contender(
        "cbx",
        "CBO",
        ("blackbox",),
        functools.partial(_make, particles=particles, options=options),
        traced=False,
        setting=setting,
        config={"particles": particles, **options},
        random=True,
        module="cbx",
    )


CONTENDERS = (
    _contender("default", 50, {}),
    _contender("tuned", 100, {"noise": "anisotropic", "dt": 0.01, "sigma": 5.0, "alpha": 30.0}),
)
