"""Linear solvers of the implicit rule against dense linear algebra."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, PartitionSpec

from jaxopt_ext import implicit

MATRIX = jnp.array([[4.0, 1.0, 0.5], [1.0, 3.0, 0.2], [0.5, 0.2, 2.0]])
SKEW = MATRIX + jnp.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
INDEFINITE = MATRIX - 3.2 * jnp.eye(3)
TREE = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(-1.0)}
KEY = jax.random.key(0)
POSITIVE = {"positive_definite": True}
SYMMETRIC = {"symmetric": True}


def operator(matrix, **structure):
    _, unravel = ravel_pytree(TREE)
    return implicit.LinearOperator(
        lambda v: unravel(matrix @ ravel_pytree(v)[0]), TREE, **structure
    )


def flat_operator(matrix, **structure):
    return implicit.LinearOperator(
        lambda v: matrix @ v, jnp.zeros(matrix.shape[0], matrix.dtype), **structure
    )


def random_symmetric(eigenvalues, seed=0, dtype=jnp.float64):
    """A symmetric matrix with these eigenvalues."""
    n = len(eigenvalues)
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(seed), (n, n)))[0]
    return ((basis * jnp.asarray(eigenvalues)[None, :]) @ basis.T).astype(dtype)


CASES = {
    "dense": (implicit.Dense(), SKEW, {}),
    "dense-positive": (implicit.Dense(), MATRIX, POSITIVE),
    "cg": (implicit.CG(), MATRIX, POSITIVE),
    "minres": (implicit.MINRES(), INDEFINITE, SYMMETRIC),
    "gmres": (implicit.GMRES(restart=3), SKEW, {}),
    "bicgstab": (implicit.BiCGStab(), SKEW, {}),
    "normal-cg": (implicit.NormalCG(), SKEW, {}),
    "lsmr": (implicit.LSMR(), SKEW, {}),
    "neumann": (implicit.Neumann(120, step=0.25), SKEW, {}),
    "nystrom": (implicit.Nystrom(3, 1e-11, KEY), MATRIX, SYMMETRIC),
    "nystrom-cg": (implicit.NystromCG(2, KEY), MATRIX, POSITIVE),
    "minimum-norm": (implicit.MinimumNorm(), SKEW, {}),
    "minimum-norm-symmetric": (implicit.MinimumNorm(), INDEFINITE, SYMMETRIC),
    "refined": (implicit.Refined(implicit.Ridge(implicit.Dense(), 0.01), 4), SKEW, {}),
    "shared": (implicit.Shared(jnp.linalg.inv(SKEW + 0.2), steps=3), SKEW, {}),
}


@pytest.mark.parametrize(("solver", "matrix", "structure"), CASES.values(), ids=CASES)
def test_solution_transpose_and_derivatives(solver, matrix, structure):
    rhs = jax.tree.map(lambda x: x + 0.5, TREE)
    flat, unravel = ravel_pytree(rhs)
    weights = jnp.array([0.3, -1.0, 2.0])

    def ours(matrix, flat):
        return ravel_pytree(solver(operator(matrix, **structure), unravel(flat)))[0]

    def everything(solve, matrix, flat):
        def loss(matrix, flat):
            return jnp.sum(weights * solve(matrix, flat) ** 2)

        along = (jnp.eye(3) * 0.1, weights)  # a symmetric direction, and one for the right side

        def slopes(matrix, flat):
            dm, db = jax.grad(loss, (0, 1))(matrix, flat)
            return (dm + dm.T if structure else dm), db  # Cholesky reads one triangle only

        gradient, curvature = jax.jvp(slopes, (matrix, flat), along)
        value, slope = jax.jvp(solve, (matrix, flat), along)
        batch = jax.vmap(lambda b: solve(matrix, b))(jnp.stack([flat, -2 * weights]))
        return value, slope, gradient, curvature, batch

    found = jax.jit(functools.partial(everything, ours))(matrix, flat)
    truth = everything(jnp.linalg.solve, matrix, flat)
    for name, a, b in zip(("x", "jvp", "grad", "hvp", "vmap"), found, truth, strict=True):
        for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(u, v, rtol=1e-8, atol=1e-8, err_msg=name)


def test_auto_chooses_by_size_and_structure():
    auto = implicit.Auto(direct_below=2)
    chosen = {
        "dense": implicit.Auto().choose(operator(SKEW)),
        "positive": auto.choose(operator(SKEW, positive_definite=True)),
        "symmetric": auto.choose(operator(SKEW, symmetric=True)),
        "general": auto.choose(operator(SKEW)),
    }
    assert {name: type(solver).__name__ for name, solver in chosen.items()} == {
        "dense": "Dense",
        "positive": "CG",
        "symmetric": "MINRES",
        "general": "GMRES",
    }
    b = ravel_pytree(TREE)[0]
    np.testing.assert_allclose(
        auto(flat_operator(INDEFINITE, symmetric=True), b),
        np.linalg.solve(INDEFINITE, b),
        rtol=1e-9,
    )


def test_maps_that_jax_cannot_transpose_have_a_matrix_too():
    """A loop of unknown length and a rule for reverse mode alone: columns instead of rows."""

    def looped(v):
        return jax.lax.while_loop(lambda c: c[1] < 2, lambda c: (SKEW @ c[0], c[1] + 1), (v, 0))[0]

    @jax.custom_vjp
    def ruled(v):
        return SKEW @ v

    ruled.defvjp(lambda v: (SKEW @ v, None), lambda _, w: (SKEW.T @ w,))
    for mv, matrix in ((looped, SKEW @ SKEW), (ruled, SKEW)):
        op = implicit.LinearOperator(mv, jnp.zeros(3))
        np.testing.assert_allclose(op.as_matrix(), matrix, atol=1e-12)

    def broken(v):
        raise ValueError("the map's own error")

    with pytest.raises(ValueError, match="the map's own error"):
        implicit.LinearOperator(broken, jnp.zeros(3)).as_matrix()


def test_operator_as_matrix_size_and_transpose():
    op = operator(SKEW)
    assert op.size == 3
    np.testing.assert_allclose(op.as_matrix(), SKEW)
    np.testing.assert_allclose(op.transpose().as_matrix(), SKEW.T)
    symmetric = operator(MATRIX, symmetric=True)
    assert symmetric.transpose() is symmetric


SCALED = {
    "cg": (implicit.CG(), MATRIX, POSITIVE),
    "minres": (implicit.MINRES(), INDEFINITE, SYMMETRIC),
    "gmres": (implicit.GMRES(restart=3), SKEW, {}),
    "bicgstab": (implicit.BiCGStab(), SKEW, {}),
    "normal-cg": (implicit.NormalCG(), SKEW, {}),
    "lsmr": (implicit.LSMR(), SKEW, {}),
    "nystrom-cg": (implicit.NystromCG(2, KEY), MATRIX, POSITIVE),
    "shared": (implicit.Shared(jnp.linalg.inv(SKEW + 0.2), steps=3), SKEW, {}),
}


@pytest.mark.parametrize(("solver", "matrix", "structure"), SCALED.values(), ids=SCALED)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_accuracy_is_relative_to_the_right_hand_side(solver, matrix, structure, dtype):
    op = flat_operator(matrix.astype(dtype), **structure)
    rhs = jnp.array([1.0, -2.0, 0.5], dtype)
    truth = np.linalg.solve(np.asarray(matrix), np.asarray(rhs, np.float64))

    @jax.jit
    def pull(scale):  # the cotangent is what a user's loss makes small
        return jax.vjp(lambda b: solver(op.transpose(), b), rhs)[1](rhs * scale)[0]

    for scale in (1e-30, 1.0, 1e30):
        found = np.asarray(pull(jnp.asarray(scale, dtype)), np.float64) / scale
        np.testing.assert_allclose(found, truth, rtol=5e-5 if dtype == jnp.float32 else 1e-10)
    assert not np.any(pull(jnp.asarray(0.0, dtype)))


def test_matrix_free_solve_of_a_size_that_no_matrix_fits():
    n = 200_000
    d = jnp.linspace(1.0, 10.0, n)

    def solution(t):
        condition = implicit.Stationary(lambda x, t: jnp.sum(d * x**2) / 2 - jnp.sum(t * x))
        return implicit.attach(
            condition, jax.lax.stop_gradient(t) / d, t, linear_solver=implicit.CG()
        )

    gradient = jax.jit(jax.grad(lambda t: jnp.sum(solution(t) ** 2)))(jnp.ones(n))
    np.testing.assert_allclose(gradient, 2 / d**2, rtol=1e-8)


# ---- MINRES


def minimal_residuals(matrix, b, steps):
    """min ‖A x − b‖ over the Krylov space of dimension 1, 2, ..., by least squares."""
    basis, found = np.asarray(b)[:, None] / np.linalg.norm(b), []
    for _ in range(steps):
        product = matrix @ basis
        y = np.linalg.lstsq(product, b, rcond=None)[0]
        found.append(np.linalg.norm(product @ y - b) / np.linalg.norm(b))
        new = product[:, -1]
        for _ in range(2):
            new = new - basis @ (basis.T @ new)
        basis = np.concatenate([basis, new[:, None] / np.linalg.norm(new)], axis=1)
    return np.array(found)


def test_minres_minimizes_the_residual_on_every_krylov_space():
    matrix = random_symmetric(np.concatenate([np.linspace(-4, -1, 6), np.linspace(0.5, 9, 10)]))
    op = flat_operator(matrix, symmetric=True)
    b = jax.random.normal(jax.random.key(1), (16,))
    solve = jax.jit(
        lambda k: implicit.linear_solvers.minres(op.mv, b, jnp.array(0.0), k)[0]  # k is traced
    )
    xs = jax.vmap(solve)(jnp.arange(1, 17))
    residuals = np.linalg.norm(xs @ matrix - b[None, :], axis=1) / np.linalg.norm(b)
    assert np.all(np.diff(residuals) <= 1e-12)
    np.testing.assert_allclose(residuals[:12], minimal_residuals(matrix, b, 12), rtol=1e-6)
    assert residuals[-1] < 1e-11  # n steps are exact


def test_minres_on_a_singular_operator():
    matrix = random_symmetric([3.0, -2.0, 1.0, 0.0, 0.0])
    op = flat_operator(matrix, symmetric=True)
    inside = matrix @ jnp.arange(1.0, 6.0)
    solve = jax.jit(lambda b: implicit.solve_linear(implicit.MINRES(), op, b))
    x, status = solve(inside)
    assert status.converged
    np.testing.assert_allclose(x, np.linalg.pinv(matrix) @ inside, rtol=1e-8, atol=1e-10)
    values, vectors = jnp.linalg.eigh(matrix)
    kernel = vectors[:, jnp.argmin(jnp.abs(values))]
    outside = inside + kernel
    x, status = solve(outside)  # no solution: a least-squares one, and no blow-up
    assert not status.converged
    np.testing.assert_allclose(np.linalg.norm(matrix @ x - outside), 1.0, rtol=1e-8)
    assert np.linalg.norm(x) < 1e3


def test_gradient_through_minres_exports():
    def loss(t):
        op = implicit.LinearOperator(
            lambda v: jnp.stack([t * v[0] + v[1], v[0]]), t * jnp.zeros(2, t.dtype), symmetric=True
        )
        return jnp.sum(implicit.MINRES()(op, jnp.ones(2, t.dtype)) ** 2)

    shape = jax.ShapeDtypeStruct((), jnp.float32)
    exported = export.export(jax.jit(jax.grad(loss)), platforms=["cpu", "cuda", "tpu"])(shape)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert "callback" not in exported.mlir_module()


# ---- approximate inverses


@pytest.mark.parametrize("terms", [0, 5])
def test_neumann_error_bound(terms):
    contraction = 0.6 * random_symmetric(np.linspace(-1, 1, 6)) + 0.05 * SKEW[0, 1]
    matrix = jnp.eye(6) - contraction
    b = jnp.arange(1.0, 7.0)
    truth = jnp.linalg.solve(matrix, b)
    for step in (1.0, 0.7):
        rate = np.linalg.norm(jnp.eye(6) - step * matrix, 2)
        assert rate < 1
        x = implicit.Neumann(terms, step=step)(flat_operator(matrix), b)
        bound = rate ** (terms + 1) * np.linalg.norm(truth)
        error = np.linalg.norm(x - truth)
        assert error <= bound * (1 + 1e-9)
        series = step * sum(
            np.linalg.matrix_power(np.eye(6) - step * matrix, k) @ b for k in range(terms + 1)
        )
        np.testing.assert_allclose(x, series, rtol=1e-10)


def test_jacobian_free_error_is_the_contraction_and_zero_at_a_newton_map():
    contraction = 0.3 * random_symmetric([1.0, -0.5, 0.2])
    b = jnp.array([1.0, 2.0, -1.0])
    truth = jnp.linalg.solve(jnp.eye(3) - contraction, b)
    x = implicit.JacobianFree()(flat_operator(jnp.eye(3) - contraction), b)
    assert np.linalg.norm(x - truth) <= 0.3 * np.linalg.norm(truth) * (1 + 1e-12)

    def newton(x, t):  # for x² = t
        return x - (x**2 - t) / (2 * x)

    def root(t):
        return implicit.attach(
            implicit.FixedPoint(newton),
            jnp.sqrt(jax.lax.stop_gradient(t)),
            t,
            linear_solver=implicit.JacobianFree(),
        )

    np.testing.assert_allclose(jax.grad(root)(2.0), 1 / (2 * np.sqrt(2.0)), rtol=1e-12)
    half = implicit.JacobianFree(0.5)(flat_operator(jnp.eye(3)), b)
    np.testing.assert_allclose(half, b / 2)


def test_ridge_is_the_inverse_of_the_shifted_operator_and_of_its_derivative():
    singular = random_symmetric([2.0, 1.0, 0.0])
    b = jnp.array([1.0, -1.0, 0.5])

    def ours(s):
        op = flat_operator(s * singular, symmetric=True)
        return implicit.Ridge(implicit.Dense(), 0.1)(op, b)

    def truth(s):
        return jnp.linalg.solve(s * singular + 0.1 * jnp.eye(3), b)

    np.testing.assert_allclose(ours(1.0), truth(1.0), rtol=1e-12)
    np.testing.assert_allclose(jax.jacfwd(ours)(1.0), jax.jacfwd(truth)(1.0), rtol=1e-10)
    inside = singular @ b
    tiny = implicit.Ridge(implicit.Dense(), 1e-9)(flat_operator(singular), inside)
    np.testing.assert_allclose(tiny, np.linalg.pinv(singular) @ inside, atol=1e-6)


@pytest.mark.parametrize("rank", [3, 40])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_nystrom_is_exact_from_the_rank_of_the_operator_on(rank, dtype):
    matrix = random_symmetric([5.0, 2.0, 1.0] + [0.0] * 9, dtype=dtype)
    b = jnp.arange(1.0, 13.0, dtype=dtype)
    inverse = implicit.Nystrom(rank, 0.1, KEY)
    x = jax.jit(lambda b: inverse(flat_operator(matrix, symmetric=True), b))(b)
    truth = np.linalg.solve(np.asarray(matrix, np.float64) + 0.1 * np.eye(12), b)
    np.testing.assert_allclose(x, truth, rtol=0, atol=2e-3 if dtype == jnp.float32 else 1e-11)


def test_nystrom_below_the_rank_stays_between_the_identity_and_the_inverse():
    values = 2.0 ** -np.arange(20.0)
    matrix, rho = random_symmetric(values), 1e-2
    inverse = implicit.Nystrom(8, rho, KEY)
    op = flat_operator(matrix, symmetric=True)
    ours = jax.jit(jax.vmap(lambda b: inverse(op, b)))(jnp.eye(20))
    exact = np.linalg.inv(matrix + rho * np.eye(20))
    np.testing.assert_allclose(ours, ours.T, atol=1e-10)
    # 0 ≤ Â ≤ A, so (A + rho I)⁻¹ ≤ (Â + rho I)⁻¹ ≤ I / rho
    assert np.linalg.eigvalsh(ours - exact).min() > -1e-9
    assert np.linalg.eigvalsh(np.eye(20) / rho - ours).min() > -1e-9
    # the error of Â is at most the sum of the eigenvalues left out, up to a modest factor
    approximate = np.linalg.inv(ours) - rho * np.eye(20)
    assert np.linalg.norm(matrix - approximate, 2) < 10 * values[8:].sum()


def test_nystrom_cg_needs_fewer_steps_than_cg():
    values = np.concatenate([10.0 ** np.linspace(5, 2, 10), np.linspace(1, 2, 50)])
    op = flat_operator(random_symmetric(values), positive_definite=True)
    b = jax.random.normal(jax.random.key(2), (60,))

    @eqx.filter_jit
    def residual(solver):
        return implicit.solve_linear(solver, op, b)[1].residual

    plain = residual(implicit.CG(max_steps=15))
    preconditioned = residual(implicit.NystromCG(15, KEY, max_steps=15))
    assert preconditioned < 1e-6 < 1e-2 < plain


def test_refinement_error_is_a_power_of_the_inner_error():
    op = flat_operator(MATRIX)
    b = jnp.array([1.0, 2.0, 3.0])
    truth = jnp.linalg.solve(MATRIX, b)
    rate = np.linalg.norm(jnp.eye(3) - MATRIX / 4, 2)
    for steps in range(4):
        x = implicit.Refined(implicit.JacobianFree(0.25), steps)(op, b)
        assert np.linalg.norm(x - truth) <= rate ** (steps + 1) * np.linalg.norm(truth)
        same = implicit.Neumann(steps, step=0.25)(op, b)
        np.testing.assert_allclose(x, same, rtol=1e-12)


def test_refinement_recovers_digits_in_float32():
    n = 12
    hilbert = 1.0 / (jnp.arange(1.0, n + 1)[:, None] + jnp.arange(0.0, n)[None, :])
    matrix = (hilbert + 1e-4 * jnp.eye(n)).astype(jnp.float32)
    op = flat_operator(matrix)
    b = matrix @ jnp.ones(n, jnp.float32)

    def residual(solver):
        return float(implicit.solve_linear(solver, op, b)[1].residual)

    ridge = implicit.Ridge(implicit.Dense(), 1e-3)
    assert residual(implicit.Refined(ridge, 4)) < 0.2 * residual(ridge)


def test_shared_inverse_as_matrix_or_function_and_its_krylov_steps():
    rough = jnp.linalg.inv(SKEW) + 0.05
    flat, unravel = ravel_pytree(TREE)
    as_function = jax.tree_util.Partial(lambda m, v: unravel(m @ ravel_pytree(v)[0]), rough)
    for inverse in (rough, as_function):
        x = implicit.Shared(inverse)(operator(SKEW), TREE)
        np.testing.assert_allclose(ravel_pytree(x)[0], rough @ flat, rtol=1e-12)
    pulled = jax.vjp(lambda b: implicit.Shared(rough)(flat_operator(SKEW), b), flat)[1](flat)[0]
    np.testing.assert_allclose(pulled, rough.T @ flat, rtol=1e-12)
    truth = np.linalg.solve(SKEW, flat)
    errors = []
    for steps in (0, 1, 2, 3):
        x = implicit.Shared(rough, steps)(flat_operator(SKEW), flat)
        errors.append(np.linalg.norm(x - truth))
    assert errors[1] < 0.5 * errors[0]
    assert errors[3] < 1e-10


# ---- the pseudo-inverse

ROWS = jnp.array([[1.0, 2.0, 3.0], [0.0, 1.0, 1.0]])


def least_norm(t):
    """argmin of least norm of ½‖W(t) (R(t) x − b(t))‖², in closed form for its full row rank."""
    rows = jnp.stack([t[0] * ROWS[0], jnp.sin(t[1]) * ROWS[1]])
    b = jnp.stack([t[1] ** 2, t[0]])
    return rows.T @ jnp.linalg.solve(rows @ rows.T, b)


def attached_least_norm(t):
    def residual(x, t):
        rows = jnp.stack([t[0] * ROWS[0], jnp.sin(t[1]) * ROWS[1]])
        return rows @ x - jnp.stack([t[1] ** 2, t[0]])

    return implicit.attach(
        implicit.LeastSquares(residual),
        least_norm(jax.lax.stop_gradient(t)),
        t,
        linear_solver=implicit.MinimumNorm(),
    )


def in_scan(f):
    """Two passes; the parameter is carried, so that scan cannot hoist what depends on it."""

    def run(t):
        def body(t, _):
            x = f(t)
            return t + 0.01 * x[:2], x

        t, xs = jax.lax.scan(body, t, None, length=2)
        return jnp.sum(xs**2) + jnp.sum(t**2)

    return run


def test_minimum_norm_solution_of_a_rank_deficient_least_squares_problem():
    t = jnp.array([1.3, 0.8])
    np.testing.assert_allclose(
        jax.jacfwd(attached_least_norm)(t), jax.jacfwd(least_norm)(t), rtol=1e-8, atol=1e-10
    )
    losses = [lambda t, f=f: jnp.sum(jnp.sin(f(t))) for f in (attached_least_norm, least_norm)]
    for derivative in (jax.grad, jax.hessian):
        ours, truth = (jax.jit(derivative(loss))(t) for loss in losses)
        np.testing.assert_allclose(ours, truth, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev], ids=["fwd-rev", "rev-rev"])
def test_minimum_norm_to_second_order_inside_scan(outer):
    t = jnp.array([1.3, 0.8])
    ours, truth = (
        jax.jit(outer(jax.grad(in_scan(f))))(t) for f in (attached_least_norm, least_norm)
    )
    np.testing.assert_allclose(ours, truth, rtol=1e-7)


@pytest.mark.parametrize("symmetric", [True, False])
def test_minimum_norm_derivatives_are_those_of_the_pseudo_inverse(symmetric):
    """Both kernels move with the parameter here; the rank stays 2."""
    b = jnp.array([1.0, -2.0, 0.5, 3.0])

    def matrix(t):
        left = jnp.array([[1.0, 0.0], [2.0, 1.0], [0.0, 1.0], [1.0, 1.0]]) * jnp.cos(t)
        left = left.at[0, 1].add(t**2)
        right = left if symmetric else left.at[2, 0].add(t)
        return left @ jnp.diag(jnp.stack([2.0 + t, -1.0 + 0 * t])) @ right.T

    def ours(t):
        op = flat_operator(matrix(t), symmetric=symmetric)
        return implicit.MinimumNorm(rcond=1e-10)(op, b)

    def truth(t):
        return jnp.linalg.pinv(matrix(t), rtol=1e-10) @ b

    t = jnp.array(0.3)

    def orders(f):
        return jax.jit(lambda t: (f(t), jax.jacfwd(f)(t), jax.jacfwd(jax.jacrev(f))(t)))(t)

    for found, expected in zip(orders(ours), orders(truth), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)

    def scanned(f):
        def run(t):
            return jax.lax.scan(lambda t, _: (t + 0.1 * jnp.sum(f(t) ** 2), None), t, length=2)[0]

        return run

    def unrolled(f):
        def run(t):
            for _ in range(2):
                t = t + 0.1 * jnp.sum(f(t) ** 2)
            return t

        return run

    # the pseudo-inverse of jnp.linalg in a plain Python loop is the reference
    ours2, truth2 = (jax.jit(jax.hessian(g))(t) for g in (scanned(ours), unrolled(truth)))
    np.testing.assert_allclose(ours2, truth2, rtol=1e-6)


def test_minimum_norm_with_repeated_singular_values_inside_scan():
    """The rule of jnp.linalg.pinv is lost here: its second derivative is NaN."""
    tilt = jnp.array([[0.0, 1.0, 2.0], [0.5, 0.0, -1.0], [1.0, 0.3, 0.0]])
    b = jnp.arange(3.0)

    def matrix(t):
        e = jnp.eye(3) + (t - 0.3) * tilt
        return e @ jnp.diag(jnp.array([1.0, 1.0, 0.0])) @ e.T

    def ours(t):
        return jnp.sum(implicit.MinimumNorm()(flat_operator(matrix(t)), b) ** 2)

    def truth(t):
        return jnp.sum((jnp.linalg.pinv(matrix(t)) @ b) ** 2)

    def scanned(t):
        return jax.lax.scan(lambda t, _: (t, ours(t)), t, length=2)[1].sum()

    np.testing.assert_allclose(
        jax.jit(jax.hessian(scanned))(0.3), 2 * jax.jit(jax.hessian(truth))(0.3), rtol=1e-8
    )


def test_minimum_norm_of_the_zero_operator_and_in_float32():
    zero = implicit.MinimumNorm()(flat_operator(jnp.zeros((3, 3))), jnp.ones(3))
    np.testing.assert_array_equal(zero, 0)
    matrix = random_symmetric([3.0, 1.0, 0.0], dtype=jnp.float32)
    x = implicit.MinimumNorm()(flat_operator(matrix), jnp.ones(3, jnp.float32))
    truth = np.linalg.pinv(np.asarray(matrix, np.float64), rcond=1e-5) @ np.ones(3)
    np.testing.assert_allclose(x, truth, rtol=1e-5, atol=1e-6)
    assert x.dtype == jnp.float32


# ---- the explicit entry


ILL = random_symmetric(10.0 ** np.linspace(0, 3, 40))


@pytest.mark.parametrize(
    "solver",
    [implicit.CG(max_steps=12), implicit.MINRES(max_steps=12), implicit.Neumann(12, step=1e-3)],
    ids=["cg", "minres", "neumann"],
)
def test_warm_start_is_worth_steps(solver):
    op = flat_operator(ILL, positive_definite=True)
    b = jax.random.normal(jax.random.key(3), (40,))
    near = jnp.linalg.solve(ILL, b) + 1e-6 * jax.random.normal(jax.random.key(4), (40,))
    solve = jax.jit(functools.partial(implicit.solve_linear, solver, op))
    cold, warm = solve(b)[1], solve(b, near)[1]
    assert warm.residual < 1e-2 * cold.residual


@pytest.mark.parametrize("solver", [implicit.CG(), implicit.Dense()], ids=["cg", "dense"])
def test_a_start_changes_neither_the_answer_nor_its_derivative(solver):
    b = jnp.array([1.0, -2.0, 0.5])

    def ours(s, b, x0):
        op = flat_operator(MATRIX + s * jnp.eye(3), positive_definite=True)
        return implicit.solve_linear(solver, op, b, x0)[0]

    def truth(s, b):
        return jnp.linalg.solve(MATRIX + s * jnp.eye(3), b)

    exact = truth(0.1, b)

    @jax.jit
    def values(x0, b):
        second = jax.hessian(lambda s: jnp.sum(ours(s, b, x0) ** 2))(0.1)
        return ours(0.1, b, x0), jax.jacfwd(ours, (0, 1, 2))(0.1, b, x0), second

    slopes = jax.jacrev(truth, (0, 1))(0.1, b)
    curvature = jax.hessian(lambda s: jnp.sum(truth(s, b) ** 2))(0.1)
    for scale in (1e-30, 1.0):  # also where the start dwarfs the right-hand side
        for start in (exact, 1e5 * jnp.ones(3), jnp.full(3, jnp.nan)):
            x, (ds, db, dx0), second = values(start, scale * b)
            np.testing.assert_allclose(x, scale * exact, rtol=1e-9)
            np.testing.assert_allclose(ds, scale * slopes[0], rtol=1e-8)
            np.testing.assert_allclose(db, slopes[1], rtol=1e-8, atol=1e-11)
            np.testing.assert_array_equal(dx0, 0)
            np.testing.assert_allclose(second, scale**2 * curvature, rtol=1e-7)


@pytest.mark.parametrize(
    "solver",
    [implicit.Dense(), implicit.Auto(), implicit.GMRES(restart=3), implicit.MinimumNorm()],
    ids=["dense", "auto", "gmres", "minimum-norm"],
)
def test_status_and_transposed_solve(solver):
    flat, _ = ravel_pytree(TREE)

    @functools.partial(jax.jit, static_argnums=0)
    def solve(transpose):
        return implicit.solve_linear(solver, operator(SKEW), TREE, transpose=transpose)

    for transpose, matrix in ((False, SKEW), (True, SKEW.T)):
        x, status = solve(transpose)
        np.testing.assert_allclose(ravel_pytree(x)[0], np.linalg.solve(matrix, flat), rtol=1e-9)
        assert status.converged
        assert status.residual < 1e-11


def test_a_solve_that_stops_early_keeps_its_iterate_and_says_so():
    op = flat_operator(ILL, positive_definite=True)
    b = jnp.ones(40)
    for solver in (implicit.CG(max_steps=4), implicit.NormalCG(max_steps=4)):
        x, status = implicit.solve_linear(solver, op, b)
        assert np.all(np.isfinite(x))
        assert not status.converged
        np.testing.assert_allclose(
            status.residual, np.linalg.norm(ILL @ x - b) / np.linalg.norm(b), rtol=1e-8
        )
        assert implicit.solve_linear(solver, op, b, rtol=2.0 * status.residual)[1].converged
    broken = implicit.solve_linear(implicit.Dense(), flat_operator(jnp.zeros((2, 2))), jnp.ones(2))
    assert not broken[1].converged  # NaN is not converged either
    nothing = implicit.solve_linear(implicit.CG(), op, jnp.zeros(40))
    assert nothing[1].converged and nothing[1].residual == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_report_does_not_depend_on_the_scale(dtype):
    op = flat_operator(MATRIX.astype(dtype), positive_definite=True)
    b = jnp.array([1.0, 2.0, 3.0], dtype)
    solve = jax.jit(lambda b: implicit.solve_linear(implicit.CG(max_steps=2), op, b)[1].residual)
    residuals = [solve(b * jnp.asarray(scale, dtype)) for scale in (1e-30, 1.0, 1e30)]
    np.testing.assert_allclose(residuals, residuals[1], rtol=1e-4)


def test_lsmr_is_scipys_and_stays_accurate_where_the_normal_equations_do_not():
    sparse = pytest.importorskip("scipy.sparse.linalg", reason="scipy is in the bench extra")
    random = np.random.RandomState(0)
    left = np.linalg.qr(random.randn(30, 30))[0]
    right = np.linalg.qr(random.randn(30, 30))[0]
    matrix = jnp.asarray(left @ np.diag(np.logspace(0, -3, 30)) @ right)
    b = jnp.asarray(random.randn(30))
    op = flat_operator(matrix)
    for steps in (3, 6):  # later, rounding takes the two apart
        ours = implicit.LSMR(rtol=1e-14, max_steps=steps)(op, b)
        theirs = sparse.lsmr(
            np.asarray(matrix), np.asarray(b), atol=0, btol=0, conlim=0, maxiter=steps
        )[0]
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    exact = jnp.linalg.solve(matrix, b)

    def error(solver):
        return float(jnp.linalg.norm(solver(op, b) - exact) / jnp.linalg.norm(exact))

    assert error(implicit.LSMR(max_steps=1000)) < 1e-7
    assert error(implicit.LSMR(max_steps=1000)) <= error(implicit.NormalCG(max_steps=1000))


def test_lsmr_gives_the_least_norm_solution_of_a_singular_system():
    matrix = jnp.array([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    for b in (jnp.array([1.0, 1.0, 3.0]), jnp.array([1.0, 0.0, 3.0])):  # the second inconsistent
        x = implicit.LSMR()(flat_operator(matrix), b)
        np.testing.assert_allclose(x, jnp.linalg.pinv(matrix) @ b, atol=1e-9)


# ---- transformations


INSIDE = {
    "dense": implicit.Dense(),
    "minres": implicit.MINRES(),
    "normal-cg": implicit.NormalCG(),
    "lsmr": implicit.LSMR(),
    "nystrom-cg": implicit.NystromCG(1, KEY),
    "nystrom": implicit.Nystrom(2, 1e-12, KEY),
    "neumann": implicit.Neumann(100, step=0.4),
    "minimum-norm": implicit.MinimumNorm(),
    "refined": implicit.Refined(implicit.CG()),
    "shared": implicit.Shared(jnp.eye(2) / 2),
}


@pytest.mark.parametrize("solver", INSIDE.values(), ids=INSIDE)
def test_inside_shard_map_on_eight_devices(solver):
    """A gradient through an attached solution: x solves (2 + s) x + 0.3 swap(x) = t²."""
    mesh = jax.make_mesh((8,), ("lane",), axis_types=(AxisType.Auto,))

    def solution(t):
        def condition(x, t):
            return jnp.sum(2 * x**2 + 0.3 * x * x[::-1]) / 2 - jnp.sum(t**2 * x)

        matrix = jnp.array([[2.0, 0.3], [0.3, 2.0]])
        x = jnp.linalg.solve(matrix, t**2)
        return implicit.attach(implicit.Stationary(condition), x, t, linear_solver=solver)

    sharded = jax.shard_map(
        jax.vmap(solution),
        mesh=mesh,
        in_specs=PartitionSpec("lane"),
        out_specs=PartitionSpec("lane"),
        check_vma=True,
    )
    batch = jnp.linspace(0.5, 2.0, 32).reshape(16, 2)
    ours = jax.jit(jax.grad(lambda b: jnp.sum(sharded(b) ** 2)))(batch)
    inverse = np.linalg.inv(np.array([[2.0, 0.3], [0.3, 2.0]]))
    if isinstance(solver, implicit.Shared):
        inverse_pulled = np.eye(2) / 2  # an approximation is used as it is
    else:
        inverse_pulled = inverse
    truth = 2 * batch * (2 * (batch**2 @ inverse) @ inverse_pulled)
    np.testing.assert_allclose(ours, truth, rtol=1e-8)


@pytest.mark.parametrize("solver", [implicit.GMRES(), implicit.BiCGStab()], ids=["gmres", "bicg"])
def test_what_jax_cannot_run_inside_shard_map_is_refused_by_name(solver):
    mesh = jax.make_mesh((8,), ("lane",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(
        lambda b: solver(flat_operator(SKEW), b[0])[None, :],
        mesh=mesh,
        in_specs=PartitionSpec("lane"),
        out_specs=PartitionSpec("lane"),
        check_vma=True,
    )
    with pytest.raises(NotImplementedError, match="check_vma=False"):
        run(jnp.ones((8, 3)))


def test_random_keys_and_settings_travel_through_attach_vmap_and_jit():
    @jax.jit
    def gradient(key, rho, t):
        def loss(t):
            condition = implicit.Stationary(lambda x, t: jnp.sum(x**2) - jnp.sum(x * t))
            solver = implicit.Nystrom(2, rho, key)
            return jnp.sum(
                implicit.attach(condition, jax.lax.stop_gradient(t) / 2, t, linear_solver=solver)
                ** 3
            )

        return jax.vmap(jax.grad(loss))(t)

    t = jnp.array([[1.0, 2.0], [3.0, -1.0]])
    np.testing.assert_allclose(gradient(KEY, jnp.array(1e-12), t), 3 * (t / 2) ** 2 / 2, rtol=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: implicit.MINRES(rtol=-1), "MINRES: rtol is -1, expected a number > 0"),
        (lambda: implicit.CG(rtol="a"), "CG: rtol is 'a', expected a number > 0"),
        (lambda: implicit.CG(rtol=float("nan")), "CG: rtol is nan"),
        (lambda: implicit.BiCGStab(max_steps=0), "BiCGStab: max_steps is 0, expected an integer"),
        (lambda: implicit.GMRES(restart=0), "GMRES: restart is 0, expected an integer >= 1"),
        (lambda: implicit.GMRES(max_steps=0), "GMRES: max_steps is 0, expected an integer >= 1"),
        (lambda: implicit.Auto(direct_below=-1), "Auto: direct_below is -1"),
        (lambda: implicit.Ridge(implicit.Dense, 1.0), "Ridge: inner is"),
        (lambda: implicit.Ridge(implicit.Dense(), 0.0), "Ridge: eps is 0.0, expected a number > 0"),
        (lambda: implicit.Neumann(1.5), "Neumann: terms is 1.5, expected an integer >= 0"),
        (lambda: implicit.Neumann(1, step=0), "Neumann: step is 0, expected a number > 0"),
        (lambda: implicit.JacobianFree(-1.0), "JacobianFree: scale is -1.0"),
        (lambda: implicit.Nystrom(0, 1.0, KEY), "Nystrom: rank is 0, expected an integer >= 1"),
        (lambda: implicit.Nystrom(1, -1.0, KEY), "Nystrom: rho is -1.0, expected a number > 0"),
        (lambda: implicit.Nystrom(1, 1.0, 7), "Nystrom: key is 7, expected a random key"),
        (lambda: implicit.NystromCG(True, KEY), "NystromCG: rank is True, expected an integer"),
        (lambda: implicit.NystromCG(1, None), "NystromCG: key is None, expected a random key"),
        (lambda: implicit.NystromCG(1, KEY, rtol=0), "NystromCG: rtol is 0"),
        (lambda: implicit.MinimumNorm(0.0), "MinimumNorm: rcond is 0.0, expected a number > 0"),
        (lambda: implicit.Refined(None), "Refined: inner is None, expected a linear solver"),
        (lambda: implicit.Refined(implicit.CG(), -1), "Refined: steps is -1, expected an integer"),
        (lambda: implicit.Shared(3.0), "Shared: inverse is 3.0, expected a square matrix"),
        (lambda: implicit.Shared(jnp.ones((2, 3))), "Shared: inverse has shape"),
        (lambda: implicit.Shared(jnp.eye(2), -1), "Shared: steps is -1, expected an integer >= 0"),
        (lambda: implicit.Shared(jnp.eye(2))(operator(SKEW), TREE), "expected .3, 3."),
        (
            lambda: implicit.solve_linear(implicit.CG(), operator(SKEW), TREE, jnp.zeros(3)),
            "solve_linear: x0 has leaves",
        ),
        (
            lambda: implicit.solve_linear(implicit.CG(), operator(SKEW), jnp.zeros(3)),
            "solve_linear: rhs has leaves",
        ),
        (
            lambda: implicit.solve_linear(implicit.CG(), operator(SKEW), TREE, rtol=0.0),
            "solve_linear: rtol is 0.0, expected a number > 0",
        ),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
