"""Variants of consensus-based optimization: their published facts, and what they add to CBO."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_ext as jx
from jaxopt_ext import implicit, solvers
from jaxopt_ext.solvers import CBO, cbo
from jaxopt_ext.solvers.cbo_pieces import shuffled

KEY = jax.random.key(0)


def sphere(y, shift):
    return jnp.sum((y - shift) ** 2)


def run(fun, solver, init, args=None, key=KEY, **options):
    return jx.solve(jx.Minimization(fun), solver, init, args, key=key, **options)


def moved(solver, fun, value, steps=1, key=KEY):
    """The states of a swarm, from ask and tell."""
    states = [solver.init(None, value, None, key)]
    step = jax.jit(lambda state: solver.tell(state, jax.vmap(fun)(solver.ask(state)))[0])
    for _ in range(steps):
        states.append(step(states[-1]))
    return states


# ---- consensus hopping ----


def hop(fun, x, width, alpha, particles, key=KEY):
    solver = cbo.consensus_hopping(width, alpha, particles)
    return moved(solver, fun, jnp.asarray(x), key=key)[1].consensus


def test_hop_on_a_quadratic_is_division_by_one_plus_tau():
    for alpha in (1.0, 10.0, 100.0):
        tau = alpha * 0.3**2
        found = hop(lambda z: 1.7 * z**2 / 2, 2.0, 0.3, alpha, 200_000)
        # the hop is α·width·f' = up to 100 widths: keep to what the sample can reach
        if alpha * 0.3 * 1.7 * 2 / (1 + 1.7 * tau) < 3:
            assert float(found) == pytest.approx(2.0 / (1 + 1.7 * tau), abs=5e-3)
    assert float(hop(lambda z: z**2 / 2, 0.5, 0.3, 100.0, 200_000)) == pytest.approx(
        0.5 / (1 + 9.0), abs=5e-3
    )


def test_sampling_error_of_a_hop_falls_as_one_over_the_root_of_the_number():
    keys = jax.random.split(KEY, 200)

    def spread(particles):
        hops = jax.vmap(lambda k: hop(lambda z: z**2 / 2, 1.0, 0.5, 2.0, particles, k))(keys)
        return float(jnp.std(hops))

    assert np.log(spread(100) / spread(10_000)) / np.log(100) == pytest.approx(0.5, abs=0.06)


def test_hop_is_a_gradient_step_up_to_second_order_in_tau():
    def fun(z):
        return jnp.log(jnp.cosh(z)) + z**2 / 4

    x = jnp.array(1.0)
    errors = []
    for alpha in (10.0, 20.0, 40.0):
        tau = alpha * 0.05**2
        found = hop(fun, x, 0.05, alpha, 2_000_000)
        errors.append(float(jnp.abs(found - (x - tau * jax.grad(fun)(x)))))
    slopes = np.log2(np.array(errors[1:]) / np.array(errors[:-1]))
    np.testing.assert_allclose(slopes, 2.0, atol=0.25)


def test_hop_tends_to_the_proximal_point_as_alpha_grows_at_fixed_tau():
    def fun(z):
        return z**4 / 4

    tau = 0.5
    roots = np.roots([tau, 0, 1, -1])  # y + τ y³ = 1
    prox = float(roots[np.isreal(roots)][0].real)
    # the error is f'''(y) / (2 α H²) with H = 1/τ + f''(y)
    constant = 6 * prox / (2 * (1 / tau + 3 * prox**2) ** 2)
    for alpha in (8.0, 32.0):
        found = hop(fun, 1.0, np.sqrt(tau / alpha), alpha, 2_000_000)
        assert alpha * abs(float(found) - prox) == pytest.approx(constant, rel=0.1)


def test_path_of_consensus_hopping_stays_near_gradient_descent():
    def well(y, args=None):
        return (y[0] ** 2 - 1) ** 2 / 4 + y[1] ** 2 / 2 + y[0] * y[1] / 4

    tau, width = 0.05, 0.05
    solver = cbo.consensus_hopping(width, tau / width**2, particles=2000)
    points, x = [], jnp.array([0.3, 1.0])
    for state in moved(solver, well, x, steps=40)[1:]:
        x = x - tau * jax.grad(well)(x)
        points.append(float(jnp.max(jnp.abs(state.consensus - x))))
    assert max(points) < 0.03  # both have moved by more than 0.5


# ---- the authors' benchmark of the paper on consensus hopping ----


def grand_canyon(y, args=None):
    a, b = y[0], y[1]
    u = b - ((a - 1) * (a - 4) ** 2 / 8 + 2)
    v = -a - 1.6 * b
    bumps = 1.1625 * ((1 - jnp.cos(0.75 * jnp.pi * a)) + (1 - jnp.cos(0.75 * jnp.pi * b)))
    gap = 4 * jnp.exp(1 - 2 * u**4) * jnp.maximum((1 - jnp.exp(-9 * v**2)) * jnp.sign(v), 0)
    valley = 25 * (1 - jnp.exp(-1.4 * u**2 * jnp.exp(-0.002 * a**4)))
    return valley + 0.4 * a**2 + 0.2 * b**2 + bumps + gap


def final_distance(solver, runs=30, steps=250):
    def one(key):
        found = run(grand_canyon, solver, jnp.array([8.0, 8.0]), key=key, max_steps=steps)
        return jnp.linalg.norm(found.state.solver.consensus)

    return jax.jit(jax.vmap(one))(jax.random.split(KEY, runs))


def test_cbo_and_consensus_hopping_cross_the_grand_canyon():
    swarm = CBO(200, cbo.Normal(0.5), sigma=1.6, alpha=100.0, noise=cbo.Isotropic())
    assert float(jnp.mean(final_distance(swarm) < 0.25)) >= 0.9
    hopping = cbo.consensus_hopping(0.7, 100.0, 200)
    assert float(jnp.mean(final_distance(hopping) < 0.5)) >= 0.85


# ---- noise ----


def test_truncated_noise_succeeds_where_isotropic_noise_diverges():
    def rastrigin(y, args):
        return jnp.sum(y**2 + 2.5 * (1 - jnp.cos(2 * jnp.pi * y)))

    def share(bound):
        solver = cbo.truncated_cbo(bound, 1.5, start=cbo.Normal(44.7))

        def one(key):
            state = run(rastrigin, solver, jnp.full(4, 5.0), key=key, max_steps=5000).state.solver
            return rastrigin(state.consensus, None) < 0.8

        return float(jnp.mean(jax.jit(jax.vmap(one))(jax.random.split(KEY, 20))))

    assert share(1.0) >= 0.9
    assert share(jnp.inf) <= 0.1


def test_covariance_noise_has_the_covariance_of_the_swarm():
    factor = jnp.array([[2.0, 0.0], [1.5, 0.1]])
    distance = jax.random.normal(KEY, (50, 2)) @ factor.T
    weight = jnp.full(50, 1 / 50)
    expected = distance.T @ distance / 50
    draws = jax.random.normal(jax.random.key(1), (20_000, 2))
    noise = cbo.Covariance(0.0)(distance, draws[:50], weight)
    root = jnp.linalg.lstsq(draws[:50], noise)[0]  # the linear map that it applied
    np.testing.assert_allclose(root.T @ root, expected, rtol=1e-6)
    collapsed = cbo.Covariance()(jnp.zeros((50, 2)), draws[:50], weight)
    np.testing.assert_array_equal(collapsed, 0.0)


def test_consensus_based_sampling_samples_a_gaussian():
    hessian = jnp.array([[2.0, 0.8], [0.8, 1.0]])
    mean = jnp.array([1.0, -2.0])

    def fun(y, args):
        return (y - mean) @ hessian @ (y - mean) / 2

    solver = cbo.consensus_based_sampling(alpha=1.0, dt=0.5, particles=4000)
    sample = []
    state = None
    for _ in range(10):
        found = run(fun, solver, jnp.zeros(2), state=state, max_steps=20)
        state = found.state
        sample.append(solver.ask(state.solver))
    sample = jnp.concatenate(sample[1:])
    np.testing.assert_allclose(jnp.mean(sample, 0), mean, atol=0.1)
    np.testing.assert_allclose(jnp.cov(sample.T) @ hessian, jnp.eye(2), atol=0.12)


def test_jumps_happen_at_their_rate_and_have_mean_zero():
    jumps = cbo.Jumps(rate=5.0, scale=0.5)
    distance = jnp.ones((200_000, 2))
    change = jumps.displacement(KEY, jnp.array(0), jnp.array(0.1), distance)
    happened = jnp.mean(change[:, 0] != 0)
    assert float(happened) == pytest.approx(1 - np.exp(-0.5), abs=0.005)
    assert float(jnp.mean(change)) == pytest.approx(0.0, abs=0.005)
    assert float(jnp.std(change[change != 0])) == pytest.approx(0.5, rel=0.01)
    found = run(sphere, CBO(sigma=3.0, jumps=jumps), jnp.zeros(2), jnp.ones(2), max_steps=300)
    assert float(found.objective) < 1e-2


# ---- schedules ----


def test_schedules_of_optax_drive_alpha_and_sigma():
    ours = CBO(particles=20, alpha=cbo.Geometric(1.0, 1.05, 1e5))
    theirs = CBO(particles=20, alpha=optax.exponential_decay(1.0, 1, 1.05, end_value=1e5))
    a = run(sphere, ours, jnp.zeros(2), jnp.ones(2), max_steps=30)
    b = run(sphere, theirs, jnp.zeros(2), jnp.ones(2), max_steps=30)
    np.testing.assert_allclose(a.value, b.value, rtol=1e-6)
    assert float(a.state.solver.alpha) == pytest.approx(1.05**29)
    silenced = CBO(particles=20, sigma=optax.linear_schedule(8.0, 1e-12, 1))
    _, before, after = moved(silenced, lambda y: sphere(y, 1.0), jnp.zeros(2), 2)
    drifted = before.swarm - 0.01 * (before.swarm - after.consensus[None])
    np.testing.assert_allclose(after.swarm, drifted, atol=1e-10)


def test_effective_sample_size_makes_the_path_independent_of_the_scale_of_the_objective():
    solver = CBO(particles=50, alpha=cbo.EffectiveSampleSize(0.3))
    a = moved(solver, lambda y: sphere(y, 1.0), jnp.zeros(3), 10)[-1]
    b = moved(solver, lambda y: 1e6 * sphere(y, 1.0) + 5.0, jnp.zeros(3), 10)[-1]
    np.testing.assert_allclose(a.swarm, b.swarm, rtol=1e-5)


# ---- memory, gradient, cut-off, batches, kicks, polarization ----


def test_memory_never_gets_worse_and_holds_evaluated_points():
    solver = CBO(particles=15, sigma=2.0, memory=cbo.Memory(0.4, 0.1))
    states = moved(solver, lambda y: sphere(y, 1.0), jnp.zeros(3), 12)
    energies = [state.personal.energies for state in states]
    for before, after in itertools.pairwise(energies):
        assert bool(jnp.all(after <= before))
    last = states[-1]
    np.testing.assert_allclose(
        jax.vmap(lambda y: sphere(y, 1.0))(last.personal.points), last.personal.energies
    )
    assert float(last.objective) == float(jnp.min(last.personal.energies))


def test_gradient_drift_with_vanishing_noise_is_gradient_descent_of_each_particle():
    solver = CBO(particles=5, drift=1e-12, sigma=1e-12, dt=0.1, gradient=2.0)
    found = run(sphere, solver, jnp.zeros(2), jnp.ones(2), max_steps=3)
    start = solver.init(None, jnp.zeros(2), None, KEY).swarm
    expected = 1 + (start - 1) * (1 - 0.1 * 2.0 * 2) ** 3
    np.testing.assert_allclose(found.state.solver.swarm, expected, atol=1e-9)
    assert int(found.stats.counts.gradient) == int(found.stats.counts.value) == 15


def test_cutoff_holds_back_the_particles_that_are_better_than_the_consensus():
    solver = CBO(particles=40, drift=10.0, sigma=1e-12, alpha=0.0, cutoff=cbo.Cutoff())
    start = solver.init(None, jnp.zeros(2), None, KEY).swarm
    found = run(sphere, solver, jnp.zeros(2), jnp.zeros(2), max_steps=1)
    center = jnp.mean(start, axis=0)
    worse = jax.vmap(lambda y: sphere(y, 0.0))(start) > sphere(center, 0.0)
    drifted = start - 0.1 * (start - center[None])
    expected = jnp.where(worse[:, None], drifted, start)
    assert 0 < int(jnp.sum(worse)) < 40
    np.testing.assert_allclose(found.state.solver.swarm, expected, atol=1e-10)
    assert int(found.stats.counts.value) == 41


def test_batches_cover_all_particles_once_per_epoch():
    fun = lambda y: sphere(y, 1.0)  # noqa: E731
    for move_all in (True, False):
        solver = CBO(particles=12, batch=cbo.Batch(4, move_all))
        states = moved(solver, fun, jnp.zeros(2), 3)
        changed = [jnp.any(a.swarm != b.swarm, 1) for a, b in itertools.pairwise(states)]
        per_step = [12] * 3 if move_all else [4] * 3
        assert [int(jnp.sum(c)) for c in changed] == per_step
        assert bool(jnp.all(jnp.stack(changed).any(0)))
        assert int(states[-1].counts.value) == 12
    found = run(sphere, CBO(batch=cbo.Batch(50)), jnp.zeros(2), jnp.ones(2), max_steps=200)
    assert int(found.stats.counts.value) == 200 * 50
    assert float(found.objective) < 1e-4


def test_the_orders_of_batches_are_permutations_and_all_alike():
    keys = jax.random.split(jax.random.key(0), 6000)
    orders = np.asarray(jax.vmap(lambda key: shuffled(key, 12))(keys))
    assert (np.sort(orders, axis=1) == np.arange(12)).all()
    # how often each index has each place: 500 expected, χ² with 121 degrees of freedom
    counts = np.stack([np.bincount(place, minlength=12) for place in orders.T])
    assert ((counts - 500) ** 2 / 500).sum() < 121 + 4 * (2 * 121) ** 0.5
    # neighbours are not tied: 1 follows 0 in one of twelve orders
    follows = np.argmax(orders == 1, axis=1) == np.argmax(orders == 0, axis=1) + 1
    assert abs(follows.mean() - 1 / 12) < 4 * (11 / 144 / 6000) ** 0.5


def test_kick_revives_a_swarm_that_has_collapsed():
    # collapsed far from the minimizer: only the kick can move it on
    start = cbo.Normal(1e-3)
    stuck = run(sphere, CBO(start=start, sigma=2.0), jnp.zeros(2), jnp.full(2, 9.0), max_steps=2000)
    assert float(stuck.objective) > 50
    kicked = CBO(start=start, sigma=2.0, kick=cbo.Kick(patience=5, width=0.5))
    found = run(
        sphere, kicked, jnp.zeros(2), jnp.full(2, 9.0), max_steps=2000, stop=jx.Target(1e-2)
    )
    assert bool(found.success)


def test_polarized_swarm_of_infinite_width_is_the_ordinary_one():
    fun = lambda y: sphere(y, 1.0)  # noqa: E731
    plain = moved(CBO(particles=20), fun, jnp.zeros(2), 5)[-1]
    polarized = CBO(particles=20, polarized=cbo.Polarized(jnp.inf))
    np.testing.assert_allclose(moved(polarized, fun, jnp.zeros(2), 5)[-1].swarm, plain.swarm)


def test_polarized_swarm_finds_all_minimizers_of_himmelblau():
    minimizers = jnp.array(
        [[3, 2], [-2.805118, 3.131312], [-3.779310, -3.283186], [3.584428, -1.848126]]
    )

    def himmelblau(y, args):
        return (y[0] ** 2 + y[1] - 11) ** 2 + (y[0] + y[1] ** 2 - 7) ** 2

    solver = CBO(
        particles=200,
        start=cbo.Uniform(-6.0, 6.0),
        sigma=1.0,
        alpha=cbo.Geometric(1.0, 1.02, 1e3),
        polarized=cbo.Polarized(0.5),
    )
    swarm = run(himmelblau, solver, jnp.zeros(2), max_steps=600).state.solver.swarm
    distance = jnp.linalg.norm(swarm[:, None] - minimizers[None], axis=-1)
    assert bool(jnp.all(jnp.min(distance, axis=0) < 0.05))


# ---- constraints ----


def test_projection_keeps_every_particle_in_the_set_and_the_solution_is_differentiable():
    solver = CBO(
        projection=implicit.projections.projection_l2_sphere,
        start=cbo.Normal(2.0),
        sigma=5.0,
        alpha=1e3,
    )
    direction = jnp.array([1.0, -2.0, 0.5])

    def solution(a):
        found = run(lambda y, a: -jnp.sum(a * y), solver, jnp.zeros(3), a, max_steps=600)
        return found.value, found.state.solver.swarm

    value, swarm = solution(direction)
    np.testing.assert_allclose(jnp.linalg.norm(swarm, axis=1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(value, direction / jnp.linalg.norm(direction), atol=1e-2)
    ours = jax.jacrev(lambda a: solution(a)[0])(direction)
    truth = jax.jacrev(lambda a: a / jnp.linalg.norm(a))(direction)
    np.testing.assert_allclose(ours, truth, atol=0.02)


def test_mirror_map_keeps_every_particle_on_the_simplex():
    target = jnp.array([0.6, 0.3, 0.1])
    solver = CBO(mirror=jax.nn.softmax, sigma=3.0, alpha=1e4)
    found = run(sphere, solver, jnp.full(3, 1 / 3), target, max_steps=600)
    np.testing.assert_allclose(found.value, target, atol=1e-2)
    particles = solver.ask(found.state.solver)
    np.testing.assert_allclose(jnp.sum(particles, axis=1), 1.0, rtol=1e-12)


# ---- refinement and derivatives ----


def quartic(y, t):
    return jnp.sum((y**2 - 1) ** 2 + t * y)


def test_polished_solution_is_a_global_minimizer_with_exact_derivatives():
    solver = CBO(particles=40, polish=cbo.Polish(solvers.GradNormSmooth(), after=60))

    def solution(t):
        return run(quartic, solver, jnp.full(2, 1.0), t).value

    t = jnp.array([0.3, -0.2])
    value = solution(t)
    # the wells at ∓1 according to the sign of t, not the one that it started in
    np.testing.assert_array_equal(jnp.sign(value), -jnp.sign(t))
    jacobian = jax.jacrev(solution)(t)
    np.testing.assert_allclose(jacobian, jnp.diag(-1 / (12 * value**2 - 4)), rtol=1e-9, atol=1e-12)
    found = run(quartic, solver, jnp.full(2, 1.0), t)
    assert float(found.optimality) < 1e-8
    assert int(found.stats.steps) == 60
    assert int(found.stats.counts.gradient) > 0


def test_polish_that_fails_says_so_and_keeps_the_best_particle():
    slow = solvers.GradNormSmooth(radius=1e-9, max_radius=1e-9)
    solver = CBO(particles=20, polish=cbo.Polish(slow, after=5, max_steps=3))
    found = run(sphere, solver, jnp.zeros(2), jnp.ones(2))
    assert found.result == jx.RESULTS.max_steps_reached
    assert int(found.stats.steps) == 5
    assert bool(jnp.isfinite(found.objective))


def test_unrolled_adjoint_differentiates_the_dynamics_for_fixed_noise():
    def final(t):
        found = run(
            sphere,
            CBO(particles=10, alpha=5.0),
            jnp.zeros(2),
            t,
            adjoint=implicit.UnrolledAdjoint(),
            max_steps=8,
        )
        return jnp.sum(found.state.solver.consensus**2)

    t, h = jnp.array([0.5, -0.3]), 1e-6
    numeric = [(final(t + h * e) - final(t - h * e)) / (2 * h) for e in jnp.eye(2)]
    np.testing.assert_allclose(jax.jit(jax.grad(final))(t), jnp.stack(numeric), rtol=1e-6)


# ---- devices ----


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_sharded_swarm_has_the_consensus_of_the_ordinary_one(devices):
    mesh = jax.make_mesh((devices,), ("particles",), devices=jax.devices()[:devices])
    plain = run(sphere, CBO(particles=16), jnp.zeros(3), jnp.ones(3), max_steps=10)
    sharded = run(sphere, CBO(particles=16, mesh=mesh), jnp.zeros(3), jnp.ones(3), max_steps=10)
    a, b = plain.state.solver, sharded.state.solver
    np.testing.assert_allclose(a.consensus, b.consensus, rtol=1e-10)
    np.testing.assert_allclose(a.swarm, b.swarm, rtol=1e-8)
    assert len(b.swarm.sharding.device_set) == devices
    if devices > 1:
        assert not b.swarm.sharding.is_fully_replicated


# ---- bad input ----


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CBO(batch=cbo.Batch(200)), ValueError, "expected at most the 100 particles"),
        (lambda: CBO(memory=True), TypeError, r"memory is a bool, expected Memory\(...\) or None"),
        (lambda: CBO(projection=1), TypeError, "projection is a int, expected a function or None"),
        (
            lambda: CBO(projection=abs, mirror=abs),
            ValueError,
            "projection and mirror are both given",
        ),
        (lambda: CBO(gradient=1.0, mirror=abs), ValueError, "gradient is given together"),
        (lambda: cbo.Polish(CBO()), ValueError, "expected a solver that needs no random key"),
        (lambda: cbo.Polish(1), TypeError, "solver is a int, expected a solver such as"),
        (lambda: cbo.Batch(1), ValueError, "size is 1, expected an integer >= 2"),
        (lambda: cbo.Kick(0), ValueError, "patience is 0, expected an integer >= 1"),
        (lambda: cbo.Polarized(0.0), ValueError, "width is 0, expected a number > 0"),
        (lambda: cbo.Jumps(rate=0.0), ValueError, "rate is 0, expected a number > 0"),
        (lambda: cbo.Memory(-1.0), ValueError, "drift is -1, expected a number >= 0"),
        (lambda: cbo.Cutoff(-1.0), ValueError, "width is -1, expected a number >= 0"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_tell_refuses_settings_that_need_the_problem():
    solver = CBO(particles=4, gradient=1.0)
    state = solver.init(None, jnp.zeros(2), None, KEY)
    with pytest.raises(ValueError, match="gradient is given, expected None"):
        solver.tell(state, jnp.ones(4))
    assert all(eqx.is_array(leaf) for leaf in jax.tree.leaves(state))
