"""Surrogates in target space from minibatches: theory, bias, sampling, streams, transformations."""

import io

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding, PartitionSpec

import jaxopt_ext as jx
from jaxopt_ext.solvers import SSO, StochasticSSO, sso

KEY = jax.random.key(0)


def squares(z, data):
    return jnp.mean((z - data["y"]) ** 2) / 2


def linear(w, data):
    return data["X"] @ w


REGRESSION = jx.ComposedMinimization(squares, linear)
EXACT = sso.ExactLeastSquares()


def regression(noise, samples=6, features=2):
    keys = jax.random.split(jax.random.key(4), 3)
    X = jax.random.normal(keys[0], (samples, features))
    error = noise * jax.random.normal(keys[1], (samples,))
    return {"X": X, "y": X @ jnp.arange(1.0, features + 1) + error}


def final(solver, data, number, keys, size=1):
    """Targets of the last iterates of runs with a minibatch drawn with replacement per step."""
    problem = sso.Minibatches(REGRESSION, size, replace=True)
    init = jnp.zeros(data["X"].shape[1])

    def run(key):
        return jx.solve(problem, solver, init, data, key=key, max_steps=number).value

    return jax.jit(jax.vmap(run))(keys) @ data["X"].T


# ---- theory ----


class Told(sso.Minibatches):
    """The minibatch is the one sample that the key says."""

    def rows(self, key, step, count):
        return jax.random.key_data(key)[-1:].astype(jnp.int32) % count


def squared_distance(targets, data):
    """To the targets of the solution, in the mean over runs."""
    best = data["X"] @ jnp.linalg.lstsq(data["X"], data["y"])[0]
    return jnp.mean(jnp.sum((targets - best[None]) ** 2, axis=1))


def variance(data):
    """Of the gradients of single losses at the solution, in target space."""
    best = data["X"] @ jnp.linalg.lstsq(data["X"], data["y"])[0]
    single = jnp.diag(best - data["y"])
    return jnp.mean(jnp.sum((single - jnp.mean(single, axis=0)[None]) ** 2, axis=1))


@pytest.mark.parametrize("factor", [0.5, 0.1])
def test_expected_distance_to_the_solution_obeys_the_recursion(factor):
    data, start = regression(noise=1.0), jnp.array([3.0, -1.0])
    problem, n = Told(REGRESSION, 1), data["y"].size

    def targets(inner):
        """After one step, for each sample that it may draw."""
        rule = sso.Smoothness(1.0, factor=factor)
        solver = StochasticSSO(rule, inner, scope="full", safeguard=False)

        def after(row):
            key = jax.random.wrap_key_data(jnp.array([0, row], jnp.uint32))
            state = solver.init(problem, start, data, key)
            return data["X"] @ solver.step(problem, data, state)[0].trial

        return jnp.stack([after(row) for row in range(n)])

    # one sample in the batch, so L is that of its loss, and 1/n the strong convexity of the mean
    eta, mu = factor, 1 / n
    before = squared_distance((data["X"] @ start)[None], data)
    bound = (1 - mu * eta) * before + 2 * eta**2 * variance(data)
    exact, rough = targets(EXACT), targets(sso.GradientSteps(2, "lipschitz"))
    assert float(squared_distance(exact, data)) <= float(bound)
    # an inner error of ε, in the mean square, adds ε to the root
    epsilon = jnp.sqrt(jnp.mean(jnp.sum((rough - exact) ** 2, axis=1)))
    assert float(epsilon) > 1e-3
    assert float(jnp.sqrt(squared_distance(rough, data))) <= float(jnp.sqrt(bound) + epsilon)


def test_exponential_schedule_obeys_the_bound_of_the_theorem_and_a_constant_step_does_not():
    data, keys, kappa = regression(noise=0.5), jax.random.split(KEY, 40), 6.0  # L = 1, μ = 1/6
    start = squared_distance(jnp.zeros((1, 6)), data)
    rule = sso.Smoothness(1.0, factor=0.5)

    def bound(T):
        """exp(−T/κ) and σ²/T up to logarithms: the recursion, summed up."""
        shrink = T ** (-1 / T)
        forgotten = jnp.exp(-shrink * (T - 1) / (2 * kappa * jnp.log(T)))
        noise = 8 * (kappa * jnp.log(T) / (jnp.e * shrink)) ** 2 / T * variance(data)
        return forgotten * start + noise * jnp.exp(shrink / (2 * kappa * jnp.log(T)))

    def error(T, decay):
        solver = StochasticSSO(rule, EXACT, scope="full", decay=decay, safeguard=False)
        return float(squared_distance(final(solver, data, T, keys), data))

    horizons = np.array([1000.0, 4000.0, 16_000.0])
    measured = [error(int(T), sso.ExponentialDecay(T)) for T in horizons]
    for found, T in zip(measured, horizons, strict=True):
        assert found <= float(bound(T))
    constant = error(16_000, None)
    assert constant > float(bound(16_000.0)) and constant > 20 * measured[2]
    slope = np.polyfit(np.log(np.log(horizons) ** 2 / horizons), np.log(measured), 1)[0]
    assert slope == pytest.approx(1.0, abs=0.2)


def test_interpolation_converges_linearly_and_noise_to_a_floor():
    keys = jax.random.split(KEY, 20)
    constant = StochasticSSO(sso.Smoothness(1.0, factor=0.5), EXACT, scope="full")

    def error(noise, number):
        data = regression(noise)
        return float(squared_distance(final(constant, data, number, keys), data))

    assert error(0.0, 500) < 1e-20
    floor = error(0.5, 500)
    assert floor > 1e-2 and error(0.5, 2000) > floor / 3


def test_batch_scope_tends_to_the_mean_of_minimizers_and_full_scope_to_the_solution():
    # ½(θ − 1)² and ½(2θ + ½)²: minimizers 1 and −¼ with mean 3/8; of the sum 0
    data = {"X": jnp.array([[1.0], [2.0]]), "y": jnp.array([1.0, -0.5])}
    keys = jax.random.split(KEY, 100)
    means = {}
    for scope in ("batch", "full"):
        solver = StochasticSSO(
            sso.Smoothness(1.0), EXACT, scope=scope, decay=sso.InverseSquareRoot()
        )
        means[scope] = float(jnp.mean(final(solver, data, 2000, keys)[:, 0]))
    assert means["batch"] == pytest.approx(3 / 8, abs=0.03)
    assert means["full"] == pytest.approx(0.0, abs=0.01)


def test_scopes_agree_where_the_batch_is_everything():
    data = regression(noise=1.0)
    problem = sso.Minibatches(REGRESSION, 6)
    inner = sso.GradientSteps(4, "lipschitz")
    found = [
        jx.solve(
            problem,
            StochasticSSO(sso.Smoothness(1.0), inner, scope=scope),
            jnp.zeros(2),
            data,
            key=KEY,
            max_steps=10,
        )
        for scope in ("batch", "full")
    ]
    np.testing.assert_allclose(found[0].value, found[1].value, rtol=1e-10)
    whole = jx.solve(REGRESSION, SSO(sso.Smoothness(1.0), inner), jnp.zeros(2), data, max_steps=10)
    np.testing.assert_allclose(found[0].value, whole.value, rtol=1e-10)
    np.testing.assert_allclose(found[0].objective, whole.objective, rtol=1e-10)


# ---- step size and safeguard ----


def test_partial_batch_is_scaled_by_its_own_size():
    data = regression(noise=1.0)
    solver = StochasticSSO(sso.Smoothness(1.0), EXACT)
    state = solver.init(REGRESSION, jnp.zeros(2), data)
    for size in (6, 4, 2):
        part = jax.tree.map(lambda leaf, size=size: leaf[:size], data)
        fresh = solver.init(REGRESSION, jnp.zeros(2), part)
        fresh, _ = solver.step(REGRESSION, part, fresh)
        assert float(fresh.eta) == size
        # 1/L with the mean over the batch, and the exact solve: the fit of this batch
        np.testing.assert_allclose(
            fresh.trial, jnp.linalg.lstsq(part["X"], part["y"])[0], atol=1e-12
        )
    assert not bool(state.evaluated)


def test_safeguard_reduces_a_step_size_that_is_too_large_and_keeps_it_reduced():
    data = regression(noise=0.0, samples=40)
    problem = sso.Minibatches(REGRESSION, 5)
    safe = StochasticSSO(5 * 100.0, sso.GradientSteps(5))  # 1/L is 5

    def run(solver):
        return jx.solve(problem, solver, jnp.zeros(2), data, key=KEY, max_steps=300)

    found = run(safe)
    np.testing.assert_allclose(found.value, [1.0, 2.0], atol=1e-6)
    # what the loss of squares needs is 1/L; halving ends within a factor of two of it
    assert 2.5 <= float(found.state.solver.eta) <= 5.0 * (1 + 1e-9)
    counts = found.stats.counts
    assert int(counts.oracle) == 300 and 300 < int(counts.value) < 320
    bare = run(StochasticSSO(5 * 100.0, sso.GradientSteps(5), safeguard=False))
    assert int(bare.stats.counts.value) == 0
    assert not float(jnp.max(jnp.abs(bare.value - jnp.array([1.0, 2.0])))) < 1e-6


def test_estimated_step_size_and_armijo_train_an_interpolating_model():
    data = regression(noise=0.0, samples=40)
    problem = sso.Minibatches(REGRESSION, 5)
    for rule in (sso.EstimatedSmoothness(), sso.TargetArmijo()):
        solver = StochasticSSO(rule, sso.GradientSteps(5))
        found = jx.solve(problem, solver, jnp.zeros(2), data, key=KEY, max_steps=300)
        np.testing.assert_allclose(found.value, [1.0, 2.0], atol=1e-6)


# ---- sampling and streams ----


def test_epoch_without_replacement_meets_each_sample_once():
    problem = sso.Minibatches(REGRESSION, 4)
    epoch = jnp.concatenate([problem.rows(KEY, jnp.asarray(t), 12) for t in range(3)])
    np.testing.assert_array_equal(jnp.sort(epoch), jnp.arange(12))
    other = jnp.concatenate([problem.rows(KEY, jnp.asarray(t), 12) for t in range(3, 6)])
    np.testing.assert_array_equal(jnp.sort(other), jnp.arange(12))
    assert not bool(jnp.all(epoch == other))
    drawn = sso.Minibatches(REGRESSION, 500, replace=True).rows(KEY, jnp.asarray(0), 12)
    assert len(set(drawn.tolist())) == 12


def test_stream_of_minibatches_gives_the_iterates_of_the_sampler():
    data = regression(noise=0.3, samples=12)
    problem = sso.Minibatches(REGRESSION, 4)
    solver = StochasticSSO(
        sso.Smoothness(1.0), sso.GradientSteps(6), sso.DiagonalAdaGrad(samples=12)
    )
    sampled = jx.solve(problem, solver, jnp.zeros(2), data, key=KEY, max_steps=7)
    state, step = solver.init(REGRESSION, jnp.zeros(2), data), eqx.filter_jit(solver.step)
    for t in range(7):
        rows = problem.rows(KEY, jnp.asarray(t), 12)
        state, info = step(REGRESSION, problem.part(data, rows), state, rows)
    np.testing.assert_allclose(state.value, sampled.value, rtol=1e-12)
    np.testing.assert_allclose(state.metric, sampled.state.solver.metric, rtol=1e-12)
    assert int(info.counts.oracle) == 7
    with pytest.raises(ValueError, match="rows is None, expected the indices of the samples"):
        solver.step(REGRESSION, data, state)


def test_diagonal_adagrad_counts_a_repeated_sample_twice():
    metric, z = sso.DiagonalAdaGrad(samples=3), jnp.zeros(3)
    memory = metric.remember(metric.init(z), jnp.array([1.0, 2.0, 3.0]), jnp.array([1, 1, 0]))
    np.testing.assert_array_equal(memory, [9.0, 5.0, 0.0])
    data = regression(noise=0.0, samples=8)
    for scope in ("batch", "full"):
        solver = StochasticSSO(1.0, sso.GradientSteps(5), sso.DiagonalAdaGrad(), scope=scope)
        problem = sso.Minibatches(REGRESSION, 4, replace=True)
        found = jx.solve(problem, solver, jnp.zeros(2), data, key=KEY, max_steps=60)
        assert float(squares(data["X"] @ found.value, data)) < 0.1 * float(
            squares(jnp.zeros(8), data)
        )


def test_host_oracle_feeds_minibatches():
    def never(z, data):
        raise AssertionError("the loss must not be called")

    data = regression(noise=0.0, samples=12)
    problem = jx.ComposedMinimization(never, linear)
    solver = StochasticSSO(sso.Smoothness(1.0), sso.GradientSteps(20), safeguard=False)
    state = solver.init(problem, jnp.zeros(2), data)
    ask, tell = eqx.filter_jit(solver.ask), eqx.filter_jit(solver.tell)
    for t in range(30):
        rows = (4 * t + np.arange(4)) % 12
        part = {name: leaf[rows] for name, leaf in data.items()}
        error = np.asarray(ask(problem, part, state)) - np.asarray(part["y"])
        state, _ = tell(problem, part, state, np.mean(error**2) / 2, error / 4)
    np.testing.assert_allclose(state.trial, [1.0, 2.0], atol=1e-3)
    with pytest.raises(ValueError, match="safeguard is True, expected False, as it evaluates"):
        guarded = StochasticSSO(sso.Smoothness(1.0))
        guarded.tell(problem, data, guarded.init(problem, jnp.zeros(2), data), 1.0, data["y"])


def test_args_of_any_structure_through_take():
    data = {"X": regression(0.0)["X"], "y": regression(0.0)["y"], "scale": jnp.array(2.0)}
    problem = jx.ComposedMinimization(
        lambda z, d: jnp.mean((z - d["scale"] * d["y"]) ** 2) / 2, linear
    )

    def take(args, rows):
        return args | {"X": args["X"][rows], "y": args["y"][rows]}

    with pytest.raises(ValueError, match="expected arrays with a common leading axis of samples"):
        sso.Minibatches(problem, 2).count(data)
    minibatches = sso.Minibatches(problem, 2, take=take, samples=6)
    solver = StochasticSSO(sso.Smoothness(1.0), sso.GradientSteps(10), scope="full")
    found = jx.solve(minibatches, solver, jnp.zeros(2), data, key=KEY, max_steps=400)
    np.testing.assert_allclose(found.value, [2.0, 4.0], atol=1e-5)


def test_keys_of_a_stream_are_frozen_while_a_surrogate_is_reduced():
    """Dropout: one inner step is a gradient step with the mask of the oracle's call."""
    data = regression(noise=0.3, samples=6)

    def dropped(w, d):
        mask = jax.random.bernoulli(d["key"], 0.5, d["X"].shape).astype(w.dtype)
        return (d["X"] * mask) @ w

    problem = jx.ComposedMinimization(squares, dropped)
    solver = StochasticSSO(1.0, sso.GradientSteps(1, 0.2), safeguard=False)
    state = solver.init(problem, jnp.ones(2), data | {"key": KEY})
    step, w = eqx.filter_jit(solver.step), jnp.ones(2)
    for key in jax.random.split(KEY, 4):
        batch = data | {"key": key}
        state, info = step(problem, batch, state)
        assert float(info.objective) == pytest.approx(float(problem.objective(w, batch)[0]))
        w = w - 0.2 * jax.grad(lambda w, b=batch: problem.objective(w, b)[0])(w)
        np.testing.assert_allclose(state.trial, w, rtol=1e-12)


# ---- failures ----


def test_broken_sample_ends_the_solve_and_keeps_the_last_good_point():
    data = regression(noise=0.0, samples=12)
    data["y"] = data["y"].at[7].set(jnp.nan)
    problem = sso.Minibatches(REGRESSION, 3)
    solver = StochasticSSO(sso.Smoothness(1.0), sso.GradientSteps(3))
    key = next(k for k in map(jax.random.key, range(9)) if 7 not in problem.rows(k, 0, 12))
    found = jx.solve(problem, solver, jnp.zeros(2), data, key=key, max_steps=50)
    assert found.result == jx.RESULTS.nonfinite_step
    assert int(found.stats.steps) <= 4
    assert bool(jnp.all(jnp.isfinite(found.value))) and bool(jnp.isfinite(found.objective))
    data["y"] = jnp.full(12, jnp.nan)
    found = jx.solve(problem, solver, jnp.zeros(2), data, key=KEY, max_steps=50)
    assert found.result == jx.RESULTS.nonfinite_start
    np.testing.assert_array_equal(found.value, 0.0)
    # an empty batch has no mean
    state = solver.init(REGRESSION, jnp.zeros(2), regression(0.0, samples=0))
    _, info = solver.step(REGRESSION, regression(0.0, samples=0), state)
    assert info.failure == jx.RESULTS.nonfinite_start


def test_misuse_is_refused_in_one_sentence():
    data, problem = regression(0.0), sso.Minibatches(REGRESSION, 2)

    def go(solver, problem=problem, key=KEY):
        return jx.solve(problem, solver, jnp.zeros(2), data, key=key, max_steps=2)

    for call, kind, pattern in (
        (lambda: go(StochasticSSO(), key=None), ValueError, "key is None, expected a key"),
        (lambda: go(SSO()), TypeError, "SSO cannot solve a Minibatches"),
        (lambda: go(StochasticSSO(scope="full"), REGRESSION), ValueError, "scope is 'full' and"),
        (lambda: StochasticSSO(scope="all"), ValueError, "scope is 'all', expected"),
        (
            lambda: StochasticSSO(metric=sso.DiagonalHessian(), scope="full"),
            ValueError,
            "metric is DiagonalHessian, expected one that does not need the loss",
        ),
        (lambda: StochasticSSO(decay=0.5), TypeError, "decay is a float, expected a function"),
        (lambda: sso.Minibatches(REGRESSION, 0), ValueError, "size is 0, expected an integer"),
        (
            lambda: go(StochasticSSO(), sso.Minibatches(REGRESSION, 7)),
            ValueError,
            "size is 7, expected at most the 6 samples",
        ),
        (
            lambda: sso.Minibatches(jx.Minimization(lambda y, a: y), 1),
            TypeError,
            "problem is a Minimization, expected a ComposedMinimization",
        ),
    ):
        with pytest.raises(kind, match=pattern) as caught:
            call()
        assert "\n" not in str(caught.value)


# ---- transformations ----


def test_jit_vmap_and_resume_give_the_same_run():
    data = regression(noise=0.3, samples=12)
    problem = sso.Minibatches(REGRESSION, 4)
    solver = StochasticSSO(sso.Smoothness(1.0), sso.GradientSteps(6))

    def run(key, number=6, state=None):
        return jx.solve(problem, solver, jnp.zeros(2), data, key=key, max_steps=number, state=state)

    keys = jax.random.split(KEY, 3)
    loop = jnp.stack([run(key).value for key in keys])
    mapped = jax.jit(jax.vmap(lambda key: run(key).value))(keys)
    np.testing.assert_allclose(mapped, loop, rtol=1e-12)
    assert not bool(jnp.all(loop[0] == loop[1]))
    half, whole = run(KEY, 3), run(KEY, 6)
    buffer = io.BytesIO()
    eqx.tree_serialise_leaves(buffer, half.state)
    buffer.seek(0)
    saved = eqx.tree_deserialise_leaves(buffer, jax.tree.map(jnp.zeros_like, half.state))
    resumed = run(KEY, 3, saved)
    np.testing.assert_array_equal(resumed.value, whole.value)
    np.testing.assert_array_equal(resumed.state.solver.trial, whole.state.solver.trial)


def test_solution_is_differentiable_and_exports():
    data = regression(noise=0.0, samples=12)
    problem = sso.Minibatches(REGRESSION, 4)
    solver = StochasticSSO(sso.Smoothness(1.0), EXACT)

    def fitted(y):
        init = jnp.zeros(2, y.dtype)
        args = {"X": data["X"].astype(y.dtype), "y": y}
        return jx.solve(problem, solver, init, args, key=KEY, max_steps=20).value

    np.testing.assert_allclose(jax.jacrev(fitted)(data["y"]), jnp.linalg.pinv(data["X"]), atol=1e-9)
    shape = jax.ShapeDtypeStruct((12,), jnp.float32)
    for platform in ("cpu", "cuda", "tpu"):
        gradient = jax.grad(lambda y: jnp.sum(fitted(y) ** 2))
        exported = export.export(jax.jit(gradient), platforms=[platform])(shape)
        assert "stablehlo.while" in exported.mlir_module()


def test_sharded_samples_give_the_iterates_of_one_device():
    data = regression(noise=0.3, samples=48)
    mesh = jax.make_mesh((8,), ("samples",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(data, NamedSharding(mesh, PartitionSpec("samples")))
    problem = sso.Minibatches(REGRESSION, 8)
    solver = StochasticSSO(sso.Smoothness(1.0), sso.GradientSteps(4), scope="full")
    one, many = (
        jx.solve(problem, solver, jnp.zeros(2), d, key=KEY, max_steps=12) for d in (data, sharded)
    )
    np.testing.assert_allclose(many.value, one.value, rtol=1e-10)
