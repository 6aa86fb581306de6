"""The certificate against the true errors of solutions and hypergradients."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxopt_ext import implicit

RANDOM = np.random.RandomState(0)
X, Y = jnp.asarray(RANDOM.randn(20, 4)), jnp.asarray(RANDOM.randn(20))
LABELS = jnp.sign(Y)
W = jnp.asarray(RANDOM.randn(5, 5)) * 0.15
Q = jnp.diag(jnp.array([1.0, 2.0, 4.0]))
LASSO = jnp.array([3.0, -2.0, 0.1])


@dataclasses.dataclass(frozen=True)
class Case:
    """A condition whose solution is found to rounding, with an outer function of it."""

    name: str
    condition: Any
    start: Any
    args: jax.Array
    outer: Callable


def soft(v, t):
    return jnp.sign(v) * jax.nn.relu(jnp.abs(v) - t)


def _ridge(w, t):
    return jnp.sum((X @ w - Y) ** 2) / 2 + jnp.sum(jnp.exp(t) * w**2) / 2


def _logistic(w, t):
    margins = LABELS * (X @ w)
    return jnp.mean(jax.nn.softplus(-margins)) + jnp.sum(jnp.exp(t) * w**2) / 2


def _lasso(x, t):
    gradient = x - LASSO * jnp.exp(t[0])
    return x - soft(x - 0.5 * gradient, 0.5 * jnp.exp(t[1]))


def _quadratic_kkt():
    return implicit.KKT(
        lambda y, t: jnp.vdot(y, Q @ y) / 2 - jnp.vdot(t, y) + jnp.sum(y**4),
        equality=lambda y, t: jnp.sum(y) - t[0] ** 2,
    )


def norm(x, t):
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(x)) + jnp.sum(t**2)


CASES = [
    Case(
        "ridge", implicit.Stationary(_ridge), jnp.zeros(4), jnp.array([0.5, -0.5, 0.0, 1.0]), norm
    ),
    Case("logistic", implicit.Stationary(_logistic), jnp.zeros(4), -jnp.ones(4), norm),
    Case(
        "equilibrium",
        implicit.FixedPoint(lambda x, t: jnp.tanh(W @ x + t)),
        jnp.zeros(5),
        jnp.linspace(-0.5, 0.5, 5),
        norm,
    ),
    Case(
        "equality-program",
        _quadratic_kkt(),
        (jnp.ones(3), implicit.Multipliers(equality=jnp.array(0.0))),
        jnp.array([1.2, 0.3, -0.4]),
        norm,
    ),
    Case(
        "cubic", implicit.Root(lambda x, t: x**3 + x - t), jnp.zeros(2), jnp.array([1.0, 2.0]), norm
    ),
    Case(
        "log-sum-exp",
        implicit.Stationary(
            lambda x, t: jax.nn.logsumexp(X.T @ jnp.tile(x, 5)[:20] + t) + jnp.sum(x**2)
        ),
        jnp.zeros(4),
        jnp.array([1.0, 0.0, -1.0, 0.5]),
        norm,
    ),
    Case("lasso", implicit.Root(_lasso), jnp.array([2.0, -1.0, 0.0]), jnp.array([0.1, -0.2]), norm),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda c: c.name)
def solved(request):
    """The case, its solution to rounding and its true hypergradient there."""
    case = request.param
    flat, unravel = ravel_pytree(case.start)

    def F(v):
        return ravel_pytree(case.condition(unravel(v), case.args))[0]

    newton = jax.jit(lambda v: v - jnp.linalg.solve(jax.jacfwd(F)(v), F(v)))
    for _ in range(60):
        flat = newton(flat)
    assert float(jnp.max(jnp.abs(F(flat)))) < 1e-12

    def total(t):
        return case.outer(implicit.attach(case.condition, unravel(flat), t), t)

    hyper = jax.jit(
        lambda v: implicit.hypergradient(case.outer, case.condition, unravel(v), case.args)
    )
    corrected = jax.jit(
        lambda v: implicit.hypergradient(
            case.outer, case.condition, unravel(v), case.args, correct=True
        ).gradient[0]
    )
    return case, flat, jax.grad(total)(case.args), hyper, corrected


def test_hypergradient_equals_automatic_differentiation(solved):
    _, flat, truth, hyper, _ = solved
    found = hyper(flat)
    np.testing.assert_allclose(found.gradient[0], truth, rtol=1e-9, atol=1e-12)
    assert not bool(found.certificate.flagged), str(found.certificate)
    assert float(found.certificate.gradient_error) < 1e-10 * max(1, float(jnp.max(jnp.abs(truth))))


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-4, 1e-6, 1e-8])
def test_error_estimates_are_within_a_factor_two(solved, size):
    case, flat, truth, hyper, corrected = solved
    direction = jnp.asarray(np.random.RandomState(1).randn(flat.size))
    if case.name == "lasso":  # on the support: off it the prox would snap back
        direction = jnp.where(jnp.abs(flat) > 0, direction, 0)
    off = flat + size * direction / jnp.linalg.norm(direction)
    found = hyper(off)
    true_error = float(jnp.linalg.norm(off - flat))
    assert 0.5 < float(found.certificate.solution_error) / true_error < 2
    true_gradient_error = float(jnp.linalg.norm(found.gradient[0] - truth))
    if true_gradient_error > 1e-13:
        ratio = float(found.certificate.gradient_error) / true_gradient_error
        assert 0.5 < ratio < 2
    # the corrected gradient is of second order: ten times closer at least while errors are visible
    if size in (1e-2, 1e-4):
        better = float(jnp.linalg.norm(corrected(off) - truth))
        assert better < max(0.1 * true_gradient_error, 1e-12)


def test_correction_is_of_second_order():
    case = CASES[1]
    errors = []
    flat = jnp.zeros(4)
    gradient = jax.grad(_logistic)
    for _ in range(30):
        flat = flat - jnp.linalg.solve(
            jax.hessian(_logistic)(flat, case.args), gradient(flat, case.args)
        )
    truth = implicit.hypergradient(case.outer, case.condition, flat, case.args).gradient[0]
    for size in (1e-1, 1e-2, 1e-3):
        found = implicit.hypergradient(
            case.outer, case.condition, flat + size * jnp.ones(4) / 2, case.args, correct=True
        )
        errors.append(float(jnp.linalg.norm(found.gradient[0] - truth)))
    slopes = np.diff(np.log10(errors))
    assert np.all(slopes < -1.8), (errors, slopes)


def test_inexact_adjoint_is_measured():
    case = CASES[0]
    hessian = jax.hessian(_ridge)(case.start, case.args)
    solution = -jnp.linalg.solve(hessian, jax.grad(_ridge)(case.start, case.args))
    exact = implicit.hypergradient(case.outer, case.condition, solution, case.args)
    rough = implicit.hypergradient(
        case.outer, case.condition, solution, case.args, linear_solver=implicit.CG(max_steps=2)
    )
    error = float(jnp.linalg.norm(rough.gradient[0] - exact.gradient[0]))
    assert error > 1e-6
    assert 0.2 < float(rough.certificate.gradient_error) / error < 5
    assert float(rough.certificate.adjoint_residual) > 1e-6


def test_adjoint_comes_back_and_warms_the_next_solve():
    case = CASES[0]
    hessian = jax.hessian(_ridge)(case.start, case.args)
    solution = -jnp.linalg.solve(hessian, jax.grad(_ridge)(case.start, case.args))
    solver = implicit.CG(max_steps=1)
    cold = implicit.hypergradient(
        case.outer, case.condition, solution, case.args, linear_solver=solver
    )
    exact = implicit.hypergradient(case.outer, case.condition, solution, case.args)
    warm = implicit.hypergradient(
        case.outer,
        case.condition,
        solution,
        case.args + 1e-3,
        linear_solver=solver,
        adjoint0=exact.adjoint,
    )
    assert float(warm.certificate.adjoint_residual) < 0.05 * float(
        cold.certificate.adjoint_residual
    )


def test_singular_and_ambiguous_systems_are_flagged():
    # ½(x₀ + x₁ − t)²: the sum is determined, the difference is not
    condition = implicit.Stationary(lambda x, t: (x[0] + x[1] - t) ** 2 / 2)
    x = jnp.array([1.0, 1.0])
    seen = implicit.certify(condition, x, 2.0, outer=lambda x, t: x[0] + x[1])
    assert bool(seen.singular)
    assert not bool(seen.ambiguous)
    unseen = implicit.certify(condition, x, 2.0, outer=lambda x, t: x[0])
    assert bool(unseen.ambiguous)
    np.testing.assert_allclose(unseen.kernel_component, np.sqrt(0.5), rtol=1e-12)
    assert "ambiguous" in str(unseen)


def test_unconverged_points_are_flagged():
    case = CASES[1]
    assert bool(implicit.certify(case.condition, jnp.ones(4) * 3, case.args).unconverged)
    # far away Newton's correction does not contract: said even where the step looks small
    spiky = implicit.Root(lambda x, t: jnp.arctan(10 * (x - t)))
    assert bool(implicit.certify(spiky, jnp.array(1.3), 1.0).unconverged)


def test_weakly_active_constraint_is_flagged():
    # min ½(y − t)² s.t. y ≥ 0 at t = 0: bound active with zero multiplier
    kkt = implicit.KKT(lambda y, t: jnp.sum((y - t) ** 2) / 2, lower=0.0)
    weak = implicit.certify(
        kkt, (jnp.zeros(1), implicit.Multipliers(lower=jnp.zeros(1))), jnp.zeros(1)
    )
    assert bool(weak.kink)
    strict = implicit.certify(
        kkt, (jnp.zeros(1), implicit.Multipliers(lower=jnp.ones(1))), -jnp.ones(1)
    )
    assert not bool(strict.kink)
    np.testing.assert_allclose(strict.margin, 1.0)


def test_kantorovich_bound_holds_and_is_withheld_where_invalid():
    # F = x² − t: A(x̂)⁻¹A has Lipschitz constant 1/x̂
    condition = implicit.Root(lambda x, t: x**2 - t)
    for x in (2.1, 1.8, 2.5):
        certificate = implicit.certify(condition, jnp.array(x), 4.0, lipschitz=1 / x)
        bound = float(certificate.solution_error_bound)
        assert abs(x - 2.0) <= bound * (1 + 1e-12) <= 2.01 * float(certificate.solution_error)
    far = implicit.certify(condition, jnp.array(0.5), 4.0, lipschitz=2.0)
    assert np.isinf(float(far.solution_error_bound))
    assert np.isinf(float(implicit.certify(condition, jnp.array(2.1), 4.0).solution_error_bound))


def test_gradient_bound_holds():
    # outer x²: total derivative is 1 for every t; at x̂ it is (2x̂)(1/(2x̂)) = 1, so use x³:
    # g(x̂) = 3x̂²/(2x̂) = 1.5 x̂, Lipschitz constant 1.5
    condition = implicit.Root(lambda x, t: x**2 - t)
    found = implicit.hypergradient(
        lambda x, t: x**3, condition, jnp.array(2.1), 4.0, lipschitz=1 / 2.1, gradient_lipschitz=1.5
    )
    error = abs(float(found.gradient[0]) - 3.0)
    assert error <= float(found.certificate.gradient_error_bound) < 4 * error


def test_batched_jitted_and_printed():
    case = CASES[4]
    points = jnp.stack([jnp.array([0.68, 1.0]), jnp.array([0.6, 1.1])])
    batch = jax.jit(
        jax.vmap(lambda x: implicit.certify(case.condition, x, case.args, outer=case.outer))
    )(points)
    assert batch.solution_error.shape == (2,)
    for i in range(2):
        alone = implicit.certify(case.condition, points[i], case.args, outer=case.outer)
        np.testing.assert_allclose(batch.gradient_error[i], alone.gradient_error, rtol=1e-10)
    text = str(batch)
    assert text.count("\n") == 3
    assert "gradient" in text


def test_large_systems_use_estimates():
    d = jnp.linspace(1.0, 50.0, 2000)
    condition = implicit.Stationary(lambda x, t: jnp.sum(d * x**2) / 2 - t * jnp.sum(x))
    certificate = implicit.certify(condition, 2.0 / d, 2.0, linear_solver=implicit.CG())
    assert 30 < float(certificate.largest_singular_value) <= 50.0001
    assert 0.999 <= float(certificate.smallest_singular_value) < 3
    assert not bool(certificate.flagged)


def test_only_floating_arguments_get_a_gradient():
    found = implicit.hypergradient(
        lambda x, args: x,
        implicit.Root(lambda x, args: x - args["n"].astype(x.dtype) * args["t"]),
        jnp.array(6.0),
        {"t": jnp.array(2.0), "n": jnp.array(3), "name": "kept"},
    )
    assert float(found.gradient[0]["t"]) == 3.0
    assert found.gradient[0]["n"] is None
