"""Measuring one contender on one problem: time, accuracy at the point returned, audited counts."""

import functools
import gc
import hashlib
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_ext.bench.contender import LARGEST_DENSE, Answer, Budget, Contender, cast
from jaxopt_ext.bench.counting import Log, counted, work
from jaxopt_ext.bench.problem import Problem
from jaxopt_ext.bench.record import Row

ENOUGH = 0.5  # CPU seconds of timed solves after which no further one is made


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result of a call with the CPU seconds and wall seconds it took.

    Args:
        call: Blocks until its result is there.

    Returns:
        Result, CPU seconds of the whole process, wall seconds.
    """
    cpu, wall = time.process_time(), time.perf_counter()
    result = call()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def repeated(call: Callable[[], Any], repeats: int) -> tuple[list[float], list[float]]:
    """CPU and wall seconds of up to `repeats` calls, fewer where they are slow.

    Args:
        call: Blocks until its result is there.
        repeats: Most calls; at least one is made.

    Returns:
        Two lists of the same length.
    """
    cpu, wall = [], []
    gc.collect()
    while not cpu or (len(cpu) < repeats and sum(cpu) < ENOUGH):
        _, seconds, clock = timed(call)
        cpu.append(seconds)
        wall.append(clock)
    return cpu, wall


def memory_peak(call: Callable[[], Any]) -> tuple[Any, int | None]:
    """The result of a call with the growth of resident memory during it.

    Args:
        call: Any function.

    Returns:
        Result and bytes, `None` where the system cannot reset its high-water mark.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except OSError:
        return call(), None
    result = call()
    return result, max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@functools.lru_cache(maxsize=32)
def built(build: Callable[[], Any]) -> Any:
    """The problem of an entry, made once per process.

    Args:
        build: `Entry.build`.

    Returns:
        The problem.
    """
    return build()


@functools.lru_cache(maxsize=32)
def _evaluator(problem: Problem, dtype: str) -> Callable[..., Any]:
    data, lower, upper = cast((problem.data, problem.lower, problem.upper), dtype)

    @jax.jit
    def at(y, data):
        violation = [jnp.zeros((), y.dtype)]
        if lower is not None:
            violation.append(jnp.max(lower - y))
        if upper is not None:
            violation.append(jnp.max(y - upper))
        if problem.equality is not None:
            violation.append(jnp.max(jnp.abs(problem.equality(y, data))))
        if problem.inequality is not None:
            violation.append(jnp.max(problem.inequality(y, data)))
        value, gradient = jax.value_and_grad(problem.fun)(y, data)
        return value, jnp.max(jnp.abs(gradient)), jnp.max(jnp.stack(violation))

    return lambda y: at(y, data)


def evaluate(problem: Problem, x: Any, dtype: str) -> dict[str, Any]:
    """Objective, max norm of the gradient and largest violation at a point, by our own functions.

    Args:
        problem: The problem, not counted.
        x: The point.
        dtype: That of the run.

    Returns:
        `x`, `f`, `grad_norm` and `violation`, 0 without constraints.
    """
    f, gradient, violation = (float(v) for v in _evaluator(problem, dtype)(cast(x, dtype)))
    return {"x": x, "f": f, "grad_norm": gradient, "violation": violation}


def digest(x: Any) -> str:
    """Twelve hexadecimal digits of the bytes of a point.

    Args:
        x: An array.

    Returns:
        The digits.
    """
    array = np.ascontiguousarray(x)
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()[:12]


def solve(
    row: Row,
    problem: Problem,
    contender: Contender,
    budget: Budget,
    repeats: int,
    accuracy: Callable[[Problem, dict[str, Any]], float],
    tolerance: float | None = None,
) -> Row:
    """Fill a row: compile, solve to warm up, solve timed, judge the point, solve audited.

    Args:
        row: Names of problem and contender filled in; changed in place, so that what is known
            before an exception is kept.
        problem: The problem.
        contender: The contender.
        budget: What it may spend.
        repeats: Most timed solves.
        accuracy: From the problem and `evaluate` to the number compared with the tolerance.
        tolerance: What that number is compared with; `None` means the budget's, which is what the
            contender is asked for.

    Returns:
        The same row.
    """
    at_start = evaluate(problem, problem.init, budget.dtype)
    residuals = problem.residual is not None
    row.problem_hash, row.n, row.params = problem.digest(), problem.size, dict(problem.meta)
    row.m = _rows(problem) if residuals or problem.equality or problem.inequality else None
    if contender.dense and problem.size > LARGEST_DENSE:
        row.status = "skipped"
        row.message = f"it keeps a dense matrix, and n is {problem.size} > {LARGEST_DENSE}"
        return row
    row.f0, row.f_star = at_start["f"], problem.optimum
    row.tolerance = budget.tolerance if tolerance is None else tolerance

    prepared, row.compile_cpu_s, _ = timed(lambda: contender.prepare(problem, budget))
    answer, growth = memory_peak(prepared.solve)
    row.peak_bytes = growth if prepared.temporary_bytes is None else prepared.temporary_bytes
    row.run_cpu_s, row.run_wall_s = repeated(prepared.solve, repeats)
    _judge(row, problem, answer, budget, accuracy)

    log = Log()
    audited = contender.prepare(counted(problem, log), budget)
    log.clear()  # what a contender evaluates while it compiles is not part of the solve
    audited.solve()
    row.counts = dict(log.counts)
    row.work = work(log.counts) if log.counts else None
    if not log.counts and not contender.traced:
        row.compile_cpu_s = None  # it calls no function of the problem, so nothing is compiled
    if problem.equality is None and problem.inequality is None:
        row.history = log.history()  # the objective of infeasible points would mean nothing
    return row


def _rows(problem: Problem) -> int:
    total = 0
    for fun in (problem.residual, problem.equality, problem.inequality):
        if fun is not None:
            out = jax.eval_shape(fun, *cast((problem.init, problem.data), "float32"))
            total += int(out.size)
    return total


def _judge(row, problem, answer: Answer, budget, accuracy) -> None:
    x = np.asarray(answer.x)
    row.x_hash, row.message = digest(x), answer.message
    row.iterations = None if answer.iterations is None else int(answer.iterations)
    row.declared = {kind: int(number) for kind, number in answer.declared.items()}
    there = evaluate(problem, x, budget.dtype)
    row.f, row.grad_norm, row.violation = there["f"], there["grad_norm"], there["violation"]
    if not (np.all(np.isfinite(x)) and np.isfinite(row.f)):
        row.status = "nonfinite"
        return
    row.error = accuracy(problem, there)
    constrained = problem.equality is not None or problem.inequality is not None
    if row.error <= row.tolerance:
        row.status = "ok"
    else:
        row.status = "diverged" if row.f > row.f0 and not constrained else "missed"
