"""The closed forms of the hypergradient problems, and the suite that measures on them."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_ext.bench import contender, suite, worker
from jaxopt_ext.bench.problems import hypergradients as bench
from jaxopt_ext.bench.suites import implicit

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
    return request.param, bench.ENTRIES[request.param].build(**SMALL[request.param])


def as_jax(problem):
    return contender.cast((problem.theta, problem.x, problem.data), "float64")


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
    assert implicit.relative_error(gradient, problem.gradient) < 1e-11


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


OURS = [c for c in implicit.SUITE.contenders() if c.package == contender.OURS]
PEERS = [c for c in implicit.SUITE.contenders() if c.package != contender.OURS]
BUDGET = contender.Budget(implicit.TIGHT["float64"], 0, 0, 0, "float64")


def error_of(one, problem):
    rule = one.make(problem, BUDGET)
    gradient = jax.jit(bench.hypergradient(problem, rule))(*as_jax(problem))
    return implicit.relative_error(gradient, problem.gradient)


@pytest.mark.parametrize("one", OURS, ids=lambda c: c.name)
def test_our_hypergradients(one):
    for name, entry in bench.ENTRIES.items():
        if set(one.kinds) & set(entry.kinds):
            problem = entry.build(**SMALL[name])
            assert error_of(one, problem) < (1e-11 if one.setting == "default" else 1e-9)


@pytest.mark.parametrize("one", PEERS, ids=lambda c: c.name)
def test_peers_solve_the_same_problem(one):
    name = next(n for n, entry in bench.ENTRIES.items() if set(one.kinds) & set(entry.kinds))
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore")
        pytest.importorskip(one.module)
        assert error_of(one, bench.ENTRIES[name].build(**SMALL[name])) < 1e-4


def test_a_row_has_times_error_and_memory():
    task = suite.Task("implicit", "ridge", "jaxopt_ext attach", 0, "float64", True, 2)
    row = worker.execute(implicit.SUITE, bench.ENTRIES["ridge"], OURS[0], task)
    assert (row.status, row.message, row.n) == ("ok", "", 100)
    assert row.error < 1e-12
    assert row.compile_cpu_s > 0 and row.cpu > 0 and row.peak_bytes > 8 * 100**2
