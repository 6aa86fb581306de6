"""Preconditioners of SketchedNewtonAL's systems, and programs that need them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_ext as jx
from jaxopt_ext import solvers
from jaxopt_ext.bench.inner_solver_costs import poisson_control
from jaxopt_ext.solvers import kkt
from jaxopt_ext.solvers.flat_program import Scaling
from jaxopt_ext.solvers.kkt_systems import KKTSystem, Units

N, M = 9, 3


def identity(flat):
    return flat


def saddle_point_system(seed, equalities=M, scaling=None):
    """K with a positive definite W, and rows of which those beyond `equalities` are relaxed."""
    rng = np.random.default_rng(seed)
    root, jacobian = rng.normal(size=(N, N)), jnp.asarray(rng.normal(size=(M, N)))
    hessian = jnp.asarray(root @ root.T / N + np.eye(N))
    relaxation = jnp.where(jnp.arange(M) < equalities, 0.0, 0.1)
    matrix = jnp.block([[hessian, jacobian.T], [jacobian, -jnp.diag(relaxation)]])
    if scaling is None:
        scaling = Scaling(jnp.ones(()), jnp.ones(M))
    units = Units(identity, identity, scaling, equalities)
    system = KKTSystem(
        lambda v: matrix @ v, matrix, jnp.diagonal(hessian), lambda v: jacobian @ v,
        lambda v: jacobian.T @ v, jacobian, relaxation, units,
    )  # fmt: skip
    return system, jnp.asarray(rng.normal(size=N + M))


def dense(preconditioner, system, transposed):
    kept = preconditioner.prepare(system)
    return jax.vmap(lambda v: preconditioner.apply(system, kept, v, transposed))(
        jnp.eye(N + M, dtype=jnp.float64)
    ).T


def inverse_root(matrix):
    return jnp.linalg.inv(jnp.linalg.cholesky(matrix)).T


def exact_blocks(system, objective=1.0, rows=1.0):
    """S_y and S_λ for the program whose scaled form the system is."""
    hessian, jacobian = system.matrix[:N, :N] / objective, system.jacobian / rows
    schur = jacobian @ jnp.linalg.solve(hessian, jacobian.T)
    by_rows, by_variables = inverse_root(schur), inverse_root(hessian)
    return kkt.BlockPreconditioner(lambda r: by_rows @ r, lambda y: by_variables @ y)


@pytest.mark.parametrize(
    "preconditioner", [kkt.Diagonal(), kkt.Schur(), kkt.Nystrom(4), kkt.BlockPreconditioner()]
)
def test_the_factors_are_transposes_of_each_other(preconditioner):
    system, _ = saddle_point_system(0)
    factor, transposed = (dense(preconditioner, system, t) for t in (False, True))
    np.testing.assert_allclose(factor.T, transposed, atol=1e-12)
    assert np.linalg.svd(factor)[1].min() > 1e-3


def test_exact_blocks_leave_three_eigenvalues():
    """SᵀK S has the eigenvalues 1 and (1 ± √5) / 2, so MINRES takes three steps."""
    system, rhs = saddle_point_system(1)
    for preconditioner in (exact_blocks(system), kkt.Nystrom(N)):
        factor = dense(preconditioner, system, False)
        values = np.linalg.eigvalsh(factor.T @ system.matrix @ factor)
        golden = (1 + 5**0.5) / 2
        nearest = np.abs(values[:, None] - np.array([[1.0, golden, 1 - golden]])).min(axis=1)
        assert nearest.max() < 1e-9
    inner = kkt.MINRES(exact_blocks(system))
    tolerance = 1e-9 * jnp.linalg.norm(rhs)
    found = inner.solve(system, inner.prepare(system), rhs, 0 * rhs, tolerance, None)
    assert jnp.linalg.norm(system.matrix @ found.solution - rhs) <= tolerance
    assert int(found.products) <= 3 + 2 + 2


def test_the_users_blocks_are_in_the_units_of_the_program():
    rows = jnp.array([2.0, 0.1, 5.0])
    system, _ = saddle_point_system(2, scaling=Scaling(jnp.array(3.0), rows))
    block = exact_blocks(system, 3.0, rows[:, None])
    factor = dense(block, system, False)
    values = np.linalg.eigvalsh(factor.T @ system.matrix @ factor)
    golden = (1 + 5**0.5) / 2
    assert np.abs(values[:, None] - np.array([[1.0, golden, 1 - golden]])).min(axis=1).max() < 1e-9


def test_direct_eliminates_inequalities():
    system, rhs = saddle_point_system(3, equalities=1)
    inner = kkt.Direct()
    kept = inner.prepare(system)
    assert kept[0][0].shape == (N + 1, N + 1)
    found = inner.solve(system, kept, rhs, 0 * rhs, jnp.array(0.0), None)
    np.testing.assert_allclose(system.matrix @ found.solution, rhs, atol=1e-12)


def test_bad_blocks_are_refused():
    with pytest.raises(TypeError, match="constraints"):
        kkt.BlockPreconditioner(3)  # pyright: ignore
    with pytest.raises(ValueError, match="rank is 0"):
        kkt.Nystrom(0)
    system, rhs = saddle_point_system(0)
    wrong = kkt.BlockPreconditioner(lambda r: r[:2])
    with pytest.raises(ValueError, match="constraints returned"):
        wrong.apply(system, wrong.prepare(system), rhs, False)


# ---- whole programs ----------------------------------------------------------------------------


def preconditioned_control(size):
    """The control problem, and S_λ with S_λ S_λᵀ within 2 of the exact one."""
    program, start, _ = poisson_control(size)
    h, i = 2.0 / (size + 1), np.arange(1.0, size + 1)
    sines = jnp.asarray(np.sqrt(2 / (size + 1)) * np.sin(np.pi * np.outer(i, i) / (size + 1)))
    waves = (2 - 2 * np.cos(np.pi * i / (size + 1))) / h**2
    damp = jnp.asarray(1 / (waves[:, None] + waves[None, :] + 10**0.5))
    block = kkt.BlockPreconditioner(lambda r: sines @ (damp * (sines @ r @ sines)) @ sines)
    return program, start, block


def test_products_do_not_grow_with_the_grid():
    products = []
    for size in (8, 24):
        program, start, block = preconditioned_control(size)
        solver = solvers.SketchedNewtonAL(kkt.MINRES(block))
        found = jx.solve(program, solver, start, max_steps=30)
        assert bool(found.success), str(found)
        assert int(found.stats.counts.hessian) == 0
        products.append(int(found.stats.counts.hvp))
    assert max(products) < 250  # 14 693 without, at size 32


def test_thousands_of_inequalities_in_a_few_variables():
    """The largest disc in a polygon of 2000 sides that touch the unit circle."""
    angles = jnp.linspace(0, 2 * jnp.pi, 2000, endpoint=False)
    normals = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    program = jx.NonlinearProgram(
        lambda y, args: -y[2], inequality=lambda y, args: normals @ y[:2] + y[2] - 1.0
    )
    found = jx.solve(program, solvers.SketchedNewtonAL(), jnp.array([0.3, 0.1, 0.2]))
    assert bool(found.success), str(found)
    np.testing.assert_allclose(found.value, [0.0, 0.0, 1.0], atol=1e-6)
    assert float(jnp.sum(found.multipliers.inequality)) == pytest.approx(1.0, abs=1e-6)


def test_curved_valleys_are_followed():
    """The weight of the gradient in the merit function falls where it alone forbids long steps."""
    program = jx.NonlinearProgram(
        lambda y, args: 100 * (y[1] - y[0] ** 2) ** 2 + (1 - y[0]) ** 2, lower=-10.0
    )
    found = jx.solve(program, solvers.SketchedNewtonAL(), jnp.array([-1.2, 1.0]), max_steps=60)
    assert bool(found.success), str(found)
    np.testing.assert_allclose(found.value, 1.0, atol=1e-6)
