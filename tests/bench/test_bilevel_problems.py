"""The bilevel problems against their closed forms, and one run of the suite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_ext import implicit, solvers
from jaxopt_ext.bench import contender, suite, worker
from jaxopt_ext.bench.problems import bilevel as bench
from jaxopt_ext.bench.problems import bolib
from jaxopt_ext.bench.record import Row
from jaxopt_ext.bench.suites import bilevel

SMALL = {"lower_size": 6, "upper_size": 4, "samples": 20}


@pytest.fixture(scope="module")
def quadratic():
    return bench.quadratic(**SMALL)


def test_gradient_of_the_quadratic_equals_that_through_the_lower_solution(quadratic):
    args = contender.cast(quadratic.args, "float64")
    zero = jnp.zeros(6)

    def value(x):
        gradient = jax.grad(quadratic.lower, 1)
        hessian = jax.jacobian(gradient, 1)(x, zero, args)
        y = -jnp.linalg.solve(hessian, gradient(x, zero, args))
        return quadratic.upper(x, y, args), y

    x = jnp.asarray(np.random.default_rng(1).standard_normal(4))
    (_, y), gradient = jax.value_and_grad(value, has_aux=True)(x)
    found = quadratic.measure(x, y)
    np.testing.assert_allclose(found["gradient"], jnp.sum(gradient**2), rtol=1e-10)
    assert found["distance"] < 1e-12


def test_mean_over_all_rows_is_the_deterministic_problem(quadratic):
    sampled = bench.quadratic(batch=5, **SMALL)
    x, y = jnp.ones(4), jnp.ones(6)
    everything = contender.cast({**sampled.args, "rows": np.arange(20, dtype=np.int32)}, "float64")
    whole = contender.cast(quadratic.args, "float64")
    for level in ("upper", "lower"):
        one, two = (getattr(p, level) for p in (quadratic, sampled))
        np.testing.assert_allclose(two(x, y, everything), one(x, y, whole), rtol=1e-12)
    drawn = sampled.sampler(jax.random.key(0), contender.cast(sampled.args, "float64"))
    assert drawn["rows"].shape == (5,) and int(jnp.max(drawn["rows"])) < 20


def test_area_under_the_curve_counts_pairs():
    score = np.array([0.1, 0.4, 0.4, 0.8])
    positive = np.array([False, True, False, True])
    assert bench.auc(score, positive) == (0.5 + 1 + 1 + 1) / 4
    assert bench.auc(-score, positive) == 1 - 3.5 / 4


def test_labels_are_corrupted_at_the_given_rate():
    labels = np.arange(400) % 10
    data = bench.corrupt(np.eye(400), labels, 300, 50, 0.4)
    assert 0.3 < data.corrupted.mean() < 0.5
    true = labels[np.argmax(data.train[:, :-1], axis=1)]
    np.testing.assert_array_equal(data.labels != true, data.corrupted)
    np.testing.assert_array_equal(data.test_labels, labels[np.argmax(data.test[:, :-1], axis=1)])
    assert data.train.shape == (300, 401) and data.test.shape == (50, 401)


def test_retraining_reaches_the_lower_solution():
    pytest.importorskip("sklearn")
    problem = bench.digits(0.3)
    x, y, args = contender.cast((problem.init[0] + 1.0, problem.init[1], problem.args), "float32")
    end = bench.retrained(x, y, args, jnp.float32(problem.lower_step), steps=1500)
    assert float(jnp.max(jnp.abs(jax.grad(problem.lower, 1)(x, end, args)))) < 1e-5
    accuracy = problem.facts["test accuracy"]
    assert accuracy["none"] < accuracy["clean samples only"]


# ---- BOLIB ----

LINES = [name for name, p in bolib.PROBLEMS.items() if p.sizes == (1, 1)]


@pytest.mark.parametrize("name", LINES)
def test_recorded_optimum_agrees_with_a_search_on_a_grid(name):
    problem = bolib.PROBLEMS[name]

    def grid(box, size):
        low, high = (
            b if np.isfinite(b) else s * problem.span for b, s in zip(box, (-1, 1), strict=True)
        )
        return jnp.linspace(low, high, size)

    if name == "MacalHurter1997":  # steep: y = 50 x − 500
        x, y = jnp.linspace(10.0, 10.04, 401), jnp.linspace(0.0, 2.0, 8001)
    else:
        x, y = grid(problem.x_box, 801), grid(problem.y_box, 8001)

    def best(x):
        lower = jax.vmap(lambda v: problem.lower(x[None], v[None]))(y)
        upper = jax.vmap(lambda v: problem.upper(x[None], v[None]))(y)
        optimal = lower <= jnp.min(lower) + 1e-6 * (1 + jnp.abs(jnp.min(lower)))
        return jnp.min(jnp.where(optimal, upper, jnp.inf))

    least = float(jnp.min(jax.lax.map(best, x)))
    assert abs(least - problem.optimum) <= 2e-2 * (1 + abs(problem.optimum))


@pytest.mark.parametrize("name", sorted(set(bolib.PROBLEMS) - set(LINES)))
def test_closed_form_of_the_lower_minimum(name):
    problem = bolib.PROBLEMS[name]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(-2, 2, problem.sizes[0]))
    points = jnp.asarray(rng.uniform(*problem.y_box, (4000, problem.sizes[1])))
    assert float(jnp.min(jax.vmap(lambda y: problem.lower(x, y))(points))) >= float(
        problem.least(x)
    )


def test_all_problems_are_there_and_the_jumps_are_marked():
    assert len(bolib.PROBLEMS) == 29
    assert sum(not p.regular for p in bolib.PROBLEMS.values()) == 6


# ---- the suite ----


def test_names_of_contenders_are_unique():
    names = [one.name for one in bilevel.SUITE.own]
    assert len(names) == len(set(names))


def small_row(monkeypatch, name, entry):
    monkeypatch.setattr(bilevel, "entries", lambda: {"small": entry})
    task = suite.Task("bilevel", "small", name, 0, "float64", False, 1)
    one = next(c for c in bilevel.SUITE.own if c.solver == name)
    row = worker.execute(bilevel.SUITE, entry, one, task)
    assert isinstance(row, Row) and row.status != "error", row.message
    return row


def test_suite_measures_hypergradient_methods(monkeypatch):
    build = functools.partial(bench.quadratic, gradients=6000, **SMALL)
    entry = suite.Entry(("deterministic",), build)
    for name in ("penalty", "SOBA"):
        row = small_row(monkeypatch, name, entry)
        assert row.work <= 6000
        assert len(row.history["f"]) == bilevel.POINTS
        assert row.history["f"][-1] < row.history["f"][0]
        assert row.error < 0.1


@pytest.mark.filterwarnings("ignore:JAXopt is no longer:DeprecationWarning")
def test_loop_with_jaxopts_derivative_makes_the_steps_of_aid(quadratic):
    pytest.importorskip("jaxopt")
    one = next(c for c in bilevel.SUITE.contenders() if c.solver == "GradientDescent")
    budget = contender.Budget(1e-3, 0, 0, 0, "float64")
    ours = solvers.ImplicitBilevel(
        upper_step=quadratic.upper_step,
        lower_step=quadratic.lower_step,
        linear_solver=implicit.CG(max_steps=10),  # six variables, so exact
        warm_start=False,
    )
    start, args = contender.cast((quadratic.init, quadratic.args), "float64")
    ends = []
    for solver in (ours, one.make(quadratic, budget)):
        state = solver.init(quadratic.bilevel, start, args, None)
        for _ in range(3):
            state, info = solver.step(quadratic.bilevel, args, state)
        ends.append((state, info))
    (mine, _), (theirs, counts) = ends
    np.testing.assert_allclose(theirs.value[0], mine.ahead[0], rtol=1e-8)
    np.testing.assert_allclose(theirs.value[1], mine.value[1], rtol=1e-8)
    np.testing.assert_allclose(theirs.objective, mine.objective, rtol=1e-8)
    assert int(counts.counts.gradient) == 12


def test_suite_counts_hits_on_bolib(monkeypatch):
    entry = bolib.ENTRIES["bolib-MorganPatrone2006a"]
    row = small_row(monkeypatch, "penalty-continuation", entry)
    assert row.status == "ok"
    assert row.extras["hit_rate"] > 0.5
