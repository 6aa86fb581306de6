"""u'' = f on [0, 1] with random features: experts that agree on their faces, and that do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_ext import layers

EXPERTS, POINTS, RIDGE, SEEDS = 4, 400, 1e-5, 5


def exact(x):
    return jnp.sin(3 * jnp.pi * x) + 0.5 * jnp.sin(7 * jnp.pi * x) * jnp.exp(-20 * (x - 0.7) ** 2)


source = jax.vmap(jax.grad(jax.grad(exact)))


def features(n, seed):
    """Slopes and shifts of n tanh features, drawn as in the reference experiment."""
    random = np.random.default_rng(seed)
    a = random.uniform(4, 14, n) * random.choice([-1, 1], n)
    return jnp.asarray(a), jnp.asarray(-a * random.random(n))


def terms(x, slopes, shifts):
    """Features and their first two derivatives at x."""
    t = jnp.tanh(x[:, None] * slopes[None, :] + shifts[None, :])
    first = (1 - t**2) * slopes[None, :]
    return t, first, -2 * t * first * slopes[None, :]


def residual(c, args):
    """The equation at the expert's points and the boundary conditions that are its own."""
    local, shared = args
    second = terms(local["x"], *shared)[2]
    value = terms(jnp.array([0.0, 1.0]), *shared)[0]
    return {"equation": second @ c - local["f"], "boundary": value @ c}


def trace(c, args):
    point, shared = args
    value, slope, _ = terms(point[None], *shared)
    return {"value": value @ c, "slope": slope @ c}


def mixture(shared, coupled):
    boxes = layers.BoxPartition((0.0,), (1.0,), (EXPERTS,))
    x = (jnp.arange(POINTS, dtype=float) + 0.5) / POINTS
    groups = boxes.group(x[:, None], capacity=POINTS // EXPERTS)
    local = groups.split({"x": x, "f": source(x)})
    pairs, places, _ = boxes.interfaces()
    faces = jnp.asarray(places)[:, 0, 0]
    ends = jnp.zeros((EXPERTS, 2), bool).at[0, 0].set(True).at[-1, 1].set(True)
    mask = {"equation": groups.mask, "boundary": ends if coupled else jnp.ones_like(ends)}
    interface = layers.Interface(trace, pairs, {"value": 100.0, "slope": 10.0})
    layer = layers.MixtureOfExperts(
        layers.HardConstraint(
            residual, linear=True, ridge=RIDGE, weights={"boundary": 100.0}, normalize=False
        ),
        interface if coupled else None,
    )
    init = jnp.zeros((EXPERTS, shared[0].size))
    found = layer(init, local, shared, mask, faces if coupled else None)
    u = groups.merge(jax.vmap(lambda c, x: terms(x, *shared)[0] @ c)(found.value, local["x"]))
    error = jnp.linalg.norm(u - exact(x)) / jnp.linalg.norm(exact(x))
    jumps = interface.jumps(found.value, faces, shared, jnp.ones(EXPERTS, bool))
    return error, jnp.max(jnp.abs(jumps["value"])), found.report.ok


@pytest.mark.parametrize(("n", "accuracy"), [(20, 3.3e-3), (40, 2e-6)])
def test_interface_rows_reach_the_accuracy_of_the_reference_experiment(n, accuracy):
    slopes, shifts = map(jnp.stack, zip(*(features(n, seed) for seed in range(SEEDS)), strict=True))

    def medians(coupled):
        run = jax.jit(lambda all: jax.lax.map(lambda s: mixture(s, coupled), all))
        error, jump, ok = run((slopes, shifts))
        assert bool(jnp.all(ok))
        return float(jnp.median(error)), float(jnp.median(jump))

    together, alone = medians(True), medians(False)
    assert together[0] <= accuracy
    assert alone[0] >= 100 * together[0]
    assert alone[1] >= 100 * together[1]
