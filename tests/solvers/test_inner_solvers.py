"""Inner solvers of SketchedNewtonAL: residuals, contraction of sketches, accuracy rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_ext import solvers
from jaxopt_ext.solvers import kkt
from jaxopt_ext.solvers.exact_augmented_lagrangian import Sizes
from jaxopt_ext.solvers.kkt_systems import KKTSystem, convexifying_shift, reduced_hessian

N, M = 6, 3


def random_system(seed, relaxed=0.0):
    """A saddle-point system with W positive definite on the null space of J."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(N, N))
    hessian = jnp.asarray(root @ root.T / N + 0.5 * np.eye(N))
    jacobian = jnp.asarray(rng.normal(size=(M, N)))
    relaxation = jnp.full(M, relaxed)
    matrix = jnp.block([[hessian, jacobian.T], [jacobian, -jnp.diag(relaxation)]])
    rhs = jnp.asarray(rng.normal(size=N + M))
    system = KKTSystem(
        lambda v: matrix @ v,
        matrix,
        jnp.diagonal(hessian),
        lambda v: jacobian @ v,
        lambda v: jacobian.T @ v,
        jacobian,
        relaxation,
    )
    return system, rhs


INNER = {
    "direct": kkt.Direct(),
    "minres": kkt.MINRES(),
    "minres-diagonal": kkt.MINRES("diagonal"),
    "minres-schur": kkt.MINRES("schur"),
    "gmres": kkt.GMRES(restart=9),
    "projected-cg": kkt.ProjectedCG(),
    "gaussian": kkt.SketchAndProject("gaussian"),
    "gaussian-3": kkt.SketchAndProject("gaussian", 3),
    "kaczmarz": kkt.SketchAndProject("coordinate"),
    "kaczmarz-norms": kkt.SketchAndProject("coordinate", by_row_norm=True),
    "coordinate-3": kkt.SketchAndProject("coordinate", 3),
    "countsketch-3": kkt.SketchAndProject("countsketch", 3),
    "srht-3": kkt.SketchAndProject("srht", 3),
}


@pytest.mark.parametrize("relaxed", [0.0, 0.1], ids=["equalities", "relaxed"])
@pytest.mark.parametrize("name", INNER)
def test_reaches_the_residual_asked_for(name, relaxed):
    inner = INNER[name]
    system, rhs = random_system(0, relaxed)
    tolerance = 1e-4 * jnp.linalg.norm(rhs)
    kept = inner.prepare(system)

    @jax.jit
    def solve(start):
        return inner.solve(system, kept, rhs, start, tolerance, jax.random.key(1))

    found = solve(jnp.zeros(N + M))
    assert jnp.linalg.norm(system.matrix @ found.solution - rhs) <= tolerance
    again = solve(found.solution)  # there is nothing left to do
    assert jnp.linalg.norm(system.matrix @ again.solution - rhs) <= tolerance
    assert int(again.products) <= int(found.products)


def test_krylov_methods_end_within_the_dimension_of_the_space():
    system, rhs = random_system(1)
    tolerance = 1e-9 * jnp.linalg.norm(rhs)
    for inner, bound in ((kkt.MINRES(), N + M + 6), (kkt.ProjectedCG(), N - M + 4)):
        found = inner.solve(system, inner.prepare(system), rhs, 0 * rhs, tolerance, None)
        assert jnp.linalg.norm(system.matrix @ found.solution - rhs) <= tolerance
        assert int(found.products) <= bound


def test_projected_cg_meets_the_rows_at_every_accuracy():
    system, rhs = random_system(2)
    inner = kkt.ProjectedCG(max_steps=1)
    found = inner.solve(system, inner.prepare(system), rhs, 0 * rhs, jnp.array(0.0), None)
    rows = (system.matrix @ found.solution - rhs)[N:]
    assert jnp.max(jnp.abs(rows)) < 1e-12 * jnp.linalg.norm(rhs)


@pytest.mark.parametrize(
    "inner",
    [
        kkt.SketchAndProject("gaussian"),
        kkt.SketchAndProject("gaussian", 3),
        kkt.SketchAndProject("coordinate"),
        kkt.SketchAndProject("coordinate", by_row_norm=True),
        kkt.SketchAndProject("countsketch", 3),
        kkt.SketchAndProject("srht", 3),
    ],
    ids=["gaussian", "gaussian-3", "coordinate", "by-row-norm", "countsketch-3", "srht-3"],
)
def test_sketches_contract_the_error_as_the_theory_says(inner):
    """E‖d_T − d*‖² ≤ (1 − λ_min(E[W (WᵀW)⁺ Wᵀ]))ᵀ ‖d_0 − d*‖², and no step makes it larger."""
    system, rhs = random_system(3)
    matrix = np.asarray(system.matrix)
    size = N + M
    truth = np.linalg.solve(matrix, np.asarray(rhs))
    logits = inner.prepare(system)

    def projection(key):
        if inner.sketch == "coordinate":
            columns = system.matrix[jax.random.categorical(key, logits)][:, None]
        else:
            columns = system.matrix @ inner.draw(key, size, rhs.dtype)
        return columns @ jnp.linalg.pinv(columns)

    keys = jax.random.split(jax.random.key(0), 4000)
    mean = np.asarray(jnp.mean(jax.lax.map(projection, keys, batch_size=500), axis=0))
    rate = 1 - np.linalg.eigvalsh((mean + mean.T) / 2)[0]
    assert 0.5 < rate < 1

    steps = max(1, size // inner.block)

    @jax.jit
    @jax.vmap
    def errors(key):
        def sweep(d, key):
            d = inner.sweep(system.matrix, logits, rhs, d, key)
            return d, jnp.sum((d - truth) ** 2)

        return jax.lax.scan(sweep, jnp.zeros(size), jax.random.split(key, 3))[1]

    found = errors(jax.random.split(jax.random.key(1), 200)) / np.sum(truth**2)
    assert (np.diff(found, axis=1, prepend=1.0) <= 1e-9).all()
    assert np.mean(found[:, -1]) <= rate ** (3 * steps) * 1.1


def test_the_published_bound_on_the_inverse_holds():
    """Ψ ≥ ‖K⁻¹‖ wherever the curvature on the null space is at least ξ_B."""
    rule = kkt.PublishedAccuracy()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        root = rng.normal(size=(N, N))
        hessian = root @ root.T / N * rng.uniform(0.1, 10) + 0.1 * np.eye(N)
        jacobian = rng.normal(size=(M, N)) * rng.uniform(0.1, 3)
        matrix = np.block([[hessian, jacobian.T], [jacobian, np.zeros((M, M))]])
        one = jnp.ones(())
        sizes = Sizes(
            residual=one,
            optimality=one,
            hessian=jnp.linalg.norm(hessian),
            jacobian=jnp.linalg.norm(jacobian),
            matrix=jnp.linalg.norm(matrix),
            least=jnp.asarray(np.linalg.eigvalsh(jacobian @ jacobian.T)[0]),
            decrease=0.1,
            penalty=one,
            gradient_penalty=0.1 * one,
        )
        bound = float(rule.inverse_bound(sizes)) * 7 / 20  # 7 is enough, the code has 20
        assert np.linalg.norm(np.linalg.inv(matrix), 2) <= bound
        # a residual of this size is a relative error of at most δ in the step
        tolerance = float(rule.tolerance(jnp.array(0.1), sizes))
        error = np.linalg.norm(np.linalg.solve(matrix, rng.normal(size=N + M)))
        assert tolerance <= 0.1 and error > 0
        # δ falls with the penalties and is never below the floor
        first = rule.update(jnp.array(0.1), sizes)
        later = rule.update(first, sizes._replace(penalty=100 * one, gradient_penalty=0.01 * one))
        assert 1e-6 <= float(later) <= float(first) <= 0.1


def test_the_relative_rule_sharpens_with_the_residual():
    one = jnp.ones(())
    sizes = Sizes(2 * one, one, one, one, one, one, 0.1, one, one)
    rule = kkt.RelativeAccuracy(0.1)
    assert float(rule.tolerance(one, sizes)) == pytest.approx(0.2)
    near = sizes._replace(optimality=jnp.array(1e-3))
    assert float(rule.tolerance(one, near)) == pytest.approx(2e-3)
    linear = kkt.RelativeAccuracy(0.1, superlinear=False)
    assert float(linear.tolerance(one, near)) == pytest.approx(0.2)


def test_shift_makes_the_reduced_hessian_positive_definite():
    jacobian = jnp.array([[1.0, 1.0, 0.0]])
    hessian = jnp.diag(jnp.array([1.0, 2.0, -3.0]))
    no, yes = jnp.array(False), jnp.array(True)
    reduced = reduced_hessian(hessian, jacobian, jnp.zeros(1), 1, no)
    # 1.5 on the null space, and the largest entry of W beyond it
    np.testing.assert_allclose(np.linalg.eigvalsh(reduced), [-3.0, 1.5, 3.0], atol=1e-12)
    shift = convexifying_shift(reduced, jnp.array(0.0))
    assert 3.0 < float(shift) <= 300.0
    # with one that was needed before the search is finer
    closer = convexifying_shift(reduced, jnp.array(4.0))
    assert 3.0 < float(closer) <= 24.0
    assert float(convexifying_shift(reduced + 4 * jnp.eye(3), jnp.array(4.0))) == 0.0
    # an inequality that is nearly active counts by its stiffness 1 / Δ
    stiff = reduced_hessian(hessian, jnp.array([[0.0, 0.0, 1.0]]), jnp.array([1e-3]), 0, no)
    assert float(stiff[2, 2]) == pytest.approx(997.0)
    # two equal rows leave a null space that is larger than the number of rows says
    twice = jnp.concatenate([jacobian, jacobian])
    found = reduced_hessian(hessian, twice, jnp.full(2, 1e-2), 2, yes)
    assert np.linalg.eigvalsh(found)[0] == pytest.approx(-3.0)
    assert (np.linalg.eigvalsh(found)[1:] > 1.0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kkt.MINRES("jacobi"), "preconditioner is 'jacobi', expected one of: 'none'"),
        (lambda: kkt.MINRES(max_steps=0), "max_steps is 0, expected an integer >= 1"),
        (lambda: kkt.GMRES(restart=0), "restart is 0, expected an integer >= 1"),
        (lambda: kkt.SketchAndProject("sparse"), "sketch is 'sparse', expected one of"),
        (lambda: kkt.SketchAndProject(block=0), "block is 0, expected an integer >= 1"),
        (lambda: kkt.RelativeAccuracy(1.0), "fraction is 1, expected a number > 0 and < 1"),
        (lambda: kkt.PublishedAccuracy(first=0.0), "first is 0, expected a number > 0"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_automatic_choice_by_size():
    from jaxopt_ext.solvers.inner_solvers import automatic

    assert isinstance(automatic(500), kkt.Direct)
    assert isinstance(automatic(501), kkt.MINRES)
    assert solvers.SketchedNewtonAL.published().needs_key
    assert not solvers.SketchedNewtonAL().needs_key
