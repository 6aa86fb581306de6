"""Constraint layers as benchmark problems, and the training that compares soft with hard."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_ext.bench import physics_training as training
from jaxopt_ext.bench import suite
from jaxopt_ext.bench.problems import constraint_layers, physics
from jaxopt_ext.bench.problems.grid_equations import DiffusionSorption, NavierStokes
from jaxopt_ext.bench.suites import physics as physics_suite

SMALL = DiffusionSorption((6, 8))


@pytest.fixture(scope="module", params=[DiffusionSorption, constraint_layers.Heat])
def layer_problem(request):
    return constraint_layers.build(request.param((6, 8)), 4, 2)


def test_dense_gradient_agrees_with_finite_differences(layer_problem):
    """Each difference solves the layers again, by our solver with the exact Hessian."""
    rule = physics_suite.layer()(layer_problem, suite_budget())
    parameters, init, levels = map(
        jnp.asarray, (layer_problem.parameters, layer_problem.init, layer_problem.levels)
    )
    solve = jax.jit(lambda p: jax.vmap(lambda level: rule(init, (p, level)))(levels))
    found = solve(parameters)
    c, slope = constraint_layers.exact_gradient(layer_problem, found)
    np.testing.assert_allclose(c, found, atol=1e-7)

    def loss(p):
        def each(c, level):
            return layer_problem.loss(c, p, level)

        return jnp.mean(jax.vmap(each)(solve(p), levels))

    for index in (0, 5):
        step = jnp.zeros_like(parameters).at[index].set(1e-4)
        difference = (loss(parameters + step) - loss(parameters - step)) / 2e-4
        np.testing.assert_allclose(slope[index], difference, rtol=2e-5, atol=1e-9)


def suite_budget():
    return physics_suite.Budget(1e-10, 100, 0, 0, "float64")


def test_our_layers_have_that_gradient(layer_problem):
    makes = [physics_suite.layer()]
    if layer_problem.linear:
        makes.append(physics_suite.layer(linear=True))
    inputs = tuple(
        map(jnp.asarray, (layer_problem.parameters, layer_problem.init, layer_problem.levels))
    )
    for make in makes:
        rule = make(layer_problem, suite_budget())
        slope, found = jax.jit(constraint_layers.gradient(layer_problem, rule))(*inputs)
        _, expected = constraint_layers.exact_gradient(layer_problem, found)
        np.testing.assert_allclose(slope, expected, rtol=1e-6, atol=1e-10)


def test_suite_is_listed():
    loaded = suite.load("physics")
    names = {one.name for one in loaded.contenders()}
    assert "jaxopt_ext HardConstraint" in names
    assert any(name.startswith("optimistix") for name in names)
    assert any(name.startswith("jaxopt ") for name in names)


@pytest.mark.parametrize("space", [8, 16])
def test_rows_vanish_for_the_reference_as_the_grid_gets_finer(space):
    """The rows and the reference solver are discretized apart; they meet at second order."""

    def size(factor):
        equation = DiffusionSorption((factor * 20 + 1, factor * space + 1))
        field = equation.reference(jnp.asarray(0.1))
        values = {k: v[:, 0] for k, v in equation.terms(field[None]).items()}
        nodes = equation.blocks()["equation"]
        late = nodes[equation.coordinates()[nodes, 0] > 0.5]
        rows = equation.rows("equation", {k: v[late] for k, v in values.items()}, late)
        return float(jnp.sqrt(jnp.mean(rows**2)))

    assert size(1) > 2.5 * size(2)


def test_navier_stokes_rows_vanish_for_the_reference():
    def size(times):
        equation = NavierStokes((times, 16, 16))
        x, y = (2 * jnp.pi * jnp.arange(16.0) / 16)[:, None], (jnp.arange(16.0) / 16)[None, :]
        start = jnp.cos(x) * jnp.cos(2 * jnp.pi * y) + 0.3 * jnp.sin(x + 2 * jnp.pi * y)
        field = equation.reference(start)
        values = {k: v[:, 0] for k, v in equation.terms(field[None]).items()}
        inner = np.arange(equation.size).reshape(equation.shape)[1:-1].ravel()
        rows = equation.rows("equation", {k: v[inner] for k, v in values.items()}, inner)
        return float(jnp.max(jnp.abs(rows)))

    coarse, fine = size(9), size(17)
    assert fine < 0.3 * coarse


def tiny(method, splits=(1, 2), **more):
    setting = training.Setting(
        "small", method, splits, (50.0, 1.0), 0, 4, functions=3, width=4, depth=1, batch=1
    )
    return setting._replace(**more)


@pytest.fixture(autouse=True)
def _small_equation(monkeypatch):
    monkeypatch.setitem(training.EQUATIONS, "small", SMALL)


def test_every_row_of_the_grid_has_an_owner():
    cut = training.cut(SMALL, (1, 2), own_rows=True)
    blocks = SMALL.blocks()
    assert sorted(cut.index[cut.mask].tolist()) == sorted(blocks["equation"].tolist())
    for name, owned in cut.others.items():
        np.testing.assert_array_equal(owned.sum(axis=0), 1, err_msg=name)
    assert len(cut.pairs) == SMALL.shape[0]  # one face, one pair of nodes per time
    assert np.all(cut.pairs == [0, 1])


def test_periodic_grids_have_faces_at_the_seam():
    equation = NavierStokes((3, 4, 4))
    cut = training.cut(equation, (1, 2, 1), own_rows=True)
    assert len(cut.pairs) == 2 * 3 * 4  # two faces in x


@pytest.mark.slow
def test_gradient_through_coupled_experts_agrees_with_differences(monkeypatch):
    monkeypatch.setattr(training, "ACCURACY", 1e-14)  # differences see the error of the solves
    problem = training.problem_of(tiny("coupled"))
    network = training.network_of(problem.setting)
    weights = jnp.array([50.0, 1.0])
    parameters = jnp.array([0.1])

    @jax.jit
    def loss(network):
        return problem.loss(network, parameters, weights)[0]

    slope = jax.jit(jax.grad(loss))(network)
    leaves, structure = jax.tree.flatten(network)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    direction = structure.unflatten(
        [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    )

    def along(h):
        return loss(jax.tree.map(lambda leaf, d: leaf + h * d, network, direction))

    difference = (8 * (along(1e-4) - along(-1e-4)) - (along(2e-4) - along(-2e-4))) / 12e-4
    product = sum(jnp.vdot(a, b) for a, b in zip(
        jax.tree.leaves(slope), jax.tree.leaves(direction), strict=True))  # fmt: skip
    np.testing.assert_allclose(product, difference, rtol=2e-5)


@pytest.fixture
def _promotion():
    """The Adam of optax multiplies floats with integer counts."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("_promotion")
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    setting = tiny("experts")
    whole = training.train(setting, tmp_path / "whole")
    training.train(setting, tmp_path / "parts", stop_after=2)
    parts = training.train(setting, tmp_path / "parts")
    one, two = (
        (tmp_path / folder / f"{setting.name}.eqx").read_bytes() for folder in ("whole", "parts")
    )
    assert one == two
    assert whole["tests"] == parts["tests"]
    assert [point["step"] for point in parts["curve"]] == [2, 4]
    lines = training.table(training.read(tmp_path / "whole")).splitlines()
    assert len(lines) == 3
    assert "| experts | 2 | 1 |" in lines[2]


@pytest.mark.slow
@pytest.mark.usefixtures("_promotion")
def test_training_lowers_the_loss_and_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    setting = tiny("global", (1, 1), steps=60)
    result = training.train(setting, tmp_path)
    problem, start = training.problem_of(setting), training.begin(setting)
    end = eqx.tree_deserialise_leaves(tmp_path / f"{setting.name}.eqx", start)
    loss = jax.jit(problem.loss)
    parameters, weights = training.test_parameters(SMALL), jnp.asarray(setting.weights)
    before, after = (loss(one.network, parameters, weights)[0] for one in (start, end))
    assert float(after) < float(before)
    training.picture([result], tmp_path, tmp_path / "maps.png")
    assert (tmp_path / "maps.png").stat().st_size > 10_000


def test_reference_start_is_that_of_the_rows():
    level = jnp.asarray(0.07)
    exact = SMALL.reference(level)
    x = jnp.linspace(0.0, 1.0, SMALL.shape[1])
    np.testing.assert_allclose(exact[0], physics.sorption_start(level, x), atol=1e-12)
