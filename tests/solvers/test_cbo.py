"""Consensus-based optimization: the published facts, corner cases and transformations."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_ext as jx
from jaxopt_ext.solvers import CBO, cbo, cbo_noise

KEY = jax.random.key(0)
BOX = cbo.Uniform(-3.0, 3.0)


def sphere(y, shift):
    return jnp.sum((y - shift) ** 2)


def rastrigin(y, shift):
    z = y - shift
    return jnp.sum(z**2 - 10 * jnp.cos(2 * jnp.pi * z) + 10)


def ackley(y, shift):
    z = y - shift
    root = jnp.sqrt(jnp.mean(z**2))
    return 20 - 20 * jnp.exp(-root / 5) + jnp.e - jnp.exp(jnp.mean(jnp.cos(2 * jnp.pi * z)))


def minimize(fun, size, solver, args, key=KEY, **options):
    problem = jx.Minimization(fun)
    return jx.solve(problem, solver, jnp.zeros(size), args, key=key, **options)


def minimum_found(fun, solver, runs, size=20, **options):
    """Share of runs within 0.25 of the minimizer, from `runs` keys with a shift each."""

    def run(key):
        shift = jax.random.uniform(jax.random.fold_in(key, 1), (size,), jnp.float32, -2.0, 2.0)
        init = jnp.zeros(size, jnp.float32)
        value = jx.solve(jx.Minimization(fun), solver, init, shift, key=key, **options).value
        return jnp.max(jnp.abs(value - shift)) < 0.25

    return float(jnp.mean(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(1), runs))))


# ---- the consensus ----


def test_laplace_principle_the_consensus_tends_to_the_minimizer_as_alpha_grows():
    x = jax.random.uniform(KEY, (200_000, 1), minval=-3.0, maxval=5.0)
    energies = x[:, 0] ** 2 - 10 * jnp.cos(2 * jnp.pi * x[:, 0]) + 10
    errors = [
        float(abs((cbo.weights(energies, jnp.array(a)) @ x)[0])) for a in (1.0, 10.0, 1e2, 1e3)
    ]
    assert errors[1] < 1e-2 and errors[2] < 1e-3 and errors[3] < 1e-3
    best = x[jnp.argmin(energies)]
    for alpha in (1e15, jnp.inf):
        np.testing.assert_allclose(cbo.weights(energies, jnp.array(alpha)) @ x, best, atol=1e-12)
    # the free energy lies within log(N)/α above the minimum
    for alpha in (0.1, 1.0, 10.0):
        free = -jax.nn.logsumexp(-alpha * energies, b=1 / energies.size) / alpha
        assert float(jnp.min(energies)) <= float(free)
        assert float(free) <= float(jnp.min(energies)) + np.log(energies.size) / alpha


def test_weights_are_safe_for_any_alpha_and_energy():
    inf, nan = jnp.inf, jnp.nan
    cases = [
        ([1.0, 2.0, nan, inf], 0.0, [0.5, 0.5, 0, 0]),
        ([1.0, 2.0, nan, inf], inf, [1, 0, 0, 0]),
        ([1.0, 1.0, 2.0, 3.0], 1e308, [0.5, 0.5, 0, 0]),
        ([-inf, 2.0, -inf, 3.0], 1.0, [0.5, 0, 0.5, 0]),
        ([nan, inf, nan, nan], 1.0, [0, 0, 0, 0]),
        ([-1e300, 1e300, 0.0, 0.0], 1e5, [1, 0, 0, 0]),
    ]
    for energies, alpha, expected in cases:
        np.testing.assert_array_equal(cbo.weights(jnp.array(energies), jnp.array(alpha)), expected)


def test_weights_keep_their_precision_under_an_offset_of_the_objective():
    # a power of two, so that float32 holds the sums exactly
    energies = jnp.arange(64) / 64
    exact = np.exp(-50 * np.asarray(energies))
    exact /= exact.sum()
    ours = cbo.weights(jnp.float32(2**17) + energies.astype(jnp.float32), jnp.float32(50))
    np.testing.assert_allclose(ours, exact, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_alpha_is_found_from_the_effective_sample_size(scale):
    energies = scale * jax.random.uniform(KEY, (100,)).at[3].set(jnp.nan)
    for share in (0.1, 0.5):
        alpha = cbo.EffectiveSampleSize(share).at(energies)
        ess = cbo.effective_sample_size(cbo.weights(energies, alpha))
        assert float(ess) == pytest.approx(share * 99, rel=1e-6)
    equal = cbo.EffectiveSampleSize(0.5, limit=1e6).at(jnp.ones(5))
    assert float(equal) == 1e6


# ---- random numbers ----


def test_threefry_equals_the_published_test_vectors():
    def run(key, counter):
        key, counter = (tuple(map(jnp.uint32, pair)) for pair in (key, counter))
        return tuple(int(word) for word in cbo_noise.threefry(key, *counter))

    ones, pi = (0xFFFFFFFF,) * 2, ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3))
    assert run((0, 0), (0, 0)) == (0x6B200159, 0x99BA4EFE)
    assert run(ones, ones) == (0x1CB996FC, 0xBB002BE7)
    assert run(*pi) == (0xC4923A9C, 0x483DF7A0)


def test_words_change_in_half_of_their_bits_with_any_bit_of_position_or_key():
    rng = np.random.default_rng(0)
    counter = jnp.arange(4096, dtype=jnp.uint32)
    keys = jnp.asarray(rng.integers(0, 2**32, (4, 2), dtype=np.uint32))

    def flipped(a, b):
        """Share of the words in which each of the 32 bits differs."""
        return np.unpackbits(np.asarray(a ^ b).view(np.uint8)).reshape(-1, 32).mean(0)

    for first, second in keys:
        plain = cbo_noise.hashed((first, second), counter)
        assert len(set(np.asarray(plain).tolist())) == counter.size
        for bit in (jnp.uint32(1 << i) for i in range(32)):
            for other in (
                cbo_noise.hashed((first, second), counter ^ bit),
                cbo_noise.hashed((first ^ bit, second), counter),
                cbo_noise.hashed((first, second ^ bit), counter),
            ):
                # the standard deviation over 4096 words is 0.008
                assert np.abs(flipped(plain, other) - 0.5).max() < 0.1


def test_normal_increments_follow_the_normal_distribution_into_the_tails():
    x = np.sort(np.asarray(cbo.gaussian(jax.random.key(3), (2000, 1000)), float).ravel())
    exact = np.asarray(jax.scipy.stats.norm.cdf(x))
    # Kolmogorov and Smirnov at the level 1e-3
    assert np.abs(exact - (np.arange(x.size) + 0.5) / x.size).max() < 1.95 / np.sqrt(x.size)
    for bound in (3.0, 4.0):
        expected = 2 * x.size * float(jax.scipy.stats.norm.sf(bound))
        assert abs(np.sum(np.abs(x) > bound) - expected) < 4 * np.sqrt(expected)


def test_folding_a_number_into_a_key_is_that_of_jax():
    for number in (0, 7, 2**31):
        ours = cbo_noise.fold(KEY, jnp.uint32(number))
        theirs = jax.random.fold_in(KEY, jnp.uint32(number))
        assert jax.random.key_data(ours).tolist() == jax.random.key_data(theirs).tolist()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize(
    ("increments", "kurtosis"),
    [(cbo.gaussian, 3.0), (cbo.uniform, 1.8), (cbo.rademacher, 1.0), (cbo.StudentT(10.0), 4.0)],
    ids=["gaussian", "uniform", "rademacher", "student"],
)
def test_increments_have_the_moments_that_the_scheme_needs(impl, increments, kurtosis):
    x = np.asarray(increments(jax.random.key(5, impl=impl), (40_001, 5)), float)
    assert x.shape == (40_001, 5)
    n = x.size
    assert abs(x.mean()) < 5 / np.sqrt(n)
    assert abs((x**2).mean() - 1) < 5 * np.sqrt((kurtosis - 1) / n) + 1e-12
    assert (x**4).mean() == pytest.approx(kurtosis, rel=0.1)
    correlation = np.corrcoef(x.T) - np.eye(5)
    assert np.abs(correlation).max() < 5 / np.sqrt(40_001)
    serial = np.mean(x[1:] * x[:-1])
    assert abs(serial) < 5 / np.sqrt(n)


# ---- theorems on the dynamics ----


def advanced(solver, state):
    """One step of the swarm with the consensus held at 0, by a particle that lies there."""
    pinned = eqx.tree_at(lambda s: s.swarm, state, state.swarm.at[0].set(0.0))
    energies = jnp.ones(solver.particles).at[0].set(0.0)
    return solver.tell(pinned, energies)[0]


def frozen(noise, sigma, size, dt, steps, particles=400):
    """log-growth per unit time of the typical distance when the consensus is held fixed."""
    solver = CBO(noise=noise, sigma=sigma, dt=dt, particles=particles, alpha=jnp.inf)
    state = solver.init(None, jnp.zeros(size), None, KEY)

    def body(state, _):
        typical = jnp.mean(jnp.log(jnp.max(jnp.abs(state.swarm[1:]), axis=1)))
        return advanced(solver, state), typical

    _, typical = jax.lax.scan(body, state, None, length=steps)
    return float(typical[-1] - typical[0]) / (steps * dt)


def test_dimension_4_isotropic_swarm_contracts_below_the_almost_sure_threshold_only():
    for dt, threshold in ((0.01, 0.996), (0.1, 0.924)):
        steps = int(40 / dt)
        assert frozen(cbo.Isotropic(), 0.9 * threshold, 4, dt, steps) < 0
        assert frozen(cbo.Isotropic(), 1.1 * threshold, 4, dt, steps) > 0


def test_anisotropic_contraction_does_not_depend_on_the_dimension():
    def rate(size):
        solver = CBO(sigma=0.5, particles=4000, alpha=jnp.inf)
        start = solver.init(None, jnp.zeros(size), None, KEY)

        def body(state, _):
            return advanced(solver, state), jnp.mean(state.swarm**2)

        _, square = jax.lax.scan(body, start, None, length=100)
        return float(jnp.log(square[0] / square[-1])) / 0.99

    # −log((1 − λdt)² + σ²dt)/dt, in any dimension
    exact = -np.log(0.99**2 + 0.25 * 0.01) / 0.01
    for size in (1, 5, 40):
        assert rate(size) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("amplitude", [0.0, 2.5], ids=["convex", "rastrigin"])
@pytest.mark.parametrize("noise", [cbo.Isotropic(), cbo.Anisotropic()], ids=["iso", "aniso"])
def test_mean_square_error_decays_at_the_stated_rate(amplitude, noise):
    size, sigma, dt, particles, steps = 4, 0.32, 0.01, 20_000, 150
    shift = jnp.array([0.3, -0.2, 0.5, 0.1])

    def fun(y, args):
        z = y - shift
        return jnp.sum(z**2 + amplitude * (1 - jnp.cos(2 * jnp.pi * z)))

    solver = CBO(
        noise=noise, sigma=sigma, dt=dt, alpha=1e15, particles=particles, start=cbo.Normal(1.5)
    )
    state = solver.init(None, jnp.ones(size), None, KEY)

    def body(state, _):
        error = jnp.mean(jnp.sum((state.swarm - shift[None]) ** 2, axis=1))
        state, _ = solver.tell(state, jax.vmap(lambda y: fun(y, None))(state.swarm))
        return state, error

    _, error = jax.jit(lambda s: jax.lax.scan(body, s, None, length=steps))(state)
    rate = float(jnp.log(error[0] / error[-1])) / ((steps - 1) * dt)
    spread = size if isinstance(noise, cbo.Isotropic) else 1
    stated = -np.log((1 - dt) ** 2 + spread * sigma**2 * dt) / dt
    assert rate == pytest.approx(stated, rel=0.1)


# ---- success on shifted problems ----


def test_success_rates_at_the_settings_of_the_literature():
    rate = minimum_found(rastrigin, CBO(start=BOX, sigma=8.5), 40)
    assert rate >= 0.7  # CBXPy: 0.83 to 0.87 of 100
    assert minimum_found(ackley, CBO(start=BOX, sigma=8.5), 40) >= 0.95


def test_annealed_hopping_solves_the_rotated_problem_that_anisotropic_noise_fails_on():
    """100 000 evaluations each in 20 dimensions; hopping does not know the axes."""
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(20, 20)))[0].astype(np.float32)

    def rotated(y, shift):
        return rastrigin(turn @ (y - shift), jnp.zeros_like(y))

    width = cbo.Geometric(2.0, 0.005 ** (1 / 200), 0.01)
    alpha = cbo.EffectiveSampleSize(0.3)
    hopping = cbo.consensus_hopping(width, alpha, particles=500, start=BOX, rtol=0.0, atol=0.0)
    assert minimum_found(rotated, hopping, 30, max_steps=200) >= 0.5
    # the same on the axes, where anisotropic noise is at home
    assert minimum_found(rastrigin, hopping, 30, max_steps=200) >= 0.5
    default = CBO(start=BOX, rtol=0.0, atol=0.0)
    assert minimum_found(rastrigin, default, 30, max_steps=1000) >= 0.5
    assert minimum_found(rotated, default, 30, max_steps=1000) == 0.0


# ---- solution, counts, stopping ----


def test_solution_is_the_best_particle_and_counts_every_evaluation():
    seen = []

    def fun(y, shift):
        jax.debug.callback(lambda e: seen.append(float(e)), sphere(y, shift), ordered=False)
        return sphere(y, shift)

    found = minimize(fun, 3, CBO(particles=7), jnp.ones(3), max_steps=5)
    jax.effects_barrier()
    assert len(seen) == int(found.stats.counts.value) == 35
    assert float(found.objective) == pytest.approx(min(seen), rel=1e-15)
    assert int(found.stats.counts.gradient) == 0
    assert bool(jnp.isnan(found.optimality))
    assert found.result == jx.RESULTS.max_steps_reached


def test_run_ends_successfully_when_the_swarm_agrees():
    found = minimize(sphere, 4, CBO(sigma=5.0, atol=1e-4), jnp.ones(4), max_steps=5000).check()
    state = found.state.solver
    assert float(state.spread) < 2e-4
    np.testing.assert_allclose(found.value, jnp.ones(4), atol=0.01)
    np.testing.assert_allclose(state.consensus, found.value, atol=0.01)
    loose = minimize(sphere, 4, CBO(sigma=5.0, atol=1e-2), jnp.ones(4), max_steps=5000).check()
    assert int(loose.stats.steps) < int(found.stats.steps)


def test_criteria_of_the_driver_work_on_a_swarm():
    found = minimize(sphere, 2, CBO(), jnp.ones(2), stop=jx.Evaluations(500))
    assert int(found.stats.counts.value) == 500
    found = minimize(sphere, 2, CBO(), jnp.ones(2), stop=jx.Target(1e-2)).check()
    assert float(found.objective) <= 1e-2
    found = minimize(sphere, 2, CBO(sigma=0.5), jnp.ones(2), stop=jx.Stalled(20))
    assert found.result == jx.RESULTS.stagnated
    assert int(found.stats.steps) < 1000


def test_values_that_are_not_finite_get_no_weight_and_are_counted():
    def fun(y, args):
        value = sphere(y, 0.7)
        value = jnp.where(y[0] < -0.5, jnp.nan, value)
        return jnp.where(y[1] < -0.5, jnp.inf, value)

    found = minimize(fun, 2, CBO(start=BOX), None, max_steps=300)
    np.testing.assert_allclose(found.value, 0.7, atol=1e-3)
    assert int(found.state.solver.nonfinite) > 20
    assert bool(jnp.all(jnp.isfinite(found.state.solver.swarm)))


def test_objective_that_is_never_finite_and_one_that_is_unbounded_are_named():
    never = minimize(lambda y, args: jnp.sum(y) * jnp.nan, 2, CBO(), None)
    assert never.result == jx.RESULTS.nonfinite_start
    unbounded = minimize(lambda y, args: jnp.log(jnp.maximum(y[0], 0)), 2, CBO(), None)
    assert unbounded.result == jx.RESULTS.diverged
    assert bool(jnp.all(jnp.isfinite(unbounded.value)))


def test_swarm_that_diverges_stays_finite():
    # isotropic noise far above its threshold, in float32
    solver = CBO(noise=cbo.Isotropic(), sigma=8.0)
    init, shift = jnp.zeros(10, jnp.float32), jnp.ones(10, jnp.float32)
    found = jx.solve(jx.Minimization(sphere), solver, init, shift, key=KEY)
    assert bool(jnp.all(jnp.isfinite(found.state.solver.swarm)))
    assert bool(jnp.isfinite(found.objective))
    assert found.result == jx.RESULTS.diverged


# ---- starts, PyTrees, dtypes, transformations ----


def test_starts_fill_what_they_say():
    value = {"a": jnp.zeros(3), "b": jnp.array(5.0)}
    box = cbo.Uniform({"a": jnp.array([0.0, 1.0, 2.0]), "b": -1.0}, 4.0)(KEY, value, 500)
    assert box["a"].shape == (500, 3) and box["b"].shape == (500,)
    assert bool(jnp.all((box["a"] >= jnp.arange(3.0)[None]) & (box["a"] < 4)))
    assert float(jnp.min(box["b"])) < -0.9 and float(jnp.max(box["b"])) > 3.9
    latin = cbo.Uniform(0.0, 1.0, design="latin")(KEY, jnp.zeros(4), 50)
    cells = jnp.sort(jnp.floor(latin * 50), axis=0)
    np.testing.assert_array_equal(cells, jnp.broadcast_to(jnp.arange(50.0)[:, None], (50, 4)))
    normal = cbo.Normal(2.0)(KEY, value, 2000)
    assert float(jnp.mean(normal["b"])) == pytest.approx(5.0, abs=0.2)
    assert float(jnp.std(normal["a"])) == pytest.approx(2.0, rel=0.05)


def test_particles_of_the_user_are_the_first_to_be_evaluated():
    positions = jax.random.normal(KEY, (6, 2))
    solver = CBO(particles=6, start=cbo.Particles(positions))
    found = minimize(sphere, 2, solver, jnp.zeros(2), max_steps=1)
    assert float(found.objective) == pytest.approx(float(jnp.min(jnp.sum(positions**2, 1))))


def test_variables_may_be_a_tree_and_float32_stays_float32():
    def fun(y, args):
        return jnp.sum((y["a"] - 1) ** 2) + (y["b"] + 2) ** 2

    init = {"a": jnp.zeros((2, 2), jnp.float32), "b": jnp.zeros((), jnp.float32)}
    found = jx.solve(jx.Minimization(fun), CBO(sigma=5.0), init, key=KEY, max_steps=3000).check()
    np.testing.assert_allclose(found.value["a"], 1.0, atol=1e-2)
    np.testing.assert_allclose(found.value["b"], -2.0, atol=1e-2)
    state = found.state.solver
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}
    assert solver_particles(CBO(sigma=3.0), state)["a"].shape == (100, 2, 2)


def solver_particles(solver, state):
    return solver.ask(state)


def test_ask_and_tell_on_the_host_equal_the_compiled_solve():
    solver, shift = CBO(particles=10), jnp.ones(3)
    found = minimize(sphere, 3, solver, shift, max_steps=4)
    state = solver.init(None, jnp.zeros(3), None, KEY)
    tell = jax.jit(solver.tell)
    for _ in range(4):
        particles = np.asarray(solver.ask(state))
        state, info = tell(state, np.sum((particles - 1.0) ** 2, axis=1))
    np.testing.assert_allclose(state.value, found.value, rtol=1e-12)
    np.testing.assert_allclose(state.swarm, found.state.solver.swarm, rtol=1e-10)
    assert int(info.counts.value) == 40


def test_runs_are_reproducible_and_independent_under_vmap():
    def run(key):
        return minimize(sphere, 2, CBO(particles=20), jnp.ones(2), key=key, max_steps=20)

    keys = jax.random.split(KEY, 3)
    mapped = jax.jit(jax.vmap(run))(keys)
    for i in range(3):
        one, again = run(keys[i]), run(keys[i])
        np.testing.assert_array_equal(one.value, again.value)
        np.testing.assert_allclose(mapped.value[i], one.value, rtol=1e-9)
    assert len({float(x) for x in mapped.objective}) == 3


def test_kinds_of_keys():
    for key in (jax.random.PRNGKey(3), jax.random.key(3, impl="rbg")):
        found = minimize(sphere, 2, CBO(), jnp.ones(2), key=key, max_steps=500)
        assert float(found.objective) < 1e-3
    typed = minimize(sphere, 2, CBO(), jnp.ones(2), key=jax.random.key(3), max_steps=5)
    legacy = minimize(sphere, 2, CBO(), jnp.ones(2), key=jax.random.PRNGKey(3), max_steps=5)
    np.testing.assert_array_equal(typed.value, legacy.value)
    with pytest.raises(ValueError, match="CBO is a random method: key is None"):
        minimize(sphere, 2, CBO(), jnp.ones(2), key=None)


# ---- bad input ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CBO(particles=1), "particles is 1, expected an integer >= 2"),
        (lambda: CBO(drift=0.0), "drift is 0, expected a number > 0"),
        (lambda: CBO(sigma=-1.0), "sigma is -1, expected a number > 0"),
        (lambda: CBO(dt=0.0), "dt is 0, expected a number > 0"),
        (lambda: CBO(drift=3.0, dt=1.0), r"drift \* dt is 3, expected a number < 2"),
        (lambda: CBO(alpha=-1.0), "alpha is -1, expected a number >= 0"),
        (lambda: cbo.Uniform(1.0, 1.0), "expected finite bounds with lower < upper"),
        (lambda: cbo.Uniform(0.0, jnp.inf), "expected finite bounds with lower < upper"),
        (lambda: cbo.Uniform({"a": 0.0}, {"a": -1.0}), "expected finite bounds with lower < upper"),
        (lambda: cbo.Normal(0.0), "scale is 0, expected a number > 0"),
        (lambda: cbo.Particles(jnp.ones((5, 2))), "positions are all equal"),
        (lambda: cbo.Isotropic(bound=0.0), "bound is 0, expected a number > 0"),
        (lambda: cbo.EffectiveSampleSize(1.0), "share is 1, expected a number > 0 and < 1"),
        (lambda: cbo.StudentT(2.0), "degrees is 2, expected a number > 2"),
        (lambda: cbo.Geometric(0.0, 1.0, 1.0), "initial is 0, expected a number > 0"),
    ],
)
def test_settings_outside_their_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_settings_of_the_wrong_type_are_refused():
    with pytest.raises(TypeError, match=r"CBO has no setting 'sigam' .did you mean 'sigma'"):
        CBO(sigam=1.0)
    with pytest.raises(TypeError, match="noise is a str, expected a function"):
        CBO(noise="isotropic")
    with pytest.raises(ValueError, match="one entry per particle, each like init"):
        solver = CBO(particles=5, start=cbo.Particles(jnp.arange(8.0).reshape(4, 2)))
        minimize(sphere, 2, solver, jnp.zeros(2))
    with pytest.raises(TypeError, match="CBO cannot solve a FixedPoint"):
        jx.solve(jx.FixedPoint(lambda y, a: y), CBO(), jnp.zeros(2), key=KEY)
