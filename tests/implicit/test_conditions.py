"""Every condition under every transformation, against closed forms; then each one's promises."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from jaxopt_ext import implicit
from jaxopt_ext.implicit import KKT, Multipliers, QuadraticProgram

# Problems with closed-form solutions. t is a vector of parameters and decides the dtype.

X = np.array([[1.0, 0.5, -0.3], [0.2, 2.0, 0.4], [1.0, -1.0, 0.7], [0.3, 0.1, 1.5]])
Y = np.array([1.0, -1.0, 0.5, 2.0])


@dataclasses.dataclass(frozen=True)
class Case:
    condition: Any
    solution: Callable  # t -> x
    t: tuple
    arguments: Callable = lambda t: (t,)

    def attached(self, t):
        x = implicit.detach(self.solution(t))
        return implicit.attach(self.condition, x, *self.arguments(t))


def soft(v, threshold):
    return jnp.sign(v) * jnp.maximum(jnp.abs(v) - threshold, 0)


def sine_root(t):  # of x³ + x = t
    scale = jnp.sqrt(jnp.asarray(3, t.dtype))
    return 2 / scale * jnp.sinh(jnp.arcsinh(3 * scale * t / 2) / 3)


def ridge(w, t):
    data, target = jnp.asarray(X, t.dtype), jnp.asarray(Y, t.dtype)
    return jnp.sum((data @ w - target) ** 2) / 2 + jnp.sum(jnp.exp(t) * w**2) / 2


def ridge_residual(w, t):
    data, target = jnp.asarray(X, t.dtype), jnp.asarray(Y, t.dtype)
    return {"fit": data @ w - target, "size": jnp.exp(t / 2) * w}


def ridge_solution(t):
    data, target = jnp.asarray(X, t.dtype), jnp.asarray(Y, t.dtype)
    return jnp.linalg.solve(data.T @ data + jnp.diag(jnp.exp(t)), data.T @ target)


def quadratic(x, t):  # separable, unequal curvatures
    return jnp.sum(jnp.arange(1, 4).astype(t.dtype) * (x - t[:3] ** 2 * jnp.sign(t[:3])) ** 2) / 2


def signed_square(t):
    return t[:3] ** 2 * jnp.sign(t[:3])


def lasso_solution(t):  # threshold e^{t₃} / curvature
    return soft(signed_square(t), jnp.exp(t[3]) / jnp.arange(1, 4).astype(t.dtype))


def box_solution(t):  # between −1 and e^{t₃}
    return jnp.clip(signed_square(t), -1, jnp.exp(t[3]))


def box_pair(t):
    y = box_solution(t)
    gradient = jax.grad(quadratic)(y, t)
    z_l = jnp.where(y == -1, gradient, 0)
    return y, Multipliers(inequality=jnp.where(y == jnp.exp(t[3]), -gradient, 0), lower=z_l)


def simplex_solution(t):  # the support {0, 1} is fixed
    v = jnp.exp(t)
    shift = (v[0] + v[1] - 1) / 2
    return jnp.where(jnp.arange(4) < 2, v - shift, 0)


def project_simplex(v):
    u = jnp.sort(v)[::-1]
    shifts = (jnp.cumsum(u) - 1) / (1 + jnp.arange(v.size)).astype(v.dtype)
    return jnp.maximum(v - shifts[jnp.sum(u > shifts) - 1], 0)


def ball_pair(t):  # min ½‖y − t‖² s.t. ‖y‖² ≤ 1
    norm = jnp.sqrt(jnp.sum(t**2))
    return t / norm, Multipliers(inequality={"ball": (norm - 1) / 2, "far": 0 * norm})


def ball_constraint(y, t):
    return {"ball": jnp.sum(y**2) - 1, "far": y[0] - 10}


def half_square(y, t):
    return jnp.sum((y - t) ** 2) / 2


def barrier_pair(kappa):
    def pair(t):  # min ½(y − t)² − κ log(−y)
        y = (t - jnp.sqrt(t**2 + 4 * kappa)) / 2
        return y, Multipliers(inequality=-kappa / y)

    return pair


def below_zero(form, kappa=None):
    return KKT(half_square, inequality=lambda y, t: y, form=form, kappa=kappa)


def equality_program(t):  # Q, c, A, b
    one = jnp.ones((1, 3), t.dtype)
    return jnp.diag(jnp.exp(t)), t**2, one, jnp.sin(t[:1])


def equality_pair(t):
    Q, c, A, b = equality_program(t)
    inverse = 1 / jnp.diag(Q)
    nu = -(b + A @ (inverse * c)) / jnp.sum(inverse)
    return -inverse * (c + nu), Multipliers(equality=nu)


def inequality_program(t):  # Q, c, A, b, G, h: the first constraint is active, the second is not
    G = jnp.asarray([[1.0, 2.0, 0.5], [0.0, 0.0, 1.0]], t.dtype)
    h = jnp.stack([t[0] ** 2, jnp.asarray(10, t.dtype)])
    return jnp.eye(3, dtype=t.dtype), -t, None, None, G, h


def inequality_pair(t):
    _, c, _, _, G, h = inequality_program(t)
    lam = jnp.stack([(-G[0] @ c - h[0]) / (G[0] @ G[0]), jnp.zeros((), t.dtype)])
    return -c - G.T @ lam, Multipliers(inequality=lam)


def blocks(x, t):
    return (
        jnp.sum((x["a"] - t[:2]) ** 2) / 2
        + 5 * (x["b"][0] - t[0] * t[1]) ** 2
        + jnp.sum((x["c"] - jnp.exp(t[2])) ** 2)
    )


def blocks_solution(t):
    return {
        "a": soft(t[:2], jnp.abs(t[2])),
        "b": (t[0] * t[1],),
        "c": jnp.clip(jnp.exp(t[2:]), 0, 1),
    }


def second_order_cone(v):
    """Projection onto {(a, u): ‖u‖ ≤ a}."""
    a, u = v[0], v[1:]
    square = jnp.sum(u**2)
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    safe = jnp.where(norm > 0, norm, 1)
    edge = (a + norm) / 2 * jnp.concatenate([jnp.ones(1, v.dtype), u / safe])
    return jnp.where(norm <= a, v, jnp.where(norm <= -a, 0, edge))


def cone_program(t):  # min t₀x₀ + t₁x₁ s.t. ‖x‖ ≤ t₂
    A = jnp.concatenate([jnp.zeros((1, 2), t.dtype), -jnp.eye(2, dtype=t.dtype)])
    return t[:2], A, jnp.concatenate([t[2:], jnp.zeros(2, t.dtype)])


def cone_triple(t):
    c, radius = t[:2], t[2]
    norm = jnp.sqrt(jnp.sum(c**2))
    x = -radius * c / norm
    return x, jnp.concatenate([norm[None], c]), jnp.concatenate([radius[None], x])


def orthant_program(t):  # min ½‖x − t‖² s.t. x ≥ 0
    one = jnp.eye(3, dtype=t.dtype)
    return -t, -one, jnp.zeros(3, t.dtype), one


CASES = {
    "root": Case(implicit.Root(lambda x, t: x**3 + x - t), sine_root, (0.7, -1.3)),
    "fixed-point": Case(implicit.FixedPoint(lambda x, t: (x + t / x) / 2), jnp.sqrt, (0.7, 2.3)),
    "stationary": Case(
        implicit.Stationary(ridge, strongly_convex=True), ridge_solution, (0.1, -0.4, 0.8)
    ),
    "least-squares": Case(implicit.LeastSquares(ridge_residual), ridge_solution, (0.1, -0.4, 0.8)),
    "gauss-newton": Case(
        implicit.LeastSquares(ridge_residual, gauss_newton=True), ridge_solution, (0.1, -0.4, 0.8)
    ),
    "lasso": Case(
        implicit.ProximalGradient(
            quadratic, lambda v, step, t: soft(v, step * jnp.exp(t[3])), step=0.3
        ),
        lasso_solution,
        (1.5, -1.2, 0.2, -0.5),
    ),
    "box": Case(
        implicit.ProjectedGradient(
            quadratic, lambda v, t: jnp.clip(v, -1, jnp.exp(t[3])), step=0.3
        ),
        box_solution,
        (0.6, -1.4, 1.7, 0.2),
    ),
    "simplex": Case(
        implicit.ProjectedGradient(
            lambda x, t: jnp.sum((x - jnp.exp(t)) ** 2),
            lambda v, t: project_simplex(v),
            step=0.4,
        ),
        simplex_solution,
        (0.1, 0.3, -1.9, -1.7),
    ),
    **{
        f"kkt-box-{form}": Case(
            KKT(quadratic, None, lambda y, t: y - jnp.exp(t[3]), -1.0, form=form),
            box_pair,
            (0.6, -1.4, 1.7, 0.2),
        )
        for form in ("active", "complementarity")
    },
    "kkt-ball-active": Case(
        KKT(half_square, inequality=ball_constraint), ball_pair, (0.8, -1.4, 0.9)
    ),
    "kkt-ball-fischer": Case(
        KKT(half_square, inequality=ball_constraint, form="fischer_burmeister"),
        ball_pair,
        (0.8, -1.4, 0.9),
    ),
    "kkt-barrier": Case(below_zero("barrier", 0.1), barrier_pair(0.1), (0.9, -0.6, 0.0)),
    "qp-equality": Case(QuadraticProgram(), equality_pair, (0.3, -0.5, 0.4), equality_program),
    "qp-inequality": Case(QuadraticProgram(), inequality_pair, (0.9, 0.8, 1.4), inequality_program),
    "mirror": Case(
        implicit.MirrorDescent(
            lambda x, t: jnp.vdot(x, jnp.log(x) - t**3),
            lambda v, t: jax.nn.softmax(v),
            jnp.log,
            step=0.7,
        ),
        lambda t: jax.nn.softmax(t**3),
        (0.8, -0.7, 1.1),
    ),
    "blocks": Case(
        implicit.BlockCoordinate(
            blocks,
            {
                "a": lambda v, step, t: soft(v, step * jnp.abs(t[2])),
                "b": None,
                "c": lambda v, step, t: jnp.clip(v, 0, 1),
            },
            step={"a": 1.0, "b": 0.1, "c": 0.5},
        ),
        blocks_solution,
        (1.5, -1.2, -0.4),
    ),
    "cone": Case(
        implicit.ConicResidual(second_order_cone), cone_triple, (0.8, -0.5, 1.2), cone_program
    ),
    "orthant": Case(
        implicit.ConicResidual(lambda v: jnp.maximum(v, 0)),
        lambda t: (jnp.maximum(t, 0), jnp.maximum(-t, 0), jnp.maximum(t, 0)),
        (0.8, -0.5, 1.2),
        orthant_program,
    ),
}


def flat(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def loss(x):
    v = flat(x)
    return jnp.sum(jnp.sin(v * (1 + jnp.arange(v.size).astype(v.dtype)) / v.size))


def scanned(f):
    """A loss whose parameter is updated by the carry of a scan."""

    def g(t):
        def body(t, _):
            here = loss(f(t))
            return t + here / 50, here

        return jnp.sum(jax.lax.scan(body, t, None, length=2)[1])

    return g


def direction(t):
    return 1 / (2 + jnp.arange(t.size).astype(t.dtype))


def pushed(f):
    """The forward derivative along a direction v."""
    return lambda t: jax.jvp(f, (t,), (direction(t),))[1]


SECOND = {  # Hv in three ways, and vᵀHv
    "fwd-rev": lambda f: pushed(jax.grad(f)),
    "rev-rev": lambda f: jax.grad(lambda t: jnp.vdot(jax.grad(f)(t), direction(t))),
    "rev-fwd": lambda f: jax.grad(pushed(f)),
    "fwd-fwd": lambda f: pushed(pushed(f)),
}


def lanes(t):
    return jnp.stack([t, t + 0.02])


def first_order(f, t):
    """Plain; and under vmap, through a scan."""
    plain, through = (lambda t: loss(f(t))), scanned(f)
    return {
        "jvp": (pushed(plain)(t), jax.vmap(pushed(through))(lanes(t))),
        "vjp": (jax.grad(plain)(t), jax.vmap(jax.grad(through))(lanes(t))),
    }


def second_order(mode, f, t):
    """Under vmap, through a scan: what plain code does, and the most that can go wrong."""
    return jax.vmap(SECOND[mode](scanned(f)))(lanes(t))


def compiled(fun):
    """These programs run once, so compiling them must be cheap."""
    return jax.jit(fun, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def truth(name):
    case = CASES[name]

    @compiled
    def of(t):
        return {
            **first_order(case.solution, t),
            "second": second_order("fwd-rev", case.solution, t),
        }

    return of(jnp.array(case.t))


def error(ours, theirs):
    """Relative error in the largest entry, of the worst leaf."""
    return max(
        float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    )


@pytest.fixture(autouse=True)
def _promotion(request):
    """Optax and jaxopt mix dtypes."""
    foreign = "optax" in request.node.name or "jaxopt" in request.node.name
    with jax.numpy_dtype_promotion("standard" if foreign else "strict"):
        yield


@pytest.mark.parametrize("name", CASES)
def test_closed_form_is_a_root_and_the_hints_hold(name):
    case = CASES[name]
    t = jnp.array(case.t)
    args = case.arguments(t)
    point, unravel = ravel_pytree(case.solution(t))

    @jax.jit
    def both(v):
        def residual(v):
            return flat(case.condition(unravel(v), *args))

        return residual(v), jax.jacfwd(residual)(v)

    residual, matrix = both(point)
    np.testing.assert_allclose(residual, 0 * residual, atol=1e-12)
    assert np.linalg.cond(matrix) < 1e3
    if case.condition.symmetric or case.condition.positive_definite:
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-13)
    if case.condition.positive_definite:
        assert np.linalg.eigvalsh(matrix)[0] > 0
    assert float(case.condition.margin(case.solution(t), *args)) > 0


@pytest.mark.parametrize("name", CASES)
def test_first_order(name):
    case = CASES[name]
    ours = compiled(lambda t: first_order(case.attached, t))(jnp.array(case.t))
    for mode in ("jvp", "vjp"):
        assert error(ours[mode], truth(name)[mode]) < 1e-8, mode


@pytest.mark.parametrize("mode", SECOND)
@pytest.mark.parametrize("name", CASES)
def test_second_order(name, mode):
    case = CASES[name]
    ours = compiled(lambda t: second_order(mode, case.attached, t))(jnp.array(case.t))
    expected = truth(name)["second"]
    if mode == "fwd-fwd":
        expected = expected @ direction(jnp.array(case.t))
    assert error(ours, expected) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_first_order_in_float32(name):
    case = CASES[name]

    @compiled
    def of(t):
        scalar = lambda t: loss(case.attached(t))  # noqa: E731
        return pushed(scalar)(t), jax.grad(scalar)(t)

    ours = of(jnp.array(case.t, jnp.float32))
    assert {leaf.dtype for leaf in ours} == {jnp.dtype("float32")}
    expected = [truth(name)[mode][0] for mode in ("jvp", "vjp")]
    assert error([leaf.astype(float) for leaf in ours], expected) < 1e-3


# What each condition promises beyond the table.


def test_optax_projection_gives_the_same_derivative():
    t = jnp.array([0.1, 0.3, -1.9, -1.7])
    case = CASES["simplex"]
    condition = implicit.ProjectedGradient(
        case.condition.fun, lambda v, t: optax.projections.projection_simplex(v), step=0.4
    )
    x = case.solution(t)
    ours = jax.jacobian(lambda t: implicit.attach(condition, x, t))(t)
    np.testing.assert_allclose(ours, jax.jacobian(case.solution)(t), rtol=1e-9, atol=1e-12)


def test_gauss_newton_changes_only_the_linearization():
    def residual(x, t):
        return {"a": x**2 - t, "b": x[:1] * x[1:]}

    full = implicit.LeastSquares(residual)
    short = implicit.LeastSquares(residual, gauss_newton=True)
    x, t = jnp.array([1.0, -0.7]), jnp.array([0.3, 2.0])
    np.testing.assert_allclose(short(x, t), full(x, t), rtol=1e-15)
    np.testing.assert_allclose(
        jax.jacobian(short, 1)(x, t), jax.jacobian(full, 1)(x, t), rtol=1e-15
    )
    J = jax.jacobian(lambda x: flat(residual(x, t)))(x)
    np.testing.assert_allclose(jax.jacobian(short)(x, t), J.T @ J, rtol=1e-14)
    hessian = jax.hessian(lambda x: jnp.sum(flat(residual(x, t)) ** 2) / 2)(x)
    np.testing.assert_allclose(jax.jacobian(full)(x, t), hessian, rtol=1e-14)
    assert (full.positive_definite, short.positive_definite) == (False, True)


@pytest.mark.parametrize("fit", [0.0, 0.3], ids=["exact-fit", "misfit"])
def test_gauss_newton_is_exact_for_an_exact_fit_and_biased_otherwise(fit):
    def residual(x, t):
        return jnp.stack([x**2 - t, fit * (x + 1 / x)])

    def solution(t, steps=50):
        def newton(x, _):
            slope, curvature = jax.grad(value)(x, t), jax.grad(jax.grad(value))(x, t)
            return x - slope / curvature, None

        value = lambda x, t: jnp.sum(residual(x, t) ** 2) / 2  # noqa: E731
        return jax.lax.scan(newton, jnp.sqrt(t), None, length=steps)[0]

    def derivative(gauss_newton, order):
        condition = implicit.LeastSquares(residual, gauss_newton=gauss_newton)
        attached = lambda t: implicit.attach(condition, solution(t), t)  # noqa: E731
        return float((jax.grad if order == 1 else jax.hessian)(attached)(2.0))

    exact = derivative(False, 1), derivative(False, 2)
    if fit == 0:
        np.testing.assert_allclose(exact, (2**-0.5 / 2, -(2**-1.5) / 4), rtol=1e-9)
        np.testing.assert_allclose((derivative(True, 1), derivative(True, 2)), exact, rtol=1e-9)
    else:
        assert 1e-3 < abs(derivative(True, 1) / exact[0] - 1) < 0.3


@pytest.mark.parametrize("name", ["box", "lasso", "mirror", "blocks"])
def test_any_step_gives_the_same_derivative(name):
    case, t = CASES[name], jnp.array(CASES[name].t)
    x = case.solution(t)

    @jax.jit
    def jacobian(step):
        condition = dataclasses.replace(case.condition, step=step)
        return jax.jacobian(lambda t: flat(implicit.attach(condition, x, t)))(t)

    for step in (0.01, 0.2):
        np.testing.assert_allclose(
            jacobian(jnp.array(step)), jacobian(jnp.array(0.1)), rtol=1e-9, atol=1e-12
        )


def half_line(form, kappa=None):
    """min ½‖y − t‖² s.t. y ≤ 0; derivative 0 where t > 0, 1 where t < 0, a kink at 0."""

    def jacobian(x, t):
        condition = below_zero(form, kappa)
        return jnp.diag(jax.jacobian(lambda t: implicit.attach(condition, x, t)[0])(t))

    return jacobian


@pytest.mark.parametrize("where", ["barrier-point", "solution"])
def test_barrier_derivative_converges_at_the_rate_of_kappa(where):
    t = jnp.array([1.0, -0.5])
    exact = jnp.array([0.0, 1.0])

    def bias(kappa):
        pair = barrier_pair(kappa)(t)
        if where == "solution":
            pair = jnp.minimum(t, 0), Multipliers(inequality=jnp.maximum(t, 0))
        return np.max(np.abs(half_line("barrier", kappa)(pair, t) - exact))

    kappas = np.array([1e-3, 1e-4, 1e-5])
    biases = np.array([bias(kappa) for kappa in kappas])
    slope = np.polyfit(np.log(kappas), np.log(biases), 1)[0]
    assert 0.97 < slope < 1.03
    assert biases[-1] < 1e-4


def test_forms_at_a_weakly_active_constraint():
    zero = jnp.zeros(1)
    pair = zero, Multipliers(inequality=zero)
    assert float(below_zero("active").margin(pair, zero)) == 0
    np.testing.assert_allclose(half_line("active")(pair, zero), 1.0)  # one side of the kink
    np.testing.assert_allclose(half_line("fischer_burmeister")(pair, zero), 0.5)
    np.testing.assert_allclose(half_line("barrier", 1e-4)(pair, zero), 0.5)
    at_barrier = barrier_pair(1e-4)(zero)
    np.testing.assert_allclose(half_line("barrier", 1e-4)(at_barrier, zero), 0.5)
    assert not np.isfinite(half_line("complementarity")(pair, zero)).all()
    sides = [half_line("barrier", 1e-4)(barrier_pair(1e-4)(zero + d), zero + d) for d in (-1, 1)]
    assert sides[0] > 0.99 and sides[1] < 0.01


def test_fischer_burmeister_linearizes_as_the_active_form_under_strict_complementarity():
    t = jnp.array([0.8, -1.4, 0.9])
    point, unravel = ravel_pytree(ball_pair(t))

    def rows_and_derivative(form):
        condition = KKT(half_square, inequality=ball_constraint, form=form)
        rows = jax.jacobian(lambda v: flat(condition(unravel(v), t))[3:])(point)
        attached = lambda t: flat(implicit.attach(condition, unravel(point), t))  # noqa: E731
        return rows, jax.jacobian(attached)(t)

    ours, theirs = rows_and_derivative("fischer_burmeister"), rows_and_derivative("active")
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-13)


@pytest.mark.parametrize("form", ["active", "complementarity", "fischer_burmeister", "barrier"])
def test_infinite_bounds_and_fixed_variables_in_every_form(form):
    kappa = 1e-9 if form == "barrier" else None
    lower, upper = jnp.array([-jnp.inf, 0.0, 1.0]), jnp.array([jnp.inf, jnp.inf, 1.0])
    kkt = KKT(half_square, lower=lower, upper=upper, form=form, kappa=kappa)
    t = jnp.array([0.5, -2.0, 3.0])
    zero = jnp.zeros(3)
    pair = jnp.array([0.5, 0.0, 1.0]), Multipliers(lower=jnp.array([0.0, 2.0, -2.0]), upper=zero)
    np.testing.assert_allclose(flat(kkt(pair, t)), np.zeros(9), atol=1e-8)
    attached = lambda t: implicit.attach(kkt, pair, t)[0]  # noqa: E731
    for jacobian in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(jacobian(attached)(t), np.diag([1.0, 0, 0]), atol=1e-8)
    margin = jnp.inf if form == "barrier" else 2.0
    assert float(kkt.margin(pair, t)) == margin  # neither infinite bounds nor fixed variables count
    np.testing.assert_allclose(flat(kkt.multipliers(pair[0], t)), flat(pair[1]), atol=1e-14)


def test_margin_is_the_distance_to_a_change_of_the_active_set():
    kkt = KKT(half_square, inequality=lambda y, t: y - jnp.array([1.0, 2.0]), lower=-1.0)
    pair = (
        jnp.array([1.0, 1.6]),
        Multipliers(inequality=jnp.array([0.7, 0.0]), lower=jnp.zeros(2)),
    )
    np.testing.assert_allclose(kkt.margin(pair, jnp.array([1.7, 1.6])), 0.4)  # slack of the second
    tight = dataclasses.replace(pair[1], inequality=jnp.array([0.1, 0.0]))
    np.testing.assert_allclose(kkt.margin((pair[0], tight), jnp.array([1.1, 1.6])), 0.1)
    assert KKT(half_square).margin((pair[0], Multipliers()), pair[0]) == jnp.inf
    batch = jax.vmap(lambda t: kkt.margin(pair, t))(jnp.zeros((3, 2)))
    assert batch.shape == (3,)
    t = jnp.array(CASES["qp-inequality"].t)
    y, multipliers = inequality_pair(t)
    expected = min(float(multipliers.inequality[0]), float(10 - y[2]))
    np.testing.assert_allclose(
        QuadraticProgram().margin((y, multipliers), *inequality_program(t)), expected
    )


@pytest.mark.parametrize(
    "name", ["kkt-box-active", "kkt-ball-active", "qp-equality", "qp-inequality"]
)
def test_multipliers_from_a_primal_point(name):
    case = CASES[name]
    for dtype, tolerance in (("float64", 1e-12), ("float32", 1e-5)):
        t = jnp.array(case.t, dtype)
        y, expected = case.solution(t)
        (point, found), residual = case.condition.from_primal(y, *case.arguments(t))
        np.testing.assert_array_equal(point, y)
        np.testing.assert_allclose(flat(found), flat(expected), atol=tolerance)
        assert float(residual) < tolerance
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    ours = case.condition.multipliers(y, *case.arguments(t))
    np.testing.assert_array_equal(flat(ours), flat(found))


def test_multipliers_of_a_point_that_is_no_solution_show_in_the_residual():
    kkt = KKT(half_square, inequality=lambda y, t: y)
    y, t = jnp.zeros(2), jnp.array([1.0, -0.5])  # the second constraint wants to leave
    (_, multipliers), residual = kkt.from_primal(y, t)
    np.testing.assert_allclose(multipliers.inequality, [1.0, 0.0], atol=1e-14)
    np.testing.assert_allclose(residual, 0.5)
    (_, multipliers), residual = kkt.from_primal(y - 1e-3, t, tolerance=1e-4)
    assert not np.any(multipliers.inequality)
    assert float(residual) > 1
    slope = jax.grad(lambda t: jnp.sum(flat(kkt.multipliers(y, t))))(t)
    assert not np.any(slope)  # without a derivative


def test_every_argument_of_a_quadratic_program_has_a_derivative():
    t = jnp.array(CASES["qp-inequality"].t)
    Q, c, _, _, G, h = inequality_program(t)
    A, b = jnp.array([[1.0, -1.0, 0.3]]), jnp.array([0.2])
    Q = Q + 0.1

    def closed(Q, c, A, b, G, h):  # the first inequality is active
        rows = jnp.concatenate([A, G[:1]])
        Q = (Q + Q.T) / 2
        block = jnp.block([[Q, rows.T], [rows, jnp.zeros((2, 2))]])
        z = jnp.linalg.solve(block, jnp.concatenate([-c, b, h[:1]]))
        return z[:3], Multipliers(z[3:4], jnp.stack([z[4], 0 * z[4]]))

    data = Q, c, A, b, G, h

    def attached(*data):
        return implicit.attach(QuadraticProgram(), implicit.detach(closed(*data)), *data)[0]

    which = tuple(range(6))
    assert float(closed(*data)[1].inequality[0]) > 0.1
    ours, theirs = (
        jax.jit(jax.jacobian(f, which))(*data) for f in (attached, lambda *d: closed(*d)[0])
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_linear_program_at_a_vertex():
    # min cᵀy s.t. y ≥ 0, Σy = t: all of it in the cheapest entry
    c, G, zero = jnp.array([1.0, 2.0, 3.0]), -jnp.eye(3), jnp.zeros(3)
    one = jnp.ones((1, 3))

    def vertex(t):
        pair = jnp.array([2.0, 0, 0]), Multipliers(-jnp.ones(1), jnp.array([0.0, 1.0, 2.0]))
        return implicit.attach(QuadraticProgram(), pair, None, c, one, t[None], G, zero)[0]

    np.testing.assert_allclose(jax.jacobian(vertex)(2.0), [1.0, 0, 0], atol=1e-14)


def test_declared_hints_of_a_root():
    assert implicit.Root(lambda x: x).symmetric is False
    known = implicit.Root(lambda x, t: 2 * x - t, symmetric=True, positive_definite=True)
    assert known.symmetric and known.positive_definite
    np.testing.assert_allclose(
        jax.grad(lambda t: implicit.attach(known, jnp.array(1.0), t))(2.0), 0.5
    )
    assert KKT(half_square, form="barrier", kappa=1.0).symmetric  # nothing to smooth


@pytest.fixture(scope="module")
def jaxopt():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("jaxopt", reason="jaxopt, a development peer, is not installed")


def compare_with_jaxopt(jaxopt, optimality, condition, x, args):
    """Gradients of both implicit rules at the same solution."""
    cotangent = jnp.cos(jnp.arange(x.size) + 1.0)
    theirs = jaxopt.implicit_diff.root_vjp(optimality, x, args, cotangent)
    ours = jax.vjp(lambda *args: implicit.attach(condition, x, *args), *args)[1](cotangent)
    np.testing.assert_allclose(flat(ours), flat(theirs), atol=1e-4 * np.max(np.abs(flat(ours))))


def test_box_program_against_jaxopt(jaxopt):
    t = jnp.array(CASES["box"].t)
    solver = jaxopt.ProjectedGradient(
        lambda x, t: quadratic(x, t), jaxopt.projection.projection_box
    )
    args = (jnp.full(3, -1.0), jnp.full(3, jnp.exp(t[3]))), t
    condition = implicit.ProjectedGradient(
        lambda x, bounds, t: quadratic(x, t), lambda v, bounds, t: jnp.clip(v, *bounds), step=0.3
    )
    compare_with_jaxopt(jaxopt, solver.optimality_fun, condition, box_solution(t), args)


def test_lasso_against_jaxopt(jaxopt):
    t = jnp.array(CASES["lasso"].t)
    solver = jaxopt.ProximalGradient(lambda x, t: quadratic(x, t), jaxopt.prox.prox_lasso)
    args = jnp.full(3, jnp.exp(t[3])), t
    condition = implicit.ProximalGradient(
        lambda x, threshold, t: quadratic(x, t),
        lambda v, step, threshold, t: soft(v, step * threshold),
        step=0.3,
    )
    compare_with_jaxopt(jaxopt, solver.optimality_fun, condition, lasso_solution(t), args)


def test_mirror_descent_against_jaxopt(jaxopt):
    t = jnp.array([0.8, -0.7, 1.1])
    fun = lambda x, t: jnp.vdot(x, jnp.log(x) - t)  # noqa: E731
    softmax = jaxopt.MirrorDescent.make_projection_grad(lambda v, _: jax.nn.softmax(v), jnp.log)
    solver = jaxopt.MirrorDescent(fun, projection_grad=softmax, stepsize=1.0)
    optimality = lambda x, t: solver.optimality_fun(x, None, t)  # noqa: E731
    condition = implicit.MirrorDescent(fun, lambda v, t: jax.nn.softmax(v), jnp.log, step=0.5)
    compare_with_jaxopt(jaxopt, optimality, condition, jax.nn.softmax(t), (t,))


TWO, THREE = jnp.zeros(2), jnp.zeros(3)
KKT2 = KKT(lambda y: jnp.sum(y), inequality=lambda y: y, lower=0.0)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: implicit.Stationary(3.0), TypeError, "Stationary: fun is a float, expected a fun"),
        (
            lambda: implicit.ProjectedGradient(jnp.sum, None),
            TypeError,
            "ProjectedGradient: projection is a NoneType, expected a function",
        ),
        (
            lambda: implicit.ProximalGradient(jnp.sum, lambda v, s: v, step=-1.0),
            ValueError,
            "ProximalGradient: step is -1.0, expected a number > 0",
        ),
        (
            lambda: implicit.ProjectedGradient(jnp.sum, lambda v: v[:1])(TWO),
            ValueError,
            r"the output of projection is float64\[1\], expected a PyTree like the point .*\[2\]",
        ),
        (
            lambda: implicit.FixedPoint(lambda x: {"a": x})(TWO),
            ValueError,
            r"FixedPoint: the output of fun is \{a: float64\[2\]\}, expected",
        ),
        (
            lambda: implicit.MirrorDescent(jnp.sum, lambda v: v, lambda x: x[0])(TWO),
            ValueError,
            r"the output of mirror_map is float64\[\], expected",
        ),
        (
            lambda: implicit.BlockCoordinate(jnp.sum, lambda v, s: v),
            TypeError,
            "BlockCoordinate: proxes is a function, expected a tuple, list or dictionary",
        ),
        (
            lambda: implicit.BlockCoordinate(jnp.sum, {"a": 1.0}),
            TypeError,
            r"BlockCoordinate: proxes\['a'\] is a float, expected a function or None",
        ),
        (
            lambda: implicit.BlockCoordinate(jnp.sum, {"a": None}, step={"b": 1.0}),
            ValueError,
            "BlockCoordinate: step has the blocks .*'b'.* expected those of proxes, .*'a'",
        ),
        (
            lambda: implicit.BlockCoordinate(jnp.sum, (None,))((TWO, TWO)),
            ValueError,
            "BlockCoordinate: x has the blocks .*, expected those of proxes",
        ),
        (
            lambda: KKT(jnp.sum, form="smooth"),
            ValueError,
            "KKT: form is 'smooth', expected one of 'active', 'complementarity'",
        ),
        (
            lambda: QuadraticProgram(form="barrier"),
            ValueError,
            "QuadraticProgram: kappa is None, expected a number > 0 with form='barrier'",
        ),
        (
            lambda: KKT(jnp.sum, form="barrier", kappa=0.0),
            ValueError,
            "KKT: kappa is 0.0, expected a number > 0",
        ),
        (lambda: KKT(jnp.sum, kappa=0.1), ValueError, "kappa is 0.1, expected None: only form"),
        (lambda: KKT(jnp.sum, equality=1), TypeError, "KKT: equality is a int, expected a func"),
        (lambda: KKT2(TWO), TypeError, r"KKT: x is a .*, expected a pair \(y, Multipliers"),
        (
            lambda: KKT2((TWO, TWO)),
            TypeError,
            r"x is a tuple of \(ArrayImpl, ArrayImpl\), expected a pair",
        ),
        (
            lambda: KKT2((TWO, Multipliers(lower=TWO))),
            ValueError,
            r"multipliers.inequality is None, expected a PyTree like the inequality .*\[2\]",
        ),
        (
            lambda: KKT2((TWO, Multipliers(inequality=THREE, lower=TWO))),
            ValueError,
            r"multipliers.inequality is float64\[3\], expected .* float64\[2\]",
        ),
        (
            lambda: KKT2((TWO, Multipliers(inequality=TWO, lower=TWO, upper=TWO))),
            ValueError,
            r"multipliers.upper is float64\[2\], expected None because the condition has no upper",
        ),
        (
            lambda: KKT(jnp.sum, lower={"a": 1.0})((TWO, Multipliers(lower=TWO))),
            ValueError,
            r"KKT: lower is \{a: float64\[\]\}, expected one number or a PyTree like y, float64",
        ),
        (
            lambda: QuadraticProgram()((TWO, Multipliers())),
            ValueError,
            "QuadraticProgram: Q and c are both None, expected at least one",
        ),
        (
            lambda: QuadraticProgram()((TWO, Multipliers()), None, TWO, jnp.ones((1, 2))),
            ValueError,
            "QuadraticProgram: b is None although A is given, expected both or neither",
        ),
        (
            lambda: QuadraticProgram()((TWO, Multipliers()), jnp.eye(3)),
            ValueError,
            r"QuadraticProgram: Q is float64\[3, 3\], expected shape \[2, 2\]",
        ),
        (
            lambda: QuadraticProgram()((jnp.eye(2), Multipliers()), jnp.eye(3)),
            ValueError,
            r"QuadraticProgram: y is float64\[2, 2\], expected a vector",
        ),
        (
            lambda: implicit.ConicResidual(lambda v: v)(TWO, TWO, jnp.eye(2), TWO),
            TypeError,
            r"the unknown is a ArrayImpl, expected a triple \(x, y, s\)",
        ),
        (
            lambda: implicit.ConicResidual(lambda v: v)((TWO, TWO, TWO), TWO, jnp.eye(2), THREE),
            ValueError,
            r"ConicResidual: y is float64\[2\], expected shape \[3\]",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
