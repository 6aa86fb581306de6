"""Stochastic methods on losses of a model's output, against the number of oracle calls."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxopt_ext as jx
from jaxopt_ext import solvers
from jaxopt_ext.bench.contender import OURS, Budget, Contender, cast
from jaxopt_ext.bench.measure import built, digest, repeated, timed
from jaxopt_ext.bench.peers.optax import RATES
from jaxopt_ext.bench.problem import Entry
from jaxopt_ext.bench.problems import supervised
from jaxopt_ext.bench.problems.supervised import Method, Supervised
from jaxopt_ext.bench.record import Row
from jaxopt_ext.bench.suite import Suite, Task
from jaxopt_ext.solvers import sso

INNER_STEPS = (1, 5, 10, 100)
SOLVED = 1e-2  # of the gap between the start and the optimum
POINTS = 30  # of a curve


def surrogate(steps: int, decaying: bool = False):
    """A contender with η = 1/L and a number of inner steps; nothing is tuned.

    Args:
        steps: m.
        decaying: Whether η falls by the exponential schedule, for noisy data.

    Returns:
        The `make` of a contender.
    """

    def make(problem: Supervised, budget: Budget) -> Any:
        composed = jx.ComposedMinimization(problem.loss, problem.model)
        decay = sso.ExponentialDecay(float(problem.calls)) if decaying else None
        solver = solvers.StochasticSSO(
            sso.Smoothness(problem.smoothness),
            sso.GradientSteps(steps, tolerance=0.0),
            safeguard=False,
            decay=decay,
        )

        def init(w, batch, rate):
            return solver.init(composed, w, batch)

        def step(state, batch):
            return solver.step(composed, batch, state)[0]

        def further(state):
            return {
                "oracle": state.counts.oracle,
                "model": state.model_evaluations,
                "surrogate_gradient": state.surrogate_gradients,
            }

        return Method(init, step, lambda state: state.trial, further=further)

    return make


def svrg(problem: Supervised, budget: Budget) -> Any:
    """SVRG: minibatch gradients, corrected by a full gradient at a snapshot.

    An epoch begins with the full gradient, which costs as many oracle calls as there are
    minibatches, and has as many steps of two calls each: at the newest point and at the snapshot.
    Calls that belong to work already done let the state as it is, so that a round of the suite is
    one call for everybody.

    Args:
        problem: The problem.
        budget: Not used.

    Returns:
        The method; its step size is a number of the grid.

    Reference:
        Johnson, Zhang, "Accelerating stochastic gradient descent using predictive variance
        reduction", NeurIPS 2013.
    """
    steps = -(-problem.samples // problem.batch)
    slope = jax.grad(problem.fun)

    def init(w, batch, rate):
        return {"w": w, "snapshot": w, "full": w, "calls": jnp.zeros((), jnp.int32), "rate": rate}

    def step(state, batch):
        place = state["calls"] % (3 * steps)

        def look(state):
            data = cast(problem.data, str(state["rate"].dtype))
            return state | {"snapshot": state["w"], "full": slope(state["w"], data)}

        def move(state):
            gradients = (slope(state["w"], batch), slope(state["snapshot"], batch), state["full"])
            return state | {
                "w": jax.tree.map(
                    lambda w, new, old, full: w - state["rate"] * (new - old + full),
                    state["w"],
                    *gradients,
                )
            }

        moves = (place >= steps) & ((place - steps) % 2 == 0)
        kind = jnp.where(place == 0, 0, jnp.where(moves, 1, 2))
        state = jax.lax.switch(kind, (look, move, lambda state: state), state)
        return state | {"calls": state["calls"] + 1}

    return Method(init, step, lambda state: state["w"], RATES)


class Curve(NamedTuple):
    """A run of a method.

    Attributes:
        state: The last state.
        seen: After how many oracle calls which objective and gradient norm over all samples.
        cpu: CPU seconds of the calls, without the looks.
        wall: Wall seconds of the same.
    """

    state: Any
    seen: list[tuple[int, float, float]]
    cpu: float
    wall: float


class _Run:
    """A method on a problem: minibatches drawn beforehand, the same for every contender."""

    def __init__(self, problem: Supervised, method: Method, task: Task):
        self.problem, self.method = problem, method
        self.data, self.start = cast((problem.data, problem.init), task.dtype)
        random = np.random.default_rng(task.seed)
        shape = (problem.calls, problem.batch)
        whole = problem.batch == problem.samples
        rows = (
            np.zeros((problem.calls, 0), int)
            if whole
            else random.integers(problem.samples, size=shape)
        )
        self.rows, self.whole = jnp.asarray(rows), whole
        self.begin = jax.jit(self._begin)
        self.advance = jax.jit(self._advance)
        self.judge = jax.jit(self._judge)

    def _batch(self, data, rows):
        return data if self.whole else jax.tree.map(lambda leaf: leaf[rows], data)

    def _begin(self, data, start, rows, rate):
        return self.method.init(start, self._batch(data, rows[0]), rate)

    def _advance(self, state, data, rows, low, high):
        def body(i, state):
            return self.method.step(state, self._batch(data, rows[i]))

        return jax.lax.fori_loop(low, high, body, state)

    def _judge(self, state, data):
        point = self.method.point(state)
        value, gradient = jax.value_and_grad(self.problem.fun)(point, data)
        largest = [jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(gradient)]
        return value, jnp.max(jnp.stack(largest))

    def first(self, rate: float) -> Any:
        """The state at the start."""
        return self.begin(self.data, self.start, self.rows, jnp.asarray(rate, self.dtype))

    @property
    def dtype(self):
        """Of the variables."""
        return jax.tree.leaves(self.start)[0].dtype

    def curve(self, rate: float) -> Curve:
        """A run with a look at each checkpoint."""
        state, points = self.first(rate), self.checkpoints()
        seen, cpu, wall = [], 0.0, 0.0
        for low, high in zip([0, *points], points, strict=False):
            state, seconds, clock = timed(
                lambda state=state, low=low, high=high: jax.block_until_ready(
                    self.advance(state, self.data, self.rows, low, high)
                )
            )
            cpu, wall = cpu + seconds, wall + clock
            value, gradient = self.judge(state, self.data)
            seen.append((high, float(value), float(gradient)))
        return Curve(state, seen, cpu, wall)

    def checkpoints(self) -> list[int]:
        """Numbers of oracle calls, evenly spaced in the logarithm."""
        spaced = np.geomspace(1, self.problem.calls, POINTS).round().astype(int)
        return sorted(set(spaced.tolist()))

    def go(self, rate: float, calls: int) -> Any:
        """A number of oracle calls, without looking."""
        state = self.first(rate)
        return jax.block_until_ready(self.advance(state, self.data, self.rows, 0, calls))


def execute(row: Row, entry: Entry, contender: Contender, task: Task) -> None:
    """Run a number of oracle calls; a tuned method with each of its settings."""
    problem: Supervised = built(entry.build)
    budget = Budget(SOLVED, problem.calls, problem.calls, task.seed, task.dtype)
    method: Any = contender.make(problem, budget)
    run = _Run(problem, method, task)
    row.n, row.problem_hash, row.params = problem.size, problem.digest(), dict(problem.meta)
    _, row.compile_cpu_s, _ = timed(lambda: run.go(1.0, 1))
    curves = {rate: run.curve(rate) for rate in method.rates or (1.0,)}

    row.f0, row.f_star = float(jax.jit(problem.fun)(run.start, run.data)), problem.optimum

    def standing(rate):  # the earliest to be solved, then the lowest
        seen = curves[rate].seen
        value = seen[-1][1] if np.isfinite(seen[-1][1]) else np.inf
        solved = _solved(row, seen) if value < np.inf and problem.cost is None else None
        return (np.inf if solved is None else solved), value

    rate = min(curves, key=standing)
    state, seen, *seconds = curves[rate]
    row.run_cpu_s, row.run_wall_s = ([spent] for spent in seconds)
    row.f, row.grad_norm = seen[-1][1], seen[-1][2]
    row.x_hash = digest(jnp.concatenate([x.ravel() for x in jax.tree.leaves(method.point(state))]))
    row.iterations = problem.calls
    row.declared = {kind: int(number) for kind, number in method.further(state).items()}
    row.extras = {"grad_norms": [gradient for _, _, gradient in seen]}
    if method.rates:
        row.extras |= {"rate": rate, "tried": len(method.rates)}
    best = np.minimum.accumulate([row.f0, *(value for _, value, _ in seen)])
    row.history = {"work": [0.0, *(float(calls) for calls, _, _ in seen)], "f": best.tolist()}
    if problem.cost is not None:
        row.run_cpu_s, row.run_wall_s = repeated(lambda: run.go(rate, problem.calls), task.repeats)
        row.extras["seconds_per_update"] = min(row.run_cpu_s) / problem.calls
        row.status = "ok"
        return
    _judge(row, seen)


def _solved(row: Row, seen: list[tuple[int, float, float]]) -> float | None:
    """The oracle calls after which the gap was small for good, `None` if it is not."""
    assert row.f0 is not None and row.f_star is not None
    limit = row.f_star + SOLVED * (row.f0 - row.f_star)
    open_until = [calls for calls, value, _ in seen if not value <= limit]
    if open_until and open_until[-1] == seen[-1][0]:
        return None
    return float(next(calls for calls, *_ in seen if not open_until or calls > open_until[-1]))


def _judge(row: Row, seen: list[tuple[int, float, float]]) -> None:
    """Solved where the gap is small at the last iterate."""
    assert row.f0 is not None and row.f is not None and row.f_star is not None
    row.tolerance, row.work = SOLVED, float(seen[-1][0])
    if not np.isfinite(row.f):
        row.status = "nonfinite"
        return
    row.error = (row.f - row.f_star) / (row.f0 - row.f_star)
    work = _solved(row, seen)
    if work is None:
        row.status = "diverged" if row.f > row.f0 else "missed"
    else:
        row.status, row.work = "ok", work


def _contender(steps: int, decaying: bool = False) -> Contender:
    setting = "exponential" if decaying else "default"
    make, name = surrogate(steps, decaying), f"SSO m={steps}"
    config = {"inner steps": steps, "decay": setting} if decaying else {"inner steps": steps}
    return Contender(
        OURS, name, (supervised.KIND,), make, setting=setting, config=config, random=True
    )


SUITE = Suite(
    name="sso",
    title="Expensive oracles: target-based surrogates",
    summary="Linear models and a linear network in minibatches, the same for all contenders. Work "
    "is the number of oracle calls (value and gradient of the loss of a minibatch as a function of "
    "the model's output). SSO has η = 1/L everywhere and nothing is tuned; SGD, Adam, AdaGrad, "
    "SVRG and the line search are run with each step size of a grid, and the one that solves the "
    "problem with the fewest calls is shown. Evaluations of the model, and the values that line "
    "searches need, are not counted. Solved: the objective over all samples is within 1 % of the "
    "initial gap to the least one, from then on. On the problems cost-… the oracle repeats work "
    "without effect, to measure what an update costs.",
    entries=supervised.entries,
    kinds=(supervised.KIND,),
    execute=execute,
    seeds=3,
    own=(
        *(_contender(m) for m in INNER_STEPS),
        _contender(10, True),
        _contender(100, True),
        Contender("reference", "SVRG", (supervised.KIND,), svrg, random=True),
    ),
)
