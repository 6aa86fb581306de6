"""Problem sets: consistent with themselves, with the literature and with reference solutions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.sparse import BCOO

from jaxopt_ext.bench import datasets
from jaxopt_ext.bench.problem import KINDS, Problem
from jaxopt_ext.bench.problems import blackbox, glm, mgh, reference, synthetic

MODULES = (mgh, synthetic, glm, blackbox)
SMALL_GLM = [
    *("glm-logistic-breast_cancer-1overn", "glm-logistic-sonar-twin-1e-3L"),
    *("glm-logistic-a1a-twin-1overn", "glm-softmax-wine-1overn"),
    *("glm-huber-efron_diabetes-1overn", "glm-huber-outliers-twin-1e-3L"),
]


def cast(tree, dtype):
    """What a contender does: real leaves in the dtype of the run."""

    def one(leaf):
        leaf = jnp.asarray(leaf)
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, tree)


def check_start(problem: Problem, dtype):
    """Value, gradient and constraints at the start are finite and of the right dtype and shape."""
    assert problem.init.dtype == np.float64 and problem.init.ndim == 1
    y, data = cast(problem.init, dtype), cast(problem.data, dtype)

    @jax.jit
    def everything(y, data):
        parts = (problem.residual, problem.equality, problem.inequality)
        rest = [part(y, data) for part in parts if part is not None]
        return *jax.value_and_grad(problem.fun)(y, data), rest

    value, gradient, rest = everything(y, data)
    assert value.shape == () and gradient.shape == y.shape
    for array in (value, gradient, *rest):
        assert array.dtype == dtype
        assert np.isfinite(array).all()
    assert all(part.ndim == 1 for part in rest)
    if problem.residual is not None:
        np.testing.assert_allclose(value, jnp.sum(rest[0] ** 2) / 2, rtol=1e-5)
    if problem.optimum is not None and problem.equality is None:
        assert value >= problem.optimum - 1e-5 * abs(problem.optimum)


def constants(problem: Problem) -> int:
    """Number of array elements that the objective brings along instead of taking them as data."""
    closed = jax.make_jaxpr(problem.fun)(problem.init, problem.data)
    return sum(np.size(constant) for constant in closed.consts)


# ---- all sets -----------------------------------------------------------------------------------


def test_names_are_unique_and_kinds_known():
    names = [name for module in MODULES for name in module.ENTRIES]
    assert len(names) == len(set(names))
    for module in MODULES:
        for entry in module.ENTRIES.values():
            assert set(entry.kinds) <= set(KINDS)
        assert 2 <= sum(entry.quick for entry in module.ENTRIES.values()) <= 12


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.split(".")[-1])
def test_every_quick_problem_of_the_lists_exists(module):
    quick = [entry for entry in module.ENTRIES.values() if entry.quick]
    for entry in quick:
        problem = entry.build()
        assert module.ENTRIES[problem.name] is entry
        assert constants(problem) == 0
        json.dumps(problem.meta)
        assert problem.digest() == entry.build().digest()


# ---- Moré, Garbow, Hillstrom --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", mgh.TABLE)
def test_mgh_starts(name, dtype):
    n = min(mgh.TABLE[name].optimum)
    problem = mgh.ENTRIES[f"mgh-{name}-n{n}"].build()
    assert problem.size == n
    check_start(problem, dtype)
    assert constants(problem) == 0


@pytest.mark.parametrize("name", [name for name in mgh.ENTRIES if name.endswith("-n1000")])
def test_mgh_large_starts(name):
    check_start(mgh.ENTRIES[name].build(), jnp.float64)


# Σr² as the paper prints it, on the way from its starting point
PRINTED = {
    "mgh-jennrich-sampson-n2": 124.362,
    "mgh-bard-n3": 8.21487e-3,
    "mgh-gaussian-n3": 1.12793e-8,
    "mgh-meyer-n3": 87.9458,
    "mgh-kowalik-osborne-n4": 3.07505e-4,
    "mgh-brown-dennis-n4": 85822.2,
    "mgh-osborne-1-n5": 5.46489e-5,
    "mgh-osborne-2-n11": 4.01377e-2,
    "mgh-watson-n6": 2.28767e-3,
    "mgh-watson-n9": 1.39976e-6,
    "mgh-watson-n12": 4.72238e-10,
    "mgh-penalty-1-n4": 2.24997e-5,
    "mgh-penalty-1-n10": 7.08765e-5,
    "mgh-penalty-2-n4": 9.37629e-6,
    "mgh-penalty-2-n10": 2.93660e-4,
    "mgh-chebyquad-n8": 3.51687e-3,
    "mgh-chebyquad-n10": 6.50395e-3,
    "mgh-linear-full-rank-n10": 20 - 10,
    "mgh-linear-rank-one-n10": 20 * 19 / (2 * 41),
    "mgh-linear-rank-one-zeros-n10": (20**2 + 3 * 20 - 6) / (2 * 37),
}
# zeros of the residual
ZEROS = {
    "mgh-freudenstein-roth-n2": [5.0, 4.0],
    "mgh-brown-badly-scaled-n2": [1e6, 2e-6],
    "mgh-beale-n2": [3.0, 0.5],
    "mgh-helical-valley-n3": [1.0, 0.0, 0.0],
    "mgh-gulf-n3": [50.0, 25.0, 1.5],
    "mgh-box-n3": [1.0, 10.0, 1.0],
    "mgh-wood-n4": [1.0] * 4,
    "mgh-biggs-n6": [1.0, 10.0, 1.0, 5.0, 4.0, 3.0],
    "mgh-rosenbrock-n100": [1.0] * 100,
    "mgh-powell-singular-n4": [0.0] * 4,
    "mgh-variably-dimensioned-n10": [1.0] * 10,
    "mgh-trigonometric-n10": [0.0] * 10,
    "mgh-brown-almost-linear-n10": [1.0] * 10,
}
# solved from the start
SOLVED = (
    *("powell-badly-scaled-n2", "boundary-value-n10", "integral-equation-n10"),
    *("broyden-tridiagonal-n10", "broyden-banded-n10", "chebyquad-n7", "chebyquad-n9"),
)


@pytest.mark.parametrize("name", PRINTED)
def test_mgh_optima_are_those_printed_and_are_attained(name):
    optimize = pytest.importorskip("scipy.optimize")
    problem = mgh.ENTRIES[name].build()
    assert 2 * problem.optimum == pytest.approx(PRINTED[name], rel=6e-6)
    residual, jacobian = jax.jit(problem.residual), jax.jit(jax.jacobian(problem.residual))
    found = optimize.least_squares(
        lambda y: np.asarray(residual(y, problem.data)),
        problem.init,
        lambda y: np.asarray(jacobian(y, problem.data)),
        method="lm",
        **dict.fromkeys(("xtol", "ftol", "gtol"), 1e-15),
        max_nfev=5000,
    )
    assert found.cost == pytest.approx(problem.optimum, rel=1e-9)


@pytest.mark.parametrize("name", ZEROS)
def test_mgh_residuals_vanish_at_the_solution(name):
    problem = mgh.ENTRIES[name].build()
    assert problem.optimum == 0
    y = jnp.array(ZEROS[name])
    np.testing.assert_allclose(problem.residual(y, problem.data), 0, atol=1e-9)


@pytest.mark.parametrize("name", SOLVED)
def test_mgh_equations_have_a_solution(name):
    optimize = pytest.importorskip("scipy.optimize")
    problem = mgh.ENTRIES[f"mgh-{name}"].build()
    assert problem.optimum == 0
    residual, jacobian = jax.jit(problem.residual), jax.jit(jax.jacobian(problem.residual))
    found = optimize.root(
        lambda y: np.asarray(residual(y, problem.data)),
        problem.init,
        jac=lambda y: np.asarray(jacobian(y, problem.data)),
        method="lm",
        options={"xtol": 1e-15, "ftol": 1e-15},
    )
    assert np.sum(found.fun**2) < 1e-24


def test_every_mgh_function_is_checked_against_a_known_optimum():
    checked = {*PRINTED, *ZEROS, *(f"mgh-{name}" for name in SOLVED)}
    for name in mgh.TABLE:
        assert any(key.startswith(f"mgh-{name}-n") for key in checked), name
    assert len(mgh.TABLE) >= 18


# ---- synthetic ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in synthetic.ENTRIES if not n.endswith("-n1000")])
def test_synthetic_starts_and_optima(name):
    problem = synthetic.ENTRIES[name].build()
    for dtype in (jnp.float32, jnp.float64):
        check_start(problem, dtype)
    assert constants(problem) == 0
    if "log-sum-exp" in name:
        value, gradient = jax.value_and_grad(problem.fun)(jnp.zeros(problem.size), problem.data)
        np.testing.assert_allclose(gradient, 0, atol=1e-15)
        assert float(value) == pytest.approx(problem.optimum, abs=1e-14)
        return
    solution = jnp.ones(problem.size)
    if "linear" in name:
        solution = jnp.linalg.lstsq(problem.data["A"], problem.data["b"])[0]
    assert problem.optimum == 0
    assert float(problem.fun(solution, problem.data)) < 1e-24


# ---- generalized linear models ------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL_GLM)
def test_glm_optima(name):
    pytest.importorskip("sklearn")
    problem = glm.ENTRIES[name].build()
    for dtype in (jnp.float32, jnp.float64):
        check_start(problem, dtype)
    assert constants(problem) == 0
    known = glm.reference_optima()[name.removeprefix("glm-")]
    samples = problem.meta["samples"]
    L, _ = datasets.smoothness(np.asarray(problem.data["X"]))
    assert known["lam"] == pytest.approx(1 / samples if "1overn" in name else 1e-3 * L, rel=1e-12)
    best, norm = reference.newton(problem)
    assert best == pytest.approx(problem.optimum, rel=1e-13)
    assert norm < 1e-12


def test_softmax_of_two_classes_is_logistic_regression_of_the_difference():
    X, y = np.random.RandomState(0).standard_normal((9, 3)), np.arange(9) % 2
    w = jnp.array([0.3, -0.2, 0.5])
    lam = jnp.array(0.1)
    both = jnp.stack([-w / 2, w / 2], axis=1).ravel()  # half the penalty
    two = glm.softmax(both, {"X": X, "y": y, "lam": 2 * lam})
    one = glm.logistic(w, {"X": X, "y": 2.0 * y - 1, "lam": lam})
    np.testing.assert_allclose(two, one, rtol=1e-14)


def test_huber_loss_is_square_inside_and_linear_outside():
    data = {"X": np.ones((1, 1)), "y": np.zeros(1), "lam": np.float64(0), "delta": np.float64(1.5)}
    values = [float(glm.huber(jnp.array([r]), data)) for r in (1.0, -1.5, 4.0)]
    np.testing.assert_allclose(values, [0.5, 1.125, 1.5 * (4.0 - 0.75)])


def test_sparse_features_stay_sparse_and_give_the_same_derivatives(monkeypatch):
    monkeypatch.setitem(
        datasets.TWINS, "tiny-twin", datasets.Twin(50, 300, "zipf", 0.0, 8, 0.5, 2.0)
    )
    problem = glm.build("logistic", "tiny-twin", "1overn")
    X = problem.data["X"]
    assert isinstance(X, BCOO) and X.indices.dtype == np.int32
    assert problem.meta["density"] < glm.SPARSE
    for dtype in (jnp.float32, jnp.float64):
        check_start(problem, dtype)
    assert constants(problem) == 0
    dense = problem.data | {"X": np.asarray(X.todense())}
    w = jnp.asarray(np.random.RandomState(0).standard_normal(300))
    v = jnp.asarray(np.random.RandomState(1).standard_normal((2, 300)))

    @jax.jit
    def derivatives(data):
        gradient = lambda w: jax.grad(problem.fun)(w, data)  # noqa: E731
        products = jax.vmap(lambda v: jax.jvp(gradient, (w,), (v,))[1])(v)
        return problem.fun(w, data), gradient(w), products

    for one, other in zip(derivatives(problem.data), derivatives(dense), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-14)
    assert problem.digest() != glm.build("logistic", "tiny-twin", "1e-3L").digest()


def test_glm_of_a_folder(tmp_path, monkeypatch):
    (tmp_path / "three.libsvm").write_text("1 1:1\n2 1:2\n3 1:3\n")
    (tmp_path / "two.libsvm").write_text("1 1:1\n2 1:2 2:1\n1 2:3\n")
    monkeypatch.setenv(datasets.VARIABLE, str(tmp_path))
    added = set(glm.entries()) - set(glm.ENTRIES)
    assert {f"glm-logistic-{name}-{lam}" for name in ("two", "three") for lam in glm.LAMBDAS} == {
        name for name in added if "two" in name or "three" in name
    }
    problem = glm.entries()["glm-logistic-two-1overn"].build()
    np.testing.assert_array_equal(problem.data["y"], [-1, 1, -1])
    assert problem.optimum is None
    with pytest.raises(ValueError, match="three has 3 different labels, expected two"):
        glm.entries()["glm-logistic-three-1overn"].build()


def test_optima_of_the_users_folder():
    """The gradient of the objective vanishes where Newton's method gets to the committed value."""
    names = [n for n in ("heart_scale", "ionosphere", "sonar", "diabetes") if n in datasets.local()]
    if not names:
        pytest.skip(f"{datasets.VARIABLE} names no folder with the data sets of the optima")
    for name in names:
        problem = glm.build("logistic", name, "1overn")
        best, norm = reference.newton(problem)
        assert best == pytest.approx(problem.optimum, rel=1e-13)
        assert norm < 1e-12


# ---- BBOB ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", blackbox.BODIES)
def test_bbob_optimum_and_one_program_for_all_instances(number):
    problems = [blackbox.build(number, 3, instance) for instance in (1, 2)]
    fun = jax.jit(problems[0].fun)
    assert problems[0].fun is problems[1].fun
    random = np.random.RandomState(number)
    for problem in problems:
        best = np.asarray(problem.meta["minimizer"])
        assert (np.abs(best) <= 5).all() and (np.abs(problem.init) <= 4).all()
        assert float(fun(best, problem.data)) == pytest.approx(problem.optimum, abs=1e-9)
        for radius in (1e-3, 1e-1, 1.0, 10.0):
            near = np.clip(best + radius * random.standard_normal(3), -5, 5)
            assert float(fun(near, problem.data)) >= problem.optimum - 1e-12
    assert fun._cache_size() == 1
    assert constants(problems[0]) == 0
    y, data = cast((problems[0].init, problems[0].data), jnp.float32)
    value = fun(y, data)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, fun(problems[0].init, problems[0].data), rtol=2e-2)


def test_bbob_rotations_are_orthogonal():
    data = blackbox.build(15, 5, 1).data
    for name in ("R", "Q"):
        np.testing.assert_allclose(data[name] @ data[name].T, np.eye(5), atol=1e-14)


@pytest.mark.parametrize("number", [1, 10, 15, 16, 23])
def test_bbob_value_depends_on_the_offset_only(number):
    problem = blackbox.build(number, 3, 1)
    data = problem.data
    x, shift = np.array([0.3, -0.7, 0.2]), np.array([0.1, 0.2, -0.4])
    moved = data | {"x": np.zeros(3) + shift}
    fixed = data | {"x": np.zeros(3)}
    one, other = problem.fun(x + shift, moved), problem.fun(x, fixed)
    np.testing.assert_allclose(one, other, rtol=1e-9)


@pytest.mark.parametrize("number", blackbox.BODIES)
def test_bbob_is_that_of_coco(number):
    cocoex = pytest.importorskip("cocoex", exc_type=ImportError)
    random = np.random.RandomState(number)
    for n, instance in ((2, 1), (5, 1), (5, 3)):
        problem = blackbox.build(number, n, instance)
        chosen = f"dimensions:{n} function_indices:{number} instance_indices:{instance}"
        theirs = next(iter(cocoex.Suite("bbob", "", chosen)))
        fun = jax.jit(problem.fun)
        points = [*random.uniform(-6, 6, (4, n)), problem.data["x"] + 1e-3]
        for x in points:
            assert float(fun(x, problem.data)) == pytest.approx(theirs(x), rel=1e-9, abs=1e-9)
