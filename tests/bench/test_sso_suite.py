"""The suite of expensive oracles: its problems, its counts, and what it must show."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_ext.bench import suite, worker
from jaxopt_ext.bench.contender import OURS, cast
from jaxopt_ext.bench.problem import Entry
from jaxopt_ext.bench.problems import supervised
from jaxopt_ext.bench.suites import sso

CONTENDERS = {one.name: one for one in sso.SUITE.contenders()}


def small(loss="logistic", batch=20, calls=60, noise=1.0):
    random = np.random.RandomState(0)
    X = random.standard_normal((80, 5)) * np.logspace(0, -1, 5)
    score = X @ (np.ones(5) / np.logspace(0, -1, 5))
    y = (score + noise * random.standard_normal(80) > 0).astype(float)
    fun, smoothness = supervised.LOSSES[loss]
    return supervised.Supervised(
        name="small",
        loss=fun,
        model=supervised.linear,
        init=np.zeros(5),
        data={"X": X, "y": y},
        batch=batch,
        smoothness=smoothness,
        optimum=supervised._least(loss, X, y),
        calls=calls,
    )


def row_of(name, problem, seed=0):
    task = suite.Task("sso", "small", name, seed, "float64", True, 1)
    entry = Entry((supervised.KIND,), lambda: problem)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return worker.execute(sso.SUITE, entry, CONTENDERS[name], task)


@pytest.mark.parametrize("loss", supervised.LOSSES)
def test_least_objective_is_stationary_and_least(loss):
    problem = small(loss)
    X, y = problem.data["X"], problem.data["y"]
    data = cast(problem.data, "float64")
    w = jnp.zeros(5)
    for _ in range(20):
        w = w - jnp.linalg.solve(jax.hessian(problem.fun)(w, data), jax.grad(problem.fun)(w, data))
    assert supervised._least(loss, X, y) == pytest.approx(float(problem.fun(w, data)), rel=1e-9)


def test_smoothness_of_the_losses_is_that_of_one_sample():
    for fun, constant in supervised.LOSSES.values():
        one = {"y": jnp.array([0.3])}
        curvature = jax.vmap(lambda z, f=fun: jax.hessian(lambda z: f(z, one))(z[None]))
        assert float(jnp.max(curvature(jnp.linspace(-4, 4, 81)))) == pytest.approx(constant)


def test_factorization_has_the_rank_that_it_says():
    problem = supervised.factorization(4, 100, 10)
    assert problem.optimum > 1e-6
    target = problem.model(problem.init, problem.data)
    assert np.linalg.matrix_rank(target) == 4 and target.shape == (1000, 10)
    assert supervised.factorization(10, 100, 10).optimum < 1e-20


def test_work_without_effect_has_none():
    idle, busy = supervised.expensive(0), supervised.expensive(7)
    data = cast(idle.data, "float64")
    w = jnp.linspace(-1, 1, 32)
    for a, b in zip(
        jax.value_and_grad(idle.fun)(w, data), jax.value_and_grad(busy.fun)(w, data), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


def test_more_inner_steps_are_solved_with_fewer_oracle_calls():
    rows = {m: row_of(f"{OURS} SSO m={m}", small(batch=80, calls=200)) for m in (1, 10, 100)}
    assert [r.status for r in rows.values()] == ["ok"] * 3, [r.message for r in rows.values()]
    assert rows[1].work > 2 * rows[10].work >= 2 * rows[100].work
    declared = rows[10].declared
    assert declared["oracle"] == 200 and declared["surrogate_gradient"] >= 2000
    assert rows[10].history["work"][-1] == 200
    assert rows[10].history["f"] == sorted(rows[10].history["f"], reverse=True)


@pytest.mark.parametrize("name", [n for n, c in CONTENDERS.items() if c.package != OURS])
def test_peers_run_with_the_best_setting_of_their_grid(name):
    if CONTENDERS[name].module:
        pytest.importorskip(CONTENDERS[name].module)
    row = row_of(name, small(batch=80, calls=60))
    assert row.status in ("ok", "missed"), row.message
    assert row.f < row.f0 and row.extras["tried"] >= 3
    assert len(row.extras["grad_norms"]) == len(row.history["f"]) - 1


def test_sparse_rows_give_the_scores_of_the_matrix():
    random = np.random.RandomState(1)
    X = np.where(random.uniform(size=(7, 12)) < 0.3, random.standard_normal((7, 12)), 0.0)
    values, columns = supervised._sparse(X)
    assert values.shape == columns.shape == (7, max(np.count_nonzero(X, axis=1)))
    w = random.standard_normal(12)
    sparse = cast({"X": (values, columns)}, "float64")
    np.testing.assert_allclose(supervised.linear(jnp.asarray(w), sparse), X @ w, atol=1e-14)


def test_variance_reduction_is_the_textbook_method_at_its_full_price():
    problem = small(batch=20)  # 4 minibatches: 4 calls for the full gradient, 2 for each step
    method, data = sso.svrg(problem, None), cast(problem.data, "float64")
    slope = jax.grad(problem.fun)
    batches = [jax.tree.map(lambda leaf, i=i: leaf[20 * i : 20 * i + 20], data) for i in range(4)]
    rate, step = jnp.asarray(0.7), jax.jit(method.step)
    state = method.init(jnp.zeros(5), batches[0], rate)
    w = snapshot = jnp.zeros(5)
    for call in range(24):
        batch = batches[call % 4]
        state = step(state, batch)
        if call % 12 == 0:
            snapshot, full = w, slope(w, data)
        if call % 12 >= 4 and call % 2 == 0:
            w = w - rate * (slope(w, batch) - slope(snapshot, batch) + full)
        np.testing.assert_allclose(method.point(state), w, rtol=1e-12)


def test_entries_are_twins_without_a_folder_of_data(monkeypatch):
    monkeypatch.delenv("JAXOPT_EXT_DATA", raising=False)
    names = sso.SUITE.entries()
    assert "logistic-mushrooms-twin-batch125" in names and "cost-1000" in names
    problem = names["squared-mushrooms-twin-full"].build()
    assert problem.batch == problem.samples == 8124
    assert problem.digest() == names["squared-mushrooms-twin-full"].build().digest()
