"""Target-based surrogate optimization: one expensive oracle call, many cheap updates.

The solvers `SSO` and `StochasticSSO`, their step sizes, metrics and inner solvers.

Lavington, Vaswani, Babanezhad, Schmidt, Le Roux, "Target-based surrogates for stochastic
optimization", ICML 2023, arXiv 2302.02607.
"""

from jaxopt_ext.solvers.sso_inner import (
    ExactLeastSquares,
    GradientSteps,
    InnerSolver,
    OptaxSteps,
    Subsolver,
)
from jaxopt_ext.solvers.sso_metrics import (
    Bregman,
    DiagonalAdaGrad,
    DiagonalHessian,
    Euclidean,
    LogSumExp,
    NegativeEntropy,
    ScalarAdaGrad,
    SurrogateMetric,
)
from jaxopt_ext.solvers.sso_solver import SSO, SSOState, from_oracle
from jaxopt_ext.solvers.sso_steps import (
    ConstantStep,
    EstimatedSmoothness,
    ExponentialDecay,
    InverseSquareRoot,
    Smoothness,
    TargetArmijo,
    TargetStep,
)
from jaxopt_ext.solvers.sso_stochastic import Minibatches, StochasticSSO, StochasticSSOState
from jaxopt_ext.solvers.sso_surrogate import Surrogate

__all__ = [
    "SSO",
    "Bregman",
    "ConstantStep",
    "DiagonalAdaGrad",
    "DiagonalHessian",
    "EstimatedSmoothness",
    "Euclidean",
    "ExactLeastSquares",
    "ExponentialDecay",
    "GradientSteps",
    "InnerSolver",
    "InverseSquareRoot",
    "LogSumExp",
    "Minibatches",
    "NegativeEntropy",
    "OptaxSteps",
    "SSOState",
    "ScalarAdaGrad",
    "Smoothness",
    "StochasticSSO",
    "StochasticSSOState",
    "Subsolver",
    "Surrogate",
    "SurrogateMetric",
    "TargetArmijo",
    "TargetStep",
    "from_oracle",
]
