"""Derivatives, conservation and divergence against what is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_ext import layers


def test_derivatives_of_all_orders_along_each_axis():
    def u(p):
        return jnp.stack([jnp.sin(2 * p[0]) * p[1] ** 2, p[0] * p[1] ** 3])

    point = jnp.array([0.3, 0.7])
    np.testing.assert_allclose(
        layers.derivative(u, 0, 3)(point), [-8 * jnp.cos(0.6) * 0.49, 0], atol=1e-12
    )
    np.testing.assert_allclose(
        layers.derivative(u, 1, 2)(point), [2 * jnp.sin(0.6), 6 * 0.3 * 0.7], atol=1e-12
    )


@pytest.mark.parametrize("variance", [None, jnp.linspace(1.0, 3.0, 20)])
def test_conserved_field_is_the_nearest_one(variance):
    u, w = jnp.sin(jnp.arange(20.0)), jnp.linspace(0.5, 1.5, 20)
    v = layers.conserve(u, w, 2.0, variance)
    np.testing.assert_allclose(jnp.vdot(w, v), 2.0, rtol=1e-14)
    metric = jnp.ones(20) if variance is None else 1 / variance
    free = jnp.cos(jnp.arange(20.0))
    free = free - jnp.vdot(w, free) / jnp.vdot(w, w) * w  # keeps the integral
    np.testing.assert_allclose(jnp.vdot(free, metric * (v - u)), 0, atol=1e-12)


def test_divergence_free_projection():
    velocity = jax.random.normal(jax.random.key(0), (2, 9, 9))
    once = layers.divergence_free(velocity)
    np.testing.assert_allclose(layers.divergence_free(once), once, atol=1e-13)
    np.testing.assert_allclose(jnp.sum(once * (velocity - once)), 0, atol=1e-12)
    k = jnp.fft.fftfreq(9) * 9
    f = jnp.fft.fftn(once, axes=(1, 2))
    divergence = k[:, None].astype(f.dtype) * f[0] + k[None, :].astype(f.dtype) * f[1]
    np.testing.assert_allclose(jnp.abs(divergence), 0, atol=1e-11)


def test_several_conservation_laws_at_once():
    rng = np.random.default_rng(0)
    u, w, variance = (jnp.asarray(rng.uniform(0.5, 1.5, s)) for s in (20, (3, 20), 20))
    v = layers.conserve(u, w, jnp.array([1.0, 2.0, 3.0]), variance)
    np.testing.assert_allclose(w @ v, [1, 2, 3], rtol=1e-12)
    free = jnp.asarray(rng.normal(size=20))
    free = free - w.T @ jnp.linalg.solve(w @ w.T, w @ free)  # keeps all three
    np.testing.assert_allclose(jnp.vdot(free, (v - u) / variance), 0, atol=1e-12)


def test_operators_agree_with_nested_differentiation():
    def potential(p):
        return jnp.stack([jnp.sin(p[0] * p[1]), p[1] * p[2] ** 2, jnp.exp(p[0] - p[2])])

    point = jnp.array([0.3, 0.7, -0.4])
    jacobian = jax.jacfwd(potential)(point)
    np.testing.assert_allclose(layers.divergence(potential)(point), jnp.trace(jacobian), rtol=1e-12)
    rotation = [jacobian[2, 1] - jacobian[1, 2], jacobian[0, 2] - jacobian[2, 0],
                jacobian[1, 0] - jacobian[0, 1]]  # fmt: skip
    np.testing.assert_allclose(layers.curl(potential)(point), rotation, rtol=1e-12)
    np.testing.assert_allclose(layers.divergence(layers.curl(potential))(point), 0, atol=1e-14)
    hessian = jax.jacfwd(jax.jacfwd(potential))(point)
    np.testing.assert_allclose(
        layers.laplacian(potential)(point), jnp.trace(hessian, axis1=1, axis2=2), rtol=1e-12
    )
    np.testing.assert_allclose(
        layers.laplacian(potential, axes=(1, 2))(point), hessian[:, 1, 1] + hessian[:, 2, 2],
        rtol=1e-12,
    )  # fmt: skip
    plane = layers.curl(lambda p: jnp.sin(p[0]) * p[1] ** 3)
    np.testing.assert_allclose(layers.divergence(plane)(point[:2]), 0, atol=1e-14)


def test_boundary_rows_vanish_for_the_solution_that_they_describe():
    def u(p):
        return jnp.sin(2 * jnp.pi * p[0]) * jnp.exp(-p[1])

    times = jnp.linspace(0.0, 1.0, 5)
    left = jnp.stack([jnp.zeros(5), times], axis=1)
    right, outward = left.at[:, 0].set(1.0), jnp.array([[1.0, 0.0]]) * jnp.ones((5, 1))
    np.testing.assert_allclose(layers.dirichlet(u, right), 0, atol=1e-14)
    slope = 2 * jnp.pi * jnp.exp(-times)
    np.testing.assert_allclose(layers.neumann(u, right, outward, slope), 0, atol=1e-14)
    np.testing.assert_allclose(
        layers.neumann(lambda p: jnp.exp(-3 * p[0]), right, outward, robin=3.0), 0, atol=1e-14
    )
    rows = layers.periodic(u, left, right, order=2)
    assert rows.shape == (3, 5)
    np.testing.assert_allclose(rows, 0, atol=1e-12)
    fixed = layers.with_values(u, lambda p: p[1], lambda p: p[0] * (1 - p[0]))
    np.testing.assert_allclose(layers.dirichlet(fixed, left, times), 0, atol=1e-14)


def test_smooth_clip_follows_the_sharp_one_and_has_a_bounded_derivative():
    v = jnp.linspace(-1.0, 2.0, 61)
    clipped = layers.smooth_clip(v, 0.0, 1.0, 1e-2)
    assert float(jnp.max(jnp.abs(clipped - jnp.clip(v, 0, 1)))) <= 5.1e-3
    slope = jax.vmap(jax.grad(lambda x: layers.smooth_clip(x, 0.0, 1.0, 1e-2)))(v)
    assert bool(jnp.all((slope >= 0) & (slope <= 1)))


def test_smooth_positive_part_and_bad_input():
    v = jnp.linspace(-2.0, 2.0, 41)
    assert float(jnp.max(jnp.abs(layers.smooth_positive(v, 0.1) - jnp.maximum(v, 0)))) <= 0.05
    assert bool(jnp.all(layers.smooth_positive(v, 0.1) > 0))
    with pytest.raises(ValueError, match="width is 0, expected a number > 0"):
        layers.smooth_positive(v, 0.0)
    with pytest.raises(ValueError, match=r"weights has shape \[3\], expected \[41\]"):
        layers.conserve(v, jnp.ones(3), 1.0)
    with pytest.raises(ValueError, match="expected one component per axis"):
        layers.divergence_free(jnp.zeros((3, 4, 4)))
