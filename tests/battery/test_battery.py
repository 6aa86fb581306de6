"""What every registered solver must pass."""

import io
import os
import pathlib
import re
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.flatten_util import ravel_pytree

import jaxopt_ext as jx
from jaxopt_ext import implicit
from jaxopt_ext.solvers import HypergradientSystem
from jaxopt_ext.solvers.sso import Minibatches

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from registry import REGISTRY

DTYPES = {"float32": jnp.float32, "float64": jnp.float64}
# a solver for problems with structure only is tested on those
GENERAL = [e for e in REGISTRY if isinstance(e.homes[0].problem, jx.Minimization)]
BILEVEL = [e for e in REGISTRY if isinstance(e.homes[0].problem, jx.Bilevel)]
FULL = [e for e in REGISTRY if not e.brief or os.environ.get("JAXOPT_EXT_FULL_BATTERY")]
ALL_ENTRIES = pytest.mark.parametrize("entry", GENERAL + BILEVEL, ids=lambda e: e.name)
ENTRIES = pytest.mark.parametrize(
    "entry", [e for e in FULL if e in GENERAL + BILEVEL], ids=lambda e: e.name
)
# for tests that build a function of one array
MINIMIZERS = pytest.mark.parametrize(
    "entry", [e for e in FULL if e in GENERAL], ids=lambda e: e.name
)
ALL_HOMES = pytest.mark.parametrize(
    ("entry", "home"), [(e, h) for e in REGISTRY for h in e.homes], ids=lambda p: p.name
)
HOMES = pytest.mark.parametrize(
    ("entry", "home"), [(e, h) for e in FULL for h in e.homes], ids=lambda p: p.name
)
PRECISIONS = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def key_for(entry):
    return jax.random.key(0) if entry.solver().needs_key else None


def run(entry, home, dtype=jnp.float64, args=None, **options):
    args = home.args(dtype) if args is None else args
    options = {"key": key_for(entry), **entry.options, **options}
    return jx.solve(home.problem, entry.solver(), home.init(dtype), args, **options)


def relative(a, b):
    a, b = ravel_pytree(a)[0], ravel_pytree(b)[0]
    return float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))


def assert_identical(a, b):
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(u), np.asarray(v))


# ---- solutions ----


@ALL_HOMES
@PRECISIONS
def test_solves_its_home_problems_in_both_precisions(entry, home, dtype):
    solution = run(entry, home, dtype)
    assert bool(solution.success), str(solution)
    assert relative(solution.value, home.solution(home.args(dtype))) < (
        1e-8 if dtype == jnp.float64 else 1e-4
    )
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(solution.value))
    assert solution.objective.dtype == dtype
    # the reported residual is that of the conditions at the reported point
    problem = home.problem.trace(home.init(dtype), home.args(dtype))
    variables = problem.variables(solution.value, solution.multipliers)
    condition = entry.solver().condition(problem)
    rows = condition(variables, home.args(dtype))
    if isinstance(condition, implicit.PenaltySystem):  # what those of y and z do to that of x
        rows = rows[0], *(row / condition.sigma for row in rows[1:])
    residual = float(jnp.max(jnp.abs(ravel_pytree(rows)[0])))
    slack = 100 * float(jnp.finfo(dtype).eps)
    if isinstance(condition, implicit.PenaltySystem):
        slack /= float(condition.sigma)
    apart = isinstance(problem, jx.NonlinearProgram | Minibatches)
    if apart or isinstance(condition, HypergradientSystem):
        # feasibility is reported apart, and complementarity by its products; the residual is that
        # of one minibatch; the hypergradient is reported with the adjoint that the method has
        slack = max(slack, float(jnp.finfo(dtype).eps) ** (2 / 3))
    reported = max(float(solution.optimality), float(solution.feasibility))
    assert abs(reported - residual) <= slack


@ENTRIES
def test_jit_and_vmap_return_the_same_solution_as_a_loop(entry):
    home = entry.homes[0]
    batch = home.args(jnp.float64)[None] + jnp.linspace(0.0, 1.0, 3)[:, None]
    loop = [run(entry, home, args=a) for a in batch]
    mapped = jax.jit(jax.vmap(lambda a: run(entry, home, args=a)))(batch)
    assert bool(jnp.all(mapped.success))
    for i, one in enumerate(loop):
        lane = jax.tree.map(lambda leaf, i=i: leaf[i], mapped.value)
        assert relative(lane, one.value) < 1e-12
        assert int(mapped.stats.steps[i]) == int(one.stats.steps)
    mapped.check()
    assert "3 solves" in str(mapped)


@ENTRIES
def test_two_runs_are_bitwise_equal(entry):
    assert_identical(run(entry, entry.homes[0]), run(entry, entry.homes[0]))


# ---- derivatives ----


@HOMES
@PRECISIONS
def test_first_derivatives_equal_the_closed_form(entry, home, dtype):
    args = home.args(dtype)
    ours = jax.jit(jax.jacrev(lambda a: run(entry, home, dtype, a).value))(args)
    forward = jax.jit(jax.jacfwd(lambda a: run(entry, home, dtype, a).value))(args)
    truth = jax.jacrev(home.solution)(args)
    tolerance = 1e-8 if dtype == jnp.float64 else 1e-3
    assert relative(ours, truth) < tolerance
    assert relative(forward, truth) < tolerance


@HOMES
def test_second_derivatives_equal_the_closed_form(entry, home):
    args = home.args(jnp.float64)
    flat, unravel = ravel_pytree(args)

    def loss(solution):
        def of_args(flat):
            return jnp.sum(jnp.sin(ravel_pytree(solution(unravel(flat)))[0]))

        return of_args

    ours = jax.jit(jax.hessian(loss(lambda a: run(entry, home, args=a).value)))(flat)
    truth = jax.hessian(loss(home.solution))(flat)
    assert relative(ours, truth) < 1e-6


@MINIMIZERS
def test_derivatives_through_vmap_and_closures(entry):
    home = entry.homes[0]

    def loss(args):  # the objective closes over the traced args
        problem = jx.Minimization(lambda y, _: home.problem.fun(y, args))
        found = jx.solve(problem, entry.solver(), home.init(jnp.float64), key=key_for(entry))
        return jnp.sum(found.value**3)

    def closed_form(args):
        return jnp.sum(home.solution(args) ** 3)

    batch = home.args(jnp.float64)[None] + jnp.linspace(0.0, 1.0, 2)[:, None]
    assert relative(jax.vmap(jax.grad(loss))(batch), jax.vmap(jax.grad(closed_form))(batch)) < 1e-8
    hessians = jax.vmap(jax.hessian(loss))(batch)
    assert relative(hessians, jax.vmap(jax.hessian(closed_form))(batch)) < 1e-6


@MINIMIZERS
def test_objective_and_aux_of_the_solution_are_differentiable(entry):
    home = entry.homes[0]

    def fun(y, args):
        return home.problem.fun(y, args), {"norm": jnp.sum(y**2), "count": jnp.array(3)}

    def ours(args):
        found = jx.solve(
            jx.Minimization(fun, has_aux=True),
            entry.solver(),
            home.init(jnp.float64),
            args,
            key=key_for(entry),
        )
        assert found.aux["count"].dtype == jnp.asarray(3).dtype
        return found.objective + found.aux["norm"]

    def truth(args):
        y = home.solution(args)
        return home.problem.fun(y, args) + jnp.sum(y**2)

    args = home.args(jnp.float64)
    assert relative(ours(args), truth(args)) < 1e-8
    assert relative(jax.grad(ours)(args), jax.grad(truth)(args)) < 1e-8


# ---- compiled programs ----


@ENTRIES
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_value_gradient_and_hessian_export_without_host_callbacks(entry, platform):
    home = entry.homes[0]

    def loss(args):
        return jnp.sum(ravel_pytree(run(entry, home, jnp.float32, args).value)[0] ** 2)

    args = jax.ShapeDtypeStruct((3,), jnp.float32)
    for derivative in (loss, jax.grad(loss), jax.hessian(loss)):
        exported = export.export(jax.jit(derivative), platforms=[platform])(args)
        text = exported.mlir_module()
        assert "stablehlo.while" in text  # the solver itself is in there
        targets = re.findall(r"custom_call @(\w+)", text)
        assert not [target for target in targets if "callback" in target]
        assert exported.platforms == (platform,)


@ALL_ENTRIES
def test_step_keeps_the_type_of_the_state(entry):
    home = entry.homes[0]
    # weakly typed on purpose
    init = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), home.init(jnp.float64))
    problem = home.problem
    solver = entry.solver()
    value = jx.core.check.variables("init", init)
    state = solver.init(problem, value, home.args(jnp.float64), key_for(entry))

    def types(tree):
        return jax.tree.map(lambda leaf: jax.typeof(jnp.asarray(leaf)), tree)

    for _ in range(3):
        new, info = solver.step(problem, home.args(jnp.float64), state)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        assert types(new) == types(state)
        assert all(eqx.is_array(leaf) for leaf in jax.tree.leaves((new, info)))
        state = new


@ENTRIES
def test_objective_is_traced_once_per_solve(entry):
    home = entry.homes[0]
    calls = []
    names = ["upper", "lower"] if isinstance(home.problem, jx.Bilevel) else ["fun"]

    def counted(name):
        def fun(*inputs):
            calls.append(name)
            return getattr(home.problem, name)(*inputs)

        return fun

    problem = type(home.problem)(**{name: counted(name) for name in names})
    args = home.args(jnp.float64)

    def solution(args):
        return jx.solve(problem, entry.solver(), home.init(jnp.float64), args, key=key_for(entry))

    solution(args)
    assert sorted(calls) == sorted(names)
    calls.clear()
    jax.jit(jax.grad(lambda a: jnp.sum(ravel_pytree(solution(a).value)[0])))(args)
    assert sorted(calls) == sorted(names)


@ENTRIES
def test_changing_numbers_does_not_recompile(entry):
    home = entry.homes[0]
    compiled = []
    listening = [True]

    def listen(event, duration, **kwargs):
        if listening[0] and event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        name, number = entry.number
        args, init = home.args(jnp.float64), home.init(jnp.float64)

        def go(scale):
            solver = entry.solver(rtol=1e-9 * scale, atol=1e-9, **{name: number * scale})
            return jx.solve(
                home.problem,
                solver,
                jax.tree.map(lambda leaf: leaf * scale, init),
                args * scale,
                key=key_for(entry),
                max_steps=int(500 * scale),
            ).value

        go(1.0)
        assert compiled  # the listener works
        compiled.clear()
        go(1.25)
        go(1.5)
        assert not compiled
    finally:
        listening[0] = False


# ---- stopping, resuming, failing ----


@ALL_ENTRIES
def test_max_steps_keeps_the_work_and_resume_is_bitwise(entry, tmp_path):
    home = entry.homes[0]
    whole = run(entry, home, max_steps=6, stop=jx.Target(-1e30))
    assert whole.result == jx.RESULTS.max_steps_reached
    assert int(whole.stats.steps) == 6
    with pytest.raises(jx.SolveError, match="max_steps_reached: The budget"):
        whole.check()
    half = run(entry, home, max_steps=3, stop=jx.Target(-1e30))
    buffer = io.BytesIO()
    eqx.tree_serialise_leaves(buffer, half.state)
    buffer.seek(0)
    state = eqx.tree_deserialise_leaves(buffer, jax.tree.map(jnp.zeros_like, half.state))
    resumed = run(entry, home, max_steps=3, stop=jx.Target(-1e30), state=state)
    assert_identical(resumed.state, whole.state)
    assert_identical(resumed.value, whole.value)


@ENTRIES
def test_resume_with_other_args_solves_the_other_problem(entry):
    home = entry.homes[0]
    args = home.args(jnp.float64)
    first = run(entry, home).check()
    other = run(entry, home, args=args + 1.0, state=first.state).check()
    assert relative(other.value, home.solution(args + 1.0)) < 1e-8
    # and where nothing changed there is nothing to redo
    assert int(run(entry, home, state=first.state).check().stats.steps) == 1


@MINIMIZERS
def test_python_values_that_changed_between_solves_are_seen(entry):
    home, shift = entry.homes[0], [0.0]

    def shifted(y, args):
        return home.problem.fun(y - shift[0], args)

    def solution():
        return jx.solve(
            jx.Minimization(shifted),
            entry.solver(),
            home.init(jnp.float64),
            home.args(jnp.float64),
            key=key_for(entry),
        ).value

    before = solution()
    shift[0] = 2.0
    assert relative(solution(), before + 2.0) < 1e-8


@ENTRIES
def test_start_that_is_not_finite_is_named(entry):
    home = entry.homes[0]
    found = jx.solve(
        home.problem,
        entry.solver(),
        jax.tree.map(lambda leaf: leaf * jnp.nan, home.init(jnp.float64)),
        home.args(jnp.float64),
        key=key_for(entry),
    )
    assert found.result == jx.RESULTS.nonfinite_start
    with pytest.raises(jx.SolveError, match="check init and args for NaN"):
        found.check()


@MINIMIZERS
def test_region_that_is_not_finite_never_destroys_the_point(entry):
    # decreasing towards y = 1, NaN below
    problem = jx.Minimization(lambda y, args: jnp.sum(jnp.where(y > 1, y**2, jnp.nan)))
    found = jx.solve(
        problem, entry.solver(), jnp.array([3.0, 5.0]), key=key_for(entry), max_steps=200
    )
    assert not bool(found.success)
    assert bool(jnp.all(jnp.isfinite(found.value)))
    assert bool(jnp.all(found.value > 1))
    assert float(found.objective) <= 34.0
    assert jnp.allclose(found.objective, jnp.sum(found.value**2))


@ENTRIES
@pytest.mark.parametrize("compiled", [False, True], ids=["python", "jit"])
def test_callback_sees_each_step_and_stops(entry, compiled):
    home, seen = entry.homes[0], []

    def callback(now):
        seen.append((int(now.steps), float(now.objective)))
        return len(seen) == 3

    def solution(args):
        return run(entry, home, args=args, callback=callback, stop=jx.Target(-1e30))

    solution = jax.jit(solution) if compiled else solution
    found = solution(home.args(jnp.float64))
    jax.block_until_ready(found.value)
    assert found.result == jx.RESULTS.user_stopped
    assert [step for step, _ in seen] == [1, 2, 3]
    assert int(found.stats.steps) == 3


@ENTRIES
def test_history_has_fixed_length_and_ends_at_the_solution(entry):
    found = run(entry, entry.homes[0], max_steps=40, history=True)
    steps = int(found.stats.steps)
    for column in found.history.values():
        assert column.shape == (40,)
    assert bool(jnp.all(jnp.isnan(found.history["objective"][steps:])))
    assert float(found.history["optimality"][steps - 1]) == float(found.optimality)


# ---- bad input ----


@MINIMIZERS
def test_bad_input_is_refused_in_one_sentence(entry):
    home = entry.homes[0]
    good, key = jnp.zeros(3), key_for(entry)
    solver, problem, args = entry.solver(), home.problem, home.args(jnp.float64)

    def refused(kind, pattern, *a, **k):
        with pytest.raises(kind, match=pattern) as caught:
            jx.solve(*a, **k)
        assert "\n" not in str(caught.value)

    refused(
        TypeError,
        r"init has dtype int.*expected a real floating",
        problem,
        solver,
        jnp.zeros(3, int),
        args,
        key=key,
    )
    refused(TypeError, r"init\['a'\] has dtype int", problem, solver, {"a": 1}, args, key=key)
    refused(TypeError, "init is a str, expected a floating array", problem, solver, "x", key=key)
    refused(
        ValueError,
        "fun could not be evaluated with init float64.5. and args float64.3.",
        problem,
        solver,
        jnp.zeros(5),
        args,
        key=key,
    )
    refused(
        ValueError,
        r"fun returned float64\[3\], expected a scalar",
        jx.Minimization(lambda y, a: y),
        solver,
        good,
        args,
        key=key,
    )
    refused(
        ValueError,
        r"expected a pair \(value, aux\) because has_aux=True",
        jx.Minimization(home.problem.fun, has_aux=True),
        solver,
        good,
        args,
        key=key,
    )
    refused(
        TypeError,
        r"problem is a function, expected a problem such as",
        lambda y, a: y,
        solver,
        good,
        key=key,
    )
    refused(
        TypeError,
        rf"solver is the class {entry.make.__name__}, expected a solver",
        problem,
        entry.make,
        good,
        args,
        key=key,
    )
    refused(
        TypeError,
        f"{entry.make.__name__} cannot solve a FixedPoint, expected one of",
        jx.FixedPoint(lambda y, a: y),
        solver,
        good,
        key=key,
    )
    refused(
        ValueError,
        "max_steps is 0, expected an integer >= 1",
        problem,
        solver,
        good,
        args,
        key=key,
        max_steps=0,
    )
    refused(
        TypeError,
        "max_steps is a float, expected an integer",
        problem,
        solver,
        good,
        args,
        key=key,
        max_steps=10.0,
    )
    refused(
        TypeError,
        "stop is a float, expected a criterion",
        problem,
        solver,
        good,
        args,
        key=key,
        stop=1e-3,
    )
    refused(
        TypeError,
        "adjoint is a str, expected an adjoint",
        problem,
        solver,
        good,
        args,
        key=key,
        adjoint="implicit",
    )
    refused(
        ValueError,
        "expected the `state` of a Solution",
        problem,
        solver,
        good,
        args,
        key=key,
        state={"value": good},
    )
    with pytest.raises(
        TypeError, match=rf"{entry.make.__name__} has no setting 'rtoll' .did you mean"
    ):
        entry.solver(rtoll=1.0)
    with pytest.raises(ValueError, match="rtol is -1, expected a number >= 0"):
        entry.solver(rtol=-1.0)
    if entry.make.needs_key:
        refused(ValueError, "key is None, expected a key", problem, solver, good, args)
    refused(TypeError, "key is a int, expected a key", problem, solver, good, args, key=3)
    if jx.NonlinearProgram not in solver.accepts:
        refused(
            TypeError,
            f"{entry.make.__name__} cannot solve a NonlinearProgram",
            jx.NonlinearProgram(home.problem.fun, lower=0.0),
            solver,
            good,
            args,
            key=key,
        )


@ENTRIES
def test_detached_solution_has_no_derivative(entry):
    home, adjoint = entry.homes[0], implicit.DetachedAdjoint()

    def total(args):
        return jnp.sum(ravel_pytree(run(entry, home, args=args, adjoint=adjoint).value)[0])

    assert not np.any(jax.grad(total)(home.args(jnp.float64)))
