"""Stopping criteria: small objects on what a step reports, combined with `&` and `|`."""

import abc

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxopt_ext.core import check
from jaxopt_ext.core.result import RESULTS
from jaxopt_ext.core.solver import Info, Number, default_relative, default_tolerance


class Track(eqx.Module):
    """What the driver remembers between steps on behalf of the criteria.

    Attributes:
        steps: Steps taken so far.
        since_best: Steps since the best point so far was found.
    """

    steps: Int[Array, ""]
    since_best: Int[Array, ""]


class Criterion(eqx.Module):
    """Base: a criterion says whether it is met and, if so, with which result."""

    @abc.abstractmethod
    def __call__(self, info: Info, track: Track) -> tuple[Bool[Array, ""], RESULTS]:
        """Return `(met, result)`; `result` counts only where `met`."""

    def __and__(self, other: "Criterion") -> "Criterion":
        return All(self, other)

    def __or__(self, other: "Criterion") -> "Criterion":
        return Any(self, other)


class All(Criterion):
    """Met when both parts are; successful only if both are."""

    first: Criterion
    second: Criterion

    def __call__(self, info, track):
        """See `Criterion`."""
        (met1, result1), (met2, result2) = self.first(info, track), self.second(info, track)
        return met1 & met2, RESULTS.where(result1 == RESULTS.successful, result2, result1)


class Any(Criterion):
    """Met when either part is; successful if a part that is met is."""

    first: Criterion
    second: Criterion

    def __call__(self, info, track):
        """See `Criterion`."""
        (met1, result1), (met2, result2) = self.first(info, track), self.second(info, track)
        take_second = ~met1 | (met2 & (result2 == RESULTS.successful))
        return met1 | met2, RESULTS.where(take_second, result2, result1)


class Optimality(Criterion):
    """Optimality residual ≤ atol + rtol · scale, in the max norm.

    The scale is the method's own (for smooth minimization: the gradient at the start).

    Args:
        rtol: Relative tolerance, dimensionless; `None` means eps of the dtype.
        atol: Absolute tolerance, in units of the residual; `None` means eps^(2/3).

    Raises:
        ValueError: A tolerance is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> problem = jx.Minimization(lambda y, args: jnp.sum((y - 1.0) ** 2))
        >>> stop = jx.Optimality(atol=1e-3) | jx.Target(1e-12)
        >>> found = jx.solve(problem, solvers.GradNormSmooth(), jnp.zeros(2), stop=stop)
        >>> print(jnp.round(found.value, 2))
        [1. 1.]
    """

    rtol: Number | None = None
    atol: Number | None = None

    def __check_init__(self):
        for name in ("rtol", "atol"):
            if getattr(self, name) is not None:
                check.number("Optimality", name, getattr(self, name), at_least=0)

    def __call__(self, info, track):
        """See `Criterion`."""
        dtype = info.optimality.dtype
        rtol = default_relative(dtype) if self.rtol is None else self.rtol
        atol = default_tolerance(dtype) if self.atol is None else self.atol
        return info.optimality <= atol + rtol * info.optimality_scale, RESULTS.successful


class Feasible(Criterion):
    """Largest constraint violation ≤ tol.

    Args:
        tol: In the constraints' units; `None` means eps^(2/3) of the dtype.

    Raises:
        ValueError: The tolerance is negative.
    """

    tol: Number | None = None

    def __check_init__(self):
        if self.tol is not None:
            check.number("Feasible", "tol", self.tol, at_least=0)

    def __call__(self, info, track):
        """See `Criterion`."""
        tol = default_tolerance(info.feasibility.dtype) if self.tol is None else self.tol
        return info.feasibility <= tol, RESULTS.successful


class StepSize(Criterion):
    """An accepted step no longer than `tol`.

    Args:
        tol: In the variables' units, Euclidean norm.

    Raises:
        ValueError: The tolerance is negative.
    """

    tol: Number

    def __check_init__(self):
        check.number("StepSize", "tol", self.tol, at_least=0)

    def __call__(self, info, track):
        """See `Criterion`."""
        moved = info.accepted & (track.steps > 1)
        return moved & (info.step_size <= self.tol), RESULTS.successful


class ValueChange(Criterion):
    """An accepted step that changed the objective by at most atol + rtol times its size.

    Args:
        rtol: Relative tolerance, dimensionless.
        atol: Absolute tolerance, in units of the objective.

    Raises:
        ValueError: A tolerance is negative.
    """

    rtol: Number = 0.0
    atol: Number = 0.0

    def __check_init__(self):
        check.number("ValueChange", "rtol", self.rtol, at_least=0)
        check.number("ValueChange", "atol", self.atol, at_least=0)

    def __call__(self, info, track):
        """See `Criterion`."""
        small = jnp.abs(info.value_change) <= self.atol + self.rtol * jnp.abs(info.objective)
        return info.accepted & (track.steps > 1) & small, RESULTS.successful


class Target(Criterion):
    """Objective ≤ `value` (combine with `Feasible()` where there are constraints).

    Args:
        value: In units of the objective.
    """

    value: Number

    def __check_init__(self):
        check.number("Target", "value", self.value)

    def __call__(self, info, track):
        """See `Criterion`."""
        return info.objective <= self.value, RESULTS.successful


class Stalled(Criterion):
    """No better point for `steps` steps; the result is `stagnated`.

    Args:
        steps: At least 1.

    Raises:
        ValueError: `steps` is less than 1.
    """

    steps: int | Array

    def __check_init__(self):
        if not eqx.is_array(self.steps):
            check.count("Stalled", "steps", self.steps)

    def __call__(self, info, track):
        """See `Criterion`."""
        return track.since_best >= self.steps, RESULTS.stagnated


class Evaluations(Criterion):
    """At least `limit` evaluations of one kind; the result is `max_steps_reached`.

    Args:
        limit: At least 1.
        kind: A field of `Counts`: `value`, `gradient`, `hessian`, `hvp`, `constraint`,
            `linear_solve` or `oracle`.

    Raises:
        ValueError: `limit` is less than 1, or `kind` is not a kind of evaluation.
    """

    limit: int | Array
    kind: str = eqx.field(static=True, default="value")

    def __check_init__(self):
        from jaxopt_ext.core.solver import Counts

        if not eqx.is_array(self.limit):
            check.count("Evaluations", "limit", self.limit)
        kinds = list(Counts.__dataclass_fields__)
        if self.kind not in kinds:
            raise ValueError(f"Evaluations: kind is {self.kind!r}, expected one of {kinds}")

    def __call__(self, info, track):
        """See `Criterion`."""
        return getattr(info.counts, self.kind) >= self.limit, RESULTS.max_steps_reached
