"""Result codes: how a solve ended, each with a sentence that says why and what to do."""

import equinox as eqx
import jax


class RESULTS(eqx.Enumeration):
    """How a solve ended. Members are arrays inside `jit` and `vmap`; `RESULTS[code]` is a sentence.

    Example:
        >>> from jaxopt_ext import RESULTS
        >>> bool(RESULTS.successful == RESULTS.successful)
        True
        >>> RESULTS[RESULTS.user_stopped]
        'The callback or an interrupt stopped the solve; the best point so far is returned.'
    """

    successful = "The stopping criterion is met."
    max_steps_reached = (
        "The budget of steps or evaluations ran out before the stopping criterion was met; raise "
        "max_steps, loosen rtol or atol, or resume with state=solution.state."
    )
    time_limit_reached = (
        "The time limit ran out before the stopping criterion was met; raise time_limit or resume "
        "with state=solution.state."
    )
    stagnated = (
        "No further progress is possible in this precision: steps are below the resolution of the "
        "variables or the objective; loosen rtol and atol, scale the problem, or use float64."
    )
    nonfinite_start = (
        "The problem is not finite at the starting point; check init and args for NaN, for "
        "logarithms or roots of negative numbers and for overflow."
    )
    nonfinite_step = (
        "An iterate became non-finite; the best finite point is returned. Start closer, bound the "
        "variables, or choose a safeguarded solver."
    )
    infeasible_stationary = (
        "The solver converged to a stationary point of the infeasibility: the constraints are "
        "likely inconsistent near it; check them or start elsewhere."
    )
    line_search_failed = (
        "The line search found no acceptable step; check that the gradient is the objective's own "
        "and that the objective is smooth."
    )
    linear_solve_failed = (
        "A linear system inside the method could not be solved; regularize the problem or choose "
        "another linear solver."
    )
    diverged = "The objective is unbounded below or the iterates left every bounded set."
    user_stopped = (
        "The callback or an interrupt stopped the solve; the best point so far is returned."
    )


class SolveError(RuntimeError):
    """Raised by `Solution.check` when a solve was not successful."""


RESULT_NAMES = (
    "successful",
    "max_steps_reached",
    "time_limit_reached",
    "stagnated",
    "nonfinite_start",
    "nonfinite_step",
    "infeasible_stationary",
    "line_search_failed",
    "linear_solve_failed",
    "diverged",
    "user_stopped",
)


def result_names() -> dict[int, str]:
    """The names of the results by the integer that stands for each in an array."""
    return {int(jax.tree.leaves(getattr(RESULTS, name))[0]): name for name in RESULT_NAMES}
