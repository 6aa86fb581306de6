"""AID, ITD, SOBA and BOME on the same problems as the penalty method."""

import io

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import jaxopt_ext as jx
from jaxopt_ext import implicit, solvers

H = jnp.array([[2.0, 0.3, 0.0], [0.3, 1.0, 0.2], [0.0, 0.2, 1.5]])
B = jnp.array([[1.0, 0.0], [0.5, 1.0], [0.0, -1.0]])
PROBLEM = jx.Bilevel(
    upper=lambda x, y, c: jnp.sum((y - c) ** 2) / 2 + jnp.sum(x**2) / 4,
    lower=lambda x, y, _: y @ H.astype(y.dtype) @ y / 2 - y @ (B.astype(y.dtype) @ x),
)


def solution(c):
    """The minimizer x of ½‖H⁻¹Bx − c‖² + ¼‖x‖², and its y."""
    M = jnp.linalg.solve(H, B).astype(c.dtype)
    x = jnp.linalg.solve(M.T @ M + jnp.eye(2, dtype=c.dtype) / 2, M.T @ c)
    return x, M @ x


def target(dtype=jnp.float64):
    return jnp.array([1.0, -0.5, 0.8], dtype)


KEY = jax.random.key(0)
METHODS = {
    "aid": solvers.ImplicitBilevel(),
    "aid-cg": solvers.ImplicitBilevel(linear_solver=implicit.CG(max_steps=3)),
    "aid-neumann": solvers.ImplicitBilevel(linear_solver=implicit.Neumann(10, 0.4)),
    "aid-nystrom": solvers.ImplicitBilevel(linear_solver=implicit.Nystrom(3, 1e-8, KEY)),
    "aid-pinv": solvers.ImplicitBilevel(linear_solver=implicit.MinimumNorm()),
    "aid-one-step-warm": solvers.ImplicitBilevel(linear_solver=implicit.JacobianFree(0.4)),
    "itd": solvers.UnrolledBilevel(lower_steps=60),
    "soba": solvers.SOBA(),
    "optax": solvers.ImplicitBilevel(upper_step=optax.sgd(0.2, momentum=0.5)),
}
METHODS = {
    name: eqx.tree_at(lambda s: s.lower_step, method, 0.4) for name, method in METHODS.items()
}


def run(method, dtype=jnp.float64, c=None, **options):
    c = target(dtype) if c is None else c
    return jx.solve(PROBLEM, method, (jnp.zeros(2, dtype), jnp.ones(3, dtype)), c, **options)


def close(a, b, tolerance):
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(u, v, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_reaches_the_closed_form(name):
    found = run(METHODS[name]).check()
    close(found.value, solution(target()), 1e-8)
    # the residual that is reported is that of the exact conditions
    system = METHODS[name].condition(PROBLEM)(found.value, target())
    exact = max(float(jnp.max(jnp.abs(part))) for part in system)
    assert abs(float(found.optimality) - exact) < 1e-9


@pytest.mark.parametrize("name", ["aid-cg", "itd", "soba"])
def test_float32(name):
    found = run(METHODS[name], jnp.float32).check()
    close(found.value, solution(target(jnp.float32)), 2e-4)
    assert found.value[0].dtype == jnp.float32


def test_crude_adjoints_are_biased_and_do_not_hide_it():
    one_step = solvers.ImplicitBilevel(
        lower_step=0.4, linear_solver=implicit.JacobianFree(0.4), warm_start=False
    )
    found = run(one_step).check()
    assert float(found.state.solver.report["linear_residual"]) > 0.1
    assert float(jnp.max(jnp.abs(found.value[0] - solution(target())[0]))) > 0.05


def test_bome_has_a_bias_that_falls_with_its_step():
    truth = solution(target())[0]

    def error(step):
        found = run(solvers.BOME(upper_step=step, lower_step=0.4), max_steps=3000)
        assert float(found.state.solver.report["multiplier"]) > 0
        return float(jnp.max(jnp.abs(found.value[0] - truth)))

    large, small = error(0.1), error(0.01)
    assert small < 0.01
    assert small < large / 5


@pytest.mark.parametrize("name", ["aid-cg", "soba"])
def test_derivatives_equal_the_closed_form(name):
    method = METHODS[name]
    truth = jax.jacobian(solution)(target())
    close(jax.jit(jax.jacrev(lambda c: run(method, c=c).value))(target()), truth, 1e-8)

    def loss(solve):
        return lambda c: jnp.sum(jnp.sin(solve(c)[0]))

    ours = jax.jit(jax.hessian(loss(lambda c: run(method, c=c).value)))(target())
    close(ours, jax.hessian(loss(solution))(target()), 1e-6)


def test_batches_resume_and_export(tmp_path):
    batch = target()[None] + jnp.linspace(0.0, 1.0, 3)[:, None]
    for name in ("aid-cg", "soba"):
        method = METHODS[name]
        mapped = jax.jit(jax.vmap(lambda c, method=method: run(method, c=c)))(batch)
        for i in range(3):
            close([v[i] for v in mapped.value], list(run(method, c=batch[i]).value), 1e-10)
    method, never = METHODS["aid-cg"], jx.Target(-1e30)
    whole = run(method, max_steps=6, stop=never)
    half = run(method, max_steps=3, stop=never)
    buffer = io.BytesIO()
    eqx.tree_serialise_leaves(buffer, half.state)
    buffer.seek(0)
    state = eqx.tree_deserialise_leaves(buffer, jax.tree.map(jnp.zeros_like, half.state))
    resumed = run(method, max_steps=3, stop=never, state=state)
    for u, v in zip(jax.tree.leaves(resumed.state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_array_equal(u, v)
    for platform in ("cpu", "cuda", "tpu"):
        jitted = jax.jit(jax.grad(lambda c: run(METHODS["soba"], c=c).value[0][0]))
        text = export.export(jitted, platforms=[platform])(
            jax.ShapeDtypeStruct((3,), jnp.float64)
        ).mlir_module()
        assert "callback" not in text


def test_constrained_lower_level_by_its_projected_fixed_point():
    """The middle coordinate of y is on its bound; the others are free."""

    def box(y):
        return jnp.clip(y, 0, 1)

    def value(x):
        return jnp.sum((box(x) - 0.5) ** 2) + jnp.sum((x - jnp.array([0.2, 3.0, 0.9])) ** 2) / 4

    problem = jx.Bilevel(
        upper=lambda x, y, _: (
            jnp.sum((y - 0.5) ** 2) + jnp.sum((x - jnp.array([0.2, 3.0, 0.9])) ** 2) / 4
        ),
        lower=lambda x, y, _: jnp.sum((y - x) ** 2) / 2,
        lower_set=box,
    )
    init = jnp.full(3, 0.5).at[1].set(2.0), jnp.zeros(3)
    for kind in (solvers.ImplicitBilevel, solvers.UnrolledBilevel):
        method = kind(lower_step=0.5, lower_steps=40)
        found = jx.solve(problem, method, init).check()
        np.testing.assert_allclose(jax.grad(value)(found.value[0]), 0, atol=1e-8)
        assert bool(jnp.all((found.value[1] >= 0) & (found.value[1] <= 1)))
        assert float(found.value[0][1]) > 1


def test_implicit_methods_fail_where_the_lower_level_has_many_solutions():
    """The truth is x = 1; from this start the y that they find is not the best one."""
    problem = jx.Bilevel(
        upper=lambda x, y, _: jnp.sum(y**2) / 2 + x**2 / 8,
        lower=lambda x, y, _: (x * y[0] + y[1] - 1) ** 2 / 2,
    )
    init = jnp.array(0.5), jnp.array([3.0, 1.0])
    penalty = solvers.PenaltyBilevel(sigma=1e-2, upper_step=0.1, lower_step=0.2, lower_steps=20)
    stop = jx.Optimality(atol=1e-5)
    ours = jx.solve(problem, penalty, init, max_steps=5000, stop=stop).check()
    assert abs(float(ours.value[0]) - 1) < 0.01
    settings = {"upper_step": 0.1, "lower_step": 0.2, "lower_steps": 20}
    for method in (
        solvers.ImplicitBilevel(linear_solver=implicit.CG(max_steps=10), **settings),
        solvers.ImplicitBilevel(linear_solver=implicit.MinimumNorm(), **settings),
        solvers.UnrolledBilevel(**settings),
    ):
        theirs = jx.solve(problem, method, init, max_steps=1000)
        assert not abs(float(theirs.value[0]) - 1) < 0.1


def test_samples_come_from_the_key():
    def sampler(key, c):
        return c + 0.1 * jax.random.normal(key, c.shape, c.dtype)

    for name in ("aid-neumann", "itd", "soba"):
        method = METHODS[name]
        method = eqx.tree_at(lambda s: s.sampler, method, sampler, is_leaf=lambda v: v is None)
        first, second, third = (run(method, key=jax.random.key(k), max_steps=40) for k in (1, 1, 2))
        close(first.value, second.value, 0.0)
        assert float(jnp.max(jnp.abs(first.value[0] - third.value[0]))) > 1e-6
        with pytest.raises(ValueError, match="key is None, expected a key"):
            run(method)


def test_bad_settings_are_refused():
    with pytest.raises(TypeError, match="linear_solver is a str, expected a function or None"):
        solvers.ImplicitBilevel(linear_solver="cg")
    with pytest.raises(ValueError, match="lower_steps is 2, expected 1"):
        solvers.SOBA(lower_steps=2)
    with pytest.raises(ValueError, match="control is 0, expected a number > 0"):
        solvers.BOME(control=0.0)
    with pytest.raises(ValueError, match="upper_step is -1, expected a number > 0"):
        solvers.UnrolledBilevel(upper_step=-1.0)
    with pytest.raises(TypeError, match="has no iteration_map"):
        run(METHODS["soba"], adjoint=implicit.OneStepAdjoint())
    diverged = eqx.tree_at(lambda s: s.lower_step, METHODS["aid-cg"], 1e3)
    found = run(diverged)
    assert found.result == jx.RESULTS.nonfinite_step
    assert bool(jnp.all(jnp.isfinite(found.value[1])))
