"""Proximal operators against closed forms, the Moreau identity, and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_ext import implicit
from jaxopt_ext.implicit import projections, proximal

rng = np.random.default_rng(0)
X = jnp.array(rng.normal(size=8))
M = jnp.array(rng.normal(size=(3, 4)))
WEIGHTS = jnp.array(rng.uniform(0.2, 0.6, size=8))
T, STEP = jnp.array(0.3), jnp.array(0.7)


def spread(y):
    return jnp.sum(jnp.abs(y[1:] - y[:-1]))


def nuclear(y):
    return jnp.sum(jnp.linalg.svd(y, compute_uv=False))


# name: (prox, x, hyper-parameters, g)
CASES = {
    "none": (lambda x, h, s: proximal.prox_none(x), X, (), lambda y, h: 0 * jnp.sum(y)),
    "lasso": (proximal.prox_lasso, X, WEIGHTS, lambda y, h: jnp.sum(h * jnp.abs(y))),
    "non_negative_lasso": (
        proximal.prox_non_negative_lasso,
        X,
        WEIGHTS,
        lambda y, h: jnp.where(jnp.all(y >= 0), jnp.sum(h * y), jnp.inf),
    ),
    "elastic_net": (
        proximal.prox_elastic_net,
        X,
        (WEIGHTS, T),
        lambda y, h: jnp.sum(h[0] * (jnp.abs(y) + h[1] * y**2 / 2)),
    ),
    "group_lasso": (proximal.prox_group_lasso, X, T, lambda y, h: h * jnp.linalg.norm(y)),
    "ridge": (proximal.prox_ridge, X, WEIGHTS, lambda y, h: jnp.sum(h * y**2) / 2),
    "non_negative_ridge": (
        proximal.prox_non_negative_ridge,
        X,
        T,
        lambda y, h: jnp.where(jnp.all(y >= 0), h * jnp.sum(y**2) / 2, jnp.inf),
    ),
    "nuclear": (proximal.prox_nuclear, M, 3 * T, lambda y, h: h * nuclear(y)),
    "total_variation_1d": (
        proximal.prox_total_variation_1d,
        X,
        T,
        lambda y, h: h * spread(y),
    ),
}


@functools.cache
def compiled(name):
    return jax.jit(CASES[name][0])


@pytest.mark.parametrize("name", CASES)
def test_is_the_minimizer(name):
    """F strongly convex with modulus 1: F(z) >= F(y) + ½‖z − y‖² for every z, near and far."""
    _, x, hyper, g = CASES[name]
    y = compiled(name)(x, hyper, STEP)

    def objective(z):
        return STEP * g(z, hyper) + jnp.sum((z - x) ** 2) / 2

    seed = np.random.default_rng(1)
    sizes = np.repeat(10.0 ** np.arange(-4, 1), 40).reshape(-1, *(1,) * x.ndim)
    moves = jnp.array(sizes * seed.normal(size=(200, *x.shape)))
    moves = moves.at[::2].multiply(jnp.array(seed.integers(0, 2, size=(100, *x.shape)) * 1.0))
    others = y[None] + moves
    if name.startswith("non_negative"):
        others = jnp.abs(others)
    values = jax.jit(jax.vmap(objective))(others)
    least = objective(y) + jnp.sum((others - y[None]).reshape(200, -1) ** 2, axis=1) / 2
    assert float(jnp.min(values - least)) > -1e-12


@pytest.mark.parametrize("name", CASES)
def test_derivatives_vmap_and_single_precision(name):
    fun, x, hyper, _ = CASES[name]
    seed = np.random.default_rng(3)
    point = (x, hyper, STEP)
    tangent = jax.tree.map(lambda v: jnp.array(seed.normal(size=v.shape)), point)
    weights = jnp.array(seed.normal(size=x.shape))

    def loss(point):
        return jnp.sum(weights.astype(point[0].dtype) * fun(*point))

    slope = jax.jit(lambda p: jax.jvp(lambda p: fun(*p), (p,), (tangent,))[1])
    forward = slope(point)
    ahead, behind = (jax.tree.map(lambda v, t: v + s * t, point, tangent) for s in (1e-6, -1e-6))
    difference = (compiled(name)(*ahead) - compiled(name)(*behind)) / 2e-6
    np.testing.assert_allclose(forward, difference, atol=1e-8)
    gradient = jax.jit(jax.grad(loss))
    pairs = zip(jax.tree.leaves(gradient(point)), jax.tree.leaves(tangent), strict=True)
    np.testing.assert_allclose(
        sum(jnp.sum(a * b) for a, b in pairs), jnp.sum(weights * forward), atol=1e-12
    )
    second = jax.jit(lambda p: jax.jvp(slope, (p,), (tangent,))[1])(point)
    np.testing.assert_allclose(second, (slope(ahead) - slope(behind)) / 2e-6, atol=1e-7)

    many = jnp.array(seed.normal(size=(6, *x.shape)))
    batch = jax.jit(jax.vmap(fun, in_axes=(0, None, None)))(many, hyper, STEP)
    for one, result in zip(many, batch, strict=True):
        np.testing.assert_allclose(compiled(name)(one, hyper, STEP), result, atol=1e-13)

    single = jax.tree.map(lambda v: v.astype(jnp.float32), point)
    result, exact = compiled(name)(*single), compiled(name)(*point)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, exact, atol=1e-5)
    for low, high in zip(
        jax.tree.leaves(gradient(single)), jax.tree.leaves(gradient(point)), strict=True
    ):
        np.testing.assert_allclose(low, high, atol=1e-4)


def test_moreau_identity():
    """For a norm, x − prox(x) is the projection onto the ball of the dual norm."""
    np.testing.assert_allclose(
        X - proximal.prox_lasso(X, T), projections.projection_linf_ball(X, T), atol=1e-15
    )
    for scale in (0.1, 1.0):
        np.testing.assert_allclose(
            scale * X - proximal.prox_group_lasso(scale * X, 1.0),
            projections.projection_l2_ball(scale * X),
            atol=1e-15,
        )
    left, values, right = np.linalg.svd(M, full_matrices=False)
    clipped = (left * np.minimum(values, 0.9)) @ right
    np.testing.assert_allclose(M - compiled("nuclear")(M, 3 * T, 1.0), clipped, atol=1e-14)
    # x − prox = λ prox_{g*/λ}(x/λ) for g = ½‖·‖², its own conjugate
    for step in (0.5, 2.0):
        np.testing.assert_allclose(
            X - proximal.prox_ridge(X, 1.0, step),
            step * proximal.prox_ridge(X / step, 1.0, 1 / step),
            atol=1e-15,
        )


@pytest.mark.parametrize("n", [2, 3, 50])
def test_total_variation_has_a_dual_certificate(n):
    """The solution y = x − Dᵀz with |z| <= weight, z = ±weight where y jumps."""
    seed = np.random.default_rng(n)
    xs = np.concatenate([seed.normal(size=(30, n)), seed.integers(0, 4, size=(30, n)) * 1.0])
    weights = np.tile([0.0, 0.1, 0.5, 1.0, 4.0, 100.0], 10)
    prox = jax.jit(jax.vmap(proximal.prox_total_variation_1d))
    ys = np.asarray(prox(jnp.array(xs), jnp.array(weights)))
    dual = -np.cumsum(xs - ys, axis=1)
    np.testing.assert_allclose(dual[:, -1], 0, atol=1e-11)
    dual, jumps = dual[:, :-1], np.diff(ys, axis=1)
    assert np.all(np.abs(dual) <= weights[:, None] + 1e-11)
    np.testing.assert_allclose(dual * jumps, weights[:, None] * np.abs(jumps), atol=1e-9)
    np.testing.assert_allclose(ys[weights == 0], xs[weights == 0], atol=1e-13)
    if n > 3:
        np.testing.assert_allclose(
            ys[weights == 100], xs[weights == 100].mean(1)[:, None] + 0 * ys[weights == 100]
        )


def test_total_variation_edge_cases():
    np.testing.assert_array_equal(proximal.prox_total_variation_1d(X[:1], 1.0), X[:1])
    prox = compiled("total_variation_1d")
    spoiled = prox(X.at[3].set(jnp.nan), T, STEP)
    assert jnp.isnan(spoiled).all()  # and the loop has ended
    constant = jax.jit(jax.jacobian(proximal.prox_total_variation_1d))(jnp.ones(4), 1.0)
    np.testing.assert_allclose(constant, 0.25, atol=1e-15)


def test_nuclear_at_repeated_and_zero_singular_values():
    left = jnp.array(np.linalg.qr(M[:, :3])[0])
    right = jnp.array(np.linalg.qr(rng.normal(size=(4, 4)))[0][:3])
    x = (left * jnp.array([2.0, 2.0, 0.0])[None, :]) @ right
    direction = jnp.array(rng.normal(size=(3, 4)))

    def curve(s):
        return proximal.prox_nuclear(x + s * direction, 0.5)

    value, slope = jax.jit(curve), jax.jit(jax.jacfwd(curve))
    np.testing.assert_allclose(slope(0.0), (value(1e-6) - value(-1e-6)) / 2e-6, atol=1e-8)
    second = jax.jit(jax.jacfwd(jax.jacfwd(curve)))(0.0)
    np.testing.assert_allclose(second, (slope(1e-5) - slope(-1e-5)) / 2e-5, atol=1e-7)


def test_derivatives_at_zero_are_finite():
    zero, square = jnp.zeros(4), jnp.zeros((2, 2))
    for fun, x in (
        (lambda x, w: proximal.prox_group_lasso(x, w), zero),
        (lambda x, w: proximal.prox_lasso(x, w), zero),
        (lambda x, w: proximal.prox_total_variation_1d(x, w), zero),
        (lambda x, w: proximal.prox_nuclear(x, w), square),
    ):
        for weight in (0.0, 1.0):
            run = jax.jit(lambda x, w, f=fun: (f(x, w), jax.jacrev(f, argnums=(0, 1))(x, w)))
            for leaf in jax.tree.leaves(run(x, weight)):
                assert jnp.isfinite(leaf).all()
    identity = jax.jacobian(proximal.prox_group_lasso)(zero, 0.0)
    np.testing.assert_array_equal(identity, jnp.eye(4))
    tiny = proximal.prox_group_lasso(jnp.array([3e-30, 4e-30], jnp.float32), 2.5e-30)
    np.testing.assert_allclose(tiny, np.array([1.5e-30, 2e-30]), rtol=1e-5)


def test_pytrees():
    tree = {"a": X[:3], "b": (X[3], X[4:].reshape(2, 2))}

    def flat(t):
        return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(t)])

    for prox in (proximal.prox_lasso, proximal.prox_group_lasso, proximal.prox_ridge):
        np.testing.assert_allclose(flat(prox(tree, 0.3, 0.5)), prox(X, 0.3, 0.5), atol=1e-15)
    weights = jax.tree.map(lambda v: jnp.abs(v) / 2, tree)
    np.testing.assert_allclose(flat(proximal.prox_lasso(tree, weights)), X / 2, atol=1e-15)


def test_prox_from_projection():
    prox = proximal.prox_from_projection(projections.projection_affine_set)
    plane = (jnp.ones((1, 8)), jnp.ones(1))
    np.testing.assert_allclose(prox(X, plane, 0.1).sum(), 1.0, atol=1e-13)
    prox = proximal.prox_from_projection(projections.projection_non_negative)
    np.testing.assert_array_equal(prox(X, step=3.0), jnp.maximum(X, 0.0))
    with pytest.raises(TypeError, match="projection is a int, expected a function"):
        proximal.prox_from_projection(3)  # type: ignore[arg-type]


def test_condition_through_a_lambda():
    """The lasso: derivative of the solution with respect to its weight on the support."""
    design = jnp.array(rng.normal(size=(12, 4)))
    target = design @ jnp.array([2.0, 0.0, -1.0, 0.0])

    def smooth(y, weight):
        return jnp.sum((design @ y - target) ** 2) / 2

    def prox(v, step, weight):
        return proximal.prox_lasso(v, weight, step)

    step = 1 / jnp.linalg.norm(design, 2) ** 2

    @jax.jit
    def solve(weight):
        def iterate(y, _):
            return prox(y - step * jax.grad(smooth)(y, weight), step, weight), None

        y = jax.lax.scan(iterate, jnp.zeros(4), length=3000)[0]
        condition = implicit.FixedPoint(lambda y, weight: iterate(y, None)[0])
        return implicit.attach(condition, y, weight)

    at = jnp.array(0.5)
    wanted = (solve(at + 1e-5) - solve(at - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.jacfwd(solve)(at), wanted, atol=1e-8)


JAXOPT = ("lasso", "non_negative_lasso", "elastic_net", "group_lasso", "ridge")


@pytest.mark.parametrize("name", (*JAXOPT, "non_negative_ridge"))
@pytest.mark.filterwarnings("ignore")
def test_agrees_with_jaxopt(name):
    jaxopt = pytest.importorskip("jaxopt", reason="jaxopt is not installed")
    hyper = (WEIGHTS, jnp.full(8, 0.4)) if name == "elastic_net" else 0.3
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = getattr(jaxopt.prox, f"prox_{name}")(X, hyper, 0.7)
    np.testing.assert_allclose(CASES[name][0](X, hyper, 0.7), theirs, atol=1e-15)


REFUSED = {
    "weight is -1.0, expected values >= 0": (
        ValueError,
        lambda: proximal.prox_lasso(X, -1.0),
    ),
    "step is -1.0": (ValueError, lambda: proximal.prox_group_lasso(X, 1.0, -1.0)),
    "weight has structure": (ValueError, lambda: proximal.prox_lasso(X, (1.0, 2.0))),
    "weight has shape (3,), expected (8,)": (
        ValueError,
        lambda: proximal.prox_ridge(X, WEIGHTS[:3]),
    ),
    "weight has shape (8,), expected ()": (
        ValueError,
        lambda: proximal.prox_group_lasso(X, WEIGHTS),
    ),
    "hyperparams is a float, expected the tuple (weight, gamma)": (
        ValueError,
        lambda: proximal.prox_elastic_net(X, 1.0),  # type: ignore[arg-type]
    ),
    "x has dtype int": (TypeError, lambda: proximal.prox_lasso(jnp.arange(3), 1.0)),
    "x has shape (8,), expected 2 axes": (ValueError, lambda: proximal.prox_nuclear(X, 1.0)),
    "x has shape (3, 4), expected 1 axes": (
        ValueError,
        lambda: proximal.prox_total_variation_1d(M, 1.0),
    ),
    "x is (), expected a PyTree": (ValueError, lambda: proximal.prox_lasso((), 1.0)),
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_input_is_named(words):
    error, call = REFUSED[words]
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
