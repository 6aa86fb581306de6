"""The driver with solvers made for the purpose: best point, guards, limits, batches."""

import _thread
import signal
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_ext as jx
from jaxopt_ext import implicit, solvers


class State(eqx.Module):
    value: jax.Array
    counts: jx.Counts


class Descent(jx.AbstractSolver):
    """Gradient descent without any safeguard: it can pass good points and reach NaN."""

    accepts: ClassVar = (jx.Minimization, jx.NonlinearProgram)
    honours: ClassVar = frozenset({"bounds"})
    rate: float = 0.1

    def init(self, problem, value, args, key=None):
        return State(value, jx.Counts.zero())

    def step(self, problem, args, state):
        gradient = jax.grad(lambda y: problem.objective(y, args)[0])(state.value)
        value = state.value - self.rate * gradient
        objective, aux = problem.objective(value, args)
        counts = state.counts.add(value=1, gradient=1)
        zero = jnp.zeros((), objective.dtype)
        info = jx.Info(
            objective=objective,
            optimality=jnp.max(jnp.abs(gradient)),
            optimality_scale=zero,
            feasibility=zero,
            step_size=jnp.linalg.norm(jnp.atleast_1d(value - state.value)),
            value_change=zero,
            accepted=jnp.array(True),
            counts=counts,
            failure=jx.RESULTS.successful,
            aux=aux,
        )
        return State(value, counts), info


SQUARE = jx.Minimization(lambda y, args: jnp.sum(y**2))


def test_a_diverging_solver_returns_its_best_point_and_a_code():
    # y ← −2y: every step is worse than the one before
    found = jx.solve(SQUARE, Descent(rate=1.5), jnp.array([1.0]), max_steps=2000)
    assert found.result == jx.RESULTS.nonfinite_step
    assert float(found.value[0]) == -2.0  # the first evaluated point, the best one
    assert float(found.objective) == 4.0
    with pytest.raises(jx.SolveError, match="nonfinite_step: An iterate became non-finite"):
        found.check()


def test_best_point_is_kept_when_the_budget_runs_out():
    # lands on 0 exactly after one step, then the linear term pulls away and back
    problem = jx.Minimization(lambda y, args: jnp.sum(jnp.abs(y)))
    found = jx.solve(problem, Descent(rate=0.3), jnp.array([1.0]), max_steps=10, history=True)
    assert found.result == jx.RESULTS.max_steps_reached
    assert float(found.objective) == float(jnp.nanmin(found.history["objective"]))
    np.testing.assert_allclose(found.objective, jnp.sum(jnp.abs(found.value)), rtol=1e-12)
    assert float(jnp.abs(found.state.solver.value[0])) > float(jnp.abs(found.value[0]))


def test_a_point_with_a_nan_objective_is_never_the_best():
    # steps from (3, 5) towards 0 end in the region where the objective is NaN and its gradient not
    problem = jx.Minimization(lambda y, args: jnp.sum(jnp.where(y > 1, y**2, jnp.nan)))
    found = jx.solve(problem, Descent(), jnp.array([3.0, 5.0]))
    assert found.result == jx.RESULTS.nonfinite_step
    assert bool(jnp.isfinite(found.objective))
    np.testing.assert_allclose(found.objective, jnp.sum(found.value**2))
    assert float(jnp.min(found.value)) > 1


def test_resuming_remembers_the_best_point():
    problem = jx.Minimization(lambda y, args: jnp.sum(jnp.arange(1.0, 4.0) * y**2) / 2)
    init, options = jnp.ones(3), {"stop": jx.Target(-1.0)}
    whole = jx.solve(problem, Descent(rate=0.71), init, max_steps=5, **options)
    half = jx.solve(problem, Descent(rate=0.71), init, max_steps=3, **options)
    rest = jx.solve(problem, Descent(rate=0.71), init, max_steps=2, state=half.state, **options)
    np.testing.assert_array_equal(rest.value, whole.value)
    np.testing.assert_array_equal(rest.objective, whole.objective)
    assert float(whole.objective) < float(problem.fun(whole.state.solver.value, None))


def test_unrolled_gradient_with_a_callback():
    seen = []

    def loss(t):
        problem = jx.Minimization(lambda y, args: jnp.sum((y - t) ** 2))
        found = jx.solve(
            problem,
            Descent(rate=0.25),
            jnp.zeros(2),
            max_steps=3,
            adjoint=implicit.UnrolledAdjoint(),
            callback=lambda now: seen.append(int(now.steps)),
        )
        return jnp.sum(found.value)

    # y_k = (1 − 2^{-k}) t
    np.testing.assert_allclose(jax.grad(loss)(jnp.ones(2)), np.full(2, 1 - 2.0**-3))
    assert {1, 2, 3} <= set(seen)


def test_unbounded_objective_is_called_diverged():
    problem = jx.Minimization(lambda y, args: -jnp.sum(y**2))
    found = jx.solve(problem, Descent(rate=1.0), jnp.array([1.0]), max_steps=2000)
    assert found.result == jx.RESULTS.diverged
    assert bool(jnp.all(jnp.isfinite(found.value)))


def test_one_bad_lane_does_not_poison_a_batch():
    inits = jnp.array([[1.0], [jnp.nan], [-2.0]])
    batch = jax.vmap(lambda y: jx.solve(SQUARE, Descent(), y, max_steps=300))(inits)
    assert [bool(s) for s in batch.success] == [True, False, True]
    with pytest.raises(jx.SolveError, match=r"1 of 3 solves failed: nonfinite_start 1 \("):
        batch.check()
    assert "1 of 3 solves failed" in str(batch)
    np.testing.assert_allclose(batch.value[jnp.array([0, 2])], 0.0, atol=1e-9)


def test_a_batch_costs_its_slowest_lane():
    inits = jnp.array([[1e-8], [1.0], [1e3]])
    batch = jax.vmap(lambda y: jx.solve(SQUARE, Descent(), y, max_steps=500))(inits)
    alone = jx.solve(SQUARE, Descent(), inits[2], max_steps=500)
    assert int(jnp.max(batch.stats.steps)) == int(alone.stats.steps)
    assert int(batch.stats.steps[0]) < int(batch.stats.steps[2])


def test_ctrl_c_returns_the_best_point():
    def press_ctrl_c(now):
        if int(now.steps) >= 5:
            _thread.interrupt_main()

    # a shell that starts the tests in the background has the signal ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        found = jx.solve(
            SQUARE, Descent(), jnp.array([1.0]), stop=jx.Target(-1.0), callback=press_ctrl_c
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert found.result == jx.RESULTS.user_stopped
    assert 5 <= int(found.stats.steps) <= 8
    np.testing.assert_allclose(found.value[0], 0.8 ** int(found.stats.steps))


def test_time_limit_returns_the_best_point():
    found = jx.solve(
        SQUARE,
        Descent(rate=1e-9),
        jnp.array([1.0]),
        max_steps=10**9,
        stop=jx.Target(-1.0),
        time_limit=0.3,
    )
    assert found.result == jx.RESULTS.time_limit_reached
    assert 0 < float(found.value[0]) < 1


def test_chunks_do_not_change_the_numbers():
    options = {"max_steps": 37, "stop": jx.Target(-1.0)}
    init = jnp.array([1.0, 0.3])
    one_by_one = jx.solve(SQUARE, Descent(), init, callback=lambda now: None, **options)
    chunked = jx.solve(SQUARE, Descent(), init, **options)
    compiled = jax.jit(lambda y: jx.solve(SQUARE, Descent(), y, **options).value)(init)
    np.testing.assert_array_equal(one_by_one.value, chunked.value)
    np.testing.assert_array_equal(chunked.value, compiled)


def test_callback_in_a_batch_is_called_once_per_step_with_the_worst_lane():
    seen = []
    inits = jnp.array([[1.0], [8.0], [2.0]])

    def callback(now):
        seen.append((int(now.steps), now.value.shape, float(now.value[0])))

    batch = jax.jit(
        jax.vmap(
            lambda y: (
                jx.solve(
                    SQUARE, Descent(), y, max_steps=4, stop=jx.Target(-1.0), callback=callback
                ).value
            )
        )
    )(inits)
    jax.block_until_ready(batch)
    assert [step for step, *_ in seen] == [1, 2, 3, 4]
    assert all(shape == (1,) for _, shape, _ in seen)
    np.testing.assert_allclose([v for *_, v in seen], 8.0 * 0.8 ** np.arange(1, 5))


def test_callback_that_raises_stops_the_solve_inside_jit_and_says_so(capfd):
    def callback(now):
        raise RuntimeError("my own mistake")

    found = jax.jit(lambda y: jx.solve(SQUARE, Descent(), y, callback=callback))(jnp.ones(1))
    assert found.result == jx.RESULTS.user_stopped
    assert "my own mistake" in capfd.readouterr().err
    with pytest.raises(RuntimeError, match="my own mistake"):  # from Python it is the user's own
        jx.solve(SQUARE, Descent(), jnp.ones(1), callback=callback)


@pytest.mark.parametrize("compiled", [False, True], ids=["python", "jit"])
@pytest.mark.parametrize("kind", ["text", "tqdm", True])
def test_progress_is_shown(capfd, kind, compiled):
    def solution(y):
        return jx.solve(SQUARE, Descent(), y, progress=kind).value

    jax.block_until_ready((jax.jit(solution) if compiled else solution)(jnp.ones(1)))
    shown = capfd.readouterr().err
    assert "step" in shown
    assert "optimality" in shown
    if kind != "text" and not compiled:
        assert "100%" in shown


def test_unknown_progress_is_refused():
    with pytest.raises(ValueError, match="progress is 'bar', expected None, True, 'text' or"):
        jx.solve(SQUARE, Descent(), jnp.ones(1), progress="bar")


def test_throw_raises_from_python_and_is_silent_in_jit():
    with pytest.raises(jx.SolveError, match="max_steps_reached"):
        jx.solve(SQUARE, Descent(), jnp.ones(1), max_steps=2, throw=True)
    found = jax.jit(lambda y: jx.solve(SQUARE, Descent(), y, max_steps=2, throw=True))(jnp.ones(1))
    assert found.result == jx.RESULTS.max_steps_reached
    with pytest.raises(TypeError, match="outside jit, vmap and grad"):
        jax.jit(lambda y: jx.solve(SQUARE, Descent(), y).check())(jnp.ones(1))


def test_eager_gradient_is_driven_from_the_host():
    """Under an eager `grad` the solve still runs in chunks, so progress and Ctrl-C work there."""
    steps = []

    def loss(t):
        problem = jx.Minimization(lambda y, args: jnp.sum((y - t) ** 2))
        found = jx.solve(problem, Descent(), jnp.zeros(2), callback=lambda now: steps.append(now))
        return jnp.sum(found.value**2)

    t = jnp.array([1.0, -2.0])
    np.testing.assert_allclose(jax.grad(loss)(t), 2 * t, rtol=1e-9)
    assert isinstance(steps[0].objective, np.ndarray | np.generic)


def test_constraint_is_honoured_or_refused_by_name():
    bounded = jx.NonlinearProgram(lambda y, args: jnp.sum(y**2), lower=0.0)
    jx.solve(bounded, Descent(), jnp.ones(1), max_steps=1, adjoint=implicit.DetachedAdjoint())
    both = jx.NonlinearProgram(
        lambda y, args: jnp.sum(y**2), equality=lambda y, args: y[0], inequality=lambda y, args: y
    )
    with pytest.raises(
        ValueError, match="Descent cannot honour the equality and inequality constraints"
    ):
        jx.solve(both, Descent(), jnp.ones(1))


def test_adjoint_without_iteration_map_is_refused_by_name():
    with pytest.raises(TypeError, match="Descent has no iteration_map"):
        jx.solve(SQUARE, Descent(), jnp.ones(1), adjoint=implicit.OneStepAdjoint())
    with pytest.raises(ValueError, match="steps is 0, expected at least 1"):
        implicit.OneStepAdjoint(steps=0)


def test_random_solver_needs_a_key():
    class Random(Descent):
        needs_key: ClassVar = True

    with pytest.raises(ValueError, match="Random is a random method: key is None"):
        jx.solve(SQUARE, Random(), jnp.ones(1))
    jx.solve(SQUARE, Random(), jnp.ones(1), key=jax.random.key(0), max_steps=1)


def test_multistart_returns_the_best_and_all():
    double_well = jx.Minimization(lambda y, args: (y**2 - 1) ** 2 + 0.3 * y)
    inits = jnp.array([2.0, -2.0, jnp.nan, 0.9])
    found = jx.multistart(double_well, solvers.GradNormSmooth(), inits)
    assert found.all.value.shape == (4,)
    assert float(found.best.value) < -1
    assert float(found.best.objective) == float(jnp.nanmin(found.all.objective))
    assert bool(found.best.success)
    with pytest.raises(ValueError, match="expected leaves with a common leading axis"):
        jx.multistart(double_well, solvers.GradNormSmooth(), 1.0)


def test_gradient_flows_through_multistart():
    def best(t):
        problem = jx.Minimization(lambda y, args: (y**2 - t) ** 2 + 0.3 * y)
        return jx.multistart(problem, solvers.GradNormSmooth(), jnp.array([2.0, -2.0])).best.value

    h = 1e-5
    numeric = (best(1.0 + h) - best(1.0 - h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(best)(1.0), numeric, rtol=1e-7)


def test_numpy_and_python_inputs_are_taken():
    problem = jx.Minimization(lambda y, args: jnp.sum((y["a"] - args["t"]) ** 2) + y["b"] ** 2)
    found = jx.solve(
        problem,
        solvers.GradNormSmooth(),
        {"a": np.zeros(2), "b": 1.0},
        {
            "t": np.array([1.0, 2.0]),
            "label": "kept",
            "n": 3,
            "none": None,
            "key": jax.random.key(1),
        },
    ).check()
    np.testing.assert_allclose(found.value["a"], [1.0, 2.0])


def test_python_float_arguments_are_inputs_not_constants():
    problem = jx.Minimization(lambda y, t: jnp.sum((y - t) ** 2))
    first = jx.solve(problem, solvers.GradNormSmooth(), jnp.zeros(1), 0.5)
    second = jx.solve(problem, solvers.GradNormSmooth(), jnp.zeros(1), 0.25)
    np.testing.assert_allclose([first.value[0], second.value[0]], [0.5, 0.25])
    gradient = jax.grad(
        lambda t: jx.solve(problem, solvers.GradNormSmooth(), jnp.zeros(1), t).value[0]
    )(0.5)
    assert float(gradient) == pytest.approx(1.0)


def test_float32_problem_stays_float32_with_float64_enabled():
    problem = jx.Minimization(lambda y, t: jnp.sum((y - t) ** 2))
    found = jx.solve(problem, solvers.GradNormSmooth(), jnp.zeros(2, jnp.float32), 0.5)
    assert found.value.dtype == jnp.float32
    assert found.objective.dtype == jnp.float32


def test_leaks_nothing():
    problem = jx.Minimization(lambda y, t: jnp.sum((y - t) ** 2))
    with jax.checking_leaks():
        jax.jit(
            jax.grad(
                lambda t: jnp.sum(
                    jx.solve(problem, solvers.GradNormSmooth(), jnp.zeros(2), t).value
                )
            )
        )(jnp.ones(2))


def test_import_is_cheap_and_changes_no_configuration():
    import subprocess
    import sys

    script = (
        "import sys, jax\n"
        "before = dict(jax.config.values)\n"
        "import jaxopt_ext\n"
        "assert dict(jax.config.values) == before\n"
        "heavy = {'matplotlib', 'sklearn', 'jaxopt', 'optimistix', 'lineax', 'tqdm'}\n"
        "found = heavy & set(sys.modules)\n"
        "assert not found, found\n"
        "assert not any(name.startswith('jaxopt_ext.bench') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
