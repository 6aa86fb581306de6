"""The contract of a solver: `init`, `step`, `stop`; state for the next step, info for people."""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxopt_ext import implicit
from jaxopt_ext.core import check
from jaxopt_ext.core.problem import Problem
from jaxopt_ext.core.result import RESULTS

Number = float | int | Array  # a numeric setting: an input of the compiled program


def default_tolerance(dtype) -> float:
    """The default `atol`: eps^(2/3), 3.7e-11 in float64 and 2.4e-5 in float32."""
    return float(jnp.finfo(dtype).eps) ** (2 / 3)


def default_relative(dtype) -> float:
    """The default `rtol`: eps, the rounding error of a residual as large as at the start."""
    return float(jnp.finfo(dtype).eps)


class Counts(eqx.Module):
    """Evaluations so far, by kind, as 32-bit integers."""

    value: Int[Array, ""]
    gradient: Int[Array, ""]
    hessian: Int[Array, ""]
    hvp: Int[Array, ""]
    constraint: Int[Array, ""]
    linear_solve: Int[Array, ""]
    oracle: Int[Array, ""]

    @classmethod
    def zero(cls) -> "Counts":
        """No evaluation yet."""
        return cls(*(jnp.zeros((), jnp.int32) for _ in cls.__dataclass_fields__))

    def add(self, **more: Any) -> "Counts":
        """The counts after `more` evaluations, keyword by kind."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for kind, n in more.items():
            fields[kind] = fields[kind] + jnp.asarray(n, jnp.int32)
        return Counts(**fields)


class Info(eqx.Module):
    """What one step reports to the driver and to people; the same fields for every solver.

    Attributes:
        objective: At `state.value` (NaN where the problem has none).
        optimality: Max norm of the optimality conditions there.
        optimality_scale: What a relative tolerance on it multiplies.
        feasibility: Largest constraint violation, 0 without constraints.
        step_size: Euclidean length of the step just tried.
        value_change: Decrease of the objective by the step just tried.
        accepted: Whether `state.value` moved.
        counts: Evaluations so far.
        failure: `RESULTS.successful`, or why the method cannot go on.
        aux: Auxiliary output at `state.value`.
        multipliers: Further unknowns of the conditions at `state.value`: the multipliers of a
            nonlinear program, the lower-level point z of a penalized bilevel problem.
        extras: Further scalars of the method, by name.
    """

    objective: Float[Array, ""]
    optimality: Float[Array, ""]
    optimality_scale: Float[Array, ""]
    feasibility: Float[Array, ""]
    step_size: Float[Array, ""]
    value_change: Float[Array, ""]
    accepted: Bool[Array, ""]
    counts: Counts
    failure: RESULTS
    aux: PyTree = None
    multipliers: PyTree = None
    extras: dict[str, Array] = eqx.field(default_factory=dict)


class AbstractSolver(eqx.Module, metaclass=check.SettingsMeta):
    """Base of all solvers: an `equinox.Module` whose fields are its settings.

    Floating settings are inputs of the compiled program, so changing one does not recompile;
    settings that shape the program are static fields. A subclass implements `init` and `step`.
    `step` must return a state of the same structure, shapes and dtypes that it was given, with
    `state.value` a point that has been accepted and evaluated.

    Attributes:
        accepts: Problem classes that the solver can be given.
        honours: Kinds of constraint (`Problem.constraints`) that it respects.
        needs_key: Whether it needs a random key.
        monotone: Whether `state.value` is always the best point evaluated so far; then the driver
            keeps no second copy.
        rtol: Relative tolerance on the optimality residual; `None` means eps of the dtype.
        atol: Absolute tolerance on the optimality residual; `None` means eps^(2/3) of the dtype.
    """

    accepts: ClassVar[tuple[type[Problem], ...]] = ()
    honours: ClassVar[frozenset[str]] = frozenset()
    needs_key: ClassVar[bool] = False
    monotone: ClassVar[bool] = False

    rtol: Number | None = eqx.field(default=None, kw_only=True)
    atol: Number | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        for name in ("rtol", "atol"):
            if getattr(self, name) is not None:
                check.number(type(self).__name__, name, getattr(self, name), at_least=0)

    @abc.abstractmethod
    def init(self, problem: Problem, value: PyTree, args: PyTree, key: Array | None = None) -> Any:
        """Allocate the state; no iteration.

        Args:
            problem: A problem of a kind in `accepts`.
            value: Starting point, a PyTree of floating arrays.
            args: Passed to the problem's functions.
            key: Random key where `needs_key`.

        Returns:
            The state, a PyTree of arrays with an attribute `value`.
        """

    @abc.abstractmethod
    def step(self, problem: Problem, args: PyTree, state: Any) -> tuple[Any, Info]:
        """One iteration.

        Args:
            problem: The problem that `init` was given.
            args: Passed to the problem's functions. To change them between steps (a minibatch),
                pass the state through `resume` first.
            state: The state after the previous step.

        Returns:
            The next state and what the step reports.
        """

    def resume(self, problem: Problem, args: PyTree, state: Any) -> Any:
        """Make a state fit for `args` that may differ from those of its last step.

        Where they do not differ, the state must come back unchanged. The default is right for a
        solver whose state remembers no evaluation.

        Args:
            problem: The problem that `init` was given.
            args: Passed to the problem's functions from now on.
            state: The state after an earlier step.

        Returns:
            The state to go on from.
        """
        return state

    def stop(
        self, problem: Problem, args: PyTree, state: Any, info: Info
    ) -> tuple[Bool[Array, ""], RESULTS]:
        """Whether to stop, and with which result: optimality and feasibility, or a failure."""
        from jaxopt_ext.core.stop import Feasible, Optimality, Track

        zero = jnp.zeros((), jnp.int32)
        criterion = Optimality(self.rtol, self.atol) & Feasible()
        met, _ = criterion(info, Track(zero, zero))
        result = RESULTS.where(met, RESULTS.successful, info.failure)
        return met | (info.failure != RESULTS.successful), result

    def finish(
        self, problem: Problem, args: PyTree, value: PyTree, info: Info
    ) -> tuple[PyTree, Info]:
        """What `solve` returns instead of the final point; by default that point.

        It must satisfy `condition` together with `info.multipliers`. The state is not touched, so
        a solve that goes on from it is not either.
        """
        return value, info

    def condition(self, problem: Problem) -> implicit.Condition:
        """The conditions that a solution of this solver satisfies; by default the problem's."""
        return problem.condition()

    def iteration_map(self, problem: Problem, args: PyTree, state: Any, value: PyTree) -> PyTree:
        """One unguarded iteration from `value` as a differentiable map, for `OneStepAdjoint`.

        Raises:
            TypeError: The solver has no such map.
        """
        raise TypeError(
            f"{type(self).__name__} has no iteration_map, so it cannot be differentiated by "
            "OneStepAdjoint; use ImplicitAdjoint"
        )


def check_compatible(problem: Any, solver: Any, key: Any) -> None:
    """Refuse a problem that the solver does not accept, by name, before anything runs.

    Raises:
        TypeError: `problem` or `solver` is not one, or the solver does not accept the problem.
        ValueError: A constraint that the solver cannot honour, or a missing random key.
    """
    if not isinstance(problem, Problem):
        raise TypeError(
            f"problem is a {type(problem).__name__}, expected a problem such as "
            "jaxopt_ext.Minimization(fun)"
        )
    if not isinstance(solver, AbstractSolver):
        what = f"the class {solver.__name__}" if isinstance(solver, type) else type(solver).__name__
        raise TypeError(f"solver is {what}, expected a solver such as solvers.GradNormSmooth()")
    name, kind = type(solver).__name__, type(problem).__name__
    if not isinstance(problem, solver.accepts):
        accepted = ", ".join(cls.__name__ for cls in solver.accepts)
        raise TypeError(f"{name} cannot solve a {kind}, expected one of: {accepted}")
    refused = sorted(problem.constraints - solver.honours)
    if refused:
        honoured = ", ".join(sorted(solver.honours)) or "none"
        raise ValueError(
            f"{name} cannot honour the {' and '.join(refused)} constraints of this {kind}; kinds "
            f"of constraint that it honours: {honoured}"
        )
    if solver.needs_key and key is None:
        raise ValueError(
            f"{name} is a random method: key is None, expected a key such as jax.random.key(0)"
        )
    if key is not None and not isinstance(key, jax.Array):
        raise TypeError(f"key is a {type(key).__name__}, expected a key such as jax.random.key(0)")
