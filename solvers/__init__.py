"""Solvers: one file per method. `REGISTRY` lists what the shared test battery covers."""

if __name__ != "jaxopt_ext.solvers":  # reached as a bare folder of the checkout
    raise ImportError("import jaxopt_ext.solvers, not solvers")

from jaxopt_ext.solvers import cbo, kkt, sso
from jaxopt_ext.solvers.bilevel_f2sa import F2SA
from jaxopt_ext.solvers.bilevel_hypergradients import (
    BOME,
    SOBA,
    BilevelHypergradient,
    HypergradientSystem,
    ImplicitBilevel,
    UnrolledBilevel,
)
from jaxopt_ext.solvers.bilevel_steps import BilevelState, PowerLaw
from jaxopt_ext.solvers.bilevel_values import (
    PenaltyValue,
    hypergradient,
    lower_minimum,
    penalty_value,
)
from jaxopt_ext.solvers.cbo import CBO, CBOState
from jaxopt_ext.solvers.gauss_newton import EmpiricalFisher, GaussNewton
from jaxopt_ext.solvers.grad_norm_smooth import (
    ConstantRadius,
    GradNormSmooth,
    GradNormSmoothState,
    LipschitzHessian,
    QuasiSelfConcordant,
)
from jaxopt_ext.solvers.hessian_approximations import (
    AveragedHessian,
    DiagonalHessian,
    NystromHessian,
)
from jaxopt_ext.solvers.hessian_models import (
    ConjugateGradient,
    Direct,
    Eigendecomposition,
    ExactHessian,
    HessianModel,
    LowRank,
    UserHessian,
    ZeroHessian,
)
from jaxopt_ext.solvers.metrics import (
    DiagonalMetric,
    EuclideanMetric,
    MatrixMetric,
    OperatorMetric,
)
from jaxopt_ext.solvers.newton_baselines import CubicNewton, GradientMethod, SuperUniversalNewton
from jaxopt_ext.solvers.penalty_bilevel import PenaltyBilevel, lower_level_not_solved
from jaxopt_ext.solvers.quasi_newton import QuasiNewton
from jaxopt_ext.solvers.sketched_newton_al import SketchedNewtonAL, SketchedNewtonALState
from jaxopt_ext.solvers.smoothness import gradient_normalized_smoothness
from jaxopt_ext.solvers.sso import SSO, SSOState, StochasticSSO, StochasticSSOState

__all__ = [
    "BOME",
    "CBO",
    "F2SA",
    "SOBA",
    "SSO",
    "AveragedHessian",
    "BilevelHypergradient",
    "BilevelState",
    "CBOState",
    "ConjugateGradient",
    "ConstantRadius",
    "CubicNewton",
    "DiagonalHessian",
    "DiagonalMetric",
    "Direct",
    "Eigendecomposition",
    "EmpiricalFisher",
    "EuclideanMetric",
    "ExactHessian",
    "GaussNewton",
    "GradNormSmooth",
    "GradNormSmoothState",
    "GradientMethod",
    "HessianModel",
    "HypergradientSystem",
    "ImplicitBilevel",
    "LipschitzHessian",
    "LowRank",
    "MatrixMetric",
    "NystromHessian",
    "OperatorMetric",
    "PenaltyBilevel",
    "PenaltyValue",
    "PowerLaw",
    "QuasiNewton",
    "QuasiSelfConcordant",
    "SSOState",
    "SketchedNewtonAL",
    "SketchedNewtonALState",
    "StochasticSSO",
    "StochasticSSOState",
    "SuperUniversalNewton",
    "UnrolledBilevel",
    "UserHessian",
    "ZeroHessian",
    "cbo",
    "gradient_normalized_smoothness",
    "hypergradient",
    "kkt",
    "lower_level_not_solved",
    "lower_minimum",
    "penalty_value",
    "sso",
]
