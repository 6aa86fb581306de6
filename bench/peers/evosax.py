"""evosax: strategies whose whole run is compiled. They ignore the box; the start is its centre.

Tuned: a population three times as large.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_ext.bench.contender import Answer, Budget, Contender
from jaxopt_ext.bench.problem import Problem


def _make(problem: Problem, budget: Budget, name: str, factor: int):
    from evosax import algorithms

    size = factor * int(4 + 3 * np.log(problem.size))
    size += size % 2
    generations = max(1, budget.evaluations // size)
    strategy = getattr(algorithms, name)(population_size=size, solution=problem.init)
    lower, upper = problem.box
    width = float(np.mean(upper - lower))

    def solve(start, data):
        params = strategy.default_params
        if hasattr(params, "std_init"):
            params = params.replace(std_init=width / 3)
        key = jax.random.key(budget.seed)
        state = strategy.init(key, start, params)

        def step(i, carry):
            state, best, value = carry
            ask, tell = jax.random.split(jax.random.fold_in(key, i))
            population, state = strategy.ask(ask, state, params)
            fitness = jax.vmap(problem.fun, (0, None))(population, data)
            state, _ = strategy.tell(tell, population, fitness, state, params)
            least = jnp.argmin(fitness)
            better = fitness[least] < value
            best = jnp.where(better, population[least], best)
            return state, best, jnp.where(better, fitness[least], value)

        carry = (state, start, jnp.array(jnp.inf, start.dtype))
        _, best, _ = jax.lax.fori_loop(0, generations, step, carry)
        return Answer(best, generations)

    return solve


def _contender(name, setting, factor):
    return Contender(
        "evosax",
        name,
        ("blackbox",),
        functools.partial(_make, name=name, factor=factor),
        setting=setting,
        config={} if factor == 1 else {"population_factor": factor},
        random=True,
        module="evosax",
    )


CONTENDERS = (_contender("CMA_ES", "default", 1), _contender("CMA_ES", "tuned", 3))
