"""What theory says of the penalty function, on problems with a closed form."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_ext as jx
from jaxopt_ext import implicit, solvers

SIGMAS = jnp.array([1e-1, 1e-2, 1e-3, 1e-4])


class Closed(NamedTuple):
    """A bilevel problem at a point, with its value function in closed form."""

    problem: jx.Bilevel
    x: jax.Array
    y: jax.Array  # where inner solves start
    value: object  # ψ(x)
    penalty: object = None  # ψ_σ(x), where it has a closed form


def strongly_convex():
    mu, a, c = 2.0, 0.5, 1.5
    problem = jx.Bilevel(
        upper=lambda x, y, _: (y - c) ** 2 / 2 + a * x**2 / 2,
        lower=lambda x, y, _: mu * (y - x) ** 2 / 2,
    )

    def penalty(x, sigma):
        return mu / (mu + sigma) * (x - c) ** 2 / 2 + a * x**2 / 2

    return Closed(problem, jnp.array(0.4), jnp.array(0.0), lambda x: penalty(x, 0.0), penalty)


def moving_line():
    """Every y with x y₁ + y₂ = 1 is a lower-level solution."""
    problem = jx.Bilevel(
        upper=lambda x, y, _: jnp.sum(y**2) / 2,
        lower=lambda x, y, _: (x * y[0] + y[1] - 1) ** 2 / 2,
    )
    return Closed(
        problem,
        jnp.array(0.8),
        jnp.array([2.0, -1.0]),
        lambda x: 1 / (2 * (1 + x**2)),
        lambda x, sigma: 1 / (2 * (1 + x**2 + sigma)),
    )


def rank_deficient():
    """A lower-level least-squares problem with more unknowns than equations."""
    rng = np.random.default_rng(3)
    A, B, b = rng.standard_normal((3, 6)), rng.standard_normal((3, 2)), rng.standard_normal(3)
    c, root = rng.standard_normal(6), rng.standard_normal((6, 6))
    Q = root @ root.T / 6 + np.eye(6)
    inverse, kernel = np.linalg.pinv(A), np.linalg.svd(A)[2][3:].T
    choice = kernel @ np.linalg.solve(kernel.T @ Q @ kernel, kernel.T @ Q)

    def value(x):
        base = inverse @ (B @ x + b)
        y = base + choice @ (c - base)
        return (y - c) @ Q @ (y - c) / 2

    problem = jx.Bilevel(
        upper=lambda x, y, _: (y - c) @ Q @ (y - c) / 2,
        lower=lambda x, y, _: jnp.sum((A @ y - B @ x - b) ** 2) / 2,
    )
    return Closed(problem, jnp.array([0.3, -0.5]), jnp.asarray(rng.standard_normal(6)), value)


TARGET = jnp.array([0.9, -0.3, 0.6, 0.2])


def on_a_set(projection, x):
    problem = jx.Bilevel(
        upper=lambda x, y, _: (jnp.sum((y - TARGET) ** 2) + jnp.sum(x**2)) / 2,
        lower=lambda x, y, _: jnp.sum((y - x) ** 2) / 2,
        lower_set=projection,
    )

    def penalty(x, sigma):
        y, z = projection((x + sigma * TARGET) / (1 + sigma)), projection(x)
        upper = (jnp.sum((y - TARGET) ** 2) + jnp.sum(x**2)) / 2
        return upper + (jnp.sum((y - x) ** 2) - jnp.sum((z - x) ** 2)) / (2 * sigma)

    def value(x):
        return (jnp.sum((projection(x) - TARGET) ** 2) + jnp.sum(x**2)) / 2

    return Closed(problem, x, jnp.full(4, 0.25), value, penalty)


def unit_box(v):
    return jnp.clip(v, 0, 1)


def box():
    return on_a_set(unit_box, jnp.array([0.3, -0.4, 1.7, 0.6]))


def unit_simplex(v):
    with jax.numpy_dtype_promotion("standard"):
        return implicit.projections.projection_simplex(v)


def simplex():
    return on_a_set(unit_simplex, jnp.array([0.9, 0.5, -0.7, 0.2]))


EXAMPLES = {f.__name__: f for f in (strongly_convex, moving_line, rank_deficient, box, simplex)}


def slope(errors):
    return float(jnp.polyfit(jnp.log(SIGMAS), jnp.log(errors), 1)[0])


def at_sigmas(example):
    """`penalty_value` and its gradient at all σ at once."""

    def one(sigma):
        def value(x):
            found = solvers.penalty_value(
                example.problem, x, example.y, sigma=sigma, max_steps=2000
            )
            return found.value, found

        return jax.value_and_grad(value, has_aux=True)(example.x)

    (_, found), gradient = jax.jit(jax.vmap(one))(SIGMAS)
    assert bool(jnp.all(found.success))
    return found, gradient


@pytest.mark.parametrize("name", EXAMPLES)
def test_penalty_function_is_close_from_below_and_monotone(name):
    example = EXAMPLES[name]()
    found, gradient = at_sigmas(example)
    truth = example.value(example.x)
    exact = jax.grad(example.value)(example.x)
    rounding = 1e-9

    # f(x, y_σ) ≤ ψ_σ ≤ ψ, both nonincreasing in σ
    assert bool(jnp.all(found.upper <= found.value + rounding))
    assert bool(jnp.all(found.value <= truth + rounding))
    assert bool(jnp.all(jnp.diff(found.value) >= -rounding))
    assert bool(jnp.all(jnp.diff(found.upper) >= -rounding))
    # l(x, σ) = min σf + g is concave: its slope f(x, y_σ) falls with σ, and it lies below tangents
    lower = SIGMAS * found.value
    tangents = lower[:, None] + (SIGMAS[None, :] - SIGMAS[:, None]) * found.upper[:, None]
    assert bool(jnp.all(lower[None, :] <= tangents + rounding))

    assert 0.9 < slope(truth - found.value) < 1.1
    errors = jax.vmap(lambda g: jnp.max(jnp.abs(g - exact)))(gradient)
    assert 0.9 < slope(errors) < 1.1
    assert 1.8 < slope(found.lower_gap) < 2.2
    if example.penalty is not None:
        closed = jax.vmap(lambda s: example.penalty(example.x, s))(SIGMAS)
        np.testing.assert_allclose(found.value, closed, rtol=1e-6, atol=1e-9)


def test_bounds_for_strongly_convex_lower_levels():
    example = strongly_convex()
    found, _ = at_sigmas(example)
    mu, c = 2.0, 1.5
    largest = abs(0.4 - c)  # |∇_y f| on the way from y* to y_σ
    assert bool(jnp.all(jnp.abs(found.y - example.x) <= SIGMAS * largest / mu + 1e-9))
    gap = example.value(example.x) - found.value
    assert bool(jnp.all(gap <= SIGMAS * largest**2 / (2 * mu) + 1e-9))


def test_value_and_gradient_do_not_depend_on_the_lower_solution():
    example = moving_line()
    x, sigma = example.x, 1e-2
    y = jnp.array([x, 1.0]) / (1 + x**2 + sigma)
    for z in (y, jnp.array([0.0, 1.0]), jnp.array([5.0, 1 - 5.0 * x])):
        z = z + jnp.array([x, 1.0]) * (1 - x * z[0] - z[1]) / (1 + x**2)
        system = example.problem.condition(sigma)((x, y, z), None)
        np.testing.assert_allclose(system[0], -x / (1 + x**2 + sigma) ** 2, rtol=1e-10)
        np.testing.assert_allclose(jnp.concatenate(system[1:]), 0, atol=1e-12)


def test_penalty_gradient_is_right_where_implicit_and_unrolled_ones_are_not():
    example = moving_line()
    x, problem = example.x, example.problem
    truth = jax.grad(example.value)(x)
    np.testing.assert_allclose(truth, -0.297, atol=1e-3)

    penalty = solvers.hypergradient(problem, x, example.y, method="penalty", sigma=1e-4)
    np.testing.assert_allclose(penalty.gradient, truth, rtol=1e-3)

    # another solution of the lower level: the implicit gradient is far off, and says so
    other = jnp.array([2.0, 1 - 2.0 * x])
    np.testing.assert_allclose(problem.lower(x, other, None), 0, atol=1e-30)
    for method in ("cg", implicit.CG(max_steps=2), "pinv"):
        wrong = solvers.hypergradient(problem, x, other, method=method)
        assert not abs(float(wrong.gradient - truth)) < 0.5
        assert not float(wrong.residual) < 0.1
    # the pseudo-inverse is right at the best solution of the lower level
    best = jnp.array([x, 1.0]) / (1 + x**2)
    right = solvers.hypergradient(problem, x, best, method="pinv")
    np.testing.assert_allclose(right.gradient, truth, rtol=1e-9)
    assert float(right.residual) < 1e-12

    def projected(x):  # where gradient steps from (2, −1) end
        a, y = jnp.array([x, 1.0]), example.y
        return jnp.sum((y + a * (1 - a @ y) / (a @ a)) ** 2) / 2

    unrolled = solvers.hypergradient(problem, x, example.y, method="unroll", step=0.3, steps=200)
    np.testing.assert_allclose(unrolled.gradient, jax.grad(projected)(x), rtol=1e-9)
    np.testing.assert_allclose(unrolled.gradient, -0.922, atol=1e-3)


@pytest.mark.parametrize("name", ["rank_deficient", "box", "simplex"])
def test_pseudo_inverse_at_the_best_solution_equals_the_closed_form(name):
    example = EXAMPLES[name]()
    exact = jax.grad(example.value)(example.x)
    # the limit of y_σ
    y = solvers.penalty_value(example.problem, example.x, example.y, sigma=1e-7).y
    y, _ = solvers.lower_minimum(example.problem, example.x, y)
    found = solvers.hypergradient(example.problem, example.x, y, method="pinv")
    np.testing.assert_allclose(found.gradient, exact, rtol=1e-5, atol=1e-6)
    assert float(found.residual) < 1e-4
    if name == "rank_deficient":
        other, _ = solvers.lower_minimum(example.problem, example.x, example.y)
        wrong = solvers.hypergradient(example.problem, example.x, other, method="pinv")
        assert float(jnp.max(jnp.abs(wrong.gradient - exact))) > 0.1
        assert float(wrong.residual) > 0.1


def test_kink_of_the_value_function_stays_finite_and_between_the_one_sided_slopes():
    example = on_a_set(unit_box, jnp.zeros(4))
    found = solvers.hypergradient(example.problem, example.x, example.y, sigma=1e-3)
    one_sided = jnp.stack([example.x, example.x - TARGET])  # with y fixed, and with dy = dx
    low, high = jnp.min(one_sided, axis=0), jnp.max(one_sided, axis=0)
    assert bool(jnp.all((found.gradient >= low - 1e-3) & (found.gradient <= high + 1e-3)))


def test_bilinear_lower_level_breaks_the_closeness():
    """S(x) jumps at 0: ψ_σ has the slope 1/σ there, and the formulas say so."""
    problem = jx.Bilevel(
        upper=lambda x, y, _: x**2 + jnp.sum(y**2),
        lower=lambda x, y, _: x * jnp.sum(y),
        lower_set=lambda y: jnp.clip(y, -1, 1),
    )
    sigma = 1e-2
    for x, closed in ((0.5, 0.25 + 1.0), (0.01, 1e-4 - 1e-4 / (4 * sigma**2) + 0.01 / sigma)):
        found = solvers.penalty_value(problem, jnp.array(x), jnp.zeros(1), sigma=sigma)
        np.testing.assert_allclose(found.value, closed, rtol=1e-6)


def test_ridge_regression_finds_the_global_regularizer():
    rng = np.random.default_rng(1)
    X, V = rng.standard_normal((20, 4)), rng.standard_normal((15, 4))
    truth = np.array([1.0, -0.5, 0.0, 0.3])
    t, s = X @ truth + rng.standard_normal(20), V @ truth + rng.standard_normal(15)
    X, t, V, s = (jnp.asarray(v) for v in (X, t / 4, V, s / 4))
    problem = jx.Bilevel(
        upper=lambda x, y, _: jnp.sum((V @ y - s) ** 2) / 2,
        lower=lambda x, y, _: jnp.sum((X @ y - t) ** 2) / 2 + jnp.exp(x) * jnp.sum(y**2) / 2,
    )

    def value(x):
        y = jnp.linalg.solve(X.T @ X + jnp.exp(x) * jnp.eye(4), X.T @ t)
        return jnp.sum((V @ y - s) ** 2) / 2

    grid = jnp.linspace(-3, 6, 2000)
    best = grid[jnp.argmin(jax.vmap(value)(grid))]
    solver = solvers.PenaltyBilevel(
        sigma=1e-3, upper_step=optax.adam(0.1), lower_step=0.02, lower_steps=20
    )
    found = jx.solve(
        problem,
        solver,
        (jnp.array(0.0), jnp.zeros(4)),
        max_steps=1500,
        stop=jx.Optimality(atol=1e-6),
    ).check()
    assert abs(float(found.value[0] - best)) < 0.02


def toy_upper(x, y, _):
    """PBGD's toy; its lower level has a continuum of solutions S(x) = {−x} in x + y."""
    bump = jnp.cos(4 * y + 2) / (1 + jnp.exp(2 - 4 * x))
    return bump + jnp.log((4 * x - 2) ** 2 + 1) / 2


TOY = jx.Bilevel(
    upper=toy_upper,
    lower=lambda x, y, _: (x + y) ** 2 + x * jnp.sin(x + y) ** 2,
    upper_set=lambda x: jnp.clip(x, 0, 3),
)
TOY_MINIMA = jnp.array([0.3824, 1.2152, 2.8296])


@pytest.mark.parametrize(("sigma", "distance"), [(0.1, 0.04), (0.01, 0.004)])
def test_nonconvex_lower_level_every_start_ends_at_a_minimum(sigma, distance):
    starts = jax.random.uniform(jax.random.key(1), (100, 2), minval=-3.0, maxval=3.0)
    x, y = jnp.abs(starts[:, 0]), starts[:, 1]
    solver = solvers.PenaltyBilevel(sigma=sigma, upper_step=0.01, lower_step=0.1)

    def run(x, y):
        return jx.solve(TOY, solver, (x, y), max_steps=3000, stop=jx.Optimality(atol=1e-4))

    found = jax.jit(jax.vmap(run))(x, y)
    gaps = jnp.min(jnp.abs(found.value[0][:, None] - TOY_MINIMA[None, :]), axis=1)
    assert float(jnp.max(gaps)) < distance
    assert bool(jnp.all((found.value[0] >= 0) & (found.value[0] <= 3)))
