"""Solvers of lineax in the implicit rule, and solvers of this library in lineax and optimistix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

lx = pytest.importorskip("lineax", reason="the lineax adapter needs lineax")

from jaxopt_ext import implicit  # noqa: E402
from jaxopt_ext.implicit.lineax_adapter import from_lineax, to_lineax  # noqa: E402

MATRIX = jnp.array([[4.0, 1.0, 0.5], [1.0, 3.0, 0.2], [0.5, 0.2, 2.0]])
SKEW = MATRIX + jnp.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
FROM = {
    "lu": (lx.LU(), SKEW, {}),
    "cg": (lx.CG(rtol=1e-12, atol=1e-12), MATRIX, {"positive_definite": True}),
    "gmres": (lx.GMRES(rtol=1e-12, atol=1e-12, restart=3), SKEW, {}),
    "svd": (lx.SVD(), MATRIX, {"symmetric": True}),
}


def loss(solve, s, b):
    return jnp.sum(jnp.sin(solve(s, b)))


@pytest.mark.parametrize(("solver", "matrix", "structure"), FROM.values(), ids=FROM)
def test_value_gradient_and_hessian_of_a_lineax_solver(solver, matrix, structure):
    b = jnp.array([1.0, -2.0, 0.5])
    adapted = from_lineax(solver)

    def ours(s, b):
        def mv(v):
            return {"x": matrix @ v["x"] + s * v["x"]}

        operator = implicit.LinearOperator(mv, {"x": b}, **structure)
        return adapted(operator, {"x": b})["x"]

    def truth(s, b):
        return jnp.linalg.solve(matrix + s * jnp.eye(3), b)

    def everything(solve):
        def run(s, b):
            gradient, curvature = jax.jvp(
                jax.grad(lambda s, b: loss(solve, s, b), (0, 1)), (s, b), (1.0, jnp.ones(3))
            )
            return solve(s, b), gradient, curvature

        return jax.jit(run)(0.3, b)

    for a, t in zip(
        jax.tree.leaves(everything(ours)), jax.tree.leaves(everything(truth)), strict=True
    ):
        np.testing.assert_allclose(a, t, rtol=1e-8, atol=1e-9)


def test_absolute_tolerances_do_not_see_the_scale_and_failures_do_not_raise():
    operator = implicit.LinearOperator(lambda v: MATRIX @ v, jnp.zeros(3), positive_definite=True)
    b = jnp.array([1.0, -2.0, 0.5])
    solver = from_lineax(lx.CG(rtol=1e-10, atol=1e-10))
    x = jax.jit(lambda b: solver(operator, b))(1e-30 * b)
    np.testing.assert_allclose(x, 1e-30 * jnp.linalg.solve(MATRIX, b), rtol=1e-8)
    short = from_lineax(lx.CG(rtol=1e-10, atol=1e-10, max_steps=1))
    pulled = jax.jit(
        lambda b: jax.vjp(lambda b: implicit.solve_linear(short, operator, b)[0], b)[1](b)[0]
    )(b)
    assert np.all(np.isfinite(pulled))
    assert not implicit.solve_linear(short, operator, b)[1].converged


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_gradient_through_a_lineax_solver_of_full_rank_exports(platform):
    def root(t):
        return implicit.attach(
            lambda x, t: x**3 + x - t,
            jnp.ones_like(t),
            t,
            linear_solver=from_lineax(lx.LU()),
        )

    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    gradient = jax.jit(jax.grad(lambda t: jnp.sum(root(t) ** 2)))
    exported = export.export(gradient, platforms=[platform])(shape)
    assert "callback" not in exported.mlir_module()


TO = {
    "dense": (implicit.Dense(), SKEW, ()),
    "cg": (implicit.CG(), MATRIX, (lx.symmetric_tag, lx.positive_semidefinite_tag)),
    "minres": (implicit.MINRES(), MATRIX - 3.2 * jnp.eye(3), lx.symmetric_tag),
    "minimum-norm": (implicit.MinimumNorm(), SKEW, ()),
}


@pytest.mark.parametrize(("solver", "matrix", "tags"), TO.values(), ids=TO)
def test_our_solver_inside_lineax(solver, matrix, tags):
    b = jnp.array([1.0, -2.0, 0.5])
    adapted = to_lineax(solver)

    def ours(s, b):
        operator = lx.MatrixLinearOperator(matrix + s * jnp.eye(3), tags)
        return lx.linear_solve(operator, b, adapted).value

    def truth(s, b):
        return jnp.linalg.solve(matrix + s * jnp.eye(3), b)

    np.testing.assert_allclose(ours(0.1, b), truth(0.1, b), rtol=1e-9)
    for a, t in zip(
        jax.tree.leaves(jax.jit(jax.jacrev(ours, (0, 1)))(0.1, b)),
        jax.tree.leaves(jax.jacrev(truth, (0, 1))(0.1, b)),
        strict=True,
    ):
        np.testing.assert_allclose(a, t, rtol=1e-8, atol=1e-10)


def test_structures_that_differ_and_operators_that_are_not_square():
    weights = jnp.array([2.0, 4.0])
    operator = lx.FunctionLinearOperator(
        lambda v: jnp.concatenate([v["a"], v["b"]]) * weights,
        {
            "a": jax.ShapeDtypeStruct((1,), weights.dtype),
            "b": jax.ShapeDtypeStruct((1,), weights.dtype),
        },
    )
    x = lx.linear_solve(operator, jnp.array([2.0, 8.0]), to_lineax(implicit.Dense())).value
    np.testing.assert_allclose(x["a"], 1.0)
    np.testing.assert_allclose(x["b"], 2.0)
    with pytest.raises(ValueError, match="expected a square operator"):
        lx.linear_solve(
            lx.MatrixLinearOperator(jnp.ones((3, 2))), jnp.ones(3), to_lineax(implicit.Dense())
        )


def test_optimistix_uses_our_solver_in_its_adjoint():
    optx = pytest.importorskip("optimistix", reason="the peer that takes lineax solvers")

    def root(t):
        return optx.root_find(
            lambda y, t: y**3 + y - t,
            optx.Newton(rtol=1e-12, atol=1e-12),
            jnp.ones(2),
            t,
            adjoint=optx.ImplicitAdjoint(linear_solver=to_lineax(implicit.GMRES(restart=2))),
        ).value

    t = jnp.array([2.0, 10.0])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        slopes = jax.jit(jax.jacrev(root))(t)
    np.testing.assert_allclose(slopes, jnp.diag(1 / (3 * jnp.array([1.0, 4.0]) + 1)), atol=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_lineax(implicit.CG()), "from_lineax: lineax_solver is CG"),
        (lambda: to_lineax(3), "to_lineax: solver is 3, expected a linear solver"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
