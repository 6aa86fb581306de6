"""A suite whose contenders fail in every way; imported by worker processes of the tests."""

import os
import time

import jax.numpy as jnp
import numpy as np

from jaxopt_ext.bench import measure
from jaxopt_ext.bench.contender import Answer, Budget, Contender
from jaxopt_ext.bench.problem import Entry, Problem
from jaxopt_ext.bench.suite import Suite


def _problem():
    return Problem("bowl", lambda y, data: jnp.sum((y - data) ** 2), np.zeros(2), np.ones(2))


def _good(problem, budget):
    def solve(start, data):
        return Answer(start + (data - start), 1)

    return solve


def _random(problem, budget):
    def solve(start, data):
        return Answer(start + budget.seed, 1)

    return solve


def _nan(problem, budget):
    return lambda start, data: Answer(start * jnp.nan, 1)


def _away(problem, budget):
    return lambda start, data: Answer(start - 1e3, 1)


def _raises(problem, budget):
    raise ArithmeticError("no such <luck>")


def _hangs(problem, budget):
    time.sleep(600)


def _dies(problem, budget):
    print("last words", flush=True)
    os._exit(7)


def _imports(problem, budget):
    import surely_not_installed  # noqa: F401


def _faulty(name, make, **more):
    return Contender("faulty", name, ("faulty",), make, **more)


CONTENDERS = (
    _faulty("good", _good),
    _faulty("random", _random, random=True),
    _faulty("nan", _nan),
    _faulty("away", _away),
    _faulty("raises", _raises),
    _faulty("hangs", _hangs),
    _faulty("dies", _dies),
    _faulty("imports", _imports),
    _faulty("absent", _good, module="surely_not_installed")._replace(package="absent"),
)


def execute(row, entry, contender, task):
    budget = Budget(1e-8, 10, 100, task.seed, task.dtype)
    problem = measure.built(entry.build)
    measure.solve(row, problem, contender, budget, task.repeats, lambda _, at: at["grad_norm"])


SUITE = Suite(
    name="faulty_suite",
    title="Faults",
    summary="Everything that can go wrong.",
    entries=lambda: {"bowl": Entry(("faulty",), _problem, quick=True)},
    kinds=("faulty",),
    execute=execute,
    seeds=2,
    own=CONTENDERS,
)
