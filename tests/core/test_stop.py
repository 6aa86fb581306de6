"""Stopping criteria alone and combined."""

import jax
import jax.numpy as jnp
import pytest

import jaxopt_ext as jx
from jaxopt_ext import solvers

PROBLEM = jx.Minimization(lambda y, args: jnp.sum((y - 1) ** 4) + jnp.sum(y**2) / 10)


def run(stop, **options):
    return jx.solve(PROBLEM, solvers.GradNormSmooth(), jnp.full(2, 5.0), stop=stop, **options)


def test_each_criterion_holds_at_the_point_where_it_stopped():
    assert float(run(jx.Optimality(rtol=0.0, atol=1e-3)).check().optimality) <= 1e-3
    assert float(run(jx.Target(1.0)).check().objective) <= 1.0
    by_step = run(jx.StepSize(1e-4), history=True).check()
    steps = int(by_step.stats.steps)
    assert float(by_step.history["step_size"][steps - 1]) <= 1e-4
    assert float(jnp.nanmin(by_step.history["step_size"][1 : steps - 1])) > 1e-4
    by_value = run(jx.ValueChange(atol=1e-3), history=True).check()
    last = by_value.history["objective"][int(by_value.stats.steps) - 2 :][:2]
    assert abs(float(last[0] - last[1])) <= 1e-3


def test_relative_tolerance_scales_with_the_start():
    start = float(jnp.max(jnp.abs(jax.grad(PROBLEM.fun)(jnp.full(2, 5.0), None))))
    found = run(jx.Optimality(rtol=1e-3, atol=0.0)).check()
    assert 1e-6 * start < float(found.optimality) <= 1e-3 * start


def test_evaluations_is_a_budget():
    found = run(jx.Evaluations(5) | jx.Optimality())
    assert found.result == jx.RESULTS.max_steps_reached
    assert int(found.stats.counts.value) == 5
    assert int(run(jx.Evaluations(2, kind="hessian")).stats.counts.hessian) == 2


def test_stalled_is_no_success():
    found = run(jx.Stalled(3), max_steps=500)
    assert found.result == jx.RESULTS.stagnated


def test_or_stops_at_the_first_and_prefers_success():
    first = run(jx.Target(1.0) | jx.Evaluations(10**6))
    assert first.result == jx.RESULTS.successful
    assert int(first.stats.steps) == int(run(jx.Target(1.0)).stats.steps)
    both = run(jx.Evaluations(1) | jx.Optimality(atol=1e9))
    assert both.result == jx.RESULTS.successful


def test_and_waits_for_both_and_is_successful_only_if_both_are():
    loose, tight = jx.Target(1.0), jx.Optimality(rtol=0.0, atol=1e-6)
    both = run(loose & tight).check()
    assert float(both.optimality) <= 1e-6
    assert int(both.stats.steps) == int(run(tight).stats.steps)
    budget = run(jx.Target(1.0) & jx.Evaluations(3))
    assert budget.result == jx.RESULTS.max_steps_reached


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: jx.Optimality(rtol=-1.0), ValueError, "rtol is -1, expected a number >= 0"),
        (lambda: jx.Feasible(tol=-1.0), ValueError, "tol is -1"),
        (lambda: jx.StepSize(-1.0), ValueError, "tol is -1"),
        (lambda: jx.ValueChange(atol="x"), TypeError, "atol is a str, expected a number"),
        (lambda: jx.Stalled(0), ValueError, "steps is 0, expected an integer >= 1"),
        (lambda: jx.Stalled(1.5), TypeError, "steps is a float, expected an integer"),
        (lambda: jx.Evaluations(3, kind="values"), ValueError, "kind is 'values', expected one of"),
    ],
)
def test_bad_settings_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_result_names_cover_the_enumeration():
    from jaxopt_ext.core.result import RESULT_NAMES, result_names

    assert len(RESULT_NAMES) == len(jx.RESULTS) == len(result_names())
    for name in RESULT_NAMES:
        assert jx.RESULTS[getattr(jx.RESULTS, name)]
