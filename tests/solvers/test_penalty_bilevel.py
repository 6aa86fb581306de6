"""`PenaltyBilevel`: solutions, transformations, derivatives, failures; F2SA as published."""

import io
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import jaxopt_ext as jx
from jaxopt_ext import implicit, solvers

DTYPES = {"float32": jnp.float32, "float64": jnp.float64}
PRECISIONS = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)

# f = (y − c)²/2 + a x²/2 and g = (y − x)²: κ = 2/(2 + σ), and ψ_σ is least at κ c / (κ + a)
SCALAR = jx.Bilevel(
    upper=lambda x, y, args: (y - args["c"]) ** 2 / 2 + args["a"] * x**2 / 2,
    lower=lambda x, y, args: (y - x) ** 2,
)
SIGMA = 1e-2


def scalar_args(dtype=jnp.float64):
    return {"c": jnp.asarray(1.5, dtype), "a": jnp.asarray(0.5, dtype)}


def scalar_solution(args, sigma=SIGMA):
    kappa = 2 / (2 + sigma)
    x = kappa * args["c"] / (kappa + args["a"])
    return x, (sigma * args["c"] + 2 * x) / (2 + sigma)


def scalar_central(args, sigma=SIGMA):
    """Least x of (l(σ) − l(−σ)) / 2σ, and its y."""
    kappa = (2 / (2 + sigma) + 2 / (2 - sigma)) / 2
    x = kappa * args["c"] / (kappa + args["a"])
    return x, (sigma * args["c"] + 2 * x) / (2 + sigma)


def scalar_start(dtype=jnp.float64):
    return jnp.zeros((), dtype), jnp.ones((), dtype)


SETTINGS = {
    "default": {},
    "single-loop": {"lower_steps": 1},
    "constant": {"sigma": SIGMA, "lower_steps": 3},
    "central": {"difference": "central"},
    "momentum": {"momentum": 0.3, "lower_steps": 1},
    "central-momentum": {"difference": "central", "momentum": 0.5, "lower_steps": 1},
    "proximal": {"prox": 0.3, "averaging": 0.7},
    "nesterov": {"lower_step": optax.sgd(0.1, momentum=0.5, nesterov=True)},
    "adam": {"upper_step": optax.adam(0.05)},
}


def scalar_solver(**settings):
    return solvers.PenaltyBilevel(**{"upper_step": 0.2, "lower_step": 0.2} | settings)


def run(dtype=jnp.float64, args=None, solver=None, **options):
    args = scalar_args(dtype) if args is None else args
    solver = scalar_solver() if solver is None else solver
    return jx.solve(SCALAR, solver, scalar_start(dtype), args, **options)


def close(a, b, tolerance):
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(u, v, rtol=tolerance, atol=tolerance)


def assert_identical(a, b):
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(u), np.asarray(v))


# ---- solutions and derivatives ----


@pytest.mark.parametrize("setting", SETTINGS)
@PRECISIONS
def test_every_form_reaches_the_closed_form(setting, dtype):
    solver = scalar_solver(**SETTINGS[setting])
    found = run(dtype, solver=solver, max_steps=3000)
    closed = scalar_central if "central" in setting else scalar_solution
    close(found.value, closed(scalar_args(dtype)), 1e-8 if dtype == jnp.float64 else 2e-4)
    assert bool(found.success), str(found)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves((found.value, found.objective)))
    # what is reported is the residual of the conditions, those of y and z over σ
    live = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), eqx.filter(solver, eqx.is_array))
    traced = SCALAR.trace(found.value, scalar_args(dtype))
    condition = eqx.combine(live, solver).condition(traced)
    x, y, z = condition((*found.value, found.multipliers), scalar_args(dtype))
    residual = max(abs(float(x)), abs(float(y)) / SIGMA, abs(float(z)) / SIGMA)
    # the estimates of the momentum are not the gradients, only close to them
    slack = 1e-9 if dtype == jnp.float64 else 2e-4
    assert abs(float(found.optimality) - residual) < slack


@PRECISIONS
def test_derivatives_equal_the_closed_form(dtype):
    args = scalar_args(dtype)
    tolerance = 1e-8 if dtype == jnp.float64 else 1e-3
    truth = jax.jacobian(scalar_solution)(args)
    close(jax.jit(jax.jacrev(lambda a: run(dtype, a).value))(args), truth, tolerance)
    close(jax.jit(jax.jacfwd(lambda a: run(dtype, a).value))(args), truth, tolerance)


def test_second_derivatives_batches_closures_and_the_objective():
    args = scalar_args()

    def ours(args):  # closes over traced values
        problem = jx.Bilevel(
            upper=lambda x, y, _: SCALAR.upper(x, y, args), lower=lambda x, y, _: (y - x) ** 2
        )
        found = jx.solve(problem, scalar_solver(), scalar_start())
        return jnp.sin(found.value[0]) + found.value[1] ** 3 + found.objective

    def truth(args):
        x, y = scalar_solution(args)
        return jnp.sin(x) + y**3 + SCALAR.upper(x, y, args)

    batch = jax.tree.map(lambda leaf: leaf + jnp.linspace(0.0, 0.5, 3), args)
    close(jax.jit(jax.vmap(jax.grad(ours)))(batch), jax.vmap(jax.grad(truth))(batch), 1e-8)
    close(jax.jit(jax.hessian(ours))(args), jax.hessian(truth)(args), 1e-6)


def test_central_difference_has_the_derivative_of_its_own_solution():
    args = scalar_args()
    solver = scalar_solver(difference="central")
    ours = jax.jit(jax.jacrev(lambda a: run(args=a, solver=solver).value))(args)
    close(ours, jax.jacobian(scalar_central)(args), 1e-8)


@pytest.mark.parametrize(
    ("difference", "least", "most"), [("forward", 0.9, 1.1), ("central", 1.8, 2.3)]
)
def test_order_of_the_bias(difference, least, most):
    """The exact minimizer is c / (1 + a) = 1."""
    sigmas = jnp.array([1e-1, 3e-2, 1e-2, 3e-3])

    def error(sigma):
        solver = scalar_solver(sigma=sigma, difference=difference)
        return jnp.abs(run(solver=solver, max_steps=3000).value[0] - 1)

    errors = jax.jit(jax.vmap(error))(sigmas)
    order = jnp.polyfit(jnp.log(sigmas), jnp.log(errors), 1)[0]
    assert least < float(order) < most, errors


def test_derivative_where_the_lower_level_has_many_solutions():
    """x minimizes 1/(2(1 + x² + σ)) + t x²/8, so (1 + x² + σ)² = 4/t."""
    problem = jx.Bilevel(
        upper=lambda x, y, t: jnp.sum(y**2) / 2 + t * x**2 / 8,
        lower=lambda x, y, _: (x * y[0] + y[1] - 1) ** 2 / 2,
    )
    solver = solvers.PenaltyBilevel(sigma=0.05, upper_step=0.3, lower_step=0.3, lower_steps=20)
    adjoint = implicit.ImplicitAdjoint(implicit.MinimumNorm())

    def solution(t):
        init = jnp.array(2.0), jnp.array([1.0, 0.0])
        return jx.solve(problem, solver, init, t, adjoint=adjoint, max_steps=5000).value[0]

    def closed(t):
        return jnp.sqrt(2 / jnp.sqrt(t) - 1 - 0.05)

    t = jnp.array(1.2)
    np.testing.assert_allclose(solution(t), closed(t), rtol=1e-8)
    np.testing.assert_allclose(jax.jit(jax.grad(solution))(t), jax.grad(closed)(t), rtol=1e-6)


def test_three_levels():
    """The top minimizes (x(c) − 1)² + c²/10 over c, through the solution of a bilevel problem."""
    args = scalar_args()

    def top(c, _):
        inner = run(args={"c": c, "a": args["a"]})
        return (inner.value[0] - 1) ** 2 + c**2 / 10

    found = jx.solve(jx.Minimization(top), solvers.GradNormSmooth(), jnp.array(0.3)).check()
    slope = scalar_solution({"c": 1.0, "a": 0.5})[0]
    np.testing.assert_allclose(found.value, slope / (slope**2 + 0.1), rtol=1e-8)


def test_nested_as_the_upper_level_of_a_bilevel_problem():
    """The same top level in y, as a penalty problem whose upper function solves another one."""
    args = scalar_args()

    def upper(x, y, _):
        inner = jx.solve(SCALAR, scalar_solver(), scalar_start(), {"c": y, "a": args["a"]})
        return (inner.value[0] - 1) ** 2 + y**2 / 10

    problem = jx.Bilevel(upper=upper, lower=lambda x, y, _: (y - x) ** 2)
    solver = scalar_solver(sigma=1e-3, lower_steps=2)
    found = jax.jit(lambda init: jx.solve(problem, solver, init, stop=jx.Optimality(atol=1e-6)))(
        (jnp.array(0.3), jnp.array(0.3))
    )
    slope = scalar_solution({"c": 1.0, "a": 0.5})[0]
    np.testing.assert_allclose(found.value[0], slope / (slope**2 + 0.1), atol=2e-3)


# ---- compiled programs ----


def test_jit_vmap_and_a_loop_agree():
    batch = jnp.linspace(0.5, 2.0, 3)

    def one(c):
        return run(args={"c": c, "a": jnp.array(0.5)})

    mapped = jax.jit(jax.vmap(one))(batch)
    mapped.check()
    for i, c in enumerate(batch):
        alone = one(c)
        close([leaf[i] for leaf in mapped.value], list(alone.value), 1e-12)
        assert int(mapped.stats.steps[i]) == int(alone.stats.steps)


def test_batches_of_penalties_and_starts():
    sigmas = jnp.array([1e-1, 1e-2])
    starts = jnp.array([0.0, 5.0])

    def one(sigma, start):
        solver = scalar_solver(sigma=sigma)
        init = start, jnp.array(1.0)
        return jx.solve(SCALAR, solver, init, scalar_args()).value[0]

    found = jax.vmap(jax.vmap(one, (None, 0)), (0, None))(sigmas, starts)
    expected = jnp.stack([scalar_solution(scalar_args(), s)[0] for s in sigmas])
    np.testing.assert_allclose(found, jnp.stack([expected, expected], 1), rtol=1e-8)


def test_runs_repeat_and_resume_bit_for_bit():
    never = jx.Target(-1e30)
    for setting in ("momentum", "nesterov", "proximal"):
        solver = scalar_solver(**SETTINGS[setting])
        whole = run(solver=solver, max_steps=6, stop=never)
        assert_identical(whole.state, run(solver=solver, max_steps=6, stop=never).state)
        half = run(solver=solver, max_steps=3, stop=never)
        assert half.result == jx.RESULTS.max_steps_reached
        buffer = io.BytesIO()
        eqx.tree_serialise_leaves(buffer, half.state)
        buffer.seek(0)
        state = eqx.tree_deserialise_leaves(buffer, jax.tree.map(jnp.zeros_like, half.state))
        resumed = run(solver=solver, max_steps=3, stop=never, state=state)
        assert_identical((resumed.value, resumed.state), (whole.value, whole.state))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_value_and_derivatives_export(platform):
    def loss(c):
        return run(jnp.float32, {"c": c, "a": jnp.float32(0.5)}).value[0] ** 2

    for function in (loss, jax.grad(loss)):
        exported = export.export(jax.jit(function), platforms=[platform])(
            jax.ShapeDtypeStruct((), jnp.float32)
        )
        targets = re.findall(r"custom_call @(\w+)", exported.mlir_module())
        assert not [target for target in targets if "callback" in target]
        assert "stablehlo.while" in exported.mlir_module()


def test_functions_are_traced_once_and_numbers_do_not_recompile():
    calls, compiled, listening = [], [], [True]

    def upper(x, y, args):
        calls.append("upper")
        return SCALAR.upper(x, y, args)

    def lower(x, y, args):
        calls.append("lower")
        return SCALAR.lower(x, y, args)

    problem = jx.Bilevel(upper, lower)

    def solution(args, scale=1.0):
        solver = scalar_solver(
            upper_step=0.2 * scale,
            lower_step=0.2 * scale,
            sigma=solvers.cbo.Geometric(0.3 * scale, 0.9, 1e-2 * scale),
            rtol=1e-9 * scale,
            atol=1e-9,
        )
        return jx.solve(problem, solver, scalar_start(), args).value

    jax.jit(jax.grad(lambda a: solution(a)[0]))(scalar_args())
    assert sorted(calls) == ["lower", "upper"]

    def listen(event, duration, **kwargs):
        if listening[0] and event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        solution(scalar_args())
        assert compiled
        compiled.clear()
        solution(scalar_args(), 1.1)
        assert not compiled
    finally:
        listening[0] = False


def test_trees_are_solved_like_flat_arrays():
    H = jnp.array([[2.0, 0.3, 0.0], [0.3, 1.0, 0.2], [0.0, 0.2, 1.5]])

    def upper(x, y, _):
        return jnp.sum((y - 1.0) ** 2) / 2 + jnp.sum(x**2) / 4

    def lower(x, y, _):
        return y @ H @ y / 2 - jnp.sum(x) * y[0] - x[0] * y[2]

    def upper_tree(x, y, _):
        return upper(jnp.stack([x["a"], x["b"][0]]), jnp.concatenate(y), None)

    def lower_tree(x, y, _):
        return lower(jnp.stack([x["a"], x["b"][0]]), jnp.concatenate(y), None)

    solver = solvers.PenaltyBilevel(upper_step=0.1, lower_step=0.3)
    flat = jx.solve(jx.Bilevel(upper, lower), solver, (jnp.ones(2), jnp.zeros(3)), max_steps=50)
    init = {"a": jnp.array(1.0), "b": jnp.ones(1)}, [jnp.zeros(1), jnp.zeros(2)]
    nested = jx.solve(jx.Bilevel(upper_tree, lower_tree), solver, init, max_steps=50)
    x, y = nested.value
    close([x["a"], x["b"][0]], list(flat.value[0]), 1e-12)
    close(jnp.concatenate(y), flat.value[1], 1e-12)


def test_sets_hold_at_every_point_and_starts_are_projected():
    def box(v):
        return jnp.clip(v, 0, 1)

    def larger(v):
        return jnp.clip(v, 0, 1.5)

    problem = jx.Bilevel(
        upper=lambda x, y, _: jnp.sum((y - 2) ** 2) + jnp.sum((x + 1) ** 2) / 8,
        lower=lambda x, y, _: jnp.sum((y - x) ** 2) / 2,
        upper_set=box,
        lower_set=larger,
    )
    solver = solvers.PenaltyBilevel(sigma=1e-2, upper_step=0.3, lower_step=0.5)
    seen = []

    def callback(now):
        seen.append(now.value)
        return False

    outside = jnp.array([-3.0, 0.5]), jnp.array([4.0, -4.0])
    found = jx.solve(problem, solver, outside, callback=callback).check()
    assert len(seen) > 3
    for x, y in seen:
        assert np.all((x >= 0) & (x <= 1)) and np.all((y >= 0) & (y <= 1.5))
    np.testing.assert_allclose(found.value[0], jnp.ones(2), atol=1e-9)
    inside = jx.solve(problem, solver, (box(outside[0]), larger(outside[1])))
    assert_identical(found.value, inside.value)


@pytest.mark.parametrize(
    ("upper", "lower", "x"),
    [
        (lambda x, y, _: (y - 1) ** 2, lambda x, y, _: (y - x) ** 2, 1.0),  # f without x
        (lambda x, y, _: (x - 1) ** 2 + y**2, lambda x, y, _: (y - 2) ** 2, 1.0),  # g without x
        (lambda x, y, _: (x - 1) ** 2, lambda x, y, _: (y - x) ** 2, 1.0),  # f without y
    ],
    ids=["f-without-x", "g-without-x", "f-without-y"],
)
def test_functions_may_ignore_a_level(upper, lower, x):
    found = jx.solve(
        jx.Bilevel(upper, lower), scalar_solver(), scalar_start(), max_steps=3000
    ).check()
    np.testing.assert_allclose(found.value[0], x, rtol=1e-6)


# ---- what the practical rules promise ----

RNG = np.random.default_rng(0)
ROOT = RNG.standard_normal((6, 6)) / 3
CURVATURE = jnp.asarray(ROOT @ ROOT.T + 0.5 * np.eye(6))
COUPLING = jnp.asarray(RNG.standard_normal((6, 3)))
GOAL = jnp.asarray(RNG.standard_normal(6))


def quadratic_upper(x, y, args):
    return jnp.sum((y - GOAL) ** 2) / 2 + jnp.sum(x**2) / 20


def quadratic_lower(x, y, args):
    return y @ CURVATURE @ y / 2 - y @ (COUPLING @ x)


def quadratic_gradient(x):
    y = jnp.linalg.solve(CURVATURE, COUPLING @ x)
    return x / 10 + COUPLING.T @ jnp.linalg.solve(CURVATURE, y - GOAL)


QUADRATIC = jx.Bilevel(quadratic_upper, quadratic_lower)
LIPSCHITZ = float(jnp.linalg.eigvalsh(CURVATURE)[-1])


@pytest.mark.parametrize("lower_steps", [1, 5])
def test_outer_step_need_not_shrink_with_sigma(lower_steps):
    """Matched steps: with a fixed outer step, what is left is the bias O(σ), at every σ."""
    sigmas = jnp.array([1e-1, 1e-2, 1e-3, 1e-4])

    def left(sigma):
        solver = solvers.PenaltyBilevel(
            sigma=sigma, upper_step=0.01, lower_step=0.9 / LIPSCHITZ, lower_steps=lower_steps
        )
        init = jnp.zeros(3), jnp.zeros(6)
        x, _ = jx.solve(
            QUADRATIC, solver, init, max_steps=6000, stop=jx.Optimality(atol=1e-7)
        ).value
        return jnp.linalg.norm(quadratic_gradient(x))

    gradients = jax.jit(jax.vmap(left))(sigmas)
    ratios = gradients[:-1] / gradients[1:]
    assert bool(jnp.all((ratios > 7) & (ratios < 13))), gradients


def noisy_lower(x, y, key):
    noise = jax.random.normal(key, COUPLING.shape, x.dtype) / 20
    return quadratic_lower(x, y, None) - y @ (noise @ x)


NOISY = jx.Bilevel(quadratic_upper, noisy_lower)


def sample(key, args):
    return key


def directions(solver, point, count=400):
    """Stochastic directions of x at one point (x, y, z)."""
    state = solver.init(NOISY, point[:2], jax.random.key(0), jax.random.key(1))
    state = eqx.tree_at(lambda s: s.ahead, state, point)

    def one(step):
        there = eqx.tree_at(lambda s: s.steps, state, step)
        new, _ = solver.step(NOISY, jax.random.key(0), there)
        return (point[0] - new.ahead[0]) / solver.upper_step

    return jax.jit(jax.vmap(one))(jnp.arange(count, dtype=jnp.int32))


def test_common_samples_keep_the_variance_bounded():
    sigma, x = 1e-3, jnp.ones(3)
    z = jnp.linalg.solve(CURVATURE, COUPLING @ x)
    y = jnp.linalg.solve(CURVATURE + sigma * jnp.eye(6), COUPLING @ x + sigma * GOAL)
    settings = {"sigma": sigma, "upper_step": 0.1, "lower_step": 0.1, "lower_steps": 1}

    def variance(**more):
        drawn = directions(solvers.PenaltyBilevel(sampler=sample, **settings, **more), (x, y, z))
        return float(jnp.sum(jnp.var(drawn, axis=0)))

    # the noise of ∇_x g at y is that of the coupling times y; 3 columns of variance 1/400
    apart = 3 / 400 * float(jnp.sum(((y - z) / sigma) ** 2))
    alone = 3 / 400 * float(jnp.sum(y**2) + jnp.sum(z**2)) / sigma**2
    assert alone / apart > 1e4
    np.testing.assert_allclose(variance(), apart, rtol=0.25)
    np.testing.assert_allclose(variance(common_samples=False), alone, rtol=0.25)


def test_stochastic_runs_come_close_and_repeat():
    solver = solvers.PenaltyBilevel(
        sigma=0.05,
        upper_step=solvers.PowerLaw(0.02, -3 / 5, 200.0),
        lower_step=solvers.PowerLaw(0.2, -2 / 5, 200.0),
        lower_steps=1,
        sampler=sample,
    )

    def left(solver, key):
        found = jx.solve(
            NOISY,
            solver,
            (jnp.zeros(3), jnp.zeros(6)),
            jax.random.key(0),
            key=key,
            max_steps=4000,
            adjoint=implicit.DetachedAdjoint(),
        )
        return jnp.linalg.norm(quadratic_gradient(found.value[0]))

    keys = jax.random.split(jax.random.key(3), 4)
    start = float(jnp.linalg.norm(quadratic_gradient(jnp.zeros(3))))
    plain = jax.jit(jax.vmap(lambda key: left(solver, key)))(keys)
    assert float(jnp.mean(plain)) < start / 3
    assert_identical(plain, jax.jit(jax.vmap(lambda key: left(solver, key)))(keys))
    momentum = eqx.tree_at(
        lambda s: s.momentum,
        solver,
        solvers.PowerLaw(1.0, -4 / 5, 20.0),
        is_leaf=lambda v: v is None,
    )
    assert float(jnp.mean(jax.jit(jax.vmap(lambda key: left(momentum, key)))(keys))) < start / 3


def test_deterministic_schedule_decays_as_its_theory_says():
    """σ, α ~ k^(−1/3): the gradient falls like k^(−1/3), up to slowly varying factors."""
    solver = solvers.PenaltyBilevel(
        sigma=solvers.PowerLaw(0.3, -1 / 3),
        upper_step=solvers.PowerLaw(0.02, -1 / 3),
        lower_step=0.9 / LIPSCHITZ,
        lower_steps=1,
    )
    state = solver.init(QUADRATIC, (jnp.zeros(3), jnp.zeros(6)), None)

    def step(state, _):
        state, _ = solver.step(QUADRATIC, None, state)
        return state, jnp.linalg.norm(quadratic_gradient(state.value[0]))

    norms = jax.jit(lambda s: jax.lax.scan(step, s, None, length=20000)[1])(state)
    steps = jnp.array([1000, 2000, 5000, 10000, 19999])
    decay = jnp.polyfit(jnp.log(steps.astype(float)), jnp.log(norms[steps]), 1)[0]
    assert -0.45 < float(decay) < -0.22, norms[steps]


def test_float32_is_close_to_float64():
    solver = solvers.PenaltyBilevel(sigma=1e-2, upper_step=0.01, lower_step=0.9 / LIPSCHITZ)
    problem = jx.Bilevel(
        lambda x, y, args: jnp.sum((y - args[2]) ** 2) / 2 + jnp.sum(x**2) / 20,
        lambda x, y, args: y @ args[0] @ y / 2 - y @ (args[1] @ x),
    )

    def solution(dtype):
        args = jax.tree.map(lambda leaf: leaf.astype(dtype), (CURVATURE, COUPLING, GOAL))
        init = jnp.zeros(3, dtype), jnp.zeros(6, dtype)
        found = jx.solve(problem, solver, init, args, max_steps=3000, stop=jx.Optimality(atol=1e-4))
        return found.check().value

    (x32, y32), (x64, y64) = solution(jnp.float32), solution(jnp.float64)
    np.testing.assert_allclose(x32, x64, rtol=1e-2)
    np.testing.assert_allclose(y32, y64, rtol=1e-2, atol=1e-2)


# ---- F2SA ----


def test_derivative_of_f2sa_is_that_at_its_multiplier():
    sigma = 0.1
    solver = solvers.F2SA(alpha=0.2 * sigma, gamma=0.2, multiplier=1 / sigma, ratio=0.2 / 0.02)
    args = scalar_args()
    ours = jax.jit(jax.jacrev(lambda a: run(args=a, solver=solver).value))(args)
    close(ours, jax.jacobian(lambda a: scalar_solution(a, sigma))(args), 1e-8)


@pytest.mark.parametrize("lower_steps", [1, 3])
def test_f2sa_follows_its_algorithm(lower_steps):
    alpha, gamma, xi = 0.002, 0.1, 3.0
    solver = solvers.F2SA(
        alpha=alpha,
        gamma=gamma,
        multiplier=lambda k: 20.0 + k.astype(float),
        ratio=xi,
        lower_steps=lower_steps,
    )
    found = jx.solve(QUADRATIC, solver, (jnp.ones(3), jnp.zeros(6)), max_steps=8)

    f = jax.grad(quadratic_upper, (0, 1))
    g = jax.grad(quadratic_lower, (0, 1))
    x, y, z = jnp.ones(3), jnp.zeros(6), jnp.zeros(6)
    for k in range(8):
        weight = 20.0 + k
        for _ in range(lower_steps):
            z = z - gamma * g(x, z, None)[1]
            y = y - alpha * (f(x, y, None)[1] + weight * g(x, y, None)[1])
        before = x
        x = x - xi * alpha * (f(x, y, None)[0] + weight * (g(x, y, None)[0] - g(x, z, None)[0]))
    close(found.value, (before, y), 1e-12)
    close(found.multipliers, z, 1e-12)
    close(found.state.solver.ahead[0], x, 1e-12)


def test_f2sa_with_matched_steps_and_the_penalty_method_agree_in_the_end():
    sigma, rate = 0.05, 0.9 / LIPSCHITZ
    f2sa = solvers.F2SA(
        alpha=rate * sigma, gamma=rate, multiplier=1 / sigma, ratio=0.01 / (rate * sigma)
    )
    ours = solvers.PenaltyBilevel(sigma=sigma, upper_step=0.01, lower_step=rate)
    init, stop = (jnp.zeros(3), jnp.zeros(6)), jx.Optimality(atol=1e-8)
    one, two = (
        jx.solve(QUADRATIC, s, init, max_steps=5000, stop=stop).check() for s in (f2sa, ours)
    )
    close(one.value, two.value, 1e-7)


def test_f3sa_runs_and_improves():
    solver = solvers.F2SA(
        alpha=solvers.PowerLaw(0.004, -3 / 5, 100.0),
        gamma=solvers.PowerLaw(0.1, -2 / 5, 100.0),
        momentum=solvers.PowerLaw(1.0, -4 / 5, 10.0),
        lower_steps=1,
        common_samples=True,
        sampler=sample,
    )
    found = jx.solve(
        NOISY,
        solver,
        (jnp.zeros(3), jnp.zeros(6)),
        jax.random.key(0),
        key=jax.random.key(2),
        max_steps=3000,
        adjoint=implicit.DetachedAdjoint(),
    )
    start = jnp.linalg.norm(quadratic_gradient(jnp.zeros(3)))
    assert float(jnp.linalg.norm(quadratic_gradient(found.value[0]))) < float(start) / 2


# ---- failures ----


def test_start_that_is_not_finite_is_named():
    init = jnp.array(jnp.nan), jnp.array(0.0)
    found = jx.solve(SCALAR, scalar_solver(), init, scalar_args())
    assert found.result == jx.RESULTS.nonfinite_start


@pytest.mark.parametrize("lower_steps", [1, 10])
def test_divergence_ends_with_a_code_and_the_last_finite_point(lower_steps):
    solver = scalar_solver(lower_step=1e3, lower_steps=lower_steps)
    found = run(solver=solver, max_steps=500)
    assert found.result == jx.RESULTS.nonfinite_step
    assert all(bool(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((found.value, found.objective)))
    with pytest.raises(jx.SolveError, match="best finite point"):
        found.check()


def test_region_that_is_not_finite_never_destroys_the_point():
    problem = jx.Bilevel(
        upper=lambda x, y, _: jnp.where(x > 1, x**2, jnp.nan) + y**2,
        lower=lambda x, y, _: (y - x) ** 2,
    )
    found = jx.solve(problem, scalar_solver(), (jnp.array(3.0), jnp.array(3.0)))
    assert found.result == jx.RESULTS.nonfinite_step
    assert float(found.value[0]) > 1
    np.testing.assert_allclose(found.objective, found.value[0] ** 2 + found.value[1] ** 2)


def test_lower_level_that_is_stuck_is_flagged():
    """g has wells at −1 (deep) and 1; y is pulled out of the shallow one, z stays."""
    problem = jx.Bilevel(
        upper=lambda x, y, _: 8 * (y + 1) ** 2 + x**2,
        lower=lambda x, y, _: (y**2 - 1) ** 2 / 4 + 0.05 * y + 0 * x,
    )
    rates = {"sigma": 0.1, "upper_step": 0.1, "lower_step": 0.1}
    solver = solvers.PenaltyBilevel(rescue=False, **rates)
    stuck = jx.solve(problem, solver, (jnp.array(0.5), jnp.array(0.9)), max_steps=300)
    assert float(stuck.value[1]) < -0.9 and float(stuck.multipliers) > 0.9
    assert bool(solvers.lower_level_not_solved(stuck.state.solver))
    fine = jx.solve(problem, solver, (jnp.array(0.5), jnp.array(-0.9)), max_steps=300)
    assert not bool(solvers.lower_level_not_solved(fine.state.solver))
    solver = solvers.PenaltyBilevel(**rates)
    rescued = jx.solve(problem, solver, (jnp.array(0.5), jnp.array(0.9)), max_steps=300)
    close(rescued.multipliers, fine.multipliers, 1e-8)
    assert not bool(solvers.lower_level_not_solved(rescued.state.solver))


@pytest.mark.parametrize("lower_steps", [1, 4])
def test_rescue_never_acts_on_convex_lower_levels(lower_steps):
    """Not even far from the solution, where z lags behind."""
    rates = {"sigma": 1e-3, "upper_step": 0.05, "lower_step": 0.3, "lower_steps": lower_steps}
    init = jnp.full(3, 5.0), jnp.arange(6.0)
    one, two = (
        jx.solve(QUADRATIC, solvers.PenaltyBilevel(rescue=rescue, **rates), init, max_steps=60)
        for rescue in (True, False)
    )
    assert_identical(one.value, two.value)


def test_polished_point_is_lower_level_optimal():
    found = run()
    y, solved = solvers.lower_minimum(SCALAR, *found.value, scalar_args())
    assert bool(solved)
    assert float(jnp.abs(found.value[1] - found.value[0])) > 1e-3
    np.testing.assert_allclose(y, found.value[0], atol=1e-10)


@pytest.mark.parametrize("difference", ["forward", "central"])
def test_polish_returns_a_lower_level_solution_with_its_derivative(difference):
    solver = scalar_solver(polish=True, difference=difference)
    closed = scalar_solution if difference == "forward" else scalar_central
    args = scalar_args()
    found = run(solver=solver).check()
    x, y = closed(args)
    close(found.value, (x, x), 1e-9)  # argmin g(x, ·) = x
    close(found.multipliers[0], y, 1e-9)
    close(found.objective, SCALAR.upper(x, x, args), 1e-9)
    ours = jax.jit(jax.jacrev(lambda a: run(args=a, solver=solver).value))(args)
    close(ours, jax.jacobian(lambda a: (closed(a)[0], closed(a)[0]))(args), 1e-8)
    # polishing leaves the state alone
    plain = run(solver=scalar_solver(difference=difference))
    assert_identical(found.state, plain.state)
    assert int(found.stats.counts.gradient) > int(plain.stats.counts.gradient)


def test_polish_stays_near_the_best_of_many_lower_solutions():
    problem = jx.Bilevel(
        upper=lambda x, y, _: jnp.sum(y**2) / 2 + x**2 / 8,
        lower=lambda x, y, _: (x * y[0] + y[1] - 1) ** 2 / 2,
        lower_set=lambda y: jnp.clip(y, -5, 5),
    )
    init = jnp.array(2.0), jnp.array([1.0, 0.0])
    rates = {"sigma": 0.05, "upper_step": 0.3, "lower_step": 0.3, "lower_steps": 20}
    solver = solvers.PenaltyBilevel(polish=True, **rates)
    stop = jx.Optimality(atol=1e-8)
    found = jx.solve(problem, solver, init, max_steps=5000, stop=stop).check()
    x, y = found.value
    best = jnp.array([x, 1.0]) / (1 + x**2)
    assert float(problem.lower(x, y, None)) < 1e-18
    assert float(problem.lower(x, found.multipliers[0], None)) > 1e-4
    np.testing.assert_allclose(y, best, atol=1e-6)  # y_σ is a multiple of it, so nothing is lost


def test_sigma_never_falls_below_its_floor():
    found = run(solver=scalar_solver(sigma=1e-30), max_steps=3)
    assert float(found.state.solver.report["sigma"]) == float(jnp.finfo(jnp.float64).eps) ** 0.5


def test_success_waits_until_sigma_has_settled():
    schedule = optax.exponential_decay(0.3, 1, 0.99, end_value=1e-2)
    found = run(solver=scalar_solver(sigma=schedule), max_steps=3000)
    assert bool(found.success)
    close(found.value, scalar_solution(scalar_args()), 1e-6)
    endless = run(solver=scalar_solver(sigma=solvers.PowerLaw(0.3, -1 / 3)), max_steps=300)
    assert endless.result == jx.RESULTS.max_steps_reached


def test_callback_history_and_counts():
    seen = []

    def callback(now):
        seen.append(int(now.steps))
        return len(seen) == 3

    found = run(callback=callback, history=True, max_steps=5)
    assert found.result == jx.RESULTS.user_stopped
    assert seen == [1, 2, 3]
    assert int(found.stats.counts.gradient) == 3 * 10 * 3
    assert bool(jnp.all(jnp.isnan(found.history["objective"][3:])))


def test_auxiliary_output_comes_back():
    problem = jx.Bilevel(
        lambda x, y, args: (SCALAR.upper(x, y, args), {"double": 2 * y}), SCALAR.lower, has_aux=True
    )

    def aux(args):
        return jx.solve(problem, scalar_solver(), scalar_start(), args).aux["double"]

    args = scalar_args()
    np.testing.assert_allclose(aux(args), 2 * scalar_solution(args)[1], rtol=1e-8)
    close(jax.grad(aux)(args), jax.grad(lambda a: 2 * scalar_solution(a)[1])(args), 1e-8)


# ---- bad input ----

GOOD = jnp.array(0.0), jnp.array(0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": 0.0}, "sigma is 0, expected a number > 0"),
        ({"sigma": -1.0}, "sigma is -1, expected a number > 0"),
        ({"sigma": float("nan")}, "sigma is nan, expected a number > 0"),
        ({"prox": 0.0}, "prox is 0, expected a number > 0"),
        ({"averaging": 0.0}, "averaging is 0, expected a number > 0"),
        ({"averaging": 1.5}, "averaging is 1.5, expected a number > 0 and <= 1"),
        ({"momentum": 2.0, "lower_steps": 1}, "momentum is 2.0, expected a number > 0 and <= 1"),
        ({"momentum": 0.5}, "lower_steps is 10, expected 1 with momentum"),
        ({"lower_steps": 0}, "lower_steps is 0, expected an integer >= 1"),
        ({"upper_step": -0.1}, "upper_step is -0.1, expected a number > 0"),
        ({"lower_step": 0.0}, "lower_step is 0, expected a number > 0"),
        ({"difference": "central", "prox": 0.5}, "prox is 0.5, expected None because difference"),
        ({"difference": "backward"}, "difference is 'backward', expected 'forward' or 'central'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        solvers.PenaltyBilevel(**settings)


def test_bad_problems_are_refused():
    def refused(kind, pattern, problem, init=GOOD, solver=None, **options):
        with pytest.raises(kind, match=pattern) as caught:
            jx.solve(problem, solver or scalar_solver(), init, scalar_args(), **options)
        assert "\n" not in str(caught.value)

    lower, upper = SCALAR.lower, SCALAR.upper
    refused(TypeError, "cannot solve a Minimization", jx.Minimization(lambda y, a: y**2))
    refused(ValueError, r"expected a pair \(x, y\)", SCALAR, jnp.zeros(2))
    refused(TypeError, r"init\[1\] has dtype int", SCALAR, (jnp.array(0.0), jnp.array(1)))
    refused(TypeError, "dtype complex", SCALAR, (jnp.array(0.0), jnp.array(1j)))
    refused(ValueError, "expected a PyTree with at least one", SCALAR, ({}, {}))
    refused(
        ValueError, "upper returned .*expected a scalar", jx.Bilevel(lambda x, y, a: (x, y), lower)
    )
    refused(
        ValueError,
        "lower returned .*expected a scalar",
        jx.Bilevel(upper, lambda x, y, a: jnp.stack([x, y])),
    )
    for name in ("upper_set", "lower_set"):
        for wrong in (lambda v: v[None], lambda v: v.astype(jnp.float32), lambda v: (v, v)):
            problem = jx.Bilevel(upper, lower, **{name: wrong})
            refused(ValueError, f"{name} returned .*expected the structure", problem)
    with pytest.raises(TypeError, match="upper_set is a int, expected a function"):
        jx.Bilevel(upper, lower, upper_set=3)
    refused(
        ValueError,
        "difference is 'central', expected 'forward' because the problem has a lower_set",
        jx.Bilevel(upper, lower, lower_set=lambda y: y),
        solver=scalar_solver(difference="central"),
    )
    with_sampler = scalar_solver(sampler=lambda key, args: args)
    refused(ValueError, "key is None, expected a key", SCALAR, solver=with_sampler)
    refused(
        ValueError,
        "sampler returned .*expected args of the same structure",
        SCALAR,
        solver=scalar_solver(sampler=lambda key, args: args["c"]),
        key=jax.random.key(0),
    )
    with pytest.raises(TypeError, match="polish is a str, expected True, False or a solver"):
        solvers.PenaltyBilevel(polish="yes")
    with pytest.raises(TypeError, match=r"has no setting 'sigm'.*did you mean 'sigma'"):
        solvers.PenaltyBilevel(sigm=1.0)
    with pytest.raises(ValueError, match="method is 'magic', expected 'penalty', 'cg'"):
        solvers.hypergradient(SCALAR, *GOOD, scalar_args(), method="magic")
    with pytest.raises(ValueError, match="sigma is -1, expected a number > 0"):
        solvers.penalty_value(SCALAR, *GOOD, scalar_args(), sigma=-1.0)
    with pytest.raises(TypeError, match="expected the state of a penalty method"):
        solvers.lower_level_not_solved(None)
