"""Audited evaluation counts: a problem's functions tell the host each time they are evaluated.

The same wrapper serves every contender, so counts are comparable whatever a library says of itself.
It makes evaluations slow, so the audited solve is not the one that is timed. What is counted is
what the compiled program executes, in either mode of differentiation: what the compiler removes as
unused or repeated is not counted.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxopt_ext.bench.problem import Problem

# The cost of each kind in evaluations of the objective. For a constraint or residual function, one
# evaluation of all its components counts as one.
WEIGHTS = {
    "value": 1.0,
    "gradient": 1.0,  # on top of the value computed with it
    "jvp": 1.0,
    "hvp": 2.0,  # a dense Hessian in n variables is n of these
    "residual": 1.0,
    "residual_jvp": 1.0,
    "residual_vjp": 1.0,
    "residual_second": 2.0,
    "equality": 1.0,
    "equality_jvp": 1.0,
    "equality_vjp": 1.0,
    "equality_second": 2.0,
    "inequality": 1.0,
    "inequality_jvp": 1.0,
    "inequality_vjp": 1.0,
    "inequality_second": 2.0,
}
POINTS = 200


def work(counts: dict[str, int]) -> float:
    """The counts as one number, in evaluations of the objective (`WEIGHTS`).

    Args:
        counts: Evaluations by kind.

    Returns:
        The weighted sum.
    """
    return float(sum(WEIGHTS[kind] * number for kind, number in counts.items()))


@dataclasses.dataclass(eq=False)
class Log:
    """Evaluations so far, and the best objective against them.

    Attributes:
        counts: Evaluations by kind.
        work: Their weighted sum.
        curve: Pairs of work and objective, one for each objective better than all before.
    """

    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    work: float = 0.0
    curve: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    def note(self, kind: str, times: int, values: np.ndarray) -> None:
        """Count `times` evaluations; of the objective, remember the best of `values`."""
        self.counts[kind] = self.counts.get(kind, 0) + times
        self.work += WEIGHTS[kind] * times
        if kind in ("value", "residual"):
            finite = values[np.isfinite(values)]
            if finite.size and (not self.curve or finite.min() < self.curve[-1][1]):
                self.curve.append((self.work, float(finite.min())))

    def history(self) -> dict[str, list[float]]:
        """The curve, thinned to at most `POINTS` points evenly spaced in the logarithm of work."""
        curve = self.curve
        if len(curve) > POINTS:
            works = np.log(np.array([w for w, _ in curve]) + 1.0)
            wanted = np.linspace(works[0], works[-1], POINTS)
            kept = sorted({0, len(curve) - 1, *np.searchsorted(works, wanted).tolist()})
            curve = [curve[i] for i in kept if i < len(curve)]
        return {"work": [w for w, _ in curve], "f": [f for _, f in curve]}

    def clear(self) -> None:
        """Forget everything."""
        self.counts, self.work, self.curve = {}, 0.0, []


def counted(problem: Problem, log: Log) -> Problem:
    """The problem with functions that report to `log`.

    Args:
        problem: Any problem.
        log: Where evaluations are counted.

    Returns:
        The same problem; its functions are slower and differentiable twice in either mode, with
        respect to the variables alone.
    """
    functions: dict[str, Any] = {
        name: _counted(getattr(problem, name), log, name)
        for name in ("fun", "residual", "equality", "inequality")
        if getattr(problem, name) is not None
    }
    return dataclasses.replace(problem, **functions)


def _counted(fun: Callable, log: Log, name: str) -> Callable:
    prefix = "" if name == "fun" else f"{name}_"
    value = "value" if name == "fun" else name
    forward, reverse = f"{prefix}jvp", "gradient" if name == "fun" else f"{prefix}vjp"
    second = "hvp" if name == "fun" else f"{prefix}second"

    # the data are an argument: the rule of a custom_jvp must not close over traced values
    @jax.custom_jvp
    def evaluate(y, data):
        return report(fun(y, data), y)

    @evaluate.defjvp
    def _(primals, tangents):
        (y, data), (tangent, _) = primals, tangents
        tangent = tally(tangent, y, log=log, forward=forward, transposed=reverse)
        value, tangent = jax.jvp(lambda y: fun(y, data), (point(y),), (tangent,))
        return report(value, y), tangent

    @jax.custom_jvp
    def point(y):  # seen by the second derivative only
        return y

    @point.defjvp
    def _(primals, tangents):
        (y,), (tangent,) = primals, tangents
        return y, tally(tangent, y, log=log, forward=second, transposed=second)

    def report(result, y):
        if name != "residual":
            return tally(result, y, log=log, forward=value, transposed=value)
        objective = jnp.vdot(result, result) / 2  # what the curve shows
        return result + 0 * tally(objective, y, log=log, forward=value, transposed=value)

    return evaluate


# ---- the identity that counts ------------------------------------------------------------------

tally_p = Primitive("tally")


def tally(x: jax.Array, y: jax.Array, *, log: Log, forward: str, transposed: str) -> jax.Array:
    """The identity in x; counts one `forward` when evaluated, or one `transposed` when transposed.

    The callback gets an entry of y too: without it the compiler would take the count of a constant
    direction out of a loop over y.
    """
    return tally_p.bind(
        x, jnp.ravel(y)[0], log=log, forward=forward, transposed=transposed, times=1
    )


def _execute(x, y, *, log, forward, transposed, times):
    def callback(values, _):
        log.note(forward, times, np.asarray(values).ravel())
        return np.zeros((), x.dtype)

    seen = x if forward in ("value", "residual") else jnp.ravel(x)[0]
    zero = jax.pure_callback(callback, jax.ShapeDtypeStruct((), x.dtype), seen, y)
    return x + zero


def _batch(args, axes, *, times, **params):
    (x, y), (x_axis, y_axis) = args, axes
    size = y.shape[y_axis] if x_axis is None else x.shape[x_axis]
    y = y if y_axis is None else y[0]
    if x_axis is None:
        x, x_axis = jnp.broadcast_to(x, (size, *x.shape)), 0
    return tally_p.bind(x, y, times=times * size, **params), x_axis


def _differentiate(primals, tangents, **params):
    return tally_p.bind(*primals, **params), tangents[0]


def _transpose(cotangent, x, y, *, forward, transposed, **params):
    return [tally_p.bind(cotangent, y, forward=transposed, transposed=forward, **params), None]


tally_p.def_impl(jax.jit(_execute, static_argnames=("log", "forward", "transposed", "times")))
tally_p.def_abstract_eval(lambda x, y, **params: x)
batching.primitive_batchers[tally_p] = _batch
ad.primitive_jvps[tally_p] = _differentiate
ad.primitive_transposes[tally_p] = _transpose
mlir.register_lowering(tally_p, mlir.lower_fun(_execute, multiple_results=False))
