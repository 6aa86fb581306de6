"""Constraints of a swarm, several objectives, Sobol starts and the history for pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import qmc

import jaxopt_ext as jx
from jaxopt_ext import solvers
from jaxopt_ext.bench.swarm_plot import swarm_figure
from jaxopt_ext.solvers import CBO, cbo, cbo_sobol

KEY = jax.random.key(0)


def run(fun, solver, init, args=None, key=KEY, **options):
    return jx.solve(jx.Minimization(fun), solver, init, args, key=key, **options)


# ---- penalty ----


def spring_weight(y, args):
    """Weight of a tension/compression spring: wire diameter, coil diameter, active coils."""
    wire, coil, turns = y[0], y[1], y[2]
    return (turns + 2) * coil * wire**2


def spring_limits(y, args):
    """Deflection, shear stress, surge frequency and outer diameter, each ≤ 0."""
    wire, coil, turns = y[0], y[1], y[2]
    shear = (4 * coil**2 - wire * coil) / (12566 * (coil * wire**3 - wire**4))
    return jnp.stack(
        [
            1 - coil**3 * turns / (71785 * wire**4),
            shear + 1 / (5108 * wire**2) - 1,
            1 - 140.45 * wire / (coil**2 * turns),
            (wire + coil) / 1.5 - 1,
        ]
    )


LOW, HIGH = jnp.array([0.05, 0.25, 2.0]), jnp.array([2.0, 1.3, 15.0])


def test_penalty_designs_the_tension_spring():
    solver = CBO(
        particles=200,
        start=cbo.Uniform(LOW, HIGH),
        drift=1.0,
        dt=1.0,
        noise=cbo.Covariance(),
        sigma=1.2,
        alpha=cbo.EffectiveSampleSize(0.3),
        projection=lambda y: jnp.clip(y, LOW, HIGH),
        penalty=cbo.Penalty(inequality=spring_limits, weight=0.1, tolerance=0.0),
    )
    found = run(spring_weight, solver, (LOW + HIGH) / 2, max_steps=300)
    assert float(found.feasibility) == 0.0
    assert bool(jnp.all(spring_limits(found.value, None) <= 0))
    # the best known design weighs 0.0126652
    assert 0.0126652 < float(found.objective) < 1.01 * 0.0126652
    assert int(found.stats.counts.value) == 200 * int(found.stats.steps) <= 60_000


def test_penalty_prefers_feasible_particles_and_raises_its_weight_while_they_are_missing():
    def fun(y, args):
        return jnp.sum(y)

    circle = cbo.Penalty(equality=lambda y, args: y[0] ** 2 + y[1] ** 2 - 2.0, tolerance=1e-2)
    found = run(fun, CBO(sigma=5.0, penalty=circle), jnp.zeros(2), max_steps=1500)
    np.testing.assert_allclose(found.value, -1.0, atol=0.1)
    assert float(found.objective) == pytest.approx(-2.0, abs=0.02)
    assert float(found.feasibility) <= 1e-2
    assert float(found.state.solver.penalty.weight) > 1.0
    hopeless = CBO(penalty=cbo.Penalty(inequality=lambda y, args: 1.0 + y[0] ** 2))
    found = run(fun, hopeless, jnp.zeros(2), max_steps=300)
    assert 1.0 <= float(found.feasibility) < 1.001
    assert float(found.state.solver.penalty.weight) > 100.0


def test_derivative_of_a_penalized_solution_is_not_a_number_instead_of_a_wrong_one():
    solver = CBO(particles=10, penalty=cbo.Penalty(inequality=lambda y, args: -y))

    def value(t):
        return run(lambda y, t: jnp.sum((y + t) ** 2), solver, jnp.ones(2), t, max_steps=5).value

    assert bool(jnp.all(jnp.isnan(jax.jacobian(value)(1.0))))


def test_constraint_drift_keeps_the_swarm_near_the_set():
    def circle(y, args):
        return jnp.sum(y**2) - 2.0

    solver = CBO(sigma=1.0, constraint_drift=cbo.ConstraintDrift(circle, 1e-4), alpha=100.0)
    state = run(lambda y, args: jnp.sum(y), solver, jnp.zeros(2), max_steps=800).state.solver
    np.testing.assert_allclose(state.consensus, -1.0, atol=0.03)
    assert float(jnp.max(jnp.abs(jax.vmap(lambda y: circle(y, None))(state.swarm)))) < 1e-3


# ---- manifolds ----


def test_swarm_on_the_sphere_finds_the_global_minimizer_of_ackley():
    n = 5
    target = jnp.array([1.0, -2.0, 0.5, 1.0, 0.3])
    target /= jnp.linalg.norm(target)

    def ackley(y, target):
        z = 3 * (y - target)
        root = jnp.sqrt(jnp.mean(z**2))
        return 20 - 20 * jnp.exp(-root / 5) + jnp.e - jnp.exp(jnp.mean(jnp.cos(2 * jnp.pi * z)))

    solver = CBO(
        projection=cbo.Sphere(), noise=cbo.Isotropic(), sigma=0.7, alpha=1e4, particles=200
    )

    def distance(key):
        found = run(ackley, solver, jnp.zeros(n), target, key=key, max_steps=600)
        norms = jnp.linalg.norm(found.state.solver.swarm, axis=1)
        return jnp.linalg.norm(found.value - target), jnp.max(jnp.abs(norms - 1))

    far, off = jax.jit(jax.vmap(distance))(jax.random.split(KEY, 20))
    assert float(jnp.mean(far < 0.05)) >= 0.9
    assert float(jnp.max(off)) < 1e-12


def test_swarm_on_the_stiefel_manifold_finds_the_principal_subspace():
    spectrum = jnp.array([5.0, 3.0, 1.0, 0.5, 0.1])
    basis = jnp.linalg.qr(jax.random.normal(KEY, (5, 5)))[0]
    matrix = basis @ jnp.diag(spectrum) @ basis.T
    solver = CBO(
        projection=cbo.Stiefel(), noise=cbo.Isotropic(), sigma=0.5, alpha=1e4, particles=200
    )
    found = run(lambda y, a: -jnp.trace(y.T @ a @ y), solver, jnp.ones((5, 2)), matrix)
    np.testing.assert_allclose(found.value.T @ found.value, jnp.eye(2), atol=1e-12)
    assert float(-found.objective) == pytest.approx(8.0, abs=0.01)


@pytest.mark.parametrize("manifold", [cbo.Sphere(2.0), cbo.Stiefel()], ids=["sphere", "stiefel"])
def test_tangent_directions_keep_the_constraint_to_first_order(manifold):
    point = manifold(jax.random.normal(KEY, (4, 2)))
    direction = manifold.tangent(point, jax.random.normal(jax.random.key(1), (4, 2)))
    np.testing.assert_allclose(manifold(point), point, atol=1e-12)
    np.testing.assert_allclose(manifold.tangent(point, direction), direction, atol=1e-12)
    gaps = [
        float(jnp.linalg.norm(manifold(point + h * direction) - point - h * direction))
        for h in (1e-2, 1e-3)
    ]
    assert gaps[0] / gaps[1] == pytest.approx(100, rel=0.05)


# ---- several objectives ----


def test_pareto_front_covers_the_segment_between_two_minimizers():
    ends = jnp.array([[1.0, 0.5], [-1.0, 0.0]])

    def both(y, ends):
        return jnp.sum((y[None] - ends) ** 2, axis=1)

    solver = CBO(particles=100, sigma=6.0, alpha=1e5, start=cbo.Uniform(-3.0, 3.0))
    front = cbo.pareto_front(both, solver, jnp.zeros(2), ends, key=KEY, max_steps=600)
    along = (front.values - ends[1][None]) @ (ends[0] - ends[1]) / jnp.sum((ends[0] - ends[1]) ** 2)
    nearest = ends[1][None] + jnp.clip(along, 0, 1)[:, None] * (ends[0] - ends[1])[None]
    # an error across the segment enters the scalarization in second order only
    assert float(jnp.median(jnp.linalg.norm(front.values - nearest, axis=1))) < 0.06
    # each particle is where its own weights balance the two: w₁ t² = w₂ (1 − t)²
    w = front.preferences
    exact = jnp.sqrt(w[:, 1]) / (jnp.sqrt(w[:, 0]) + jnp.sqrt(w[:, 1]))
    assert float(jnp.median(jnp.abs(1 - along - exact))) < 0.01
    assert float(jnp.mean(front.efficient)) > 0.9
    assert float(jnp.min(along)) < 0.15 and float(jnp.max(along)) > 0.85
    assert int(front.evaluations) == 60_100


def test_weights_that_repel_each_other_even_out_the_front():
    ends = 1.5 * jnp.eye(3)
    solver = CBO(particles=50, sigma=4.0, alpha=1e5, start=cbo.Uniform(-1.0, 2.0))

    def distances(y, ends):
        return jnp.sum((y[None] - ends) ** 2, axis=1)

    def unevenness(repulsion):
        """Of the distances to the nearest neighbour: standard deviation over mean, of five runs."""
        fronts = jax.vmap(
            lambda key: cbo.pareto_front(
                distances, solver, jnp.zeros(3), ends, key=key, max_steps=800, repulsion=repulsion
            )
        )(jax.random.split(KEY, 5))
        np.testing.assert_allclose(jnp.sum(fronts.preferences, axis=-1), 1.0, rtol=1e-6)
        assert float(jnp.min(fronts.preferences)) >= 0
        assert float(jnp.mean(fronts.efficient)) > 0.9
        goals = np.asarray(fronts.objectives)
        apart = np.linalg.norm(goals[:, :, None] - goals[:, None], axis=-1) + 99 * np.eye(50)
        nearest = apart.min(axis=-1)
        return (nearest.std(axis=1) / nearest.mean(axis=1)).mean()

    assert unevenness(6e-5) < 0.75 * unevenness(None)


def test_efficient_rows_are_those_that_nothing_dominates():
    rows = jax.random.uniform(KEY, (60, 3))
    ours = np.asarray(cbo.efficient(rows))
    for i, row in enumerate(np.asarray(rows)):
        others = np.asarray(rows)
        dominated = np.any(np.all(others <= row, 1) & np.any(others < row, 1))
        assert ours[i] == (not dominated)
    assert not bool(cbo.efficient(jnp.array([[jnp.nan, 0.0], [1.0, 1.0]]))[0])


def test_pareto_front_in_three_objectives_and_refusals():
    def three(y, args):
        return jnp.sum((y[None] - jnp.eye(3)) ** 2, axis=1)

    solver = CBO(particles=60, sigma=4.0, alpha=cbo.EffectiveSampleSize(0.05))
    front = cbo.pareto_front(three, solver, jnp.zeros(3), key=KEY, max_steps=300)
    np.testing.assert_allclose(jnp.sum(front.preferences, axis=1), 1.0)
    # the Pareto set is the simplex of the three minimizers
    assert float(jnp.median(jnp.abs(jnp.sum(front.values, 1) - 1))) < 0.1
    with pytest.raises(ValueError, match=r"solver.memory is given, expected None"):
        cbo.pareto_front(three, CBO(memory=cbo.Memory()), jnp.zeros(3), key=KEY)
    with pytest.raises(ValueError, match="expected a vector of at least 2"):
        cbo.pareto_front(lambda y, a: jnp.sum(y), CBO(), jnp.zeros(3), key=KEY)
    with pytest.raises(ValueError, match="repulsion is 0, expected"):
        cbo.pareto_front(three, CBO(), jnp.zeros(3), key=KEY, repulsion=0.0)


# ---- Sobol starts ----


@pytest.mark.parametrize("dimensions", [1, 2, 7, cbo_sobol.MOST])
def test_sobol_points_equal_those_of_scipy(dimensions):
    theirs = qmc.Sobol(dimensions, scramble=False, bits=32).random(256)
    ours = np.asarray(cbo_sobol.sobol(256, dimensions), float) / 2.0**32
    np.testing.assert_allclose(ours, theirs, atol=2.0**-30)


def test_sobol_start_is_spread_more_evenly_than_a_random_one():
    def discrepancy(design):
        points = cbo.Uniform(0.0, 1.0, design=design)(KEY, jnp.zeros(4), 128)
        assert bool(jnp.all((points >= 0) & (points < 1)))
        return qmc.discrepancy(np.asarray(points))

    assert discrepancy("sobol") < discrepancy("latin") < discrepancy("random")
    first, second = (
        cbo.Uniform(-1.0, 1.0, design="sobol")(jax.random.key(i), jnp.zeros(2), 8) for i in (0, 1)
    )
    assert bool(jnp.any(first != second))
    with pytest.raises(ValueError, match="design is 'grid', expected"):
        cbo.Uniform(0.0, 1.0, design="grid")
    with pytest.raises(ValueError, match="expected at most 64"):
        cbo.Uniform(0.0, 1.0, design="sobol")(KEY, jnp.zeros(65), 8)


# ---- the history and its picture ----


def test_recorded_swarm_is_that_of_the_solve_and_one_call_draws_it():
    def sphere(y, shift):
        return jnp.sum((y - shift) ** 2)

    solver, shift = CBO(particles=15), jnp.array([0.5, -1.0])
    problem = jx.Minimization(sphere)
    history = cbo.record(problem, solver, jnp.zeros(2), shift, key=KEY, steps=20)
    state = run(sphere, solver, jnp.zeros(2), shift, max_steps=20).state.solver
    np.testing.assert_allclose(history.consensus[-1], state.consensus, rtol=1e-10)
    assert float(history.objective[-1]) == pytest.approx(float(state.objective), rel=1e-10)
    assert bool(jnp.all(jnp.diff(history.objective) <= 0))

    figure = swarm_figure(history, sphere, shift, steps=(1, 20), lower=-2.0, upper=2.0)
    last = figure.axes[-1]
    points, path, end = last.lines
    np.testing.assert_allclose(points.get_xydata(), history.particles[-1])
    np.testing.assert_allclose(path.get_xydata(), history.consensus)
    np.testing.assert_allclose(end.get_xydata()[0], history.consensus[-1])
    assert len(swarm_figure(history).axes) == 8
    with pytest.raises(ValueError, match="expected steps from 1 to 20"):
        swarm_figure(history, steps=(21,))
    flat = cbo.record(problem, solver, jnp.zeros(3), 0.0, key=KEY, steps=2)
    with pytest.raises(ValueError, match=r"shape \(2, 15, 3\), expected"):
        swarm_figure(flat)


# ---- bad input ----


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: cbo.Penalty(), ValueError, "expected at least one constraint"),
        (lambda: cbo.Penalty(inequality=1.0), TypeError, "inequality is a float"),
        (lambda: cbo.Penalty(equality=abs, weight=0.0), ValueError, "weight is 0, expected"),
        (lambda: cbo.Penalty(equality=abs, growth=1.0), ValueError, "growth is 1, expected"),
        (lambda: cbo.ConstraintDrift(abs, 0.0), ValueError, "width is 0, expected"),
        (lambda: cbo.Sphere(-1.0), ValueError, "radius is -1, expected"),
        (
            lambda: CBO(
                penalty=cbo.Penalty(equality=abs), polish=cbo.Polish(solvers.GradNormSmooth())
            ),
            ValueError,
            "penalty and polish are both given",
        ),
        (
            lambda: cbo.Stiefel()(jnp.ones((2, 3))),
            ValueError,
            "expected a matrix with at least as many rows as columns",
        ),
    ],
)
def test_constraints_that_do_not_fit_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_integer_variables_are_refused_by_name():
    with pytest.raises(TypeError, match="init has dtype int"):
        run(lambda y, args: jnp.sum(y**2), CBO(), jnp.array([1, 2]))
