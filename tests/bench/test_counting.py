"""Audited counts: of JAX's transformations, and of our solvers against what they declare."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_ext.bench import counting, measure, ours
from jaxopt_ext.bench.contender import Budget, Contender
from jaxopt_ext.bench.problem import Problem
from jaxopt_ext.bench.record import Row


def rosenbrock(y, data):
    return jnp.vdot(residual(y, data), residual(y, data)) / 2


def residual(y, data):
    return jnp.concatenate([10 * (y[1:] - y[:-1] ** 2), data - y[:-1]])


BOX = {"lower": np.full(3, -2.0), "upper": np.full(3, 2.0)}
PROBLEM = Problem(
    "rosenbrock", rosenbrock, np.array([-1.2, 1.0, 0.5]), np.asarray(1.0), residual, optimum=0.0
)
Y = jnp.array([-1.2, 1.0, 0.5])
DATA = jnp.asarray(1.0)


def hvp(fun):
    return lambda y: jax.jvp(jax.grad(fun), (y,), (y,))[1]


@pytest.mark.parametrize(
    "transform, expected",
    [
        (lambda f: f, {"value": 1}),
        (jax.grad, {"gradient": 1}),
        (jax.value_and_grad, {"value": 1, "gradient": 1}),
        (jax.hessian, {"hvp": 3}),
        (lambda f: jax.jacrev(jax.grad(f)), {"hvp": 3}),
        (hvp, {"hvp": 1}),
        (lambda f: lambda y: jax.jvp(f, (y,), (y,)), {"value": 1, "jvp": 1}),
        (lambda f: lambda y: jax.vmap(f)(jnp.stack([y] * 5)), {"value": 5}),
    ],
    ids=["value", "grad", "value_and_grad", "hessian", "jacrev", "hvp", "jvp", "vmap"],
)
def test_of_the_objective(transform, expected):
    log = counting.Log()
    fun = counting.counted(PROBLEM, log).fun
    program = jax.jit(transform(lambda y: fun(y, DATA)))
    plain = jax.jit(transform(lambda y: rosenbrock(y, DATA)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14), program(Y), plain(Y))
    assert log.counts == expected
    program(Y)
    assert log.counts == {kind: 2 * number for kind, number in expected.items()}
    assert log.work == counting.work(log.counts)


@pytest.mark.parametrize(
    "transform, expected",
    [
        (lambda r: r, {"residual": 1}),
        (jax.jacfwd, {"residual_jvp": 3}),
        (jax.jacrev, {"residual_vjp": 4}),
        (lambda r: lambda y: jax.jvp(r, (y,), (y,))[1], {"residual_jvp": 1}),
        (lambda r: jax.grad(lambda y: jnp.sum(r(y) ** 2)), {"residual": 1, "residual_vjp": 1}),
    ],
    ids=["residual", "jacfwd", "jacrev", "jvp", "gradient"],
)
def test_of_the_residual(transform, expected):
    log = counting.Log()
    fun = counting.counted(PROBLEM, log).residual
    program = jax.jit(transform(lambda y: fun(y, DATA)))
    np.testing.assert_allclose(program(Y), jax.jit(transform(lambda y: residual(y, DATA)))(Y))
    assert log.counts == expected


def test_a_loop_counts_every_turn_even_where_the_direction_is_constant():
    log = counting.Log()
    fun = counting.counted(PROBLEM, log).fun

    def step(_, y):
        return y - 1e-4 * hvp(lambda y: fun(y, DATA))(y) - 1e-4 * jax.grad(fun)(y, DATA)

    jax.jit(lambda y: jax.lax.fori_loop(0, 7, step, y))(Y).block_until_ready()
    assert log.counts == {"hvp": 7, "gradient": 7}


def test_the_curve_is_the_best_objective_against_work():
    log = counting.Log()
    values = np.array([5.0, 7.0, np.nan, 3.0])
    for value in values:
        log.note("value", 1, np.asarray(value))
    log.note("gradient", 1, np.zeros(1))
    log.note("value", 1, np.asarray(2.0))
    assert log.history() == {"work": [1.0, 4.0, 6.0], "f": [5.0, 3.0, 2.0]}


def test_a_long_curve_is_thinned_and_keeps_its_ends():
    log = counting.Log()
    for k in range(10_000):
        log.note("value", 1, np.asarray(-float(k)))
    history = log.history()
    assert len(history["f"]) <= counting.POINTS + 2
    assert (history["work"][0], history["f"][-1]) == (1.0, -9999.0)
    assert history["f"] == sorted(history["f"], reverse=True)


OURS = [c for c in ours.CONTENDERS if {"smooth", "least_squares", "blackbox"} & set(c.kinds)]


@pytest.mark.parametrize("contender", OURS, ids=lambda c: c.name)
def test_our_solvers_declare_what_they_evaluate(contender: Contender):
    row = Row("counting", PROBLEM.name, contender.package, contender.solver)
    blackbox = "blackbox" in contender.kinds
    problem = dataclasses.replace(PROBLEM, **BOX) if blackbox else PROBLEM
    budget = Budget(1e-8, 2000, 2_000 if blackbox else 100_000, 0, "float64")
    measure.solve(row, problem, contender, budget, 1, lambda _, there: there["grad_norm"])
    declared = row.declared
    if blackbox:
        assert row.counts == {"value": declared["value"]} and row.counts["value"] <= 2_000
        return
    assert row.status == "ok", row
    if "least_squares" in contender.kinds:
        assert row.counts["residual"] >= declared["value"]
        assert row.counts["residual_vjp"] == declared["gradient"]
        return
    assert row.counts["value"] == declared["value"]
    assert row.counts["gradient"] == declared["gradient"]
    products = declared["hvp"] + 3 * declared["hessian"]
    assert row.counts.get("hvp", 0) == products
