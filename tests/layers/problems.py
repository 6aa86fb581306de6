"""Small constraint problems that the tests of the layers share."""

import jax.numpy as jnp

POINTS = 24


def features(theta, x, n=5):
    """n smooth features of x with a parameter."""
    order = jnp.arange(n, dtype=x.dtype)[None, :]
    return jnp.cos(theta * order * x[:, None] + order)


def data(x):
    """A jump that the features cannot follow."""
    return jnp.cos(3 * x) + 0.2 * jnp.sign(x + 0.1)


def affine(c, args):
    """Fit of the features to data, with a boundary value."""
    (theta, level), x = args
    b = features(theta, x)
    return {"equation": b @ c - data(x), "boundary": (b @ c)[:1] - level}


def nonlinear(c, args):
    """A reaction term makes the residual nonlinear in the coefficients; it does not vanish."""
    (theta, level), x = args
    u = features(theta, x) @ c
    return {"equation": u + 0.3 * u**3 - data(x), "boundary": u[:1] - level}


def of_experts(residual):
    """The same for an expert: its points are its own, the parameters shared."""

    def expert(c, args):
        local, shared = args
        return residual(c, (shared, local))

    return expert


def parameters(dtype=float):
    return jnp.asarray(1.3, dtype), jnp.asarray(0.7, dtype)
