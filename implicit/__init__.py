"""Optimality conditions in, derivatives of the solution out, whoever found the solution."""

if __name__ != "jaxopt_ext.implicit":  # reached as a bare folder of the checkout
    raise ImportError("import jaxopt_ext.implicit, not implicit")

from jaxopt_ext.implicit.adjoints import (
    Adjoint,
    DetachedAdjoint,
    ImplicitAdjoint,
    OneStepAdjoint,
    UnrolledAdjoint,
)
from jaxopt_ext.implicit.attach import attach, differentiable
from jaxopt_ext.implicit.conditions import (
    KKT,
    Condition,
    FixedPoint,
    LeastSquares,
    Multipliers,
    PenaltySystem,
    Root,
    Stationary,
)
from jaxopt_ext.implicit.hoist import Hoisted, detach, hoist
from jaxopt_ext.implicit.linear_solvers import (
    CG,
    GMRES,
    Auto,
    Dense,
    LinearOperator,
    LinearSolver,
)

__all__ = [
    "CG",
    "GMRES",
    "KKT",
    "Adjoint",
    "Auto",
    "Condition",
    "Dense",
    "DetachedAdjoint",
    "FixedPoint",
    "Hoisted",
    "ImplicitAdjoint",
    "LeastSquares",
    "LinearOperator",
    "LinearSolver",
    "Multipliers",
    "OneStepAdjoint",
    "PenaltySystem",
    "Root",
    "Stationary",
    "UnrolledAdjoint",
    "attach",
    "detach",
    "differentiable",
    "hoist",
]
