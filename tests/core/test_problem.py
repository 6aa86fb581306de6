"""Each problem's optimality conditions against closed forms, and its checks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_ext as jx
from jaxopt_ext import implicit


def zero(tree, tolerance=1e-12):
    for leaf in jax.tree.leaves(tree):
        np.testing.assert_allclose(leaf, np.zeros(leaf.shape), atol=tolerance)


def derivative(problem, solution, args):
    """Implicit derivative at the closed-form solution, and the closed form's own."""
    traced = problem.trace(jax.tree.map(jnp.asarray, solution(args)), args)

    def attached(args):
        return implicit.attach(traced.condition(), implicit.detach(solution(args)), args)

    return jax.jacobian(attached)(args), jax.jacobian(solution)(args)


def assert_same(a, b, rtol=1e-10):
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(u, v, rtol=rtol, atol=1e-12)


def test_minimization():
    # f = ½ y·Ay − θ·y
    A = jnp.array([[2.0, 0.5], [0.5, 1.0]])
    problem = jx.Minimization(lambda y, t: jnp.vdot(y, A @ y) / 2 - jnp.vdot(t, y))
    solution = lambda t: jnp.linalg.solve(A, t)  # noqa: E731
    args = jnp.array([1.0, -2.0])
    zero(problem.condition()(solution(args), args))
    np.testing.assert_allclose(problem.condition()(jnp.zeros(2), args), -args)
    assert_same(*derivative(problem, solution, args))


def test_composed_minimization():
    # ℓ(z) = ½‖z − 1‖², m(y) = θ y²  ⇒  y = θ^{-1/2}
    problem = jx.ComposedMinimization(lambda z, t: jnp.sum((z - 1) ** 2) / 2, lambda y, t: t * y**2)
    args = jnp.array([4.0, 0.25])
    zero(problem.condition()(args**-0.5, args))
    y = jnp.array([1.0, 2.0])
    np.testing.assert_allclose(problem.target(y, args), args * y**2)
    np.testing.assert_allclose(problem.condition()(y, args), 2 * args * y * (args * y**2 - 1))
    assert_same(*derivative(problem, lambda t: t**-0.5, args))


def test_least_squares():
    # r = (y − θ, 2y)  ⇒  y = θ/5; the condition has the full Hessian
    problem = jx.LeastSquares(lambda y, t: (y - t, 2 * y))
    args = jnp.array([5.0, -1.0])
    zero(problem.condition()(args / 5, args))
    assert_same(*derivative(problem, lambda t: t / 5, args))
    curved = jx.LeastSquares(lambda y, t: jnp.stack([y**2 - t, y - 1]))
    y, t = jnp.array(0.7), jnp.array(2.0)
    gradient = jax.grad(lambda y: curved.objective(y, t)[0])
    np.testing.assert_allclose(curved.condition()(y, t), gradient(y))
    np.testing.assert_allclose(
        jax.grad(curved.condition())(y, t), 2 * (3 * y**2 - t) + 1, rtol=1e-12
    )


def test_root_finding_and_fixed_point():
    root = jx.RootFinding(lambda y, t: y**3 - t)
    assert_same(*derivative(root, lambda t: t ** (1 / 3), jnp.array([8.0, 1.0])))
    fixed = jx.FixedPoint(lambda y, t: y / 2 + t)
    zero(fixed.condition()(jnp.array([2.0]), jnp.array([1.0])))
    assert_same(*derivative(fixed, lambda t: 2 * t, jnp.array([1.0, 3.0])))


def equality_program():
    """min ½‖y − θ‖² s.t. Σy = 1  ⇒  y = θ − ν, ν = (Σθ − 1)/n."""
    problem = jx.NonlinearProgram(
        lambda y, t: jnp.sum((y - t) ** 2) / 2, equality=lambda y, t: jnp.sum(y) - 1
    )

    def solution(t):
        nu = (jnp.sum(t) - 1) / t.size
        return t - nu, implicit.Multipliers(equality=nu)

    return problem, solution


def bound_program():
    """min ½‖y − θ‖² s.t. 0 ≤ y ≤ 1  ⇒  y = clip(θ), multipliers the excess."""
    problem = jx.NonlinearProgram(
        lambda y, t: jnp.sum((y - t) ** 2) / 2,
        lower=jnp.zeros(3),
        upper=jnp.array([1.0, 1.0, jnp.inf]),
    )

    def solution(t):
        y = jnp.clip(t, 0.0, jnp.array([1.0, 1.0, jnp.inf]))
        return y, implicit.Multipliers(lower=jax.nn.relu(-t), upper=jax.nn.relu(t - y))

    return problem, solution


def inequality_program():
    """min ½‖y − θ‖² s.t. ‖y‖² ≤ 1 (active)  ⇒  y = θ/‖θ‖, λ = (‖θ‖ − 1)/2."""
    problem = jx.NonlinearProgram(
        lambda y, t: jnp.sum((y - t) ** 2) / 2,
        inequality=lambda y, t: {"ball": jnp.sum(y**2) - 1, "slack": y[0] - 10},
    )

    def solution(t):
        norm = jnp.linalg.norm(t)
        multipliers = {"ball": (norm - 1) / 2, "slack": jnp.zeros_like(norm)}
        return t / norm, implicit.Multipliers(inequality=multipliers)

    return problem, solution


@pytest.mark.parametrize(
    ("make", "args"),
    [
        (equality_program, [0.5, 2.0, -1.0]),
        (bound_program, [-0.5, 0.3, 2.0]),
        (bound_program, [1.7, -2.0, 0.1]),
        (inequality_program, [3.0, -4.0, 1.0]),
    ],
    ids=["equality", "bounds", "bounds-2", "inequality"],
)
def test_kkt_system_vanishes_and_differentiates_as_the_closed_form(make, args):
    problem, solution = make()
    args = jnp.array(args)
    traced = problem.trace(solution(args)[0], args)
    condition = traced.condition()
    zero(condition(solution(args), args))
    assert float(traced.feasibility(solution(args)[0], args)) < 1e-12

    def attached(args):
        return implicit.attach(condition, implicit.detach(solution(args)), args)

    assert_same(jax.jacobian(attached)(args), jax.jacobian(solution)(args))
    # the promised symmetry
    flat, unravel = jax.flatten_util.ravel_pytree(solution(args))
    matrix = jax.jacobian(lambda v: jax.flatten_util.ravel_pytree(condition(unravel(v), args))[0])(
        flat
    )
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-13)
    assert np.linalg.cond(matrix) < 1e3


def test_kkt_second_derivatives():
    problem, solution = inequality_program()
    args = jnp.array([3.0, -4.0, 1.0])
    condition = problem.trace(solution(args)[0], args).condition()

    def total(variables):
        return jnp.sum(jnp.sin(variables[0])) + variables[1].inequality["ball"] ** 3

    ours = jax.hessian(lambda t: total(implicit.attach(condition, implicit.detach(solution(t)), t)))
    truth = jax.hessian(lambda t: total(solution(t)))
    np.testing.assert_allclose(ours(args), truth(args), rtol=1e-9)


def test_fixed_variable_keeps_the_kkt_system_regular():
    problem = jx.NonlinearProgram(lambda y, t: jnp.sum((y - t) ** 2) / 2, lower=1.0, upper=1.0)
    args = jnp.array([3.0, 0.0])
    y = jnp.ones(2)
    traced = problem.trace(y, args)
    multipliers = implicit.Multipliers(lower=jnp.array([-2.0, 1.0]), upper=jnp.zeros(2))
    zero(traced.condition()((y, multipliers), args))

    def attached(args):
        return implicit.attach(traced.condition(), (y, multipliers), args)[0]

    zero(jax.jacobian(attached)(args))


def test_derivative_with_respect_to_a_bound():
    def solution(bound):
        problem = jx.NonlinearProgram(lambda y, args: jnp.sum((y + 1) ** 2), lower=bound)
        y = jnp.full(2, 0.5)
        multipliers = implicit.Multipliers(lower=jnp.full(2, 3.0))
        return implicit.attach(problem.trace(y, None).condition(), (y, multipliers), None)[0]

    np.testing.assert_allclose(jax.jacobian(solution)(0.5), np.ones(2))


def test_penalty_system_of_a_bilevel_problem():
    # f = ½(y − 1)² + ½x², g = ½(y − x)²: y_σ = (σ + x)/(1 + σ), z = x, and x solves ∇ψ_σ = 0
    problem = jx.Bilevel(
        upper=lambda x, y, t: (y - t) ** 2 / 2 + x**2 / 2, lower=lambda x, y, t: (y - x) ** 2 / 2
    )
    sigma = 0.1

    def solution(t):
        x = t / (2 + sigma)
        return x, (sigma * t + x) / (1 + sigma), x

    t = jnp.array(3.0)
    condition = problem.trace(solution(t)[:2], t).condition(sigma=sigma)
    zero(condition(solution(t), t))

    def attached(t):
        return implicit.attach(condition, implicit.detach(solution(t)), t)

    assert_same(jax.jacobian(attached)(t), jax.jacobian(solution)(t))


def test_penalty_system_with_sets_is_a_projected_fixed_point():
    problem = jx.Bilevel(
        upper=lambda x, y, t: jnp.sum((y - 5.0) ** 2) / 2,
        lower=lambda x, y, t: jnp.sum((y - x) ** 2) / 2,
        lower_set=lambda y: optax.projections.projection_box(y, 0.0, 1.0),
    )
    assert problem.constraints == {"sets"}
    x, y = jnp.array([2.0]), jnp.array([1.0])
    _, on_y, on_z = problem.trace((x, y), None).condition(sigma=0.1)((x, y, y), None)
    zero((on_y, on_z))
    with pytest.raises(ValueError, match="sigma is 0, expected a number > 0"):
        problem.condition(sigma=0.0)


def test_feasibility_is_the_largest_violation():
    problem = jx.NonlinearProgram(
        lambda y, t: jnp.sum(y),
        equality=lambda y, t: y[0] - 1,
        inequality=lambda y, t: y - 3,
        lower=0.0,
        upper=jnp.array([10.0, 2.0]),
    )
    assert problem.constraints == {"equality", "inequality", "bounds"}
    violation = problem.trace(jnp.zeros(2), None).feasibility
    assert float(violation(jnp.array([1.0, 2.0]), None)) == 0.0
    assert float(violation(jnp.array([1.5, 2.0]), None)) == 0.5
    assert float(violation(jnp.array([1.0, 6.0]), None)) == 4.0
    assert float(violation(jnp.array([1.0, -7.0]), None)) == 7.0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: jx.Minimization(3.0),
            TypeError,
            "Minimization: fun is a float, expected a function",
        ),
        (
            lambda: jx.NonlinearProgram(jnp.sum, equality=1),
            TypeError,
            "NonlinearProgram: equality is a int, expected a function or None",
        ),
        (
            lambda: jx.NonlinearProgram(lambda y, a: jnp.sum(y), lower=jnp.zeros(3)).trace(
                jnp.zeros(2), None
            ),
            ValueError,
            r"lower has shape \[3\], expected \[2\]",
        ),
        (
            lambda: jx.NonlinearProgram(lambda y, a: jnp.sum(y), lower=2.0, upper=1.0).trace(
                jnp.zeros(2), None
            ),
            ValueError,
            "lower exceeds upper in 2 of 2 entries",
        ),
        (
            lambda: jx.NonlinearProgram(lambda y, a: y["a"], lower={"b": 1.0}).trace(
                {"a": jnp.zeros(())}, None
            ),
            ValueError,
            "lower is .*expected one number or a PyTree like init",
        ),
        (
            lambda: jx.RootFinding(lambda y, a: y[:1]).trace(jnp.zeros(2), None),
            ValueError,
            r"RootFinding: fun returned float64\[1\], expected the structure",
        ),
        (
            lambda: jx.LeastSquares(lambda y, a: jnp.array([1, 2])).trace(jnp.zeros(2), None),
            ValueError,
            r"residual returned int64\[2\], expected real floating",
        ),
        (
            lambda: jx.Bilevel(lambda x, y, a: x, lambda x, y, a: x).trace(jnp.zeros(2), None),
            ValueError,
            r"Bilevel: init is float64\[2\], expected a pair",
        ),
        (
            lambda: jx.Minimization(lambda y, a: jnp.sum(y).astype(complex)).trace(
                jnp.zeros(2), None
            ),
            ValueError,
            "fun returned complex128, expected a real floating scalar",
        ),
    ],
)
def test_bad_problems_are_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_same_function_may_serve_twice():
    same = lambda v: v  # noqa: E731
    problem = jx.Bilevel(lambda x, y, a: x + jnp.sum(y), lambda x, y, a: x * jnp.sum(y), same, same)
    problem.trace((jnp.zeros(()), jnp.zeros(3)), None)
