"""The reference solvers of the physics problems against closed forms and another library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_ext import layers
from jaxopt_ext.bench.problems import physics


def test_diffusion_sorption_agrees_with_scipy_and_is_of_second_order_in_time():
    integrate = pytest.importorskip("scipy.integrate")
    x = jnp.linspace(0.0, 1.0, 17)
    start, times = physics.sorption_start(0.1, x), jnp.linspace(0.0, 500.0, 6)
    dx, exchange = 1 / 16, physics.DIFFUSION * 16

    def rate(_, inner):
        right = exchange * inner[-1] / (1 + exchange)
        u = np.concatenate([[1.0], inner, [right]])
        positive = (inner + np.sqrt(inner**2 + physics.CLIP**2)) / 2
        retarded = 1 + physics.SORPTION * (positive + 1e-6) ** (physics.EXPONENT - 1)
        return physics.DIFFUSION / retarded * (u[:-2] - 2 * u[1:-1] + u[2:]) / dx**2

    exact = integrate.solve_ivp(
        rate, (0, 500), np.asarray(start)[1:-1], "BDF", np.asarray(times), rtol=1e-10, atol=1e-12
    ).y.T
    errors = [
        np.max(np.abs(np.asarray(physics.diffusion_sorption(start, times, steps))[:, 1:-1] - exact))
        for steps in (20, 40)
    ]
    assert errors[1] < 1e-5
    assert 3.4 < errors[0] / errors[1] < 4.6


def test_without_sorption_it_is_the_heat_equation():
    """A mode of the discrete problem decays by its eigenvalue."""
    n = 33
    exchange = physics.DIFFUSION * (n - 1)
    matrix = (
        np.diag(np.full(n - 2, -2.0)) + np.diag(np.ones(n - 3), 1) + np.diag(np.ones(n - 3), -1)
    )
    matrix[-1, -1] += exchange / (1 + exchange)
    values, vectors = np.linalg.eigh(matrix * physics.DIFFUSION * (n - 1) ** 2)
    offset = np.zeros(n - 2)
    offset[0] = physics.DIFFUSION * (n - 1) ** 2
    steady = np.linalg.solve(vectors * values @ vectors.T, -offset)
    start = np.concatenate([[1.0], steady + 0.1 * vectors[:, -1], [0.0]])
    start[-1] = exchange * start[-2] / (1 + exchange)
    times = jnp.array([0.0, 200.0])
    found = physics.diffusion_sorption(jnp.asarray(start), times, 100, sorption=False)
    expected = steady + 0.1 * np.exp(200 * values[-1]) * vectors[:, -1]
    np.testing.assert_allclose(found[1, 1:-1], expected, atol=1e-7)


def test_start_fits_the_boundary_conditions():
    x = jnp.linspace(0.0, 1.0, 401)
    u = physics.sorption_start(0.15, x)
    assert abs(float(u[0]) - 1) < 1e-12
    assert abs(float(u[-1] + physics.DIFFUSION * (u[-1] - u[-2]) * 400)) < 1e-4
    assert abs(float(u[200]) - 0.15) < 1e-10


def test_burgers_agrees_with_the_cole_hopf_solution():
    n, viscosity = 128, 0.02
    x = jnp.linspace(0.0, 1.0, n, endpoint=False)
    start = jnp.sin(2 * jnp.pi * x)
    times = jnp.array([0.0, 0.1, 0.3])
    found = physics.evolve(physics.burgers(n, viscosity, start.dtype), start, times, 400)
    # φ = exp(−∫u/(2ν)) solves the heat equation, u = −2ν φ_x / φ
    potential = (1 - jnp.cos(2 * jnp.pi * x)) / (2 * jnp.pi)
    (along,), _ = physics.derivatives((n,), start.dtype)
    transformed = jnp.fft.rfft(jnp.exp(-potential / (2 * viscosity)))
    for time, u in zip(times, found, strict=True):
        heat = transformed * jnp.exp(viscosity * along**2 * time.astype(along.dtype))
        exact = -2 * viscosity * jnp.fft.irfft(along * heat, n) / jnp.fft.irfft(heat, n)
        np.testing.assert_allclose(u, exact, atol=2e-5)


def test_taylor_green_vortex_decays_exactly():
    n, viscosity = 16, 1e-2
    x = jnp.linspace(0.0, 1.0, n, endpoint=False)
    start = jnp.cos(2 * jnp.pi * x)[:, None] * jnp.cos(2 * jnp.pi * x)[None, :]
    equation = physics.navier_stokes(n, viscosity, start.dtype)
    found = physics.evolve(equation, start, jnp.array([0.0, 1.0]), 100)
    np.testing.assert_allclose(found[1], start * np.exp(-8 * np.pi**2 * viscosity), atol=2e-5)


def test_inviscid_flow_keeps_enstrophy_and_energy():
    n = 32
    start = physics.random_vorticity(jax.random.key(0), n)
    equation = physics.navier_stokes(n, 0.0, start.dtype)
    # waves beyond the two-thirds rule would not be conserved
    (_, _), keep = physics.derivatives((n, n), start.dtype)
    start = jnp.fft.irfft2(jnp.where(keep, jnp.fft.rfft2(start), 0))
    end = physics.evolve(equation, start, jnp.array([0.0, 1.0]), 200)[1]

    def energy(w):
        u, v = physics.velocity(w)
        return jnp.sum(u**2 + v**2)

    assert float(jnp.max(jnp.abs(end - start))) > 0.1  # it moved
    np.testing.assert_allclose(jnp.sum(end**2), jnp.sum(start**2), rtol=1e-6)
    np.testing.assert_allclose(energy(end), energy(start), rtol=1e-6)


def test_velocity_is_divergence_free_and_has_the_vorticity():
    w = physics.random_vorticity(jax.random.key(1), 16)
    u, v = physics.velocity(w)
    (u_x, u_y), (v_x, v_y) = physics.gradient(u), physics.gradient(v)
    # without the highest wave of the even grid, whose derivative is ambiguous
    low = jnp.fft.rfft2(v_x - u_y - w)[:8, :8]
    assert float(jnp.max(jnp.abs(low))) < 1e-9
    assert float(jnp.max(jnp.abs(jnp.fft.rfft2(u_x + v_y)[:8, :8]))) < 1e-9


def test_random_vorticity_has_the_stated_variance_and_no_mean():
    fields = jax.vmap(lambda key: physics.random_vorticity(key, 16))(
        jax.random.split(jax.random.key(2), 400)
    )
    assert float(jnp.max(jnp.abs(jnp.mean(fields, axis=(1, 2))))) < 1e-12
    row = np.exp(-(np.sin(np.pi * np.arange(16) / 16) ** 2) / (2 * 0.8**2))
    variance = 1 - np.mean(row) ** 2  # of the field less its mean
    assert abs(float(jnp.mean(fields**2)) - variance) < 0.1 * variance


def test_projection_on_the_conserved_mass_cannot_increase_the_error():
    """Burgers' equation conserves ∫u; the projection on that plane is nonexpansive."""
    n = 64
    x = jnp.linspace(0.0, 1.0, n, endpoint=False)
    start = 0.3 + jnp.sin(2 * jnp.pi * x)
    exact = physics.evolve(
        physics.burgers(n, 0.02, start.dtype), start, jnp.array([0.0, 0.2]), 200
    )[1]
    noisy = exact + 0.1 * jax.random.normal(jax.random.key(3), (n,))
    weights = jnp.full(n, 1 / n)
    total = jnp.vdot(weights, start)
    repaired = layers.conserve(noisy, weights, total)
    assert abs(float(jnp.vdot(weights, repaired) - total)) < 1e-14
    before, after = jnp.linalg.norm(noisy - exact), jnp.linalg.norm(repaired - exact)
    gap = jnp.vdot(weights, noisy) - total
    # Pythagoras: what is removed is orthogonal to what is left
    np.testing.assert_allclose(before**2, after**2 + n * gap**2, rtol=1e-10)
