"""Linear solvers of the implicit rule against dense linear algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_ext import implicit

MATRIX = jnp.array([[4.0, 1.0, 0.5], [1.0, 3.0, 0.2], [0.5, 0.2, 2.0]])
SKEW = MATRIX + jnp.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
TREE = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(-1.0)}


def operator(matrix, **structure):
    from jax.flatten_util import ravel_pytree

    _, unravel = ravel_pytree(TREE)
    return implicit.LinearOperator(
        lambda v: unravel(matrix @ ravel_pytree(v)[0]), TREE, **structure
    )


CASES = {
    "dense": (implicit.Dense(), SKEW, {}),
    "dense-positive": (implicit.Dense(), MATRIX, {"positive_definite": True}),
    "cg": (implicit.CG(), MATRIX, {"positive_definite": True}),
    "gmres": (implicit.GMRES(), SKEW, {}),
    "gmres-symmetric": (implicit.GMRES(), MATRIX, {"symmetric": True}),
    "auto-dense": (implicit.Auto(), SKEW, {}),
    "auto-cg": (implicit.Auto(direct_below=0), MATRIX, {"positive_definite": True}),
    "auto-gmres": (implicit.Auto(direct_below=0), SKEW, {}),
}


@pytest.mark.parametrize(("solver", "matrix", "structure"), CASES.values(), ids=CASES)
def test_solution_transpose_and_derivative(solver, matrix, structure):
    rhs = jax.tree.map(lambda x: x + 0.5, TREE)
    flat, unravel = jax.flatten_util.ravel_pytree(rhs)

    def solve(matrix, flat):
        return jax.flatten_util.ravel_pytree(solver(operator(matrix, **structure), unravel(flat)))[
            0
        ]

    np.testing.assert_allclose(solve(matrix, flat), jnp.linalg.solve(matrix, flat), rtol=1e-9)
    inverse = jnp.linalg.inv(matrix)
    np.testing.assert_allclose(jax.jacrev(solve, 1)(matrix, flat), inverse, rtol=1e-8, atol=1e-11)
    np.testing.assert_allclose(jax.jacfwd(solve, 1)(matrix, flat), inverse, rtol=1e-8, atol=1e-11)

    def along(s):  # derivative with respect to the operator, along a symmetric direction
        return jnp.sum(solve(matrix + s * jnp.eye(3), flat) ** 2)

    def truth(s):
        return jnp.sum(jnp.linalg.solve(matrix + s * jnp.eye(3), flat) ** 2)

    for order in (jax.grad, jax.hessian):
        np.testing.assert_allclose(order(along)(0.1), order(truth)(0.1), rtol=1e-7)
    batch = jnp.stack([flat, -2 * flat])
    np.testing.assert_allclose(
        jax.vmap(lambda b: solve(matrix, b))(batch), batch @ inverse.T, rtol=1e-9
    )


def test_operator_as_matrix_and_size():
    op = operator(SKEW)
    assert op.size == 3
    np.testing.assert_allclose(op.as_matrix(), SKEW)


@pytest.mark.parametrize("solver", [implicit.CG(), implicit.GMRES()], ids=["cg", "gmres"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_krylov_accuracy_is_relative_to_the_right_hand_side(solver, dtype):
    matrix = MATRIX.astype(dtype)
    op = implicit.LinearOperator(lambda v: matrix @ v, jnp.zeros(3, dtype), positive_definite=True)
    rhs = jnp.array([1.0, -2.0, 0.5], dtype)
    truth = np.linalg.solve(np.asarray(MATRIX), np.asarray(rhs, np.float64))
    for scale in (1e-30, 1.0, 1e30):
        found = np.asarray(solver(op, rhs * jnp.asarray(scale, dtype)), np.float64) / scale
        np.testing.assert_allclose(found, truth, rtol=1e-5 if dtype == jnp.float32 else 1e-10)
    assert not np.any(solver(op, jnp.zeros(3, dtype)))


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
