"""Surrogates in target space, deterministic: published properties, settings, corner cases."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxopt_ext as jx
from jaxopt_ext import implicit, solvers
from jaxopt_ext.solvers import SSO, sso

FOREVER = jx.Target(-1e30)


def logistic(z, data):
    """Mean over the samples; the loss of one sample has L = 1/4."""
    return jnp.mean(jnp.logaddexp(0.0, z) - data["y"] * z)


def linear(w, data):
    return data["X"] @ w


def network(params, data):
    return jnp.tanh(data["X"] @ params["W"]) @ params["v"]


def classification(samples=40, features=4, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    X = jax.random.normal(keys[0], (samples, features))
    noise = jax.random.normal(keys[1], (samples,))
    return {"X": X, "y": (X @ jnp.arange(1.0, features + 1) + noise > 0).astype(X.dtype)}


DATA = classification()
LINEAR = jx.ComposedMinimization(logistic, linear)
ETA = DATA["y"].size / 0.25
BETA = jnp.linalg.norm(DATA["X"], 2) ** 2 / ETA  # smoothness of the surrogate of LINEAR


def objective(w, problem=LINEAR, data=DATA):
    return problem.objective(w, data)[0]


@eqx.filter_jit
def steps(solver, problem, init, data, number):
    """The states after each of `number` steps; the first evaluates the start."""
    state = solver.init(problem, init, data)

    def one(state, _):
        state, info = solver.step(problem, data, state)
        return state, (state, info)

    return jax.lax.scan(one, state, length=number)[1]


def surrogate_at(problem, data, point, eta, metric=None):
    metric = sso.Euclidean() if metric is None else metric
    z = problem.model(point, data)
    gradient = jax.grad(problem.loss)(z, data)
    weights = metric.weights(metric.init(z), z, None, lambda z: problem.loss(z, data))
    return sso.Surrogate(problem.model, data, z, gradient, metric, weights, jnp.asarray(eta))


# ---- properties of the surrogate and of the method ----


@pytest.mark.parametrize(("factor", "bounded"), [(1.0, True), (1.5, False)])
def test_surrogate_is_an_upper_bound_of_any_model_where_eta_is_at_most_1_over_L(factor, bounded):
    keys = jax.random.split(jax.random.key(1), 3)
    width = 5
    start = {
        "W": jax.random.normal(keys[0], (4, width)),
        "v": 0.1 * jax.random.normal(keys[1], (width,)),
    }
    data = DATA | {"y": jnp.full_like(DATA["y"], 0.5)}  # most curved at z = 0
    problem = jx.ComposedMinimization(logistic, network)
    surrogate = surrogate_at(problem, data, start, factor * ETA)
    value = problem.objective(start, data)[0]

    def gap(key, scale):
        a, b = jax.random.split(key)
        moved = {
            "W": start["W"] + scale * jax.random.normal(a, start["W"].shape),
            "v": start["v"] + scale * jax.random.normal(b, start["v"].shape),
        }
        return value + surrogate.at(network(moved, data)) - problem.objective(moved, data)[0]

    gaps = jax.vmap(lambda s: jax.vmap(lambda k: gap(k, s))(jax.random.split(keys[2], 200)))(
        jnp.array([1e-3, 0.1, 1.0, 10.0])
    )
    assert bool(jnp.min(gaps) >= -1e-15) == bounded


def test_surrogate_touches_the_objective():
    problem = jx.ComposedMinimization(logistic, network)
    point = {"W": jnp.arange(12.0).reshape(4, 3) / 6 - 1, "v": jnp.arange(3.0)}
    for metric in (None, sso.DiagonalHessian(), sso.Bregman(lambda z: jnp.sum(z**4))):
        surrogate = surrogate_at(problem, DATA, point, 3.0, metric)
        value, gradient = surrogate.value_and_grad(point)
        assert float(value) == 0
        truth = jax.grad(lambda p: problem.objective(p, DATA)[0])(point)
        for ours, exact in zip(jax.tree.leaves(gradient), jax.tree.leaves(truth), strict=True):
            np.testing.assert_allclose(ours, exact, atol=1e-15)


@pytest.mark.parametrize("m", [1, 5, 40])
def test_objective_falls_monotonically_and_at_the_rate_of_the_theory(m):
    number = 60
    solver = SSO(ETA, sso.GradientSteps(m, float(1 / BETA), 0.0), safeguard=False)
    states, _ = steps(solver, LINEAR, jnp.ones(4), DATA, number)
    assert bool(jnp.all(jnp.diff(states.objective) <= 1e-16))
    least = jx.solve(LINEAR, solvers.GradNormSmooth(), jnp.zeros(4), DATA).objective
    squares = jnp.sum(states.gradient**2, axis=1)
    budget = 2 * BETA * (states.objective[0] - least) / jnp.arange(1.0, number + 1)
    assert bool(jnp.all(jax.lax.cummin(squares) <= budget))


def test_one_inner_step_is_gradient_descent():
    alpha = 0.3
    solver = SSO(ETA, sso.GradientSteps(1, alpha), safeguard=False)
    states, _ = steps(solver, LINEAR, jnp.zeros(4), DATA, 20)
    w = jnp.zeros(4)
    for found in states.value:
        np.testing.assert_allclose(found, w, atol=1e-14)
        w = w - alpha * jax.grad(objective)(w)


def test_exact_inner_solve_of_a_linear_model_is_the_bound_of_bohning_and_lindsay():
    states, _ = steps(SSO(ETA, sso.ExactLeastSquares()), LINEAR, jnp.ones(4), DATA, 3)
    w, X = jnp.ones(4), DATA["X"]
    for found in states.value:
        np.testing.assert_allclose(found, w, atol=1e-13)
        w = w - ETA * jnp.linalg.solve(X.T @ X, jax.grad(objective)(w))


def test_least_squares_are_solved_in_one_oracle_call_after_the_start():
    X, y = DATA["X"], DATA["y"]
    mean = jx.ComposedMinimization(lambda z, d: jnp.mean((z - d["y"]) ** 2) / 2, linear)
    residual = jx.LeastSquares(lambda w, d: d["X"] @ w - d["y"])
    expected = jnp.linalg.lstsq(X, y)[0]
    exact = sso.ExactLeastSquares()
    for problem, rule in ((mean, sso.Smoothness(1.0)), (residual, sso.Smoothness(1.0, "sum"))):
        found = jx.solve(problem, SSO(rule, exact), jnp.zeros(4), DATA)
        assert bool(found.success) and int(found.stats.counts.oracle) == 2
        np.testing.assert_allclose(found.value, expected, atol=1e-12)
    # rank-deficient: the step of minimal norm
    twice = {"X": jnp.concatenate([X, X], axis=1), "y": y}
    found = jx.solve(mean, SSO(sso.Smoothness(1.0), exact), jnp.zeros(8), twice).check()
    np.testing.assert_allclose(found.value, jnp.concatenate([expected, expected]) / 2, atol=1e-12)


def test_second_order_metric_and_exact_inner_solve_are_newtons_method():
    solver = SSO(1.0, sso.ExactLeastSquares(), sso.DiagonalHessian())
    states, _ = steps(solver, LINEAR, jnp.zeros(4), DATA, 4)
    w = jnp.zeros(4)
    for found in states.value:
        np.testing.assert_allclose(found, w, rtol=1e-12)
        w = w - jnp.linalg.solve(jax.hessian(objective)(w), jax.grad(objective)(w))


def reference_problem():
    """500 x 20, columns whose scales differ by 10^1.5: there are counts of golden runs for it."""
    random = np.random.default_rng(3)
    rows = random.standard_normal((500, 20))
    weights = random.standard_normal(20)
    y = (random.random(500) < 1 / (1 + np.exp(-rows @ weights))).astype(float)
    return {"X": jnp.asarray(rows * np.logspace(0, -1.5, 20)), "y": jnp.asarray(y)}


REFERENCE = reference_problem()
STEEPEST = 4 * 500 / jnp.linalg.norm(REFERENCE["X"], 2) ** 2  # 1/β


@eqx.filter_jit
def oracle_calls(inner, most=20_001):
    """Until ‖∇h‖ < 1e-6; the last call only finds that it is."""
    solver = SSO(sso.Smoothness(0.25), inner, safeguard=False)

    def going(carry):
        state, calls = carry
        far = jnp.linalg.norm(state.gradient) >= 1e-6
        return (calls == 0) | (far & (calls < most))

    def body(carry):
        state, calls = carry
        return solver.step(LINEAR, REFERENCE, state)[0], calls + 1

    state, calls = jax.lax.while_loop(
        going, body, (solver.init(LINEAR, jnp.zeros(20), REFERENCE), jnp.zeros((), jnp.int32))
    )
    return calls, state.counts.oracle, state.surrogate_gradients


def test_fixed_inner_steps_divide_the_number_of_oracle_calls_as_golden_runs_say():
    found = {
        m: oracle_calls(sso.GradientSteps(jnp.asarray(m), STEEPEST, 0.0))
        for m in (1, 5, 10, 100, 1000)
    }
    assert int(found[1][0]) > 20_000
    # surrogates of golden runs with another implementation, and one call at the end
    golden = {5: 16_056, 10: 8076, 100: 940, 1000: 265}
    assert {m: int(found[m][0]) - 1 for m in golden} == golden
    for m, (calls, oracle, gradients) in found.items():
        assert int(oracle) == int(calls) and int(gradients) == m * int(calls)
    # 1/β by power iteration is a little shorter
    estimated = oracle_calls(sso.GradientSteps(jnp.asarray(10), "lipschitz", 0.0))[0]
    assert int(estimated) == pytest.approx(8076, rel=0.04)


def test_searched_inner_steps_need_fewer_oracle_calls_too():
    calls = [
        int(oracle_calls(sso.GradientSteps(jnp.asarray(m), "armijo", 0.0))[0])
        for m in (1, 10, 100, 1000)
    ]
    # golden runs with another search: 9182, 4159, 551, 237
    assert calls[0] == pytest.approx(9182, rel=0.1) and calls[3] == pytest.approx(237, rel=0.1)
    assert calls[1] < 4159 and calls[2] < 551
    assert calls[0] > 3 * calls[1] > 9 * calls[2] > 9 * calls[3]


# ---- step sizes ----


def test_mean_and_sum_are_scaled_alike():
    total = jx.ComposedMinimization(lambda z, d: d["y"].size * logistic(z, d), linear)
    inner = sso.GradientSteps(5, "lipschitz")
    mean, _ = steps(SSO(sso.Smoothness(0.25), inner), LINEAR, jnp.zeros(4), DATA, 8)
    summed, _ = steps(SSO(sso.Smoothness(0.25, "sum"), inner), total, jnp.zeros(4), DATA, 8)
    np.testing.assert_allclose(mean.value, summed.value, rtol=1e-12)
    assert float(mean.eta[-1]) == 40 / 0.25 and float(summed.eta[-1]) == 1 / 0.25


def test_estimated_step_size_begins_above_1_over_L_and_follows_the_curvature():
    curvature = jnp.array([1.0, 100.0])
    problem = jx.ComposedMinimization(
        lambda z, _: jnp.sum(curvature * z**2) / 2, lambda w, _: w @ jnp.eye(2)
    )
    solver = SSO(inner=sso.ExactLeastSquares(), rtol=0.0, atol=1e-8)
    states, infos = steps(solver, problem, jnp.array([1.0, 1.0]), None, 300)
    assert float(states.eta[0]) >= 1 / 100
    assert bool(jnp.all(jnp.diff(states.objective) <= 0))
    assert float(states.objective[-1]) < 1e-5
    assert 0.005 < float(jnp.min(infos.extras["eta"]))


def test_armijo_in_target_space_accepts_no_less_than_the_theory_says():
    rule = sso.TargetArmijo(decrease=0.5, shrink=0.9, start=1e6)
    solver = SSO(rule, sso.GradientSteps(5, "lipschitz"), safeguard=False)
    states, _ = steps(solver, LINEAR, jnp.ones(4), DATA, 10)
    assert bool(jnp.all(states.eta >= 2 * (1 - 0.5) * 0.9 * ETA))
    # and each accepted η passes the test
    for i in range(10):
        z, g = states.target[i], states.target_gradient[i]
        decrease = logistic(z, DATA) - logistic(z - states.eta[i] * g, DATA)
        assert float(decrease) >= 0.5 * float(states.eta[i] * jnp.sum(g**2)) * (1 - 1e-9)


# Armijo's test looks along one line, and the model moves along another.
BENT = jx.ComposedMinimization(
    lambda z, _: (z[0] ** 2 + 100 * z[1] ** 2) / 2, lambda w, _: jnp.stack([1 - w, w])
)


def test_safeguard_stops_a_surrogate_that_is_no_upper_bound():
    bare = SSO(1.0, sso.ExactLeastSquares(), safeguard=False)
    states, _ = steps(bare, BENT, jnp.array(0.0), None, 2)
    np.testing.assert_allclose(states.objective, [0.5, 12.625])
    guarded = jx.solve(BENT, SSO(1.0, sso.ExactLeastSquares()), jnp.array(0.0), history=True)
    assert bool(guarded.success)
    np.testing.assert_allclose(guarded.value, 1 / 101, rtol=1e-9)
    objectives = guarded.history["objective"]
    assert float(jnp.nanmax(objectives)) == 0.5
    assert not bool(guarded.history["accepted"][1])
    # the η that would have been enough: the curvature of the loss along the model is 101/2
    assert float(guarded.state.solver.eta) == pytest.approx(2 / 101)


# ---- metrics ----


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_logsumexp_makes_the_surrogate_of_cross_entropy_exact(dtype):
    keys = jax.random.split(jax.random.key(5), 3)
    X = jax.random.normal(keys[0], (20, 3), dtype)
    label = jax.nn.one_hot(jax.random.randint(keys[1], (20,), 0, 4), 4, dtype=dtype)

    def loss(z, _):
        return jnp.sum(jax.nn.logsumexp(z, axis=-1) - jnp.sum(label * z, axis=-1))

    problem = jx.ComposedMinimization(loss, lambda W, _: X @ W)
    point = jax.random.normal(keys[2], (3, 4), dtype)
    surrogate = surrogate_at(problem, None, point, jnp.ones((), dtype), sso.LogSumExp())
    wide = jx.ComposedMinimization(
        lambda z, _: jnp.sum(
            jax.nn.logsumexp(z.astype(jnp.float64), axis=-1)
            - jnp.sum(label.astype(jnp.float64) * z.astype(jnp.float64), axis=-1)
        ),
        problem.model,
    )
    for scale in (1e-4, 1e-2, 1.0, 30.0):
        moved = point + scale
        moved = moved.at[0].add(scale * jnp.arange(4, dtype=dtype))
        truth = wide.loss(X @ moved, None) - wide.loss(X @ point, None)
        assert float(surrogate.at(X @ moved)) == pytest.approx(
            float(truth), rel=1e-3 if dtype == jnp.float32 else 1e-10
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_logsumexp_divergence_keeps_its_digits(dtype):
    z = jnp.array([0.3, -1.0, 2.0], dtype)
    for size in (1e-3, 0.1, 1.0, 5.0, 50.0):
        moved = z + size * jnp.array([1.0, -0.5, 0.25], dtype)
        metric = sso.LogSumExp()
        ours = metric.divergence(metric.weights(None, z, None, None), moved, z, dtype)
        a, b = np.asarray(moved, np.longdouble), np.asarray(z, np.longdouble)
        p = np.exp(b) / np.sum(np.exp(b))
        exact = np.log(np.sum(p * np.exp(a - b))) - np.sum(p * (a - b))
        # of the digits of the change itself, half are lost in its own rounding
        relative = 20 * float(jnp.finfo(dtype).eps) * (1 + 1 / size)
        assert abs(float(ours) - float(exact)) <= relative * float(exact)


def test_negative_entropy_is_the_relative_entropy_also_at_the_border():
    metric = sso.NegativeEntropy()
    p, q = jnp.array([0.2, 0.8]), jnp.array([0.5, 0.5])
    found = metric.divergence(None, p, q, jnp.float64)
    assert float(found) == pytest.approx(float(jnp.sum(p * jnp.log(p / q))), rel=1e-14)
    for target in (jnp.array([0.0, 1.0]), jnp.array([-1e-3, 1.0])):
        value, slope = jax.value_and_grad(metric.divergence, 1)(None, target, q, jnp.float64)
        assert bool(jnp.isfinite(value)) and bool(jnp.all(jnp.isfinite(slope)))


def test_diagonal_hessian_of_losses_with_several_outputs():
    z = {"a": jax.random.normal(jax.random.key(0), (5, 3)), "b": jnp.linspace(0.0, 1.0, 5)}

    def loss(z):
        return jnp.sum(jax.nn.logsumexp(z["a"], axis=1)) + jnp.sum(jnp.cosh(z["b"]))

    weights = sso.DiagonalHessian().weights(None, z, None, loss)
    p = jax.nn.softmax(z["a"], axis=1)
    np.testing.assert_allclose(weights["a"], p * (1 - p), rtol=1e-12)
    np.testing.assert_allclose(weights["b"], jnp.cosh(z["b"]), rtol=1e-12)
    flat = sso.DiagonalHessian().weights(None, z, None, lambda z: jnp.sum(z["b"]))
    assert bool(jnp.all(flat["a"] == 1))  # a linear loss has no curvature to offer


def test_adagrad_metrics_remember_all_oracle_calls():
    for metric in (sso.ScalarAdaGrad(), sso.DiagonalAdaGrad()):
        solver = SSO(1.0, sso.GradientSteps(20), metric)
        states, _ = steps(solver, LINEAR, jnp.zeros(4), DATA, 40)
        accepted = jnp.concatenate(
            [jnp.array([True]), jnp.any(jnp.diff(states.value, axis=0) != 0, axis=1)]
        )
        squares = jnp.where(accepted[:, None], states.target_gradient**2, 0)
        if isinstance(metric, sso.ScalarAdaGrad):
            np.testing.assert_allclose(states.metric, jnp.cumsum(jnp.sum(squares, axis=1)))
        else:
            np.testing.assert_allclose(states.metric, jnp.cumsum(squares, axis=0), rtol=1e-12)
        assert float(states.objective[-1]) < 0.6 * float(states.objective[0])


# ---- inner solvers ----

GAUSS_NEWTON = solvers.GradNormSmooth(solvers.GaussNewton(), atol=1e-14)
INNER = {
    "gauss-newton": sso.Subsolver(GAUSS_NEWTON, 60),
    "lbfgs": sso.OptaxSteps(optax.lbfgs(), 40, 1e-10),
    "armijo": sso.GradientSteps(400, "armijo", 1e-10),
    "lipschitz": sso.GradientSteps(400, "lipschitz", 1e-10),
}


@pytest.mark.parametrize("name", INNER)
def test_inner_solvers_agree_with_the_exact_one_on_a_linear_model(name):
    exact, _ = steps(SSO(ETA, sso.ExactLeastSquares()), LINEAR, jnp.ones(4), DATA, 3)
    found, _ = steps(SSO(ETA, INNER[name]), LINEAR, jnp.ones(4), DATA, 3)
    np.testing.assert_allclose(found.value, exact.value, atol=1e-6)
    assert int(found.counts.oracle[-1]) == 3
    assert int(found.model_evaluations[-1]) >= int(found.surrogate_gradients[-1]) > 3


@pytest.mark.parametrize("name", ["armijo", "lbfgs"])
def test_model_evaluations_are_those_that_happen(name):
    executed = []

    def model(w, data):
        jax.debug.callback(lambda: executed.append(None))
        return linear(w, data)

    problem = jx.ComposedMinimization(logistic, model)
    solver = SSO(ETA, INNER[name])
    found = jx.solve(problem, solver, jnp.ones(4), DATA, max_steps=3, stop=FOREVER)
    jax.effects_barrier()
    state = found.state.solver
    assert len(executed) == int(state.model_evaluations) > int(found.stats.counts.oracle)


def test_any_optax_optimizer_reduces_the_surrogate():
    for optimizer in (optax.adam(0.1), optax.sgd(0.5, momentum=0.5), optax.rmsprop(0.05)):
        solver = SSO(sso.Smoothness(0.25), sso.OptaxSteps(optimizer, 20))
        states, _ = steps(solver, LINEAR, jnp.ones(4), DATA, 6)
        assert bool(jnp.all(jnp.diff(states.objective) <= 0))
        assert float(states.objective[-1]) < 0.4


def test_number_of_inner_steps_can_change_without_recompiling():
    traced = []

    @jax.jit
    def found(m):
        traced.append(m)
        solver = SSO(sso.Smoothness(0.25), sso.GradientSteps(m, "lipschitz"))
        return jx.solve(LINEAR, solver, jnp.zeros(4), DATA, max_steps=5).objective

    few, more = float(found(jnp.asarray(1))), float(found(jnp.asarray(20)))
    assert more < few and len(traced) == 1


# ---- oracles ----


def test_oracle_given_as_value_and_gradient_serves_with_one_call_per_step():
    calls = []

    def oracle(z, data):
        jax.debug.callback(lambda: calls.append(None))
        return logistic(z, data), (jax.nn.sigmoid(z) - data["y"]) / z.size

    problem = jx.ComposedMinimization(sso.from_oracle(oracle), linear)
    solver = SSO(sso.Smoothness(0.25), sso.GradientSteps(20, "lipschitz"))
    found = jx.solve(problem, solver, jnp.zeros(4), DATA, adjoint=implicit.DetachedAdjoint())
    jax.effects_barrier()
    assert len(calls) == int(found.stats.counts.oracle)
    np.testing.assert_allclose(found.value, jx.solve(LINEAR, solver, jnp.zeros(4), DATA).value)


def test_solution_from_an_oracle_is_differentiable_where_the_oracle_is():
    def oracle(z, data):
        return logistic(z, data), (jax.nn.sigmoid(z) - data["y"]) / z.size

    def ours(y, loss):
        problem = jx.ComposedMinimization(loss, linear)
        solver = SSO(sso.Smoothness(0.25), sso.ExactLeastSquares())
        found = jx.solve(problem, solver, jnp.zeros(4), DATA | {"y": y})
        return jnp.sum(found.value**2) + found.objective

    soft = 0.1 + 0.8 * DATA["y"]
    expected = jax.grad(ours)(soft, logistic)
    np.testing.assert_allclose(jax.grad(ours)(soft, sso.from_oracle(oracle)), expected, rtol=1e-7)


def test_host_oracle_through_ask_and_tell_is_the_same_method():
    def never(z, data):
        raise AssertionError("the loss must not be called")

    problem = jx.ComposedMinimization(never, linear)
    solver = SSO(sso.EstimatedSmoothness(), sso.GradientSteps(10))
    state, y = solver.init(problem, jnp.zeros(4), DATA), np.asarray(DATA["y"])
    ask, tell = eqx.filter_jit(solver.ask), eqx.filter_jit(solver.tell)
    for _ in range(8):
        z = np.asarray(ask(problem, DATA, state))  # from here on NumPy alone
        value = np.mean(np.logaddexp(0, z) - y * z)
        gradient = (1 / (1 + np.exp(-z)) - y) / z.size
        state, info = tell(problem, DATA, state, value, gradient)
    states, _ = steps(solver, LINEAR, jnp.zeros(4), DATA, 8)
    np.testing.assert_allclose(state.value, states.value[-1], rtol=1e-9)
    assert int(info.counts.oracle) == 8 and int(info.counts.value) == 0


def test_what_needs_the_loss_itself_is_refused_by_tell():
    for settings, word in (
        ({"step_size": sso.TargetArmijo()}, "step_size is TargetArmijo"),
        ({"metric": sso.DiagonalHessian()}, "metric is DiagonalHessian"),
    ):
        solver = SSO(**settings)
        state = solver.init(LINEAR, jnp.zeros(4), DATA)
        with pytest.raises(ValueError, match=f"{word}, which evaluates the loss itself"):
            solver.tell(LINEAR, DATA, state, 1.0, jnp.zeros(40))
    solver = SSO()
    with pytest.raises(ValueError, match=r"gradient is float64\[3\], expected a PyTree like"):
        solver.tell(LINEAR, DATA, solver.init(LINEAR, jnp.zeros(4), DATA), 1.0, jnp.zeros(3))


# ---- transformations ----


def test_samples_sharded_over_devices_give_the_iterates_of_one_device():
    mesh = jax.make_mesh((8,), ("samples",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(DATA, NamedSharding(mesh, PartitionSpec("samples")))
    solver = SSO(inner=sso.GradientSteps(10))
    run = jax.jit(lambda data: steps(solver, LINEAR, jnp.zeros(4), data, 10)[0])
    one, many = run(DATA), run(sharded)
    np.testing.assert_allclose(many.value, one.value, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(many.counts.oracle, one.counts.oracle)
    found = jx.solve(LINEAR, solver, jnp.zeros(4), sharded).check()
    np.testing.assert_allclose(found.value, jx.solve(LINEAR, solver, jnp.zeros(4), DATA).value)


def test_equinox_model_with_functions_among_its_leaves():
    model = eqx.nn.MLP(4, "scalar", 8, 1, activation=jnp.tanh, key=jax.random.key(0))
    with pytest.raises(TypeError, match="expected a floating array"):
        jx.solve(LINEAR, SSO(), model, DATA)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    problem = jx.ComposedMinimization(
        logistic, lambda params, data: jax.vmap(eqx.combine(params, static))(data["X"])
    )
    found = jx.solve(problem, SSO(), params, DATA, max_steps=60, history=True)
    trained = eqx.combine(found.value, static)
    assert float(logistic(jax.vmap(trained)(DATA["X"]), DATA)) == pytest.approx(
        float(found.objective), rel=1e-12
    )
    objective = found.history["objective"]
    assert float(objective[0]) > 0.5 > 0.1 > float(jnp.nanmin(objective))


def test_target_with_leaves_of_different_shapes_and_dtypes():
    def model(w, _):
        return {"a": w, "b": (jnp.sum(w) * jnp.ones((2, 3))).astype(jnp.float32)}

    def loss(z, _):
        return jnp.sum((z["a"] - 1.0) ** 2) + jnp.sum((z["b"].astype(jnp.float64) - 2.0) ** 2)

    problem = jx.ComposedMinimization(loss, model)
    for metric in (sso.Euclidean(), sso.DiagonalHessian()):
        solver = SSO(metric=metric, rtol=0.0, atol=1e-3)
        found = jx.solve(problem, solver, jnp.zeros(2), max_steps=2000).check()
        np.testing.assert_allclose(found.value, 1.0, atol=1e-3)


def test_auxiliary_output_belongs_to_the_point():
    problem = jx.ComposedMinimization(
        lambda z, d: (logistic(z, d), {"largest": jnp.max(z)}), linear, has_aux=True
    )
    found = jx.solve(problem, SSO(), jnp.zeros(4), DATA, max_steps=9)
    assert float(found.aux["largest"]) == pytest.approx(float(jnp.max(DATA["X"] @ found.value)))
    residual = jx.LeastSquares(lambda w, d: (d["X"] @ w - d["y"], jnp.sum(w)), has_aux=True)
    found = jx.solve(residual, SSO(), jnp.zeros(4), DATA).check()
    assert float(found.aux) == pytest.approx(float(jnp.sum(found.value)))


# ---- corner cases ----


@pytest.mark.parametrize("broken", ["value", "gradient", "model"])
def test_start_that_is_not_finite_is_kept_and_named(broken):
    def oracle(z, _):
        value = jnp.where(broken == "value", jnp.nan, jnp.sum(z**2))
        return value, jnp.where(broken == "gradient", jnp.inf, 2 * z)

    def model(w, _):
        return jnp.sqrt(w - 2) if broken == "model" else w

    problem = jx.ComposedMinimization(sso.from_oracle(oracle), model)
    found = jx.solve(problem, SSO(), jnp.ones(2), adjoint=implicit.DetachedAdjoint())
    assert found.result == jx.RESULTS.nonfinite_start
    np.testing.assert_array_equal(found.value, 1.0)


def test_oracle_that_fails_later_keeps_the_last_good_point():
    def oracle(z, _):  # finite at the start only
        there = jnp.all(z == 1.0)
        return jnp.where(there, jnp.sum(z**2), jnp.nan), 2 * z

    problem = jx.ComposedMinimization(sso.from_oracle(oracle), lambda w, _: w * 1.0)
    found = jx.solve(problem, SSO(), jnp.ones(2), adjoint=implicit.DetachedAdjoint())
    assert found.result == jx.RESULTS.nonfinite_step
    np.testing.assert_array_equal(found.value, 1.0)
    assert float(found.objective) == 2.0


@pytest.mark.parametrize("value", [0.0, 1e8])
def test_search_in_target_space_accepts_where_the_loss_is_rounding_error(value):
    # so close to the minimum that no η changes the loss by more than its rounding error
    def loss(z, _):
        return value + jnp.sum((z - 1.0) ** 2) / 2

    problem = jx.ComposedMinimization(loss, lambda w, _: w * 1.0)
    near = jnp.full((3,), 1.0 + 1e-12)
    solver = SSO(sso.TargetArmijo(start=2.5), sso.GradientSteps(5), rtol=0.0, atol=0.0)
    states, _ = steps(solver, problem, near, None, 2)
    trials = int(states.counts.value[0])
    assert trials <= (14 if value == 0 else 1)  # 2.5 · 0.9^10 < 1 is what the curvature allows
    assert bool(jnp.all(jnp.isfinite(states.value))) and bool(
        jnp.all(states.objective <= value + 3e-24)
    )


def test_model_that_overflows_in_the_inner_loop_shortens_the_inner_step():
    problem = jx.ComposedMinimization(
        lambda z, _: jnp.mean((z - 2.0) ** 2), lambda w, _: jnp.exp(jnp.exp(w))
    )
    for inner in (sso.GradientSteps(30), sso.GradientSteps(30, "lipschitz")):
        found = jx.solve(problem, SSO(inner=inner), jnp.array([2.0]), max_steps=3000).check()
        np.testing.assert_allclose(found.value, jnp.log(jnp.log(2.0)), rtol=1e-6)
    # with a step that is far too long nothing is committed
    wild = SSO(0.5, sso.GradientSteps(3, 1e6))
    found = jx.solve(problem, wild, jnp.array([2.0]), max_steps=50)
    assert bool(jnp.isfinite(found.objective)) and bool(jnp.all(jnp.isfinite(found.value)))


def test_start_that_is_stationary_has_converged_at_once():
    problem = jx.ComposedMinimization(lambda z, _: jnp.sum((z - 1.0) ** 2), lambda w, _: w * 1.0)
    for rule in (None, sso.TargetArmijo()):
        solver = SSO() if rule is None else SSO(rule)
        found = jx.solve(problem, solver, jnp.ones(3)).check()
        assert int(found.stats.steps) == 1


def test_loss_without_curvature_wants_a_step_size_of_the_user():
    with pytest.raises(ValueError, match="Smoothness: constant is 0, expected a number > 0"):
        sso.Smoothness(0.0)
    # ℓ linear, the model bounds it: with η from the user each step is exact
    problem = jx.ComposedMinimization(lambda z, _: jnp.sum(z), lambda w, _: jnp.cosh(w - 1.0))
    found = jx.solve(problem, SSO(10.0), jnp.zeros(2)).check()
    np.testing.assert_allclose(found.value, 1.0, rtol=1e-9)


def test_single_precision_reaches_its_own_tolerance():
    data = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), DATA)
    exact = jx.solve(LINEAR, solvers.GradNormSmooth(), jnp.zeros(4), DATA).value
    for solver in (SSO(), SSO(sso.Smoothness(0.25), sso.ExactLeastSquares())):
        found = jx.solve(LINEAR, solver, jnp.zeros(4, jnp.float32), data).check()
        assert found.value.dtype == jnp.float32
        np.testing.assert_allclose(found.value, exact, rtol=5e-3)


def test_surrogate_in_difference_form_keeps_digits_beside_a_large_loss():
    offset = 1e4

    def loss(z, _):
        return offset + jnp.sum((z - 1.0) ** 2) / 2

    problem = jx.ComposedMinimization(loss, lambda w, _: w * 1.0)
    z = jnp.full((3,), 0.999, jnp.float32)
    surrogate = surrogate_at(problem, None, z, jnp.ones((), jnp.float32))
    # the change of this loss, 5e-7, is far below the resolution of the loss, 1e-3
    assert float(surrogate.at(jnp.ones(3, jnp.float32))) == pytest.approx(-1.5e-6, rel=1e-3)
    found = jx.solve(problem, SSO(1.0), jnp.zeros(3, jnp.float32)).check()
    np.testing.assert_allclose(found.value, 1.0, atol=1e-4)


def test_settings_out_of_range_are_refused_in_one_sentence():
    for make, kind, pattern in (
        (lambda: SSO(0.0), ValueError, "eta is 0, expected a number > 0"),
        (lambda: SSO(-1.0), ValueError, "eta is -1, expected"),
        (lambda: SSO("auto"), TypeError, "eta is a str, expected a number"),
        (lambda: SSO(inner=3), TypeError, "inner is a int, expected an inner solver"),
        (lambda: SSO(metric="l2"), TypeError, "metric is a str, expected a metric"),
        (lambda: SSO(safeguard=1), TypeError, "safeguard is a int, expected True or False"),
        (lambda: SSO(safeguard=False), ValueError, "safeguard is False, expected True with"),
        (lambda: sso.GradientSteps(0), ValueError, "steps is 0, expected an integer >= 1"),
        (lambda: sso.GradientSteps(1, "newton"), ValueError, "step_size is 'newton', expected"),
        (lambda: sso.OptaxSteps("adam"), TypeError, "optimizer is a str, expected an optimizer"),
        (lambda: sso.Subsolver(solvers.CBO()), ValueError, "expected a solver that needs no"),
        (lambda: sso.Subsolver(SSO), TypeError, "expected a solver such as"),
        (lambda: sso.Smoothness(1.0, "max"), ValueError, "reduction is 'max', expected"),
        (lambda: sso.TargetArmijo(decrease=2.0), ValueError, "decrease is 2, expected"),
        (lambda: sso.from_oracle(3), TypeError, "oracle is a int, expected a function"),
    ):
        with pytest.raises(kind, match=pattern) as caught:
            make()
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="metric is Bregman, expected a quadratic one"):
        metric = sso.Bregman(lambda z: jnp.sum(z**2))
        jx.solve(LINEAR, SSO(1.0, sso.ExactLeastSquares(), metric), jnp.zeros(4), DATA)
    with pytest.raises(ValueError, match="expected a common leading axis of samples"):
        problem = jx.ComposedMinimization(lambda z, _: z**2, lambda w, _: w)
        jx.solve(problem, SSO(sso.Smoothness(1.0)), jnp.array(1.0))
