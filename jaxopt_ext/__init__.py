"""Numerical optimization in JAX, differentiable through one implicit layer.

A problem states its optimality conditions, a solver finds a point that meets them, and the adjoint
differentiates the conditions rather than the solver.
"""

from jaxopt_ext import implicit, layers, solvers
from jaxopt_ext.core.drive import Multistart, multistart, solve
from jaxopt_ext.core.problem import (
    Bilevel,
    ComposedMinimization,
    CompositeMinimization,
    FixedPoint,
    LeastSquares,
    Minimization,
    NonlinearProgram,
    Problem,
    RootFinding,
)
from jaxopt_ext.core.report import Snapshot
from jaxopt_ext.core.result import RESULTS, SolveError
from jaxopt_ext.core.solution import Solution, Stats
from jaxopt_ext.core.solver import AbstractSolver, Counts, Info
from jaxopt_ext.core.stop import (
    Criterion,
    Evaluations,
    Feasible,
    Optimality,
    Stalled,
    StepSize,
    Target,
    ValueChange,
)

__version__ = "0.1.0"

__all__ = [
    "RESULTS",
    "AbstractSolver",
    "Bilevel",
    "ComposedMinimization",
    "CompositeMinimization",
    "Counts",
    "Criterion",
    "Evaluations",
    "Feasible",
    "FixedPoint",
    "Info",
    "LeastSquares",
    "Minimization",
    "Multistart",
    "NonlinearProgram",
    "Optimality",
    "Problem",
    "RootFinding",
    "Snapshot",
    "Solution",
    "SolveError",
    "Stalled",
    "Stats",
    "StepSize",
    "Target",
    "ValueChange",
    "implicit",
    "layers",
    "multistart",
    "solve",
    "solvers",
]
