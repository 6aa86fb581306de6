"""A constrained solve as a layer: values, derivatives, transformations, what it says of failure."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxopt_ext import RESULTS, implicit, layers, solvers

_spec = importlib.util.spec_from_file_location(
    "problems_of_layers", pathlib.Path(__file__).with_name("problems.py")
)
problems = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(problems)

X = jnp.linspace(-1.0, 1.0, problems.POINTS)
START = jnp.zeros(5)
LAYERS = {
    "linear": layers.HardConstraint(problems.affine, linear=True, ridge=1e-3),
    "nonlinear": layers.HardConstraint(problems.nonlinear, ridge=1e-3),
}


def loss_of(layer, init=START):
    return lambda parameters, x=X: jnp.sum(jnp.cos(layer(init, (parameters, x)).value))


def finite_difference(fun, parameters, h=1e-5):
    """By central differences, one parameter after the other."""
    out = []
    for i in range(len(parameters)):
        up, down = list(parameters), list(parameters)
        up[i], down[i] = up[i] + h, down[i] - h
        out.append((fun(tuple(up)) - fun(tuple(down))) / (2 * h))
    return jnp.stack(out)


def test_linear_rows_give_the_least_squares_solution():
    layer = LAYERS["linear"]
    theta, level = problems.parameters()
    found = layer(START, ((theta, level), X))
    b = np.asarray(problems.features(theta, X))
    matrix = np.concatenate([b / np.sqrt(len(X)), b[:1], 1e-3 * np.eye(5)])
    target = np.concatenate([np.asarray(problems.data(X)) / np.sqrt(len(X)), [level], np.zeros(5)])
    expected = np.linalg.lstsq(matrix, target, rcond=None)[0]
    np.testing.assert_allclose(found.value, expected, rtol=0, atol=1e-11)
    report = found.report
    assert bool(report.ok) and int(report.rank) == 5 and int(report.rows) == len(X) + 1
    residual = b @ expected - np.asarray(problems.data(X))
    np.testing.assert_allclose(report.max_residual["equation"], np.abs(residual).max(), rtol=1e-9)
    np.testing.assert_allclose(
        report.rms_residual["equation"], np.sqrt(np.mean(residual**2)), rtol=1e-9
    )


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_those_of_finite_differences(kind):
    loss = loss_of(LAYERS[kind])
    parameters = problems.parameters()
    report = LAYERS[kind](START, (parameters, X)).report
    assert bool(report.ok) and float(report.rms_residual["equation"]) > 3e-2
    gradient = jnp.stack(jax.jit(jax.grad(loss))(parameters))
    expected = finite_difference(jax.jit(loss), parameters)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_gauss_newton_adjoint_would_be_wrong_where_the_residual_does_not_vanish():
    layer, parameters = LAYERS["nonlinear"], problems.parameters()
    exact = jnp.stack(jax.jit(jax.grad(loss_of(layer)))(parameters))
    point = layer(START, (parameters, X)).value

    def rows(c, parameters):
        blocks = problems.nonlinear(c, (parameters, X))
        return {
            "e": blocks["equation"] / jnp.sqrt(X.size * 1.0),
            "b": blocks["boundary"],
            "r": 1e-3 * c,
        }

    def approximate(parameters):
        condition = implicit.LeastSquares(rows, gauss_newton=True)
        return jnp.sum(jnp.cos(implicit.attach(condition, point, parameters)))

    biased = jnp.stack(jax.jit(jax.grad(approximate))(parameters))
    assert float(jnp.linalg.norm(biased - exact) / jnp.linalg.norm(exact)) > 1e-2


@pytest.mark.parametrize("kind", LAYERS)
def test_same_under_vmap_and_shard_map(kind):
    loss = loss_of(LAYERS[kind])
    theta, level = problems.parameters()
    levels = level + jnp.linspace(0.0, 1.0, 16)

    def total(theta, levels):
        return jnp.sum(jax.vmap(lambda v: loss((theta, v)))(levels))

    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        lambda theta, levels: jax.lax.psum(total(theta, levels), "batch"),
        mesh=mesh, in_specs=(P(), P("batch")), out_specs=P(), check_vma=True,
    )  # fmt: skip
    run = lambda fun: jax.jit(jax.value_and_grad(fun, argnums=(0, 1)))(theta, levels)  # noqa: E731
    batched, spread = run(total), run(sharded)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), spread, batched)
    single = jax.jit(jax.grad(loss))((theta, levels[3]))[1]
    np.testing.assert_allclose(batched[1][1][3], single, rtol=1e-9)


def test_memory_of_the_backward_pass_does_not_grow_with_steps():
    def temporary(max_steps):
        layer = layers.HardConstraint(problems.nonlinear, ridge=1e-3, max_steps=max_steps)
        compiled = jax.jit(jax.grad(loss_of(layer))).lower(problems.parameters()).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(1000) == temporary(10)


@pytest.mark.parametrize("kind", LAYERS)
def test_float32(kind):
    layer = LAYERS[kind]
    x = X.astype(jnp.float32)
    parameters = problems.parameters(jnp.float32)
    found = layer(START.astype(jnp.float32), (parameters, x))
    assert bool(found.report.ok)
    assert found.value.dtype == jnp.float32 and bool(found.report.ok)
    gradient = jax.grad(loss_of(layer, START.astype(jnp.float32)))(parameters, x)
    exact = jax.grad(loss_of(layer))(problems.parameters())
    assert gradient[0].dtype == jnp.float32
    np.testing.assert_allclose(jnp.stack(gradient), jnp.stack(exact), rtol=2e-2)


def test_warm_start_saves_steps_and_changes_nothing_else():
    layer, parameters = LAYERS["nonlinear"], problems.parameters()
    cold = layer(START, (parameters, X))
    warm = layer(cold.value, (parameters, X))
    assert int(warm.report.steps) < int(cold.report.steps)
    np.testing.assert_allclose(warm.value, cold.value, atol=1e-8)
    gradient = jax.grad(loss_of(layer, cold.value))(parameters)
    np.testing.assert_allclose(
        jnp.stack(gradient), jnp.stack(jax.grad(loss_of(layer))(parameters)), rtol=1e-6
    )


@pytest.mark.parametrize("dead", ["zero", "duplicate"])
def test_rank_deficient_rows_are_reported_and_differentiable(dead):
    def residual(c, theta):
        b = problems.features(theta, X)
        b = b.at[:, 4].set(0.0 if dead == "zero" else b[:, 0])
        return b @ c - jnp.sin(2 * X)

    layer = layers.HardConstraint(residual, linear=True, ridge=1e-3)
    theta = problems.parameters()[0]
    report = layer(START, theta).report
    assert bool(report.ok) and bool(report.rank_deficient) and int(report.rank) == 4

    def loss(p):
        return jnp.sum(jnp.cos(layer(START, p[0]).value))

    gradient = jax.grad(loss)((theta,))[0]
    np.testing.assert_allclose(gradient, finite_difference(loss, (theta,))[0], rtol=1e-6)


def test_masked_rows_do_not_count():
    layer, parameters = LAYERS["linear"], problems.parameters()
    keep = jnp.arange(X.size) < 20
    masked = layer(START, (parameters, X), {"equation": keep})
    short = layer(START, (parameters, X[:20]))
    np.testing.assert_allclose(masked.value, short.value, atol=1e-11)
    assert int(masked.report.rows) == 21
    few = layer(START, (parameters, X), {"equation": jnp.arange(X.size) < 3})
    assert bool(few.report.underdetermined) and bool(few.report.ok)
    none = layer(START, (parameters, X), {"equation": keep & False, "boundary": jnp.zeros(1, bool)})
    assert bool(none.report.empty) and bool(jnp.all(none.value == 0))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_failed_solve_is_flagged_and_spoils_nothing(kind):
    layer = LAYERS[kind]
    theta = problems.parameters()[0]
    levels = jnp.array([0.7, jnp.nan, 0.9])

    def total(theta, levels):
        found = jax.vmap(lambda v: layer(START + 0.1, ((theta, v), X)))(levels)
        return jnp.sum(jnp.cos(found.value)), found.report

    (_, report), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(theta, levels)
    assert report.ok.tolist() == [True, False, True]
    good = jax.grad(lambda t: total(t, levels[jnp.array([0, 2])])[0])(theta)
    np.testing.assert_allclose(gradient, good, rtol=1e-10)
    names = RESULTS.linear_solve_failed if kind == "linear" else RESULTS.nonfinite_start
    assert bool((report.result == names)[1])


def test_an_unfinished_solve_returns_its_best_point_without_derivative():
    theta, level = problems.parameters()
    layer = layers.HardConstraint(problems.nonlinear, max_steps=3)

    def solve(theta):
        found = layer(START + 2.0, ((theta, level), X))
        return jnp.sum(found.value), found

    slope, found = jax.jit(jax.grad(solve, has_aux=True))(theta)
    assert not bool(found.report.ok) and float(slope) == 0
    at_start = layer.check(START + 2.0, ((theta, level), X))
    assert float(found.report.rms_residual["equation"]) < float(at_start.rms_residual["equation"])


def test_check_judges_points_that_were_held_out():
    layer, parameters = LAYERS["linear"], problems.parameters()
    found = layer(START, (parameters, X[::2]))
    held_out = layer.check(found.value, (parameters, X[1::2]))
    b = problems.features(parameters[0], X[1::2])
    expected = jnp.max(jnp.abs(b @ found.value - problems.data(X[1::2])))
    np.testing.assert_allclose(held_out.max_residual["equation"], expected, rtol=1e-12)


def test_exports_for_other_platforms():
    grad = jax.jit(jax.grad(loss_of(LAYERS["linear"])))
    exported = jax.export.export(grad, platforms=("cpu", "cuda", "tpu"))(problems.parameters())
    assert exported.platforms == ("cpu", "cuda", "tpu")


def test_bad_input_is_refused_by_name():
    layer, parameters = LAYERS["linear"], problems.parameters()
    with pytest.raises(TypeError, match="residual is a int, expected a function"):
        layers.HardConstraint(3)
    with pytest.raises(ValueError, match="ridge is -1, expected a number >= 0"):
        layers.HardConstraint(problems.affine, ridge=-1.0)
    with pytest.raises(TypeError, match="SketchedNewtonAL, expected one that accepts Least"):
        layers.HardConstraint(problems.affine, solvers.SketchedNewtonAL())
    with pytest.raises(ValueError, match=r"mask names \['pde'\], expected blocks"):
        layer(START, (parameters, X), {"pde": X > 0})
    with pytest.raises(ValueError, match=r"mask\['equation'\] has shape \[3\], expected \[24\]"):
        layer(START, (parameters, X), {"equation": jnp.ones(3, bool)})
    with pytest.raises(ValueError, match="solver is given, expected None because linear=True"):
        layers.HardConstraint(problems.affine, solvers.GradNormSmooth(), linear=True)
