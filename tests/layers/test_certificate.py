"""Certificates: what they say of good answers, of bad ones, and of experts that do not agree."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_ext import layers

_spec = importlib.util.spec_from_file_location(
    "problems_of_layers", pathlib.Path(__file__).with_name("problems.py")
)
problems = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(problems)

EXPERTS, CAPACITY, N = 4, 12, 4
X = jnp.linspace(-1.0, 1.0, EXPERTS * CAPACITY).reshape(EXPERTS, CAPACITY)
BETWEEN = (X[:, 1:] + X[:, :-1]) / 2
PAIRS = np.array([[0, 1], [1, 2], [2, 3]])
FACES = (X[:-1, -1] + X[1:, 0]) / 2


def residual(c, args):
    x, theta = args
    return {"equation": problems.features(theta, x, N) @ c - problems.data(x)}


def trace(c, args):
    point, theta = args
    return {"value": problems.features(theta, point[None], N) @ c}


def test_every_status_has_its_case_and_a_failure_is_named():
    layer = layers.MixtureOfExperts(layers.HardConstraint(residual, linear=True, ridge=0.1))
    rows = jnp.array([CAPACITY, 6, 2, 0])
    mask = {"equation": jnp.arange(CAPACITY)[None] < rows[:, None]}
    certify = jax.jit(lambda x, mask: layers.certify(
        layer, jnp.zeros((EXPERTS, N)), (x, 1.3), mask, held_out=BETWEEN
    ))  # fmt: skip
    starving = certify(X, mask)
    names = [line.split()[1] for line in str(starving).splitlines()[1:5]]
    assert names == ["solved", "starved", "underdetermined", "empty"]
    assert not bool(jnp.any(starving.failed)) and bool(starving.trustworthy)
    assert float(jnp.max(starving.audit.adjoint_residual)) < 1e-12
    assert float(jnp.min(starving.audit.lowest_curvature)) > 0
    assert float(starving.derivative_error) < 1e-6

    certificate = certify(X.at[2, 4].set(jnp.nan), {"equation": jnp.ones_like(X, bool)})
    assert certificate.failed.tolist() == [False, False, True, False]
    assert "failed (linear_solve_failed)" in str(certificate)
    assert "NOT trustworthy" in str(certificate) and not bool(certificate.trustworthy)


def test_rank_deficient_rows_are_named():
    layer = layers.HardConstraint(lambda c, x: (c[0] + c[1]) * x - 1.0, linear=True)
    assert "rank_deficient" in str(layers.certify(layer, jnp.zeros(2), X[0]))


def test_largest_residual_is_that_of_points_that_were_not_used():
    layer = layers.HardConstraint(residual, linear=True)
    few, every = X.reshape(-1)[::12], X.reshape(-1)
    certificate = layers.certify(layer, jnp.zeros(N), (few, 1.3), held_out=(every, 1.3))
    used = float(certificate.report.max_residual["equation"])
    value = certificate.found.value
    largest = float(jnp.max(jnp.abs(residual(value, (every, 1.3))["equation"])))
    np.testing.assert_allclose(certificate.largest_residual["equation"], largest, rtol=1e-12)
    assert largest > 1e3 * used  # as many points as unknowns: met there, and nowhere else


@pytest.mark.parametrize("coupling", ["interface", "schwarz", "none"])
def test_jumps_are_measured_whether_or_not_experts_are_coupled(coupling):
    constraint = layers.HardConstraint(residual, linear=True, ridge=0.1)
    interface = layers.Interface(trace, PAIRS, {"value": 30.0})
    pairs = {
        "none": None,
        "interface": interface,
        "schwarz": layers.Schwarz(trace, PAIRS, {"value": 30.0}),  # each takes from the next
    }
    mesh = jax.make_mesh(
        (2,), ("experts",), devices=jax.devices()[:2],
        axis_types=(jax.sharding.AxisType.Auto,),
    )  # fmt: skip
    mesh = mesh if coupling == "none" else None
    layer = layers.MixtureOfExperts(constraint, pairs[coupling], mesh=mesh)
    certificate = jax.jit(lambda theta: layers.certify(
        layer, jnp.zeros((EXPERTS, N)), (X, theta), faces=FACES,
        interface=interface if coupling == "none" else None,
    ))(1.3)  # fmt: skip
    assert bool(certificate.trustworthy) and float(certificate.derivative_error) < 1e-5
    value = certificate.found.value
    sides = [
        jax.vmap(lambda c, p: trace(c, (p, 1.3))["value"])(value[PAIRS[:, s]], FACES)
        for s in (0, 1)
    ]
    largest = jnp.max(jnp.abs(sides[0] - sides[1]))
    np.testing.assert_allclose(certificate.jumps["value"], largest, rtol=1e-9)
    assert (float(largest) < 1e-2) == (coupling != "none")


def test_a_saddle_point_is_named():
    def two_wells(c, _):  # stationary at 0, between the minima ±1
        return c**2 - 1.0

    layer = layers.HardConstraint(two_wells, ridge=0.0)
    certificate = layers.certify(layer, jnp.zeros(1))
    assert float(certificate.audit.lowest_curvature) < 0 and not bool(certificate.trustworthy)
    assert "saddle" in str(certificate)


def test_bad_input_is_refused_by_name():
    layer = layers.MixtureOfExperts(layers.HardConstraint(residual, linear=True))
    with pytest.raises(ValueError, match=r"expected a pair \(local, shared\)"):
        layers.certify(layer, jnp.zeros((EXPERTS, N)), X)
    with pytest.raises(TypeError, match="layer is a function, expected HardConstraint"):
        layers.certify(residual, jnp.zeros(N), X)
