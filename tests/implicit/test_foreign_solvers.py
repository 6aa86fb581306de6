"""The documented ways to differentiate through scipy and IPOPT."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_ext import implicit

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "implicit" / "foreign_solvers.md"


def test_ipopt_example_of_the_documentation():
    pytest.importorskip("cyipopt", reason="IPOPT comes with the peers extra (cyipopt-wheels)")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(code, str(PAGE), "exec"), names)

        # projection onto the quarter disc: clip, then scale into the disc
        def projection(t):
            inside = jnp.maximum(t, 0.0)
            return inside / jnp.maximum(1.0, jnp.linalg.norm(inside))

        targets = jnp.array([[3.0, 4.0], [0.2, -0.5]])
        best = jax.jit(jax.vmap(names["best"]))(targets)
        np.testing.assert_allclose(best, jax.vmap(projection)(targets), atol=1e-7)
        jacobians = jax.jit(jax.vmap(jax.jacobian(names["best"])))(targets)
        np.testing.assert_allclose(
            jacobians, jax.vmap(jax.jacobian(projection))(targets), atol=1e-6
        )


def test_scipy_least_squares_with_its_own_stopping():
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is in the bench extra")
    times = jnp.linspace(0.0, 2.0, 12)
    data = 2 * jnp.exp(-1.5 * times) + 0.1 * jnp.cos(7 * times)

    def residual(x, data):
        return x[0] * jnp.exp(-x[1] * times) - data

    @implicit.differentiable(implicit.LeastSquares(residual))
    def fit(x, data):
        found = optimize.least_squares(
            lambda x: np.asarray(residual(jnp.asarray(x), data)),
            np.asarray(x),
            jac=lambda x: np.asarray(jax.jacobian(residual)(jnp.asarray(x), data)),
            method="lm",
            xtol=1e-15,
            ftol=1e-15,
            gtol=1e-15,
        )
        return found.x

    def rate(data):
        return fit(jnp.array([1.0, 1.0]), data)[1]

    gradient = jax.grad(rate)(data)
    # scipy stops some 1e-10 away: polish its answer for the reference
    x = jnp.asarray(fit(jnp.array([1.0, 1.0]), data))

    def slope(x, data):
        return jax.grad(lambda x: jnp.sum(residual(x, data) ** 2) / 2)(x)

    for _ in range(4):
        x = x - jnp.linalg.solve(jax.jacobian(slope)(x, data), slope(x, data))
    closed = -jnp.linalg.solve(jax.jacobian(slope)(x, data), jax.jacobian(slope, 1)(x, data))[1]
    np.testing.assert_allclose(gradient, closed, rtol=1e-7, atol=1e-8)
