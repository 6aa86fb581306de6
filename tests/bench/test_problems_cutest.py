"""CUTEst problems: signs, bounds and optima; nothing of JAX or of the real package is touched."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_ext.bench.problems import cutest

needs_sif2jax = pytest.mark.skipif(
    importlib.util.find_spec("sif2jax") is None, reason="sif2jax is not installed"
)


@pytest.fixture(autouse=True)
def _promotion():
    """The package relies on JAX's usual promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_lists_are_long_enough_and_names_unique():
    names = [*cutest.UNCONSTRAINED, *cutest.LARGE, *cutest.EQUALITY]
    names += [*cutest.INEQUALITY, *cutest.NEGATIVE]
    assert len(names) == len(set(names)) == len(cutest.ENTRIES)
    assert len(cutest.UNCONSTRAINED) >= 40 and len(cutest.LARGE) >= 5
    assert len(cutest.EQUALITY) == 45
    assert len(cutest.INEQUALITY) + len(cutest.NEGATIVE) >= 30
    assert set(names) >= cutest.QUICK | set(cutest.reference_optima())


def test_a_missing_package_is_named_with_the_extra(monkeypatch):
    cutest._modules.cache_clear()
    monkeypatch.setattr(cutest.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"sif2jax, which is not installed.*jaxopt-ext\[peers\]"):
        cutest.ENTRIES["cutest-HS6"].build()


@needs_sif2jax
def test_every_problem_of_the_lists_is_in_the_package():
    modules = cutest._modules()
    assert {name.removeprefix("cutest-") for name in cutest.ENTRIES} <= set(modules)
    with pytest.raises(ImportError, match="this version of sif2jax has no problem NONE"):
        cutest.source("NONE")


@needs_sif2jax
def test_the_real_package_and_the_configuration_are_left_alone():
    before = {name: getattr(jax.config, name) for name in ("jax_enable_x64", "jax_debug_nans")}
    cutest.build("HS6")
    assert "sif2jax" not in sys.modules
    assert before == {name: getattr(jax.config, name) for name in before}


# some problems ask for float64 by name
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype:UserWarning")
@needs_sif2jax
@pytest.mark.parametrize("name", sorted(cutest.QUICK))
@pytest.mark.parametrize("x64", [True, False])
def test_quick_problems_at_the_start(name, x64):
    with jax.enable_x64(x64):
        problem = cutest.build(name)
        dtype = jnp.float64 if x64 else jnp.float32
        assert problem.init.dtype == np.float64 and problem.init.ndim == 1
        y, data = jnp.asarray(problem.init, dtype), problem.data
        data = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), data)
        value, gradient = jax.value_and_grad(problem.fun)(y, data)
        assert value.shape == () and gradient.shape == y.shape
        rest = [c(y, data) for c in (problem.equality, problem.inequality) if c is not None]
        for array in (value, gradient, *rest):
            assert array.dtype == dtype
            assert np.isfinite(array).all()
        assert all(part.ndim == 1 for part in rest)
        kind = cutest.ENTRIES[problem.name].kinds
        assert (kind == ("smooth",)) == (not rest and problem.lower is None)
        for bound in (problem.lower, problem.upper):
            assert bound is None or bound.shape == problem.init.shape


# minima as published with the problems
PUBLISHED = {
    "HS6": 0.0,
    "HS10": -1.0,
    "HS35": 1 / 9,
    "HS71": 17.0140173,
    "HS79": 0.0787768209,
    "HS100": 680.6300573,
    "CHACONN1": 1.95222,
    "MAKELA1": -np.sqrt(2),
    "POLAK1": np.e,
    "ZECEVIC2": -4.125,
}


@needs_sif2jax
@pytest.mark.parametrize("name", PUBLISHED)
def test_signs_and_optima_of_programs(name):
    optimize = pytest.importorskip("scipy.optimize")
    problem = cutest.build(name)
    assert problem.optimum == pytest.approx(PUBLISHED[name], rel=1e-5, abs=1e-9)
    constraints = []
    for kind, sign, fun in (("eq", 1, problem.equality), ("ineq", -1, problem.inequality)):
        if fun is not None:
            values = jax.jit(lambda y, fun=fun, sign=sign: sign * fun(y, problem.data))
            jacobian = jax.jit(jax.jacobian(values))
            constraints.append({"type": kind, "fun": values, "jac": jacobian})
    objective = jax.jit(lambda y: problem.fun(y, problem.data))
    lower = np.full(problem.size, -np.inf) if problem.lower is None else problem.lower
    upper = np.full(problem.size, np.inf) if problem.upper is None else problem.upper
    found = optimize.minimize(
        lambda y: float(objective(y)),
        problem.init,
        jac=jax.jit(jax.grad(objective)),
        bounds=optimize.Bounds(lower, upper),
        constraints=constraints,
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert found.fun == pytest.approx(problem.optimum, rel=1e-6, abs=1e-6)


@needs_sif2jax
def test_a_constant_objective_can_be_differentiated():
    problem = cutest.build("HIMMELBC")
    point = jnp.asarray(problem.init)
    value, slope = jax.jvp(lambda y: problem.fun(y, problem.data), (point,), (point,))
    assert value.dtype == point.dtype and float(slope) == 0.0
