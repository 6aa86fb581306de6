"""Composite problems min f + ψ, solved by proximal steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_ext as jx
from jaxopt_ext import implicit, solvers
from jaxopt_ext.implicit import projections, proximal

random = np.random.RandomState(0)
X = jnp.asarray(random.randn(40, 10))
LABELS = jnp.asarray(np.sign(random.randn(40)))
WEIGHT = jnp.asarray(0.03)


def logistic(w, t):
    margins = -LABELS * (X @ w)
    return jnp.mean(jnp.logaddexp(jnp.zeros_like(margins), margins))


LASSO = jx.CompositeMinimization(
    logistic,
    prox=lambda v, step, t: proximal.prox_lasso(v, t, step),
    penalty=lambda w, t: t * jnp.sum(jnp.abs(w)),
)
BOX = jx.CompositeMinimization(logistic, prox=lambda v, step, t: jnp.clip(v, 0.0, 0.3))


def simplex(v, step, t):
    with jax.numpy_dtype_promotion("standard"):
        return projections.projection_simplex(v)


SIMPLEX = jx.CompositeMinimization(logistic, prox=simplex)
MODELS = {
    "exact": solvers.ExactHessian(),
    "cg": solvers.ExactHessian(linear_solver=solvers.ConjugateGradient()),
    "lbfgs": solvers.QuasiNewton(memory=5),
    "zero": solvers.ZeroHessian(),
}


def solve(problem, solver=None, t=WEIGHT, **options):
    solver = solvers.GradNormSmooth() if solver is None else solver
    return jx.solve(problem, solver, jnp.zeros(10), t, **options)


@pytest.mark.parametrize("name", MODELS)
def test_lasso_satisfies_its_optimality_conditions(name):
    found = solve(LASSO, solvers.GradNormSmooth(MODELS[name])).check()
    w, gradient = found.value, jax.grad(logistic)(found.value, WEIGHT)
    zero = w == 0
    assert 0 < int(jnp.sum(zero)) < 10  # zeros are exact zeros
    assert float(jnp.max(jnp.where(zero, jnp.abs(gradient), 0))) <= float(WEIGHT) * (1 + 1e-6)
    np.testing.assert_allclose(jnp.where(zero, 0, gradient + WEIGHT * jnp.sign(w)), 0, atol=1e-9)
    objective = logistic(w, WEIGHT) + WEIGHT * jnp.sum(jnp.abs(w))
    assert float(found.objective) == pytest.approx(float(objective), rel=1e-14)


@pytest.mark.parametrize("problem", [BOX, SIMPLEX], ids=["box", "simplex"])
def test_solutions_on_sets(problem):
    found = solve(problem).check()
    gradient = jax.grad(logistic)(found.value, WEIGHT)
    inside = problem.prox(found.value, 1.0, WEIGHT)
    np.testing.assert_allclose(inside, found.value, atol=1e-14)
    # no direction into the set descends: to first order, f(v) ≥ f(w) for every v in it
    corners = [
        problem.prox(10 * e, 1.0, WEIGHT) for e in jnp.concatenate([jnp.eye(10), -jnp.eye(10)])
    ]
    for v in [*corners, problem.prox(-100 * gradient, 1.0, WEIGHT)]:
        assert float(jnp.dot(gradient, v - found.value)) >= -1e-9


@pytest.mark.parametrize(
    "metric",
    [
        solvers.DiagonalMetric(1.0 + jnp.arange(10.0)),
        solvers.MatrixMetric(X.T @ X / 40 + 0.1 * jnp.eye(10)),
    ],
    ids=["diagonal", "matrix"],
)
def test_the_metric_changes_the_path_and_not_the_solution(metric):
    found = solve(LASSO, solvers.GradNormSmooth(metric=metric)).check()
    np.testing.assert_allclose(found.value, solve(LASSO).value, atol=1e-8)


def test_progress_of_every_accepted_step():
    solver = solvers.GradNormSmooth(solvers.ZeroHessian(), radius=10.0)
    problem = LASSO.trace(jnp.ones(10), WEIGHT)
    state = solver.init(problem, jnp.ones(10), WEIGHT)
    step = jax.jit(lambda s: solver.step(problem, WEIGHT, s))
    state, _ = step(state)
    accepted = 0
    for _ in range(25):
        new, info = step(state)
        drop = float(state.objective - new.objective)
        assert drop >= 0
        assert float(jnp.linalg.norm(new.value - state.value)) <= float(state.radius) * (1 + 1e-9)
        if bool(info.accepted):
            accepted += 1
            assert drop >= float(new.squared / info.extras["shift"]) / 16 * (1 - 1e-9)
            # the subgradient belongs to ψ at the new point
            sign = jnp.sign(new.value)
            inside = jnp.abs(new.subgradient) <= WEIGHT * (1 + 1e-6)
            assert bool(jnp.all(inside))
            on = new.value != 0
            np.testing.assert_allclose(
                jnp.where(on, new.subgradient - WEIGHT * sign, 0), 0, atol=1e-9
            )
        state = new
    assert accepted > 5


def test_derivatives_equal_finite_differences():
    solver = solvers.GradNormSmooth(rtol=0.0, atol=1e-12)

    def loss(t, problem):
        return jnp.sum(solve(problem, solver, t).value ** 2)

    h = 1e-4
    numeric = (loss(WEIGHT + h, LASSO) - loss(WEIGHT - h, LASSO)) / (2 * h)
    ours = jax.grad(loss)(WEIGHT, LASSO)
    assert float(ours) == pytest.approx(float(numeric), rel=1e-5)
    # of the objective, by the envelope theorem: the ℓ1 norm
    found = solve(LASSO, solver)
    slope = jax.grad(lambda t: solve(LASSO, solver, t).objective)(WEIGHT)
    assert float(slope) == pytest.approx(float(jnp.sum(jnp.abs(found.value))), rel=1e-8)


def test_batches_and_both_precisions():
    weights = jnp.array([0.01, 0.03, 0.1])
    batch = jax.vmap(lambda t: solve(LASSO, t=t))(weights)
    batch.check()
    np.testing.assert_allclose(batch.value[1], solve(LASSO).value, atol=1e-10)
    single = jx.CompositeMinimization(
        lambda w, t: jnp.sum((w - t) ** 2) / 2, lambda v, step, t: jnp.clip(v, -1.0, 1.0)
    )
    t = jnp.array([2.0, 0.5, -3.0], jnp.float32)
    found = jx.solve(single, solvers.GradNormSmooth(), jnp.zeros(3, jnp.float32), t).check()
    assert found.value.dtype == jnp.float32
    np.testing.assert_allclose(found.value, jnp.array([1.0, 0.5, -1.0]), atol=1e-6)


def test_starts_outside_of_the_set_are_brought_into_it():
    found = jx.solve(BOX, solvers.GradNormSmooth(), jnp.full(10, 9.0), WEIGHT, max_steps=1)
    assert float(jnp.max(found.value)) <= 0.3
    assert float(found.objective) == pytest.approx(float(logistic(found.value, WEIGHT)))


def test_resuming_with_other_args_solves_the_other_problem():
    first = solve(LASSO).check()
    other = solve(LASSO, t=2 * WEIGHT, state=first.state).check()
    np.testing.assert_allclose(other.value, solve(LASSO, t=2 * WEIGHT).value, atol=1e-9)
    assert int(solve(LASSO, state=first.state).stats.steps) == 1


def test_what_does_not_fit_is_refused():
    with pytest.raises(
        TypeError, match="CompositeMinimization: prox is a int, expected a function"
    ):
        jx.CompositeMinimization(logistic, 3)
    bad = jx.CompositeMinimization(logistic, lambda v, step, t: v[:2])
    with pytest.raises(ValueError, match=r"prox returned float64.2., expected the structure"):
        solve(bad)
    with pytest.raises(TypeError, match="SuperUniversalNewton cannot solve a CompositeMin"):
        solve(LASSO, solvers.SuperUniversalNewton())
    operator = solvers.GradNormSmooth(metric=solvers.OperatorMetric(lambda u: 2 * u))
    with pytest.raises(ValueError, match="CompositeMinimization needs a metric with an inverse"):
        solve(LASSO, operator)
    with pytest.raises(TypeError, match="has no iteration_map"):
        jax.grad(lambda t: jnp.sum(solve(LASSO, t=t, adjoint=implicit.OneStepAdjoint()).value))(
            WEIGHT
        )
