"""Bilevel optimization: hypergradient and penalty methods on the same problems and step sizes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxopt_ext as jx
from jaxopt_ext import implicit, solvers
from jaxopt_ext.bench import measure
from jaxopt_ext.bench.contender import OURS, Budget, Contender, cast, temporary_bytes
from jaxopt_ext.bench.problem import Entry
from jaxopt_ext.bench.problems.bilevel import BilevelProblem
from jaxopt_ext.bench.problems.bolib import Bolib
from jaxopt_ext.bench.record import Row
from jaxopt_ext.bench.suite import Suite, Task

POINTS = 20  # of the curve
TOLERANCE, STEPS = 1e-2, 3000  # on BOLIB
Build = Callable[[BilevelProblem], Any]


def entries() -> dict[str, Entry]:
    """The quadratics, hyper-cleaning on the data sets that are there, and BOLIB.

    Returns:
        Entries by name.
    """
    from jaxopt_ext.bench.problems import bilevel, bolib

    return bilevel.ENTRIES | bolib.ENTRIES


# ---- contenders --------------------------------------------------------------------------------


def _rates(p: BilevelProblem, lower_steps: int = 10) -> dict[str, Any]:
    upper = p.upper_step if lower_steps > 1 else p.single_step
    return {"upper_step": upper, "lower_step": p.lower_step, "lower_steps": lower_steps}


def _accelerated(p: BilevelProblem) -> dict[str, Any]:
    return {**_rates(p), "lower_step": optax.sgd(p.lower_step, momentum=0.9, nesterov=True)}


def _decaying(p: BilevelProblem, upper: float, lower: float) -> dict[str, Any]:
    """Single-loop rates that fall by power laws, for the stochastic problem."""
    return {
        "upper_step": solvers.PowerLaw(p.single_step, upper, 100.0),
        "lower_step": solvers.PowerLaw(p.lower_step, lower, 100.0),
        "lower_steps": 1,
        "sampler": p.sampler,
    }


def _f2sa(p: BilevelProblem, **settings: Any):
    """Its own pairing of rates, with a multiplier that grows from 10 to 100 like k^(1/7)."""
    offset = 100.0
    alpha = solvers.PowerLaw(p.lower_step / 20, -5 / 7, offset)
    gamma = solvers.PowerLaw(p.lower_step, -4 / 7, offset)
    ratio = p.upper_step / (p.lower_step / 20)
    return solvers.F2SA(alpha=alpha, gamma=gamma, ratio=ratio, sampler=p.sampler, **settings)


def _tuned(p: BilevelProblem) -> solvers.PenaltyBilevel:
    """The best of 15 settings on another split of a part of mnist5k, with the same budget.

    Of seven tried there for AID-CG the best were those of AID-CG-accelerated.
    """
    return solvers.PenaltyBilevel(
        sigma=3e-3,
        upper_step=p.upper_step / 3,
        lower_step=optax.sgd(p.lower_step, momentum=0.95, nesterov=True),
        lower_steps=5,
    )


DETERMINISTIC: dict[str, Build] = {
    "penalty": lambda p: solvers.PenaltyBilevel(sigma=1e-2, **_rates(p)),
    "penalty-single-loop": lambda p: solvers.PenaltyBilevel(sigma=1e-2, **_rates(p, 1)),
    "penalty-central": lambda p: solvers.PenaltyBilevel(
        sigma=1e-2, difference="central", **_rates(p)
    ),
    "penalty-accelerated": lambda p: solvers.PenaltyBilevel(sigma=1e-2, **_accelerated(p)),
    "penalty-tuned": _tuned,
    "AID-CG": lambda p: solvers.ImplicitBilevel(
        linear_solver=implicit.CG(max_steps=10), **_rates(p)
    ),
    "AID-CG-accelerated": lambda p: solvers.ImplicitBilevel(
        linear_solver=implicit.CG(max_steps=10), **_accelerated(p)
    ),
    "AID-Neumann": lambda p: solvers.ImplicitBilevel(
        linear_solver=implicit.Neumann(10, p.lower_step), warm_start=False, **_rates(p)
    ),
    "AID-Nystrom": lambda p: solvers.ImplicitBilevel(
        # 10 products; the shift stands for the spectrum that the sketch does not see
        linear_solver=implicit.Nystrom(10, 0.1 / p.lower_step, jax.random.key(0)),
        warm_start=False,
        **_rates(p),
    ),
    "one-step": lambda p: solvers.ImplicitBilevel(
        linear_solver=implicit.JacobianFree(p.lower_step), warm_start=False, **_rates(p)
    ),
    "ITD": lambda p: solvers.UnrolledBilevel(**_rates(p)),
    "SOBA": lambda p: solvers.SOBA(**_rates(p, 1)),
    "BOME": lambda p: solvers.BOME(
        upper_step=p.lower_step / 10, lower_step=p.lower_step, lower_steps=10
    ),
    "F2SA": lambda p: _f2sa(p),
}

# Workers find contenders by name, so these have names of their own.
STOCHASTIC: dict[str, Build] = {
    "penalty-stochastic": lambda p: solvers.PenaltyBilevel(
        sigma=solvers.PowerLaw(0.1, -1 / 5, 100.0), **_decaying(p, -3 / 5, -2 / 5)
    ),
    "penalty-momentum": lambda p: solvers.PenaltyBilevel(
        sigma=solvers.PowerLaw(0.1, -1 / 5, 100.0),
        momentum=solvers.PowerLaw(1.0, -4 / 5, 10.0),
        **_decaying(p, -3 / 5, -2 / 5),
    ),
    "penalty-independent": lambda p: solvers.PenaltyBilevel(
        sigma=solvers.PowerLaw(0.1, -1 / 5, 100.0),
        common_samples=False,
        **_decaying(p, -3 / 5, -2 / 5),
    ),
    "stocBiO": lambda p: solvers.ImplicitBilevel(
        linear_solver=implicit.Neumann(10, p.lower_step),
        warm_start=False,
        sampler=p.sampler,
        **_rates(p),
    ),
    "SOBA-stochastic": lambda p: solvers.SOBA(**_decaying(p, -1 / 2, -1 / 2)),
    "F2SA-stochastic": lambda p: _f2sa(p),
    "F2SA-common": lambda p: _f2sa(p, common_samples=True),
    "F3SA": lambda p: _f2sa(
        p, momentum=solvers.PowerLaw(1.0, -4 / 5, 10.0), lower_steps=1, common_samples=True
    ),
}


def _adaptive(p: Bolib) -> dict[str, Any]:
    """Adam for x, for problems of very different scales, and steps for y below 1/curvature."""
    rate = optax.exponential_decay(0.05 * p.span, 100, 0.85)
    return {"upper_step": optax.adam(rate), "lower_step": 0.9 / (p.curvature + 2)}


BOLIB: dict[str, Callable[[Bolib], Any]] = {
    "penalty-continuation": lambda p: solvers.PenaltyBilevel(
        sigma=solvers.cbo.Geometric(0.3, 0.995, 1e-3), **_adaptive(p)
    ),
    "AID": lambda p: solvers.ImplicitBilevel(**_adaptive(p)),
}


def _contenders(methods: dict[str, Callable[[Any], Any]], kind: str) -> tuple[Contender, ...]:
    def one(name: str, build: Callable[[Any], Any]) -> Contender:
        return Contender(
            OURS, name, (kind,), lambda problem, budget: build(problem), random=kind == "stochastic"
        )

    return tuple(one(name, build) for name, build in methods.items())


# ---- one run -----------------------------------------------------------------------------------


def per_step(solver: Any, problem: BilevelProblem, start, args, key) -> int:
    """Gradients that a step costs; a second-order product counts as two."""
    state = jax.eval_shape(lambda: solver.init(problem.bilevel, start, args, key))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), state)
    counts = jax.jit(lambda s: solver.step(problem.bilevel, args, s)[1].counts)(zero)
    return int(counts.gradient) + 2 * int(counts.hvp)


def execute(row: Row, entry: Entry, contender: Contender, task: Task) -> None:
    """Spend the gradients of the problem, then judge the point by closed form or retraining."""
    problem = measure.built(entry.build)
    if isinstance(problem, Bolib):
        return many_starts(row, problem, contender, task)
    budget = Budget(problem.tolerance, 0, problem.gradients, task.seed, task.dtype)
    solver: Any = contender.make(problem, budget)
    start, args = cast((problem.init, problem.args), task.dtype)
    key = jax.random.key(task.seed) if problem.sampler is not None else None
    cost = per_step(solver, problem, start, args, key)
    gradients = problem.gradients // (10 if task.quick else 1)
    every = max(1, gradients // (cost * POINTS))
    row.n = sum(leaf.size for leaf in jax.tree.leaves(problem.init))
    row.params, row.tolerance = {"facts": problem.facts}, problem.tolerance
    row.iterations, row.work = every * POINTS, float(every * POINTS * cost)

    def run(start, args, key):
        state = solver.init(problem.bilevel, start, args, key)

        def step(_, state):
            return solver.step(problem.bilevel, args, state)[0]

        def point(state, _):
            state = jax.lax.fori_loop(0, every, step, state)
            return state, (state.value, state.objective)

        return jax.lax.scan(point, state, None, length=POINTS)[1]

    (program, seconds, _) = measure.timed(lambda: jax.jit(run).lower(start, args, key).compile())
    row.compile_cpu_s, row.peak_bytes = seconds, temporary_bytes(program)
    (points, objectives), cpu, wall = measure.timed(
        lambda: jax.block_until_ready(program(start, args, key))
    )
    row.run_cpu_s, row.run_wall_s = [cpu], [wall]

    x, y = jax.tree.map(lambda leaf: leaf[-1], points)
    figures = problem.measure(x, y)
    error = figures.pop("error")
    row.error, row.f = error, float(objectives[-1])
    row.extras = figures
    row.history = {
        "work": [float((i + 1) * every * cost) for i in range(POINTS)],
        "f": [float(v) for v in _curve(problem, points, objectives)],
    }
    if not np.isfinite(error):
        row.status = "nonfinite"
    else:
        row.status = "ok" if error <= problem.tolerance else "missed"


def many_starts(row: Row, problem: Bolib, contender: Contender, task: Task) -> None:
    """From 32 random starts at once: how many end at the recorded optimum."""
    solver: Any = contender.make(problem, Budget(TOLERANCE, STEPS, 0, task.seed, task.dtype))
    starts = cast(problem.starts(task.seed), task.dtype)

    def one(x, y):
        adjoint = implicit.DetachedAdjoint()
        return jx.solve(problem.bilevel, solver, (x, y), max_steps=STEPS, adjoint=adjoint).value

    program, seconds, _ = measure.timed(lambda: jax.jit(jax.vmap(one)).lower(*starts).compile())
    row.compile_cpu_s, row.peak_bytes = seconds, temporary_bytes(program)
    (x, y), cpu, wall = measure.timed(lambda: jax.block_until_ready(program(*starts)))
    row.run_cpu_s, row.run_wall_s = [cpu], [wall]
    row.n, row.tolerance, row.f_star = sum(problem.sizes), TOLERANCE, problem.optimum
    row.params = {"regular": problem.regular}
    row.extras = problem.hits(x, y, TOLERANCE)
    best = float(row.extras["best"])
    row.f, row.error = best, max(0.0, best - problem.optimum) / (1 + abs(problem.optimum))
    row.status = "ok" if row.extras["hit_rate"] > 0 else "missed"


def _curve(problem: BilevelProblem, points, objectives):
    """What the curve shows: the squared gradient where it has a closed form, else f(x, y)."""
    if "start" not in problem.facts:
        return np.asarray(objectives)
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], points) for i in range(POINTS)]
    return [problem.measure(x, y)["gradient"] for x, y in each]


SUITE = Suite(
    name="bilevel",
    title="Bilevel optimization",
    summary="Every method gets the same gradients to spend (a second-order product counts as two) "
    "and the same step sizes. Quadratics: solved if the squared gradient of the value function, in "
    "closed form, is at most 1e-3 of that at the start (stochastic: 1e-2). Hyper-cleaning: solved "
    "if the validation loss of a model retrained with the weights found is within 1 % of the best "
    "known. BOLIB: solved if one of 32 random starts ends within 1e-2 of the recorded optimum, at "
    "a y that is optimal for its x; the share of such starts is an extra.",
    entries=entries,
    kinds=("deterministic", "stochastic", "bolib"),
    execute=execute,
    seeds=3,
    own=(
        *_contenders(DETERMINISTIC, "deterministic"),
        *_contenders(STOCHASTIC, "stochastic"),
        *_contenders(BOLIB, "bolib"),
    ),
)
