"""Published uses of implicit differentiation, re-done small.

After Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022:
hyper-parameters of a multiclass SVM in its dual, dataset distillation, particle packing.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_ext as jx
from jaxopt_ext import implicit, solvers


def central_difference(f, x, direction, h=1e-5):
    return (f(x + h * direction) - f(x - h * direction)) / (2 * h)


@jax.numpy_dtype_promotion("standard")  # optax's simplex projection needs it
def test_regularization_of_a_multiclass_svm_through_its_dual():
    random = np.random.RandomState(0)
    centers = np.array([[2.0, 0, 0, 0, 0], [-1.0, 1.5, 0, 0, 0], [-1.0, -1.5, 0, 0, 0]])
    classes = np.arange(18) % 3
    X = jnp.asarray(centers[classes] + random.randn(18, 5))
    Y = jnp.asarray(np.eye(3)[classes])
    X_val = jnp.asarray(centers[classes] + random.randn(18, 5))

    def primal(dual, theta):
        return X.T @ (Y - dual) / jnp.exp(theta)

    def dual_objective(dual, theta):  # each row of `dual` in the simplex
        W = primal(dual, theta)
        return jnp.exp(theta) * jnp.sum(W**2) / 2 + jnp.sum(dual * Y)

    def onto_simplices(dual, theta):
        del theta
        return jax.vmap(optax.projections.projection_simplex)(dual)

    condition = implicit.ProjectedGradient(dual_objective, onto_simplices, step=0.05)

    @implicit.differentiable(condition)
    def solve(dual, theta):
        step = 1.0 / jnp.exp(-theta) / jnp.sum(X**2)

        def body(_, carry):
            dual, previous, k = carry
            ahead = dual + k / (k + 3) * (dual - previous)
            new = onto_simplices(ahead - step * jax.grad(dual_objective)(ahead, theta), theta)
            return new, dual, k + 1

        return jax.lax.fori_loop(0, 20_000, body, (dual, dual, jnp.ones(())))[0]

    def validation_loss(theta):
        dual = solve(jnp.full((18, 3), 1 / 3), theta)
        return jnp.sum((X_val @ primal(dual, theta) - Y) ** 2) / 2

    theta = jnp.array(1.0)
    loss = jax.jit(validation_loss)
    gradient = jax.jit(jax.grad(validation_loss))(theta)
    numeric = central_difference(loss, theta, 1.0, h=1e-4)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-4)
    # and it points downhill
    assert float(loss(theta - 0.05 * jnp.sign(gradient))) < float(loss(theta))


def test_dataset_distillation():
    """Two synthetic samples, one a class, learned so that training on them fits 60 real ones."""
    random = np.random.RandomState(1)
    labels = np.arange(60) % 2
    X = jnp.asarray(random.randn(60, 5) + 1.5 * labels[:, None] * np.array([1, -1, 0, 0.5, 0]))
    signs = jnp.asarray(2.0 * labels - 1)

    def train(w, distilled):
        margins = jnp.array([-1.0, 1.0]) * (distilled @ w)
        return jnp.mean(jax.nn.softplus(-margins)) + 0.05 * jnp.sum(w**2)

    problem, solver = jx.Minimization(train), solvers.GradNormSmooth()

    def outer(distilled):
        w = jx.solve(problem, solver, jnp.zeros(5), distilled).value
        return jnp.mean(jax.nn.softplus(-signs * (X @ w)))

    step = jax.jit(jax.value_and_grad(outer))
    distilled = jnp.asarray(0.1 * random.randn(2, 5))
    direction = jnp.asarray(random.randn(2, 5))
    gradient = step(distilled)[1]
    numeric = central_difference(lambda d: step(d)[0], distilled, direction)
    np.testing.assert_allclose(jnp.sum(gradient * direction), numeric, rtol=1e-6)

    optimizer = optax.sgd(3.0)
    state = optimizer.init(distilled)
    start = float(step(distilled)[0])
    for _ in range(40):
        loss, gradient = step(distilled)
        updates, state = optimizer.update(gradient, state)
        distilled = optax.apply_updates(distilled, updates)
    real = jx.solve(
        jx.Minimization(lambda w, _: jnp.mean(jax.nn.softplus(-signs * (X @ w)))),
        solver,
        jnp.zeros(5),
    )
    assert float(loss) < 0.7 * start
    assert float(loss) < float(real.objective) + 0.1  # two samples nearly do the work of sixty


def soft_sphere_energy(positions, diameter):
    """Bidisperse soft spheres in a periodic box of side 2, overlaps cost quadratically."""
    n = positions.shape[0]
    sizes = jnp.where(jnp.arange(n) < n // 2, diameter, 1.4 * diameter)
    i, j = np.triu_indices(n, 1)
    apart = positions[i] - positions[j]
    apart = apart - 2 * jnp.round(jax.lax.stop_gradient(apart) / 2)
    distance = jnp.sqrt(jnp.sum(apart**2, axis=1))
    reach = (sizes[i] + sizes[j]) / 2
    return jnp.sum(jax.nn.relu(1 - distance / reach) ** 2) * 10


def test_sensitivity_of_a_particle_packing_to_the_diameter():
    """Translations leave the energy unchanged: the Hessian is singular, the answer minimum-norm."""
    start = jnp.asarray(np.random.RandomState(1).rand(8, 2) * 2)
    tight = solvers.GradNormSmooth(rtol=0.0, atol=1e-12)
    diameter = jnp.array(0.7)

    def packed(diameter, start=start):
        found = jx.solve(
            jx.Minimization(soft_sphere_energy),
            tight,
            start,
            diameter,
            max_steps=3000,
            adjoint=implicit.ImplicitAdjoint(linear_solver=implicit.MinimumNorm()),
        )
        return found

    found = packed(diameter).check()
    assert float(found.objective) > 1e-3  # jammed: everything is held in place by overlaps
    nearby = found.value
    sensitivity = jax.jit(jax.jacfwd(lambda d: packed(d, nearby).value))(diameter)

    h = 1e-6
    up, down = (
        packed(diameter + h, nearby).check().value,
        packed(diameter - h, nearby).check().value,
    )
    numeric = (up - down) / (2 * h)
    np.testing.assert_allclose(
        sensitivity - sensitivity.mean(0, keepdims=True),
        numeric - numeric.mean(0, keepdims=True),
        atol=1e-4,
    )
    np.testing.assert_allclose(sensitivity.mean(0), np.zeros(2), atol=1e-9)  # no drift
    certificate = implicit.certify(
        implicit.Stationary(soft_sphere_energy),
        nearby,
        diameter,
        outer=lambda x, d: soft_sphere_energy(x, d) + x[0, 0],
        linear_solver=implicit.MinimumNorm(),
    )
    assert bool(certificate.singular)
    assert bool(certificate.ambiguous)  # x[0, 0] sees the translation


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_dictionary_learning_step(weight):
    """Sparse codes by lasso, differentiated with respect to the dictionary."""
    random = np.random.RandomState(2)
    signal = jnp.asarray(random.randn(6))
    dictionary = jnp.asarray(random.randn(6, 4))

    def fit(code, dictionary, weight):
        return jnp.sum((dictionary @ code - signal) ** 2) / 2

    def shrink(v, step, dictionary, weight):
        return jnp.sign(v) * jax.nn.relu(jnp.abs(v) - step * weight)

    condition = implicit.ProximalGradient(fit, shrink, step=0.05)

    @implicit.differentiable(condition)
    def codes(code, dictionary, weight):
        def body(_, code):
            ahead = code - 0.05 * jax.grad(fit)(code, dictionary, weight)
            return shrink(ahead, 0.05, dictionary, weight)

        return jax.lax.fori_loop(0, 3000, body, code)

    def loss(dictionary):
        code = codes(jnp.zeros(4), dictionary, weight)
        return fit(code, dictionary, weight)

    direction = jnp.asarray(random.randn(6, 4))
    gradient = jax.jit(jax.grad(loss))(dictionary)
    numeric = central_difference(jax.jit(loss), dictionary, direction)
    np.testing.assert_allclose(jnp.sum(gradient * direction), numeric, rtol=1e-6)
