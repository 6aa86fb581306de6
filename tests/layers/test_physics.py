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
