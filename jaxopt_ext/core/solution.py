"""What `solve` returns."""

from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree

from jaxopt_ext.core.result import RESULTS, SolveError, result_names
from jaxopt_ext.core.solver import Counts


class Stats(eqx.Module):
    """Steps taken and evaluations by kind.

    Attributes:
        steps: Steps of the solver in this call.
        counts: Evaluations since the state was initialised.
    """

    steps: Int[Array, "*batch"]
    counts: Counts


class Solution(eqx.Module):
    """The best point found, how good it is, and how the solve ended.

    It is a PyTree and passes through `jit` and `vmap`; after `vmap` every array has a leading
    batch axis.

    Attributes:
        value: The point: where the criterion was met, else the best evaluated one.
        multipliers: Of a nonlinear program; z of a penalized bilevel problem; else `None`.
        objective: The objective there (NaN where the problem has none).
        optimality: Max norm of the optimality conditions there.
        feasibility: Largest constraint violation there.
        result: How the solve ended, a member of `RESULTS`.
        stats: Steps and evaluation counts.
        aux: The auxiliary output there.
        history: Arrays of length `max_steps` by name, NaN after the last step; `None` unless asked.
        state: What to pass as `state=` to go on; the solver's own state is `state.solver`.
    """

    value: PyTree
    multipliers: PyTree
    objective: Float[Array, "*batch"]
    optimality: Float[Array, "*batch"]
    feasibility: Float[Array, "*batch"]
    result: RESULTS
    stats: Stats
    aux: PyTree
    history: dict[str, Array] | None
    state: Any

    @property
    def success(self) -> Array:
        """Whether the result is `successful`."""
        return self.result == RESULTS.successful

    def check(self) -> "Solution":
        """Raise if the solve, or any solve of a batch, was not successful. Host only.

        Returns:
            The solution itself.

        Raises:
            SolveError: With the sentence of the result; for a batch with counts by result.
        """
        if isinstance(self.objective, Tracer):
            raise TypeError(
                "Solution.check works on concrete values, expected to be called outside jit, vmap "
                "and grad; inside them look at solution.result"
            )
        if not bool(np.all(np.asarray(self.success))):
            raise SolveError(self._verdict())
        return self

    def _verdict(self) -> str:
        codes = np.asarray(jax.tree.leaves(self.result)[0])
        by_code = result_names()
        if codes.ndim == 0:
            name = by_code[int(codes)]
            return f"{name}: {RESULTS[getattr(RESULTS, name)]}"
        found, numbers = np.unique(codes, return_counts=True)
        counts = {by_code[int(c)]: int(n) for c, n in zip(found, numbers, strict=True)}
        good = counts.pop("successful", 0)
        if not counts:
            return f"successful: all {good} solves"
        parts = [
            f"{name} {n} ({RESULTS[getattr(RESULTS, name)]})"
            for name, n in sorted(counts.items(), key=lambda item: -item[1])
        ]
        return f"{sum(counts.values())} of {codes.size} solves failed: " + "; ".join(parts)

    def __str__(self) -> str:
        if isinstance(self.objective, Tracer):
            return "Solution(traced)"
        objective, optimality, feasibility, steps = (
            np.asarray(a)
            for a in (self.objective, self.optimality, self.feasibility, self.stats.steps)
        )

        def show(array):
            if array.ndim == 0:
                return f"{array:.6g}"
            return f"{np.min(array):.6g} .. {np.max(array):.6g}"

        counts = {
            name: int(np.sum(np.asarray(getattr(self.stats.counts, name))))
            for name in Counts.__dataclass_fields__
        }
        spent = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
        return "\n".join(
            [
                f"result       {self._verdict()}",
                f"objective    {show(objective)}",
                f"optimality   {show(optimality)}",
                f"feasibility  {show(feasibility)}",
                f"steps        {show(steps)} ({spent})",
            ]
        )
