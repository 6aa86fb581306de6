"""Golden numbers and theorem-level properties of gradient-normalized smoothness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jaxopt_ext as jx
from jaxopt_ext import implicit, solvers


def rosenbrock_residual(y):
    return jnp.stack([10 * (y[1] - y[0] ** 2), 1 - y[0]])


def counts(solution):
    c = solution.stats.counts
    return int(c.hessian), int(c.linear_solve)


@pytest.mark.parametrize(
    ("power", "iterations"), [(2, 51), (3, 53), (4, 55), (5, 56), (6, 58), (8, 59)]
)
def test_golden_iteration_counts_on_powers_of_the_rosenbrock_residual(power, iterations):
    # the published implementation's counts to f < 1e-8 from (-2, 2) with first radius 1
    problem = jx.Minimization(
        lambda y, p: jnp.sum(rosenbrock_residual(y) ** 2) ** (p / 2) / p,
    )
    found = jx.solve(
        problem,
        solvers.GradNormSmooth(),
        jnp.array([-2.0, 2.0]),
        jnp.array(float(power)),
        stop=jx.Target(1e-8),
    ).check()
    assert counts(found)[0] == iterations
    if power == 2:
        assert counts(found)[1] == 105


def log_sum_exp_problem():
    """Log-sum-exp in 100 dimensions with its minimum at 0, in the metric B = AAᵀ."""
    random = np.random.RandomState(3124)
    A, b = random.uniform(-1, 1, (100, 100)), random.uniform(-1, 1, 100)
    weights = np.exp(-b) / np.exp(-b).sum()
    factor = np.linalg.cholesky(A @ A.T)
    rows = jnp.asarray((A.T - weights @ A.T) @ np.linalg.inv(factor).T)
    problem = jx.Minimization(lambda y, b: jax.nn.logsumexp(rows @ y - b))
    return problem, jnp.asarray(factor.T @ np.ones(100)), jnp.asarray(b)


def test_golden_iteration_count_on_log_sum_exp():
    problem, start, b = log_sum_exp_problem()
    minimum = float(jax.nn.logsumexp(-b))
    found = jx.solve(
        problem, solvers.GradNormSmooth(), start, b, stop=jx.Target(minimum + 1e-8)
    ).check()
    assert counts(found) == (14, 22)


def chebyshev(y, args):
    return (1 - y[0]) ** 2 / 4 + jnp.sum((y[1:] - 2 * y[:-1] ** 2 + 1) ** 2)


def test_exact_hessian_does_not_stall_where_it_is_indefinite():
    found = jx.solve(
        jx.Minimization(chebyshev), solvers.GradNormSmooth(), jnp.full(200, -2.0)
    ).check()
    eigenvalues = jnp.linalg.eigvalsh(jax.hessian(chebyshev)(found.value, None))
    assert float(eigenvalues[0]) > -1e-12  # a second-order point, not the start's plateau
    assert float(found.objective) < 0.06  # from 1.6e4
    assert int(found.stats.steps) < 100


@pytest.fixture(scope="module")
def trajectory():
    """Every trial on Rosenbrock with the state before it."""
    problem = jx.Minimization(lambda y, args: jnp.sum(rosenbrock_residual(y) ** 2))
    solver = solvers.GradNormSmooth()
    state = solver.init(problem, jnp.array([-2.0, 2.0]), None)
    step = jax.jit(lambda s: solver.step(problem, None, s))
    trials = []
    for _ in range(105):
        new, info = step(state)
        trials.append((state, new, info))
        state = new
    return trials


def test_progress_inequality_holds_at_each_accepted_trial(trajectory):
    accepted = [(a, b, i) for a, b, i in trajectory[1:] if bool(i.accepted)]
    assert len(accepted) > 40
    for before, after, info in accepted:
        decrease = float(before.objective - after.objective)
        needed = float(jnp.sum(after.gradient**2) / (8 * info.extras["shift"]))
        assert decrease >= needed * (1 - 1e-12)


def test_objective_is_monotone_and_steps_are_no_longer_than_the_radius(trajectory):
    for before, after, info in trajectory[1:]:
        assert float(after.objective) <= float(before.objective)
        moved = jnp.linalg.norm(after.value - before.value)
        assert float(moved) <= float(before.radius) * (1 + 1e-12)
        if not bool(info.accepted):
            np.testing.assert_array_equal(after.value, before.value)


def test_number_of_trials_is_fixed_by_the_radius(trajectory):
    # Σ trials = 2 · accepted + log2(γ_first / γ_last)
    accepted = sum(bool(info.accepted) for _, _, info in trajectory[1:])
    last = float(trajectory[-1][1].radius)
    assert len(trajectory) - 1 == 2 * accepted + round(np.log2(1.0 / last))


def test_hessian_is_computed_once_per_accepted_point(trajectory):
    final = trajectory[-1][1].counts
    accepted = sum(bool(info.accepted) for _, _, info in trajectory)
    assert int(final.hessian) in (accepted - 1, accepted)
    assert int(final.linear_solve) == len(trajectory) - 1
    assert int(final.value) == int(final.gradient) == len(trajectory)


def test_iterates_do_not_depend_on_the_scale_of_the_objective():
    def run(scale):
        problem = jx.Minimization(lambda y, s: s * jnp.sum(rosenbrock_residual(y) ** 2))
        return jx.solve(
            problem,
            solvers.GradNormSmooth(),
            jnp.array([-2.0, 2.0]),
            jnp.array(scale),
            max_steps=60,
            stop=jx.Target(-1.0),
        ).value

    np.testing.assert_allclose(run(1.0), run(1024.0), rtol=1e-9)


def test_radius_does_not_collapse_after_convergence():
    problem, start, b = log_sum_exp_problem()
    found = jx.solve(problem, solvers.GradNormSmooth(), start, b).check()
    assert float(found.state.solver.radius) > 1.0
    # asked for the impossible, it stops and says so: the radius halves to the resolution of y once
    endless = jx.solve(problem, solvers.GradNormSmooth(rtol=0.0, atol=0.0), start, b)
    assert endless.result in (jx.RESULTS.stagnated, jx.RESULTS.successful)
    assert float(endless.optimality) < 1e-14
    assert int(endless.stats.steps) < 120


def test_float32_reaches_its_rounding_level():
    _, _, b = log_sum_exp_problem()
    rows = jnp.eye(20, dtype=jnp.float32) - 0.05
    logits = jx.Minimization(lambda y, b: jax.nn.logsumexp(rows @ y - b) + jnp.sum(y**2) / 20)
    found = jx.solve(
        logits,
        solvers.GradNormSmooth(rtol=0.0, atol=0.0),
        jnp.ones(20, jnp.float32),
        b[:20].astype(jnp.float32),
        max_steps=80,
    )
    assert float(found.optimality) < 1e-7
    assert found.value.dtype == jnp.float32


def test_stagnation_is_named_when_no_trial_can_be_accepted():
    # value −y with gradient +1: every step along −gradient makes it worse
    inconsistent = jx.Minimization(lambda y, args: y - 2 * jax.lax.stop_gradient(y))
    found = jx.solve(inconsistent, solvers.GradNormSmooth(), 0.3)
    assert found.result == jx.RESULTS.stagnated
    assert float(found.value) == 0.3
    assert int(found.stats.steps) < 70  # the radius halves down to the resolution of y


def test_empty_and_single_variable_problems():
    one = jx.solve(
        jx.Minimization(lambda y, args: (y - 3.0) ** 2), solvers.GradNormSmooth(), 1.0
    ).check()
    assert float(one.value) == pytest.approx(3.0)
    start_is_solution = jx.solve(
        jx.Minimization(lambda y, args: (y - 3.0) ** 2), solvers.GradNormSmooth(), 3.0
    ).check()
    assert int(start_is_solution.stats.steps) == 1


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("radius", 0.0, "radius is 0, expected a number > 0"),
        ("grow", 1.0, "grow is 1, expected a number > 1"),
        ("shrink", 1.5, "shrink is 1.5, expected a number > 0 and < 1"),
        ("decrease", float("nan"), "decrease is nan, expected a number > 0 and < 1"),
    ],
)
def test_settings_outside_their_range_are_refused(setting, value, message):
    with pytest.raises(ValueError, match=message):
        solvers.GradNormSmooth(**{setting: value})


def test_settings_of_the_wrong_type_are_refused():
    with pytest.raises(TypeError, match="radius is a str, expected a number"):
        solvers.GradNormSmooth(radius="1")


def test_settings_can_be_mapped_over():
    problem = jx.Minimization(lambda y, args: jnp.sum((y - 1) ** 2))

    def solution(radius):
        return jx.solve(problem, solvers.GradNormSmooth(radius=radius), jnp.zeros(2))

    mapped = jax.vmap(solution)(jnp.array([0.1, 1.0, 10.0]))
    assert bool(jnp.all(mapped.success))
    assert int(mapped.stats.steps[0]) > int(mapped.stats.steps[2])


# ---- hypergradients of a real kind of problem ----


@pytest.fixture(scope="module")
def logistic_data():
    random = np.random.RandomState(0)
    X = random.randn(60, 5)
    labels = (X @ random.randn(5) + 0.5 * random.randn(60) > 0).astype(float)
    return X[:40], labels[:40], X[40:], labels[40:]


def logistic_loss(w, X, labels):
    margins = (2 * labels - 1) * (X @ w)
    return jnp.mean(jnp.logaddexp(jnp.zeros_like(margins), -margins))


def test_hypergradient_of_logistic_regression_equals_finite_differences(logistic_data):
    X, labels, X_val, labels_val = map(jnp.asarray, logistic_data)

    def train(w, theta):
        return logistic_loss(w, X, labels) + jnp.sum(jnp.exp(theta) * w**2) / 2

    def validation(theta):
        # the last steps are quadratically convergent: 1e-13 is reached
        solver = solvers.GradNormSmooth(rtol=0.0, atol=1e-13)
        w = jx.solve(jx.Minimization(train), solver, jnp.zeros(5), theta).value
        return logistic_loss(w, X_val, labels_val)

    theta = jnp.linspace(-4.0, -1.0, 5)
    ours = jax.jit(jax.grad(validation))(theta)
    loss, h = jax.jit(jax.vmap(validation)), 1e-3

    def difference(h):  # fourth order central differences
        E = h * jnp.eye(5)
        T = theta[None, :]
        near = (loss(T + E) - loss(T - E)) / (2 * h)
        far = (loss(T + 2 * E) - loss(T - 2 * E)) / (4 * h)
        return (4 * near - far) / 3

    numeric = difference(h)
    assert float(jnp.max(jnp.abs(ours - numeric)) / jnp.max(jnp.abs(numeric))) < 1e-8

    # and in closed form, from the same w
    w = jx.solve(
        jx.Minimization(train), solvers.GradNormSmooth(rtol=0.0, atol=1e-13), jnp.zeros(5), theta
    ).value
    hessian = jax.hessian(train)(w, theta)
    adjoint = jnp.linalg.solve(hessian, jax.grad(logistic_loss)(w, X_val, labels_val))
    closed = -adjoint * jnp.exp(theta) * w
    np.testing.assert_allclose(ours, closed, rtol=1e-10)

    # float32, against the float64 truth
    def validation32(theta):
        w = jx.solve(
            jx.Minimization(
                lambda w, theta: (
                    logistic_loss(w, X.astype(jnp.float32), labels.astype(jnp.float32))
                    + jnp.sum(jnp.exp(theta) * w**2) / 2
                )
            ),
            solvers.GradNormSmooth(),
            jnp.zeros(5, jnp.float32),
            theta,
        ).value
        return logistic_loss(w, X_val.astype(jnp.float32), labels_val.astype(jnp.float32))

    single = jax.jit(jax.grad(validation32))(theta.astype(jnp.float32))
    assert single.dtype == jnp.float32
    difference32 = jnp.abs(single.astype(jnp.float64) - closed)
    assert float(jnp.max(difference32) / jnp.max(jnp.abs(closed))) < 1e-3


@pytest.mark.parametrize(
    ("adjoint", "tolerance"),
    [
        (implicit.ImplicitAdjoint(linear_solver=implicit.CG()), 1e-8),
        (implicit.ImplicitAdjoint(linear_solver=implicit.GMRES()), 1e-8),
        (implicit.UnrolledAdjoint(), 1e-6),
        (implicit.UnrolledAdjoint(checkpoints=4), 1e-6),
        (implicit.OneStepAdjoint(), 1e-6),
        (implicit.OneStepAdjoint(steps=2), 1e-6),
    ],
    ids=["cg", "gmres", "unrolled", "unrolled-4", "one-step", "two-steps"],
)
def test_other_adjoints_agree_with_the_exact_one(logistic_data, adjoint, tolerance):
    X, labels, *_ = map(jnp.asarray, logistic_data)

    def train(w, theta):
        return logistic_loss(w, X, labels) + jnp.sum(jnp.exp(theta) * w**2) / 2

    def loss(theta, adjoint):
        found = jx.solve(
            jx.Minimization(train),
            solvers.GradNormSmooth(),
            jnp.zeros(5),
            theta,
            adjoint=adjoint,
            max_steps=64,
        )
        return jnp.sum(found.value**2) + found.objective

    theta = jnp.linspace(-3.0, -1.0, 5)
    exact = jax.jit(jax.grad(lambda t: loss(t, implicit.ImplicitAdjoint())))(theta)
    other = jax.jit(jax.grad(lambda t: loss(t, adjoint)))(theta)
    assert float(jnp.max(jnp.abs(other - exact)) / jnp.max(jnp.abs(exact))) < tolerance


def test_unrolled_adjoint_sees_the_starting_point():
    def after_three_steps(init):
        problem = jx.Minimization(lambda y, args: jnp.sum(jnp.cosh(y)))
        return jx.solve(
            problem,
            solvers.GradNormSmooth(),
            init,
            adjoint=implicit.UnrolledAdjoint(),
            max_steps=3,
        ).value

    init = jnp.array([1.0, -0.4])
    ours = jax.jacrev(after_three_steps)(init)
    h = 1e-6
    columns = [
        (after_three_steps(init + h * e) - after_three_steps(init - h * e)) / (2 * h)
        for e in jnp.eye(2)
    ]
    np.testing.assert_allclose(ours, jnp.stack(columns, axis=1), atol=1e-7)
    assert float(jnp.max(jnp.abs(ours))) > 1e-3


def test_sample_state_is_a_plain_tree_of_arrays():
    problem = jx.Minimization(lambda y, args: jnp.sum(y**2))
    state = solvers.GradNormSmooth().init(problem, jnp.ones(3), None)
    flat, unravel = ravel_pytree(state.value)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert flat.shape == (3,)
    assert unravel(flat).shape == (3,)
