"""The closed forms of the hypergradient benchmark, our accuracy on it, and its tables."""

import json
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_ext.bench import hypergradients as bench
from jaxopt_ext.bench.compile_time import Skipped

SMALL = {
    "ridge": {"samples": 12, "features": 5},
    "equilibrium": {"size": 6},
    "kkt": {"variables": 6, "constraints": 2},
    "lasso": {"samples": 20, "features": 8},
}


def ridge_solution(theta, data, x):
    A = data["A"]
    return jnp.linalg.solve(A.T @ A + jnp.diag(jnp.exp(theta)), A.T @ data["b"])


def equilibrium_solution(theta, data, x):
    def step(_, x):
        return jnp.tanh(theta["W"] @ x + theta["b"])

    return jax.lax.fori_loop(0, 200, step, jnp.zeros_like(theta["b"]))


def kkt_solution(theta, data, x):
    Q, A = (theta["Q"] + theta["Q"].T) / 2, theta["A"]
    matrix = jnp.block([[Q, A.T], [A, jnp.zeros((A.shape[0], A.shape[0]))]])
    solution = jnp.linalg.solve(matrix, jnp.concatenate([-theta["c"], theta["b"]]))
    return tuple(jnp.split(solution, [len(theta["c"])]))


def lasso_solution(theta, data, x):
    support = np.flatnonzero(np.asarray(x))
    A = data["A"][:, support]
    rhs = A.T @ data["b"] - jnp.exp(theta) * jnp.sign(x[support])
    return jnp.zeros_like(x).at[support].set(jnp.linalg.solve(A.T @ A, rhs))


SOLUTIONS = {
    "ridge": ridge_solution,
    "equilibrium": equilibrium_solution,
    "kkt": kkt_solution,
    "lasso": lasso_solution,
}


@pytest.fixture(scope="module", params=list(SMALL))
def named(request):
    """The name of a problem and a small instance of it."""
    return request.param, bench.PROBLEMS[request.param](**SMALL[request.param])


def as_jax(problem):
    return bench.inputs_of(problem, "float64")


def test_the_solution_is_exact(named):
    _, problem = named
    theta, x, data = as_jax(problem)
    residual = problem.residual(x, theta, data)
    assert max(float(jnp.max(jnp.abs(r))) for r in jax.tree.leaves(residual)) < 1e-13


def test_closed_form_equals_autodiff_through_the_solution(named):
    name, problem = named
    theta, x, data = as_jax(problem)
    solve = SOLUTIONS[name]
    for found, expected in zip(
        jax.tree.leaves(solve(theta, data, x)), jax.tree.leaves(x), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-12)
    gradient = jax.jit(jax.jacfwd(lambda theta: problem.loss(solve(theta, data, x), data)))(theta)
    assert bench.relative_error(gradient, problem.gradient) < 1e-11


def test_closed_form_equals_finite_differences(named):
    name, problem = named
    theta, x, data = as_jax(problem)
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda t: jnp.asarray(rng.standard_normal(t.shape)), theta)

    @jax.jit
    def loss(h):
        moved = jax.tree.map(lambda t, d: t + h * d, theta, direction)
        return problem.loss(SOLUTIONS[name](moved, data, x), data)

    slope = float(loss(1e-5) - loss(-1e-5)) / 2e-5
    pairs = zip(jax.tree.leaves(problem.gradient), jax.tree.leaves(direction), strict=True)
    expected = sum(float(np.vdot(g, d)) for g, d in pairs)
    np.testing.assert_allclose(slope, expected, rtol=1e-7, atol=1e-9)


def test_the_lasso_is_strictly_complementary_where_it_is_measured():
    problem = bench.lasso()
    A, x, weight = problem.data["A"], problem.x, np.exp(problem.theta)
    correlation = np.abs(A.T @ (A @ x - problem.data["b"]))
    inactive = x == 0
    assert 10 <= np.sum(~inactive) <= 25
    assert np.max(correlation[inactive]) < 0.999 * weight
    np.testing.assert_allclose(correlation[~inactive], weight, rtol=1e-12)


@pytest.mark.parametrize(
    "contender", [c for c in bench.CONTENDERS if c.package == bench.OURS], ids=lambda c: c.name
)
def test_our_hypergradients(named, contender):
    name, problem = named
    if name not in contender.problems:
        return
    try:
        rule = contender.build("float64")
    except LookupError as error:
        pytest.skip(str(error))
    gradient = jax.jit(bench.hypergradient(problem, rule))(*as_jax(problem))
    default = contender.name == bench.DEFAULT
    assert bench.relative_error(gradient, problem.gradient) < (1e-11 if default else 1e-9)


@pytest.mark.parametrize(
    "contender", [c for c in bench.CONTENDERS if c.package != bench.OURS], ids=lambda c: c.name
)
def test_peers_solve_the_same_problem(contender):
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore")
        pytest.importorskip(contender.package)
        rule = contender.build("float64")
        name = contender.problems[-1]
        problem = bench.PROBLEMS[name](**SMALL[name])
        gradient = jax.jit(bench.hypergradient(problem, rule))(*as_jax(problem))
    assert bench.relative_error(gradient, problem.gradient) < 1e-4


def test_measurement_counts_time_and_error():
    problem = bench.ridge(**SMALL["ridge"])
    run = bench.measure(problem, bench.ours("float32"), "float32", calls=3, version="1")
    assert run.lower > 0 and run.compile > 0 and run.run > 0 and run.cpu >= 0
    assert 1e-12 < run.error < 1e-5
    assert run.version == "1"


def test_an_unknown_linear_solver_is_a_reason():
    with pytest.raises(LookupError, match="has no Magic"):
        bench.ours("float64", solver="Magic")


def test_a_missing_peer_gives_rows_with_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "optimistix", None)
    results = bench.measure_library("optimistix", ["float64"], calls=1)
    expected = sum(len(c.problems) for c in bench.CONTENDERS if c.package == "optimistix")
    assert len(results) == expected
    assert all(isinstance(run, Skipped) and "optimistix" in run.reason for run in results.values())


def row(run, error, start=1.0):
    return bench.Measurement(start / 2, start / 2, run, run, error, "1.0")


ROWS = {
    bench.DEFAULT: row(2e-3, 1e-15),
    "jaxopt_ext CG": row(1e-3, 1e-12),
    "jaxopt_ext Neumann(30)": row(1e-4, 1e-3),
    "jaxopt default": row(1e-5, 1e-5),
    "jaxopt LU": row(4e-3, 1e-15, 2.0),
    "optimistix default": Skipped("No module named 'optimistix'"),
}


def test_table_with_a_missing_peer():
    lines = bench.table(ROWS).splitlines()
    assert len(lines) == 1 + len(ROWS)
    expected = "jaxopt_ext default 1.0 0.500 0.500 2.000 2.000 1.0e-15"
    assert lines[1].split() == expected.split()
    assert lines[-1] == f"{'optimistix default':28} skipped: No module named 'optimistix'"


def test_summary_compares_at_equal_accuracy():
    results = {bench.Key("ridge", "float64", name): run for name, run in ROWS.items()}
    default, best = bench.summary(results).splitlines()[1:]
    # jaxopt's default is fastest but ten digits less accurate; so is our Neumann series
    assert default.split() == (
        "ridge float64 default 0.50 0.50 win: jaxopt_ext default vs jaxopt LU".split()
    )
    assert "0.25     0.50  win: jaxopt_ext CG vs jaxopt LU" in best


@pytest.mark.parametrize(
    ("left_out", "text"),
    [("jaxopt LU", "no other package as accurate"), (bench.DEFAULT, "no measurement of ours")],
)
def test_summary_says_what_it_lacks(left_out, text):
    results = {bench.Key("ridge", "float64", n): r for n, r in ROWS.items() if n != left_out}
    assert text in bench.summary(results)


def test_least_takes_every_figure_from_its_best_round():
    runs = [Skipped("busy"), row(2.0, 1e-15, 1.0), row(1.0, 1e-15, 3.0)]
    assert bench.least(runs) == row(1.0, 1e-15, 1.0)
    assert bench.least(runs[:1]) == Skipped("busy")


def test_records_are_json_with_versions():
    results = {bench.Key("ridge", "float64", name): run for name, run in ROWS.items()}
    lines = [json.loads(json.dumps(record)) for record in bench.records(results, 3, 2)]
    assert {(line["problem"], line["jax"], line["calls"]) for line in lines} == {
        ("ridge", jax.__version__, 3)
    }
    assert lines[0]["version"] == "1.0" and "reason" in lines[-1]


def test_command_line_refuses_no_calls(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--calls", "-1"])
    assert "expected at least 1" in capsys.readouterr().err
