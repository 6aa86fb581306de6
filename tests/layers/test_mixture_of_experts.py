"""Mixtures of experts: the global block-diagonal solve, devices, failures, partitions."""

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

EXPERTS, CAPACITY, UNKNOWNS = 8, 16, 4
RIDGE = 0.1  # well conditioned, so that tolerances of 1e-10 are above rounding
X = (jnp.arange(EXPERTS * CAPACITY, dtype=float) + 0.5) / 40 - 1.6
LOCAL = X.reshape(EXPERTS, CAPACITY)
START = jnp.zeros((EXPERTS, UNKNOWNS))
# quadratic convergence, so that the last step leaves rounding errors only
SOLVER = solvers.GradNormSmooth(solvers.ExactHessian(), atol=1e-13)


def affine(c, args):
    x, (theta, level) = args
    b = problems.features(theta, x, UNKNOWNS)
    return {"equation": b @ c - problems.data(x), "boundary": (b @ c)[:1] - level}


def nonlinear(c, args):
    x, (theta, level) = args
    u = problems.features(theta, x, UNKNOWNS) @ c
    return {"equation": u + 0.1 * u**3 - problems.data(x), "boundary": u[:1] - level}


def constraint(kind):
    if kind == "linear":
        return layers.HardConstraint(affine, linear=True, ridge=RIDGE)
    return layers.HardConstraint(nonlinear, SOLVER, ridge=RIDGE)


def loss_of(layer, local=LOCAL, init=START, mask=None):
    def loss(shared):
        found = layer(init, local, shared, mask)
        return jnp.sum(jnp.cos(found.value)), found

    return loss


def mesh_of(devices):
    return jax.make_mesh(
        (devices,), ("experts",), devices=jax.devices()[:devices],
        axis_types=(jax.sharding.AxisType.Auto,),
    )  # fmt: skip


def value_and_grad(layer, *args, **options):
    loss = loss_of(layer, *args, **options)
    (value, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        problems.parameters()
    )
    return value, jnp.stack(gradient), found


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_experts_equal_the_block_diagonal_global_solve(kind):
    local, init = LOCAL[:3], START[:3]
    experts = layers.MixtureOfExperts(constraint(kind))

    def together(c, args):
        x, shared = args
        fun = affine if kind == "linear" else nonlinear
        blocks = [fun(c[k], (x[k], shared)) for k in range(3)]
        return {f"{name} {k}": b[name] for k, b in enumerate(blocks) for name in b}

    solver = None if kind == "linear" else SOLVER
    whole = layers.HardConstraint(together, solver, linear=kind == "linear", ridge=RIDGE)

    def loss(shared):
        found = whole(init, (local, shared))
        return jnp.sum(jnp.cos(found.value)), found

    (value, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        problems.parameters()
    )
    parts = value_and_grad(experts, local, init)
    assert bool(found.report.ok) and bool(jnp.all(parts[2].report.ok))
    np.testing.assert_allclose(parts[2].value, found.value, rtol=0, atol=1e-10)
    np.testing.assert_allclose(parts[0], value, rtol=1e-10)
    np.testing.assert_allclose(parts[1], jnp.stack(gradient), rtol=1e-10)


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_any_number_of_devices_gives_the_same_loss_and_gradient(kind):
    alone = value_and_grad(layers.MixtureOfExperts(constraint(kind)))
    assert bool(jnp.all(alone[2].report.ok))
    for devices in (1, 2, 4, 8):
        spread = value_and_grad(layers.MixtureOfExperts(constraint(kind), mesh=mesh_of(devices)))
        assert bool(jnp.all(spread[2].report.ok))
        np.testing.assert_allclose(spread[0], alone[0], rtol=1e-9)
        np.testing.assert_allclose(spread[1], alone[1], rtol=1e-9)


def test_experts_need_not_divide_by_devices():
    mesh = mesh_of(4)
    alone = value_and_grad(layers.MixtureOfExperts(constraint("linear")), LOCAL[:6], START[:6])
    layer = layers.MixtureOfExperts(constraint("linear"), mesh=mesh)
    spread = value_and_grad(layer, LOCAL[:6], START[:6])
    assert spread[2].value.shape == (6, UNKNOWNS)
    np.testing.assert_allclose(spread[1], alone[1], rtol=1e-9)


def test_in_sequence_is_the_same():
    batched = value_and_grad(layers.MixtureOfExperts(constraint("nonlinear")))
    sequence = value_and_grad(layers.MixtureOfExperts(constraint("nonlinear"), backend="map"))
    np.testing.assert_allclose(sequence[1], batched[1], rtol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_one_bad_expert_leaves_the_others_intact(kind):
    layer = layers.MixtureOfExperts(constraint(kind))
    good = jnp.array([0, 2, 3])
    clean = value_and_grad(layer, LOCAL[good], START[good])
    bad = LOCAL[:4].at[1, 5].set(jnp.nan)

    def loss(shared):
        found = layer(START[:4], bad, shared)
        u = jax.vmap(lambda x, c: problems.features(shared[0], x, UNKNOWNS) @ c)(
            LOCAL[:4], found.value
        )
        return jnp.sum(found.gate(jnp.sum(jnp.cos(found.value), axis=1))), (found, u)

    (value, (found, u)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        problems.parameters()
    )
    assert found.report.ok.tolist() == [True, False, True, True]
    assert bool(jnp.all(jnp.isfinite(u)))
    np.testing.assert_allclose(found.value[good], clean[2].value, atol=1e-12)
    np.testing.assert_allclose(value, clean[0], rtol=1e-12)
    np.testing.assert_allclose(jnp.stack(gradient), clean[1], rtol=1e-10)


def test_order_of_experts_does_not_matter_and_one_is_the_layer_itself():
    experts = jax.jit(layers.MixtureOfExperts(constraint("linear")))
    shared, order = problems.parameters(), jnp.array([2, 0, 1])
    found = experts(START[:3], LOCAL[:3], shared)
    moved = experts(START[:3], LOCAL[:3][order], shared)
    np.testing.assert_allclose(moved.value, found.value[order], rtol=1e-12)
    alone = constraint("linear")(START[0], (LOCAL[0], shared))
    np.testing.assert_allclose(found.value[0], alone.value, rtol=1e-12)


def test_an_expert_that_did_not_converge_passes_no_derivative():
    hasty = layers.HardConstraint(nonlinear, ridge=RIDGE, max_steps=1)
    value, gradient, found = value_and_grad(layers.MixtureOfExperts(hasty), LOCAL[:2], START[:2])
    assert not bool(jnp.any(found.report.ok)) and bool(jnp.isfinite(value))
    assert bool(jnp.all(found.report.result == RESULTS.max_steps_reached))
    np.testing.assert_array_equal(gradient, 0)


def test_starved_and_empty_experts_are_named_and_finite():
    layer = layers.MixtureOfExperts(constraint("linear"))
    counts = jnp.array([CAPACITY, 2, 0])
    mask = {
        "equation": jnp.arange(CAPACITY)[None, :] < counts[:, None],
        "boundary": (counts > 0)[:, None],
    }
    _, gradient, found = value_and_grad(layer, LOCAL[:3], START[:3], mask=mask)
    assert found.report.underdetermined.tolist() == [False, True, True]
    assert found.report.rank_deficient.tolist() == [False, True, True]
    assert found.report.empty.tolist() == [False, False, True]
    assert bool(jnp.all(found.report.ok)) and bool(jnp.all(jnp.isfinite(gradient)))
    assert bool(jnp.all(found.value[2] == 0))
    shared, h = problems.parameters(), 1e-5
    loss = jax.jit(loss_of(layer, LOCAL[:3], START[:3], mask))
    up, down = (loss((shared[0] + s, shared[1]))[0] for s in (h, -h))
    np.testing.assert_allclose(gradient[0], (up - down) / (2 * h), rtol=1e-6)


def test_boxes_assign_group_and_merge_every_point():
    boxes = layers.BoxPartition((0.0, -1.0), (2.0, 1.0), (4, 3))
    points = jax.random.uniform(jax.random.key(0), (200, 2), minval=jnp.array([[0.0, -1.0]]),
                                maxval=jnp.array([[2.0, 1.0]]))  # fmt: skip
    low, high = boxes.corners()
    labels = np.asarray(boxes.assign(points))
    assert np.all((points >= low[labels]) & (points <= high[labels]))
    groups = boxes.group(points)
    assert int(groups.mask.sum()) == 200 and int(groups.dropped) == 0
    np.testing.assert_array_equal(groups.merge(groups.split(points)), points)
    assert groups.mask.shape[1] == np.bincount(labels, minlength=12).max()
    full = boxes.group(points, capacity=5)
    assert int(full.dropped) == np.maximum(np.bincount(labels, minlength=12) - 5, 0).sum()
    weights = boxes.windows(points, overlap=0.3)
    np.testing.assert_allclose(jnp.sum(weights, axis=1), 1, rtol=1e-12)
    wide = boxes.group(points, overlap=0.3)
    inside = np.zeros((12, 200), bool)
    for k, (index, mask) in enumerate(zip(wide.index, wide.mask, strict=True)):
        inside[k, np.asarray(index)[np.asarray(mask)]] = True
    assert np.all(inside.T[np.asarray(weights) > 1e-12])


@pytest.mark.parametrize("splits", [(3, 1), (1, 4), (3, 4)])
def test_slabs_of_time_or_space_need_not_divide_the_grid(splits):
    grid = jnp.stack(jnp.meshgrid(jnp.arange(10.0), jnp.arange(7.0), indexing="ij"), -1)
    points = grid.reshape(-1, 2)
    groups = layers.BoxPartition((0.0, 0.0), (9.0, 6.0), splits).group(points)
    np.testing.assert_array_equal(groups.merge(groups.split(points)), points)
    counts = np.asarray(groups.mask.sum(axis=1))
    assert counts.sum() == 70 and counts.max() == groups.mask.shape[1] and counts.min() < 70 // 3


def test_labels_and_random_groups_cover_every_point_once():
    labels = jnp.array([2, 0, -1, 2, 2])
    groups = layers.group_by_label(labels, 3)
    assert groups.mask.sum(axis=1).tolist() == [1, 0, 3]
    merged = groups.merge(groups.split(jnp.arange(5.0)))
    np.testing.assert_array_equal(merged, [0, 1, np.nan, 3, 4])
    chance = jax.jit(lambda key: layers.group_randomly(key, 11, 4))(jax.random.key(1))
    assert sorted(chance.mask.sum(axis=1).tolist()) == [2, 3, 3, 3]
    np.testing.assert_array_equal(chance.merge(chance.split(jnp.arange(11.0))), jnp.arange(11))


def test_overlapping_faces_are_the_boundary_of_one_box_inside_the_other():
    boxes = layers.BoxPartition((0.0, 0.0), (1.0, 3.0), (2, 3))
    pairs, places, normals = boxes.interfaces(points=2, overlap=0.3)
    assert len(pairs) == 2 * 7 and places.shape == (14, 2, 2)
    low, high = boxes.corners()
    size = high[0] - low[0]
    for (owner, other), face, axis in zip(pairs, places, normals, strict=True):
        up = low[other, axis] > low[owner, axis]
        edge = high[owner, axis] + 0.3 * size[axis] if up else low[owner, axis] - 0.3 * size[axis]
        np.testing.assert_allclose(face[:, axis], edge)
        assert np.all((face > low[other]) & (face < high[other]))


def test_interfaces_lie_between_their_two_boxes():
    boxes = layers.BoxPartition((0.0, 0.0), (1.0, 3.0), (2, 3))
    pairs, places, normals = boxes.interfaces(points=2)
    assert len(pairs) == 3 + 4 and places.shape == (7, 2, 2)
    low, high = boxes.corners()
    for (a, b), face, axis in zip(pairs, places, normals, strict=True):
        np.testing.assert_allclose(face[:, axis], high[a, axis])
        np.testing.assert_allclose(face[:, axis], low[b, axis])
        other = 1 - axis
        assert np.all((face[:, other] > low[a, other]) & (face[:, other] < high[a, other]))


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_coupled_experts_equal_one_dense_solve_and_finite_differences(kind):
    pairs = np.array([[0, 1], [1, 2]])
    faces = LOCAL[:2, -1] + 0.0125

    def trace(c, args):
        point, (theta, _) = args
        return {"value": problems.features(theta, point[None], UNKNOWNS) @ c}

    layer = layers.MixtureOfExperts(
        constraint(kind), layers.Interface(trace, pairs, {"value": 3.0})
    )

    def loss(shared):
        found = layer(START[:3], LOCAL[:3], shared, None, faces)
        return jnp.sum(jnp.cos(found.value)), found

    shared, h = problems.parameters(), 1e-5
    (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(shared)
    assert bool(jnp.all(found.report.ok))

    def everything(c, shared):
        fun = affine if kind == "linear" else nonlinear
        out = {}
        for k in range(3):
            for name, block in fun(c[k], (LOCAL[k], shared)).items():
                out[f"{name} {k}"] = block / np.sqrt(block.size)
        for f, (a, b) in enumerate(pairs):
            sides = [trace(c[k], (faces[f], shared))["value"] for k in (a, b)]
            out[f"face {f}"] = 3.0 * (sides[0] - sides[1])
        return out

    dense = layers.HardConstraint(
        everything, None if kind == "linear" else SOLVER, linear=kind == "linear", ridge=RIDGE,
        normalize=False,
    )  # fmt: skip
    expected = jax.jit(dense)(START[:3], shared).value
    np.testing.assert_allclose(found.value, expected, atol=1e-9)
    up, down = (jax.jit(loss)((shared[0] + s, shared[1]))[0] for s in (h, -h))
    np.testing.assert_allclose(gradient[0], (up - down) / (2 * h), rtol=1e-6)


def test_a_bad_expert_among_coupled_ones_is_cut_off():
    pairs = np.array([[0, 1], [1, 2]])

    def trace(c, args):
        point, (theta, _) = args
        return problems.features(theta, point[None], UNKNOWNS) @ c

    layer = layers.MixtureOfExperts(constraint("linear"), layers.Interface(trace, pairs))
    local = LOCAL[:3].at[2, 0].set(jnp.nan)

    def loss(shared):
        found = layer(START[:3], local, shared, None, LOCAL[:2, -1])
        return jnp.sum(jnp.cos(found.value)), found

    (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(problems.parameters())
    assert found.report.ok.tolist() == [True, True, False]
    assert bool(jnp.all(jnp.isfinite(jnp.stack(gradient))))
    two = layers.MixtureOfExperts(constraint("linear"), layers.Interface(trace, pairs[:1]))
    faces = LOCAL[:1, -1]
    pair = jax.jit(lambda *a: two(*a))(START[:2], LOCAL[:2], problems.parameters(), {}, faces)
    np.testing.assert_allclose(found.value[:2], pair.value, atol=1e-10)


def test_bad_input_is_refused_by_name():
    layer, shared = layers.MixtureOfExperts(constraint("linear")), problems.parameters()
    with pytest.raises(ValueError, match=r"first axes .* expected one number of experts"):
        layer(START, LOCAL[:3], shared)
    with pytest.raises(TypeError, match="constraint is a function, expected HardConstraint"):
        layers.MixtureOfExperts(affine)
    with pytest.raises(ValueError, match="backend is 'loop', expected one of: 'vmap', 'map'"):
        layers.MixtureOfExperts(constraint("linear"), backend="loop")
    with pytest.raises(ValueError, match="expected an axis of the mesh: 'devices'"):
        layers.MixtureOfExperts(constraint("linear"), mesh=jax.make_mesh((2,), ("devices",)))
    with pytest.raises(ValueError, match=r"upper\[0\] is 0, expected a number > 1"):
        layers.BoxPartition((1.0,), (0.0,), (2,))
    with pytest.raises(ValueError, match="capacity is None, expected a number of places under jit"):
        jax.jit(lambda x: layers.BoxPartition((0.0,), (1.0,), (2,)).group(x))(X[:, None])
