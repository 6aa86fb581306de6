"""Projections against variational inequalities, closed forms, and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_ext import implicit
from jaxopt_ext.implicit import projections as pr

rng = np.random.default_rng(0)
N = 5
X = jnp.array(rng.normal(size=N))
A = jnp.array(rng.normal(size=(2, N)))
B = A @ jnp.array(rng.normal(size=N))
G = jnp.array(rng.normal(size=(6, N)))
INSIDE = jnp.linalg.pinv(A) @ B
H = G @ INSIDE + 0.3 * jnp.array(rng.uniform(size=6))
LOW, UP = jnp.array([-1.0, 0.0, -jnp.inf, -0.5, -0.2]), jnp.array([0.5, 1.0, 0.3, jnp.inf, 0.4])
W, C = jnp.array([1.0, -0.5, 2.0, 0.7, 0.0]), jnp.array(0.4)
M = jnp.array(rng.normal(size=(3, 4)))
ROW, COLUMN = jnp.array([0.2, 0.5, 0.3]), jnp.array([0.1, 0.4, 0.3, 0.2])
S = jnp.array(rng.normal(size=(4, 4)))
S = S + S.T
CONE = jnp.array([0.3, 1.0, -2.0, 0.5])


def cone(x):
    t, v = pr.projection_second_order_cone((x[0], x[1:]))
    return jnp.concatenate([t[None], v])


# name: (function of x and hyper-parameters, x, hyper-parameters)
CASES = {
    "affine": (pr.projection_affine_set, X, (A, B)),
    "polyhedron": (pr.projection_polyhedron, X, (A, B, G, H)),
    "box_section": (pr.projection_box_section, X, (LOW, UP, W, C)),
    "transport": (pr.projection_transport, M, (ROW, COLUMN)),
    "kl_transport": (pr.kl_projection_transport, M, (ROW, COLUMN)),
    "second_order_cone": (lambda x, _: cone(x), CONE, ()),
    "psd": (lambda x, _: pr.projection_psd_cone(x), S, ()),
    "sparse_simplex": (lambda x, s: pr.projection_sparse_simplex(x, 3, s), X, jnp.array(1.3)),
    "l1_sphere": (lambda x, s: pr.projection_l1_sphere(x, s), X, jnp.array(0.7)),
    "l2_sphere": (lambda x, s: pr.projection_l2_sphere(x, s), X, jnp.array(0.7)),
}
CONVEX = [n for n in CASES if n not in ("sparse_simplex", "l1_sphere", "l2_sphere")]
EUCLIDEAN = [n for n in CONVEX if not n.startswith("kl")]


@functools.cache
def compiled(name):
    fun, _, hyper = CASES[name]
    batch = jax.jit(jax.vmap(lambda x: fun(x, hyper)))
    many = batch(jnp.asarray(2 * samples(name)))
    return jax.jit(fun), batch, many


def samples(name):
    seed = np.random.default_rng(sum(map(ord, name)))
    return seed.normal(size=(40, *CASES[name][1].shape))


def feasible(name, y):
    """Largest violation of the set's constraints."""
    if name == "affine":
        return jnp.max(jnp.abs(A @ y - B))
    if name == "polyhedron":
        return jnp.maximum(jnp.max(jnp.abs(A @ y - B)), jnp.max(G @ y - H))
    if name == "box_section":
        return jnp.max(jnp.stack([jnp.max(LOW - y), jnp.max(y - UP), jnp.abs(W @ y - C)]))
    if name.endswith("transport"):
        gaps = jnp.concatenate([y.sum(1) - ROW, y.sum(0) - COLUMN, jnp.minimum(y, 0).ravel()])
        return jnp.max(jnp.abs(gaps))
    if name == "psd":
        return jnp.maximum(jnp.max(jnp.abs(y - y.T)), -jnp.min(jnp.linalg.eigvalsh(y)))
    if name == "second_order_cone":
        return jnp.linalg.norm(y[1:]) - y[0]
    if name == "sparse_simplex":
        too_many = jnp.maximum(jnp.sum(y != 0) - 3, 0).astype(y.dtype)
        return jnp.max(jnp.stack([-jnp.min(y), jnp.abs(y.sum() - 1.3), too_many]))
    return jnp.abs(jnp.linalg.norm(y, ord=int(name[1])) - 0.7)


@pytest.mark.parametrize("name", CASES)
def test_result_is_in_the_set(name):
    _, _, many = compiled(name)
    assert float(jnp.max(jax.vmap(lambda y: feasible(name, y))(many))) < 1e-10


@pytest.mark.parametrize("name", EUCLIDEAN)
def test_variational_inequality_and_nonexpansiveness(name):
    """⟨x − P(x), z − P(x)⟩ <= 0 for all z of the set: the projection and nothing else."""
    _, _, many = compiled(name)
    xs = 2 * samples(name).reshape(40, -1)
    if name == "psd":
        full = xs.reshape(40, 4, 4)
        xs = ((full + np.swapaxes(full, 1, 2)) / 2).reshape(40, -1)
    ys = np.asarray(many).reshape(40, -1)
    products = (xs - ys) @ ys.T - np.sum((xs - ys) * ys, axis=1)[:, None]
    assert np.max(products) < 1e-9
    longer = [np.linalg.norm(v[:, None] - v[None, :], axis=2) for v in (ys, xs)]
    assert np.max(longer[0] - longer[1]) < 1e-9


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("kl")])
def test_projecting_twice_changes_nothing(name):
    _, batch, many = compiled(name)
    np.testing.assert_allclose(batch(many), many, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_vmap_is_a_loop(name):
    fun, _, many = compiled(name)
    for i in (0, 7):
        single = fun(jnp.asarray(2 * samples(name)[i]), CASES[name][2])
        np.testing.assert_allclose(single, many[i], atol=1e-12)


def consistent(name, tangent):
    """Tangents of the marginals keep the totals equal."""
    if "transport" in name:
        da, db = tangent[1]
        return tangent[0], (da - da.mean(), db - db.mean())
    return tangent


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_those_of_the_solve_in_both_precisions(name):
    fun, x, hyper = CASES[name]
    seed = np.random.default_rng(3)
    finite = jax.tree.map(lambda v: jnp.where(jnp.isfinite(v), 1.0, 0.0), (x, hyper))
    tangent = jax.tree.map(lambda v: v * jnp.array(seed.normal(size=v.shape)), finite)
    tangent = consistent(name, tangent)
    weights = jnp.array(seed.normal(size=x.shape))

    @jax.jit
    def both(x, hyper, tangent):
        value, forward = jax.jvp(fun, (x, hyper), tangent)
        w = weights.astype(x.dtype)
        gradient = jax.grad(lambda x, h: jnp.sum(w * fun(x, h)), argnums=(0, 1))(x, hyper)
        return value, forward, gradient

    value, forward, gradient = both(x, hyper, tangent)
    np.testing.assert_allclose(value, compiled(name)[0](x, hyper), atol=1e-12)
    step = 1e-6
    shifted = [
        compiled(name)[0](*jax.tree.map(lambda v, t: v + s * t, (x, hyper), tangent))
        for s in (step, -step)
    ]
    np.testing.assert_allclose(forward, (shifted[0] - shifted[1]) / (2 * step), atol=2e-8)
    reverse = sum(
        jnp.sum(g * t)
        for g, t in zip(jax.tree.leaves(gradient), jax.tree.leaves(tangent), strict=True)
    )
    np.testing.assert_allclose(reverse, jnp.sum(weights * forward), atol=1e-9)

    single = jax.tree.map(lambda v: v.astype(jnp.float32), (x, hyper, tangent))
    low, high = jax.tree.leaves(both(*single)), jax.tree.leaves((value, forward, gradient))
    for ours, exact in zip(low, high, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["polyhedron", "kl_transport", "psd"])
def test_second_derivatives_inside_a_scan(name):
    """Forward over reverse through a scan whose carry feeds the projection."""
    fun, x, hyper = CASES[name]
    direction = jnp.array(np.random.default_rng(5).normal(size=x.shape))
    turn = jnp.zeros_like(G).at[0].set(direction) if name == "polyhedron" else None

    def point(s):
        moved = hyper if turn is None else (A, B, G + s * turn, H)
        return jnp.sum(jnp.sin(fun(x + s * direction, moved)))

    def looped(s):
        return jax.lax.scan(lambda c, _: (s + 0.1 * c, point(s + 0.1 * c)), s, length=2)[1].sum()

    @jax.jit
    def both(at, step):
        first = jax.grad(looped)
        return jax.jacfwd(first)(at), jax.jacrev(first)(at), jax.lax.map(first, at + step)

    step = jnp.array([1e-5, -1e-5])
    forward, reverse, slopes = both(jnp.array(0.03), step)
    wanted = (slopes[0] - slopes[1]) / 2e-5
    np.testing.assert_allclose(forward, wanted, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(reverse, wanted, rtol=1e-6, atol=1e-7)


def test_affine_set_closed_form_and_dependent_rows():
    project = jax.jit(pr.projection_affine_set)
    exact = X - A.T @ jnp.linalg.solve(A @ A.T, A @ X - B)
    np.testing.assert_allclose(project(X, (A, B)), exact, atol=1e-13)
    twice = (jnp.concatenate([A, A[:1]]), jnp.concatenate([B, B[:1]]))
    np.testing.assert_allclose(project(X, twice), exact, atol=1e-12)
    jacobian = jax.jit(jax.jacobian(pr.projection_affine_set))(X, twice)
    np.testing.assert_allclose(
        jacobian, jnp.eye(N) - A.T @ jnp.linalg.solve(A @ A.T, A), atol=1e-12
    )


def test_polyhedron_is_the_quadratic_program_of_scipy():
    from scipy.optimize import minimize

    found = minimize(
        lambda y: np.sum((y - np.asarray(X)) ** 2) / 2,
        np.asarray(INSIDE),
        jac=lambda y: y - np.asarray(X),
        constraints=[
            {"type": "eq", "fun": lambda y: np.asarray(A) @ y - np.asarray(B)},
            {"type": "ineq", "fun": lambda y: np.asarray(H) - np.asarray(G) @ y},
        ],
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 200},
    )
    np.testing.assert_allclose(compiled("polyhedron")[0](X, (A, B, G, H)), found.x, atol=1e-6)


def test_polyhedron_with_repeated_rows_one_kind_of_rows_and_no_rows():
    project = jax.jit(pr.projection_polyhedron)
    simplex = (jnp.ones((1, N)), jnp.ones(1), -jnp.eye(N), jnp.zeros(N))
    with jax.numpy_dtype_promotion("standard"):
        wanted = optax.projections.projection_simplex(X)
    np.testing.assert_allclose(project(X, simplex), wanted, atol=1e-12)
    repeated = tuple(jnp.concatenate([v, v]) for v in simplex)
    np.testing.assert_allclose(project(X, repeated), wanted, atol=1e-12)
    jacobian = jax.jit(jax.jacfwd(project))
    support = (wanted > 0).astype(X.dtype)
    closed_form = jnp.diag(support) - support[:, None] * support[None, :] / support.sum()
    np.testing.assert_allclose(jacobian(X, repeated), closed_form, atol=1e-11)
    orthant = project(X, (None, None, -jnp.eye(N), jnp.zeros(N)))
    np.testing.assert_allclose(orthant, jnp.maximum(X, 0.0), atol=1e-13)
    affine = project(X, (A, B, None, None))
    np.testing.assert_allclose(affine, compiled("affine")[0](X, (A, B)), atol=1e-12)
    np.testing.assert_array_equal(pr.projection_polyhedron(X, (None,) * 4), X)


def test_polyhedron_with_many_degenerate_rows():
    """A cone of 30 half-spaces with one corner: most rows touch, none may be lost."""
    seed = np.random.default_rng(2)
    directions = jnp.array(seed.normal(size=(30, 4)))
    project = jax.jit(jax.vmap(lambda x: pr.projection_polyhedron(x, (None, None, G4, H4))))
    G4, H4 = directions, jnp.zeros(30)
    xs = jnp.array(seed.normal(size=(20, 4)))
    ys = project(xs)
    assert float(jnp.max(ys @ directions.T)) < 1e-12
    np.testing.assert_allclose(jnp.sum((xs - ys) * ys, axis=1), 0, atol=1e-12)
    assert float(jnp.max((xs - ys) @ ys.T)) < 1e-12


def test_empty_sets_give_nan():
    G1, h1 = jnp.array([[1.0], [-1.0]]), jnp.array([0.0, -1.0])
    project = jax.jit(pr.projection_polyhedron)
    assert jnp.isnan(project(jnp.zeros(1), (None, None, G1, h1))).all()
    section = compiled("box_section")[0]
    assert jnp.isnan(section(X, (jnp.zeros(N), jnp.ones(N), jnp.ones(N), jnp.array(9.0)))).all()


def test_box_section_is_the_simplex_and_a_hyperplane():
    with jax.numpy_dtype_promotion("standard"):
        simplex = optax.projections.projection_simplex(X, 2.0)
    project = jax.jit(pr.projection_box_section)
    section = project(X, (0.0, jnp.inf, 1.0, 2.0))
    np.testing.assert_allclose(section, simplex, atol=1e-13)
    plane = project(X, (-jnp.inf, jnp.inf, W, C))
    np.testing.assert_allclose(plane, X - W * (W @ X - C) / (W @ W), atol=1e-13)
    corner = project(X, (0.0, 1.0, 1.0, 5.0))
    np.testing.assert_allclose(corner, jnp.ones(N), atol=1e-12)


def test_transport_reaches_vertices_with_finite_derivatives():
    vertex = jnp.eye(3)[jnp.array([2, 0, 1])]
    project = jax.jit(pr.projection_birkhoff)
    np.testing.assert_allclose(project(10 * vertex), vertex, atol=1e-12)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(project))(10 * vertex), 0, atol=1e-12)
    plan = project(vertex + jnp.array(rng.normal(size=(3, 3))))
    np.testing.assert_allclose(plan.sum(0) + plan.sum(1), 2.0, atol=1e-12)
    plan = jax.jit(pr.kl_projection_birkhoff)(vertex)
    np.testing.assert_allclose(jnp.concatenate([plan.sum(0), plan.sum(1)]), 1.0, atol=1e-12)
    np.testing.assert_allclose(plan[0], jax.nn.softmax(vertex[0]), atol=1e-12)


def test_transport_is_the_polyhedron():
    """The same set, as 7 equations and 12 inequalities."""
    rows = jnp.kron(jnp.eye(3), jnp.ones((1, 4)))
    columns = jnp.kron(jnp.ones((1, 3)), jnp.eye(4))
    polyhedron = (
        jnp.concatenate([rows, columns]),
        jnp.concatenate([ROW, COLUMN]),
        -jnp.eye(12),
        jnp.zeros(12),
    )

    @jax.jit
    def both(x):
        def flat(x):
            return pr.projection_transport(x.reshape(3, 4), (ROW, COLUMN)).ravel()

        def other(x):
            return pr.projection_polyhedron(x, polyhedron)

        return [(f(x), jax.jacfwd(f)(x)) for f in (flat, other)]

    for ours, theirs in zip(*both(M.ravel()), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-11)


@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_sinkhorn_is_the_scaling_of_the_matrix(scale):
    """P = diag(u) exp(x) diag(v), with the marginals wanted; slow cases end with Newton steps."""
    plan = compiled("kl_transport")[0](scale * M, (ROW, COLUMN))
    np.testing.assert_allclose(plan.sum(1), ROW, atol=1e-12)
    np.testing.assert_allclose(plan.sum(0), COLUMN, atol=1e-11)
    if scale == 1:
        left = jnp.log(plan) - M
        np.testing.assert_allclose(left - left[:, :1] - left[:1] + left[0, 0], 0, atol=1e-12)


def test_sinkhorn_with_empty_rows():
    marginals = (ROW.at[1].set(0.0) / 0.5, COLUMN)
    project = compiled("kl_transport")[0]
    full = project(M, marginals)
    part = project(M[jnp.array([0, 2])], (ROW[jnp.array([0, 2])] / 0.5, COLUMN))
    np.testing.assert_allclose(full[jnp.array([0, 2])], part, atol=1e-13)
    assert (full[1] == 0).all()
    gradient = jax.jit(jax.grad(lambda m: jnp.sum(project(m, marginals) ** 2)))(M)
    assert jnp.isfinite(gradient).all()
    assert (gradient[1] == 0).all()


def daleckii_krein(x, direction):
    values, vectors = jnp.linalg.eigh(x)
    positive = jnp.maximum(values, 0.0)
    weights = (positive[:, None] + positive[None, :]) / (
        jnp.abs(values)[:, None] + jnp.abs(values)[None, :]
    )
    return vectors @ (weights * (vectors.T @ direction @ vectors)) @ vectors.T


def test_psd_derivative_at_repeated_eigenvalues():
    basis = jnp.linalg.qr(S)[0]
    x = (basis * jnp.array([2.0, 2.0, -1.0, -1.0])[None, :]) @ basis.T
    direction = jnp.array(rng.normal(size=(4, 4)))
    direction = direction + direction.T

    def curve(s):
        return pr.projection_psd_cone(x + s * direction)

    first = jax.jit(jax.jacfwd(curve))
    np.testing.assert_allclose(first(0.0), daleckii_krein(x, direction), atol=1e-12)
    step = 1e-5
    difference = (first(step) - first(-step)) / (2 * step)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(first))(0.0), difference, atol=1e-8)
    np.testing.assert_allclose(pr.projection_psd_cone(jnp.eye(3)), jnp.eye(3), atol=1e-14)
    identity = jax.jacobian(pr.projection_psd_cone)(jnp.eye(3)).reshape(9, 9)
    eye = jnp.eye(9).reshape(3, 3, 9)
    np.testing.assert_allclose(
        identity, ((eye + eye.transpose(1, 0, 2)) / 2).reshape(9, 9), atol=1e-14
    )


def test_derivatives_are_finite_where_a_norm_vanishes():
    zero = jnp.zeros(4)
    for fun in (
        cone,
        pr.projection_l2_sphere,
        pr.projection_l1_sphere,
        pr.projection_l2_ball,
        lambda x: pr.projection_psd_cone(x.reshape(2, 2)),
    ):
        run = jax.jit(lambda x, f=fun: (f(x), jax.jacrev(f)(x), jax.jacfwd(jax.jacrev(f))(x)))
        for leaf in run(zero):
            assert jnp.isfinite(leaf).all()
    tree = {"a": jnp.zeros(2), "b": jnp.array(0.0)}
    sphere = pr.projection_l2_sphere(tree, 2.0)
    np.testing.assert_allclose(jnp.sum(sphere["a"] ** 2) + sphere["b"] ** 2, 4.0, rtol=1e-14)


def test_cone_in_its_three_regions():
    np.testing.assert_array_equal(cone(jnp.array([3.0, 1.0, 2.0])), jnp.array([3.0, 1.0, 2.0]))
    np.testing.assert_array_equal(cone(jnp.array([-3.0, 1.0, 2.0])), jnp.zeros(3))
    np.testing.assert_allclose(cone(jnp.array([0.0, 3.0, 4.0])), jnp.array([2.5, 1.5, 2.0]))
    apex = jax.jit(jax.jacobian(cone))(jnp.array([2.0, 0.0, 0.0]))
    np.testing.assert_allclose(apex, jnp.eye(3))


def test_sparse_simplex_is_the_best_of_all_supports():
    from itertools import combinations

    def on(support):
        full = jnp.zeros(N).at[jnp.array(support)]
        with jax.numpy_dtype_promotion("standard"):
            return full.set(optax.projections.projection_simplex(X[jnp.array(support)]))

    best = min(
        (on(s) for s in combinations(range(N), 3)), key=lambda y: float(jnp.sum((y - X) ** 2))
    )
    np.testing.assert_allclose(pr.projection_sparse_simplex(X, 3), best, atol=1e-14)


JAXOPT = {
    "affine": "projection_affine_set",
    "polyhedron": "projection_polyhedron",
    "box_section": "projection_box_section",
    "transport": "projection_transport",
    "kl_transport": "kl_projection_transport",
    "sparse_simplex": "projection_sparse_simplex",
    "l1_sphere": "projection_l1_sphere",
    "l2_sphere": "projection_l2_sphere",
}


@pytest.mark.parametrize("name", JAXOPT)
@pytest.mark.filterwarnings("ignore")
def test_agrees_with_jaxopt(name):
    jaxopt = pytest.importorskip("jaxopt", reason="jaxopt is not installed")
    other = getattr(jaxopt.projection, JAXOPT[name])
    _, x, hyper = CASES[name]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        if name == "sparse_simplex":
            hyper = jnp.array(1.0)  # theirs mishandles other sums
            theirs = other(x, 3)
        elif name == "box_section":  # positive weights and finite bounds only
            hyper = (jnp.zeros(N), jnp.ones(N), jnp.ones(N), jnp.array(1.5))
            theirs = other(x, hyper)
        elif name == "polyhedron":
            theirs = other(x, hyper, check_feasible=False)
        else:
            theirs = jax.jit(other)(x, hyper)
    tol = {"polyhedron": 5e-2, "affine": 1e-4}.get(name, 1e-3)
    np.testing.assert_allclose(compiled(name)[0](x, hyper), theirs, atol=tol)


def test_everything_of_optax_is_here():
    names = {n for n in dir(optax.projections) if n.startswith("projection_")}
    assert names <= set(pr.__all__)
    assert implicit.projections is pr
    for name in pr.__all__:
        assert callable(getattr(pr, name))


REFUSED = {
    "x has dtype int": (TypeError, lambda: pr.projection_affine_set(jnp.arange(3), (A, B))),
    "x has shape": (ValueError, lambda: pr.projection_affine_set(A, (A, B))),
    "hyperparams is a 1 entries": (ValueError, lambda: pr.projection_affine_set(X, (A,))),
    "A has shape": (ValueError, lambda: pr.projection_affine_set(X[:2], (A, B))),
    "h has shape": (ValueError, lambda: pr.projection_polyhedron(X, (A, B, G, B))),
    "b is None but A is not": (
        ValueError,
        lambda: pr.projection_polyhedron(X, (A, None, G, H)),
    ),
    "lower exceeds upper": (
        ValueError,
        lambda: pr.projection_box_section(X, (1.0, 0.0, W, C)),
    ),
    "w has shape": (ValueError, lambda: pr.projection_box_section(X, (0.0, 1.0, W[:2], C))),
    "the sums of a and b differ": (
        ValueError,
        lambda: pr.projection_transport(M, (2 * ROW, COLUMN)),
    ),
    "expected values >= 0": (
        ValueError,
        lambda: pr.kl_projection_transport(M, (ROW - 0.3, COLUMN)),
    ),
    "expected a square matrix": (ValueError, lambda: pr.projection_birkhoff(M)),
    "max_nz is 9": (ValueError, lambda: pr.projection_sparse_simplex(X, 9)),
    "scale is -1": (ValueError, lambda: pr.projection_l1_sphere(X, -1.0)),
    "x[0] has shape": (
        ValueError,
        lambda: pr.projection_second_order_cone((X, X)),
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_input_is_named(words):
    error, call = REFUSED[words]
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
