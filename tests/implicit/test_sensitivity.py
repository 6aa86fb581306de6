"""Solution Jacobians, predictions along a path, covariance of fits, shadow prices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_ext import implicit


@pytest.mark.parametrize("shape", [(2,), (5,)], ids=["wide", "tall"])
def test_solution_jacobian_is_the_closed_form(shape):
    M = jnp.asarray(np.random.RandomState(0).randn(3, *shape))
    condition = implicit.Root(lambda x, s, t: s * x - M @ t)
    t = jnp.arange(1.0, shape[0] + 1)
    jacobian = implicit.solution_jacobian(condition, M @ t / 2, 2.0, t, argnum=1)
    np.testing.assert_allclose(jacobian, M / 2, rtol=1e-12)
    with pytest.raises(ValueError, match="argnum is 2, expected 0 to 1 for 2 arguments"):
        implicit.solution_jacobian(condition, M @ t / 2, 2.0, t, argnum=2)


@pytest.mark.parametrize("order", [1, 2])
def test_prediction_error_has_the_order_of_taylor(order):
    condition = implicit.Root(lambda x, t: x**3 + x - t)

    def solution(t):
        return 2 / 3**0.5 * jnp.sinh(jnp.arcsinh(3 * 3**0.5 * t / 2) / 3)

    t = jnp.array([1.0, 3.0])
    errors = []
    for h in (0.2, 0.1, 0.05):
        guess = implicit.predict(condition, solution(t), (t,), (t + h,), order=order)
        errors.append(float(jnp.max(jnp.abs(guess - solution(t + h)))))
    slopes = np.diff(np.log2(errors))
    np.testing.assert_allclose(slopes, -(order + 1), atol=0.25)


def test_prediction_refuses_what_it_cannot_do():
    condition = implicit.Root(lambda x, t: x - t)
    with pytest.raises(ValueError, match="order is 3, expected 1 or 2"):
        implicit.predict(condition, jnp.array(1.0), (1.0,), (2.0,), order=3)
    with pytest.raises(ValueError, match="new_args has structure"):
        implicit.predict(condition, jnp.array(1.0), (1.0,), (2.0, 3.0))


def test_covariance_equals_scipy_curve_fit():
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is in the bench extra")
    times = np.linspace(0, 4, 30)

    def model(t, a, b):
        return a * np.exp(-b * t)

    data = model(times, 2.5, 1.3) + 0.05 * np.random.RandomState(0).randn(30)
    best, expected = optimize.curve_fit(model, times, data, p0=[1.0, 1.0], xtol=1e-14, ftol=1e-14)

    def residual(x, weight):
        return weight * (x["a"] * jnp.exp(-x["b"] * times) - data)

    x = {"a": jnp.array(best[0]), "b": jnp.array(best[1])}
    np.testing.assert_allclose(implicit.covariance(residual, x, 1.0), expected, rtol=1e-5)
    known = implicit.covariance(residual, x, 1 / 0.05, noise_variance=1.0)
    _, absolute = optimize.curve_fit(
        model, times, data, p0=best, sigma=np.full(30, 0.05), absolute_sigma=True
    )
    np.testing.assert_allclose(known, absolute, rtol=1e-4)
    with pytest.raises(ValueError, match="1 residuals for 2 parameters"):
        implicit.covariance(lambda x: jnp.sum(x)[None], jnp.zeros(2))


def test_multipliers_are_shadow_prices():
    """The optimal value changes by −multiplier per unit by which a constraint is relaxed."""

    def program(shift):  # min ½‖y − c‖² s.t. Σy = 1 + shift₀, y₀ ≤ 0.2 + shift₁
        c = jnp.array([1.0, 0.5, 0.0])
        kkt = implicit.KKT(
            lambda y: jnp.sum((y - c) ** 2) / 2,
            equality=lambda y: jnp.sum(y) - 1 - shift[0],
            inequality=lambda y: y[0] - 0.2 - shift[1],
        )
        # closed form with the inequality active
        y0 = 0.2 + shift[1]
        nu = (c[1] + c[2] - (1 + shift[0] - y0)) / 2
        y = jnp.stack([y0, c[1] - nu, c[2] - nu])
        multipliers = implicit.Multipliers(equality=nu, inequality=c[0] - y0 - nu)
        return kkt, y, multipliers, jnp.sum((y - c) ** 2) / 2

    shift = jnp.zeros(2)
    kkt, y, multipliers, _ = program(shift)
    for leaf in jax.tree.leaves(kkt((y, multipliers))):
        np.testing.assert_allclose(leaf, np.zeros(leaf.shape), atol=1e-14)
    prices = jax.grad(lambda s: program(s)[3])(shift)
    np.testing.assert_allclose(prices[0], -multipliers.equality, rtol=1e-12)
    np.testing.assert_allclose(prices[1], -multipliers.inequality, rtol=1e-12)
    assert float(multipliers.inequality) > 0
