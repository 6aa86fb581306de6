"""Equalities, inequalities and bounds: values, derivatives, transformations, failures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxopt_ext import RESULTS, layers, solvers

X = jnp.linspace(-1.0, 1.0, 15)
START = jnp.zeros(4)


def features(theta):
    return jnp.cos(theta * jnp.arange(4.0)[None, :] * X[:, None] + jnp.arange(4.0)[None, :])


def fit(c, theta):
    """Rows whose least-squares solution is neither bounded nor monotone."""
    return features(theta) @ c - jnp.sin(3 * X)


def total(c, theta):
    """The mean of the fit has a given value."""
    return jnp.mean(features(theta) @ c) - 0.2 * theta


def twice(c, theta):
    """The same, once more with another factor, and a second one: dependent rows."""
    return jnp.stack([total(c, theta), -3 * total(c, theta), c[0] - c[1]])


LAYERS = {
    "linear equalities": layers.HardConstraint(fit, linear=True, ridge=1e-3, equality=twice),
    "nonlinear equality": layers.HardConstraint(
        fit, ridge=1e-3, equality=lambda c, theta: jnp.sum(c**2) - theta
    ),
    "inequality": layers.HardConstraint(
        fit, ridge=1e-3, inequality=lambda c, theta: jnp.abs(theta) / 3 - features(theta) @ c
    ),
    "bounds": layers.HardConstraint(fit, ridge=1e-3, lower=-0.4, upper=0.3),
}


STARTS = {"nonlinear equality": START.at[0].set(0.5)}  # at 0 the equality has no slope


def finite_difference(fun, at, h=1e-5):
    return (fun(at + h) - fun(at - h)) / (2 * h)


@pytest.mark.parametrize("kind", LAYERS)
def test_value_meets_the_constraints_and_the_derivative_is_that_of_finite_differences(kind):
    layer = LAYERS[kind]

    def loss(theta):
        found = layer(STARTS.get(kind, START), theta)
        return jnp.sum(jnp.cos(found.value)), found

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, found), gradient = run(1.3)
    assert bool(found.report.ok) and float(found.report.violation) < 1e-8
    plain = layers.HardConstraint(fit, linear=True, ridge=1e-3)(START, 1.3)
    assert float(jnp.max(jnp.abs(plain.value - found.value))) > 1e-2  # the constraints matter
    # first-order optimality, with the multipliers that came out
    rows = lambda c: jnp.concatenate([fit(c, 1.3) / jnp.sqrt(15.0), 1e-3 * c])  # noqa: E731
    slope = jax.grad(lambda c: jnp.sum(rows(c) ** 2) / 2)(found.value)
    multipliers = found.multipliers
    for name, fun in (("equality", layer.equality), ("inequality", layer.inequality)):
        if fun is not None:
            _, pull = jax.vjp(lambda c, fun=fun: fun(c, 1.3), found.value)
            slope += pull(getattr(multipliers, name))[0]
    if layer.lower is not None:
        slope += multipliers.upper - multipliers.lower
        assert float(jnp.max(multipliers.lower)) > 1e-3
    np.testing.assert_allclose(slope, 0, atol=1e-7)
    expected = finite_difference(lambda t: jax.jit(loss)(t)[0], 1.3)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_linear_equalities_are_exact_and_dependent_ones_recognized():
    found = LAYERS["linear equalities"](START, 1.3)
    np.testing.assert_allclose(twice(found.value, 1.3), 0, atol=1e-14)
    contradictory = layers.HardConstraint(
        fit, linear=True, equality=lambda c, _: jnp.stack([c[0] - 1, c[0] - 2])
    )
    report = contradictory(START, 1.3).report
    assert not bool(report.ok) and bool(report.result == RESULTS.infeasible_stationary)


def test_projection_on_affine_equalities_is_the_orthogonal_one():
    rng = np.random.default_rng(0)
    a, b, y = (jnp.asarray(rng.normal(size=s)) for s in ((3, 6), 3, 6))
    metric = jnp.asarray(rng.uniform(0.5, 2, 6))
    project = layers.Projection(lambda z, ab: ab[0] @ z - ab[1], linear=True, metric=metric)
    expected = y - (a.T / metric[:, None]) @ jnp.linalg.solve(
        a @ (a.T / metric[:, None]), a @ y - b
    )
    np.testing.assert_allclose(project(y, (a, b)).value, expected, atol=1e-13)
    jacobian = jax.jacrev(lambda y: project(y, (a, b)).value)(y)
    np.testing.assert_allclose(jacobian @ jacobian, jacobian, atol=1e-12)
    closed = jax.grad(lambda a: jnp.sum(
        y - (a.T / metric[:, None]) @ jnp.linalg.solve(a @ (a.T / metric[:, None]), a @ y - b)
    ))(a)  # fmt: skip
    gradient = jax.grad(lambda a: jnp.sum(project(y, (a, b)).value))(a)
    np.testing.assert_allclose(gradient, closed, atol=1e-12)


def test_projection_on_a_sphere_and_on_the_simplex():
    y = jnp.array([0.9, 0.5, -0.3])
    sphere = layers.Projection(lambda z, radius: jnp.sum(z**2) - radius**2)
    value = jax.jit(lambda y: sphere(y, 2.0).value)(y)
    np.testing.assert_allclose(value, 2 * y / jnp.linalg.norm(y), atol=1e-8)
    simplex = layers.Projection(lambda z, _: jnp.sum(z) - 1, lower=0.0)
    value, jacobian = jax.jit(
        lambda y: (simplex(y).value, jax.jacrev(lambda y: simplex(y).value)(y))
    )(y)
    np.testing.assert_allclose(value, [0.7, 0.3, 0.0], atol=1e-8)
    np.testing.assert_allclose(jacobian, [[0.5, -0.5, 0], [-0.5, 0.5, 0], [0, 0, 0]], atol=1e-6)


@pytest.mark.parametrize("kind", ["linear equalities", "bounds", "inequality"])
def test_same_under_vmap_and_shard_map_and_a_failure_spoils_nothing(kind):
    layer = LAYERS[kind]
    thetas = 1.3 + jnp.linspace(0.0, 0.3, 8)

    def loss(thetas):
        found = jax.vmap(lambda t: layer(START, t))(thetas)
        return jnp.sum(jnp.cos(found.value)), found.report.ok

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, ok), gradient = run(thetas)
    assert bool(jnp.all(ok))
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.shard_map(
        lambda t: jax.lax.psum(loss(t)[0], "batch"),
        mesh=mesh, in_specs=P("batch"), out_specs=P(), check_vma=True,
    )  # fmt: skip
    np.testing.assert_allclose(jax.jit(jax.grad(spread))(thetas), gradient, rtol=1e-7)
    (_, ok), broken = run(thetas.at[2].set(jnp.nan))
    assert ok.tolist() == [k != 2 for k in range(8)]
    keep = jnp.arange(8) != 2
    np.testing.assert_allclose(broken[keep], gradient[keep], rtol=1e-9)
    assert float(broken[2]) == 0


def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match="linear is True, expected False with inequalities"):
        layers.HardConstraint(fit, linear=True, lower=0.0)
    with pytest.raises(TypeError, match="solver is GradNormSmooth, expected one that accepts Nonl"):
        layers.HardConstraint(fit, solvers.GradNormSmooth(), lower=0.0)
    with pytest.raises(ValueError, match="no constraint is given, expected equality"):
        layers.Projection()
    with pytest.raises(TypeError, match="equality is a int, expected a function or None"):
        layers.Projection(3)
    with pytest.raises(ValueError, match=r"metric is .* expected a PyTree like point"):
        layers.Projection(lower=0.0, metric=jnp.ones(2))(jnp.ones(3))
