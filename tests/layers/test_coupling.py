"""Alternating solves and blended fields: against dense solves, finite differences, failures."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_ext import RESULTS, layers, solvers

_spec = importlib.util.spec_from_file_location(
    "problems_of_layers", pathlib.Path(__file__).with_name("problems.py")
)
problems = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(problems)

EXPERTS, N, RIDGE = 3, 4, 0.05
BOXES = layers.BoxPartition((0.0,), (1.0,), (EXPERTS,))
X = (jnp.arange(36.0) + 0.5) / 36
SOLVER = solvers.GradNormSmooth(solvers.ExactHessian(), atol=1e-13)
START = jnp.zeros((EXPERTS, N))
THETA = 1.3


def residual_of(kind):
    def residual(c, args):
        local, theta = args
        u = problems.features(theta, local["x"], N) @ c
        reaction = 0.1 * u**3 if kind == "nonlinear" else 0.0
        return {"equation": u + reaction - problems.data(local["x"])}

    return residual


def trace(c, args):
    point, theta = args
    return {"value": problems.features(theta, point, N) @ c}


def constraint(residual, kind):
    if kind == "linear":
        return layers.HardConstraint(residual, linear=True, ridge=RIDGE)
    return layers.HardConstraint(residual, SOLVER, ridge=RIDGE)


def schwarz(kind, mesh=None, **options):
    pairs, places, _ = BOXES.interfaces(overlap=0.4)
    coupling = layers.Schwarz(trace, pairs, {"value": 0.5}, **options)
    layer = layers.MixtureOfExperts(constraint(residual_of(kind), kind), coupling, mesh=mesh)
    groups = BOXES.group(X[:, None], overlap=0.4)
    local = groups.split({"x": X})
    mask = {"equation": groups.mask}
    faces = jnp.asarray(places)[:, 0]
    return lambda theta, local=local: layer(START, local, theta, mask, faces), local, faces, pairs


def finite_difference(fun, at, h=1e-5):
    return (fun(at + h) - fun(at - h)) / (2 * h)


def loss_of(run):
    def loss(theta, *rest):
        found = run(theta, *rest)
        return jnp.sum(jnp.cos(found.value)), found

    return loss


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_alternating_solves_reach_a_state_that_none_would_leave(kind):
    run, local, faces, pairs = schwarz(kind)
    loss = loss_of(run)
    (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(THETA)
    assert bool(jnp.all(found.report.ok)) and 2 < int(found.report.steps[0]) < 60
    # one expert alone, with its neighbours' traces as data
    k = 1
    own = [f for f, (to, _) in enumerate(pairs) if to == k]
    given = [trace(found.value[pairs[f][1]], (faces[f], THETA))["value"] for f in own]
    keep = BOXES.group(X[:, None], overlap=0.4).mask[k]

    def rows(c, _):
        x = local["x"][k]
        r = jnp.where(keep, residual_of(kind)(c, ({"x": x}, THETA))["equation"], 0)
        face = [
            0.5 * (trace(c, (faces[f], THETA))["value"] - g) / np.sqrt(len(own))
            for f, g in zip(own, given, strict=True)
        ]
        return jnp.concatenate([r / jnp.sqrt(jnp.sum(keep)), *face])

    alone = layers.HardConstraint(rows, SOLVER, ridge=RIDGE, normalize=False)(START[k])
    np.testing.assert_allclose(found.value[k], alone.value, atol=1e-9)
    fast = jax.jit(loss)
    expected = finite_difference(lambda t: fast(t)[0], THETA)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_alternating_solves_spread_over_a_mesh_and_say_when_they_run_out():
    mesh = jax.make_mesh(
        (2,), ("experts",), devices=jax.devices()[:2],
        axis_types=(jax.sharding.AxisType.Auto,),
    )  # fmt: skip
    grads = [
        jax.jit(jax.value_and_grad(loss_of(schwarz("linear", m)[0]), has_aux=True))(THETA)
        for m in (None, mesh)
    ]
    np.testing.assert_allclose(grads[1][0][0], grads[0][0][0], rtol=1e-9)
    np.testing.assert_allclose(grads[1][1], grads[0][1], rtol=1e-9)
    (_, found), gradient = jax.jit(
        jax.value_and_grad(loss_of(schwarz("linear", max_sweeps=2)[0]), has_aux=True)
    )(THETA)
    assert not bool(jnp.any(found.report.ok)) and float(gradient) == 0
    assert bool(jnp.all(found.report.result == RESULTS.max_steps_reached))


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_a_bad_expert_leaves_alternating_solves_of_the_others_intact(kind):
    run, local, _, _ = schwarz(kind)
    broken = {"x": local["x"].at[0, 3].set(jnp.nan)}
    loss = jax.jit(jax.value_and_grad(loss_of(run), has_aux=True))
    (_, found), gradient = loss(THETA, broken)
    assert found.report.ok.tolist() == [False, True, True]
    assert bool(jnp.all(jnp.isfinite(found.value))) and bool(jnp.isfinite(gradient))
    fast = jax.jit(loss_of(run))
    expected = finite_difference(lambda t: fast(t, broken)[0], THETA)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


# ---- one blended field ---------------------------------------------------------------------


def field(c, args):
    point, shared = args
    return problems.features(shared["theta"], point, N)[0] @ c


def gates(point, shared):
    return layers.soft_gates(point, shared["centres"], 0.2)


def blended_residual(kind):
    def residual(u, args):
        local, _ = args
        value, slope = jax.vmap(u)(local["x"]), jax.vmap(layers.derivative(u))(local["x"])
        reaction = 0.1 * value**3 if kind == "nonlinear" else 0.0
        equation = 0.2 * slope + value + reaction - problems.data(local["x"][:, 0])
        return {"equation": equation, "start": value[:1] - 0.7}

    return residual


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_blended_field_equals_one_dense_solve_and_gates_are_differentiable(kind):
    coupling = layers.PartitionOfUnity(field, gates)
    groups = BOXES.group(X[:, None])
    local = groups.split({"x": X[:, None]})
    first = jnp.arange(EXPERTS) == 0
    mask = {"equation": groups.mask, "start": first[:, None]}
    layer = layers.MixtureOfExperts(constraint(blended_residual(kind), kind), coupling)
    shared = {"theta": jnp.array(THETA), "centres": jnp.array([[0.15], [0.5], [0.9]])}

    def loss(shared):
        found = layer(START, local, shared, mask)
        u = coupling.blend(found.value, shared)
        return jnp.sum(jnp.cos(jax.vmap(u)(X[:, None]))), found

    (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(shared)
    assert bool(jnp.all(found.report.ok)) and float(jnp.max(found.report.optimality)) < 1e-9

    def everything(c, shared):
        u = coupling.blend(c, shared)
        whole = blended_residual(kind)(u, ({"x": X[:, None]}, shared))
        return {"equation": whole["equation"] / np.sqrt(12), "start": whole["start"]}

    dense = layers.HardConstraint(
        everything, None if kind == "linear" else SOLVER, linear=kind == "linear", ridge=RIDGE,
        normalize=False,
    )  # fmt: skip
    expected = jax.jit(dense)(START, shared).value
    np.testing.assert_allclose(found.value, expected, atol=1e-9)
    fast = jax.jit(loss)

    def moved(h):
        return fast(shared | {"centres": shared["centres"].at[1, 0].add(h)})[0]

    np.testing.assert_allclose(gradient["centres"][1, 0], finite_difference(moved, 0.0), rtol=1e-6)
    assert abs(float(gradient["centres"][1, 0])) > 1e-4


def test_blended_field_without_the_rows_of_a_bad_expert():
    coupling = layers.PartitionOfUnity(field, gates)
    groups = BOXES.group(X[:, None])
    local = groups.split({"x": X[:, None]})
    layer = layers.MixtureOfExperts(constraint(blended_residual("linear"), "linear"), coupling)
    shared = {"theta": jnp.array(THETA), "centres": jnp.array([[0.15], [0.5], [0.9]])}
    mask = {"equation": groups.mask, "start": jnp.array([[True], [False], [False]])}

    def loss(theta, local, mask):
        found = layer(START, local, shared | {"theta": theta}, mask)
        return jnp.sum(jnp.cos(found.value)), found

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    broken = {"x": local["x"].at[2, 3, 0].set(jnp.nan)}
    (_, found), gradient = run(shared["theta"], broken, mask)
    assert found.report.ok.tolist() == [True, True, False]
    without = mask | {"equation": groups.mask & (jnp.arange(EXPERTS) != 2)[:, None]}
    (_, expected), slope = run(shared["theta"], local, without)
    np.testing.assert_allclose(found.value, expected.value, atol=1e-11)
    np.testing.assert_allclose(gradient, slope, rtol=1e-9)


def test_imbalance_and_gates():
    centres = jnp.array([[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    points = jax.random.uniform(jax.random.key(0), (50, 2))
    weights = jax.vmap(lambda p: layers.soft_gates(p, centres, jnp.array([0.3, 0.5])))(points)
    np.testing.assert_allclose(jnp.sum(weights, axis=1), 1, rtol=1e-12)
    hard = jax.vmap(lambda p: layers.soft_gates(p, centres, 1e-2))(points)
    nearest = jnp.argmin(jnp.sum((points[:, None] - centres[None]) ** 2, axis=-1), axis=1)
    np.testing.assert_array_equal(jnp.argmax(hard, axis=1), nearest)
    np.testing.assert_allclose(layers.imbalance(jnp.full((5, 3), 1 / 3)), 1, rtol=1e-12)
    np.testing.assert_allclose(layers.imbalance(jnp.eye(3)[jnp.zeros(5, int)]), 3, rtol=1e-12)


def test_bad_input_is_refused_by_name():
    plain = layers.HardConstraint(residual_of("linear"), linear=True)
    with pytest.raises(TypeError, match="coupling is a function, expected Interface"):
        layers.MixtureOfExperts(plain, trace)
    bounded = layers.HardConstraint(residual_of("linear"), lower=0.0)
    with pytest.raises(ValueError, match="constraint has bounds, expected rows of the residual"):
        layers.MixtureOfExperts(bounded, layers.PartitionOfUnity(field, gates))
    mesh = jax.make_mesh((2,), ("experts",), devices=jax.devices()[:2])
    with pytest.raises(ValueError, match="mesh is given, expected None with PartitionOfUnity"):
        layers.MixtureOfExperts(plain, layers.PartitionOfUnity(field, gates), mesh=mesh)
    with pytest.raises(ValueError, match="expected leaves with first axis 4, one entry per face"):
        coupling = layers.Schwarz(trace, [(0, 1), (1, 0), (1, 2), (2, 1)])
        layers.MixtureOfExperts(plain, coupling)(START, {"x": X.reshape(3, 12)}, THETA, None, X[:3])
