"""Solvers: one file per method. `REGISTRY` lists what the shared test battery covers."""

if __name__ != "jaxopt_ext.solvers":  # reached as a bare folder of the checkout
    raise ImportError("import jaxopt_ext.solvers, not solvers")

from jaxopt_ext.solvers import cbo
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
from jaxopt_ext.solvers.quasi_newton import QuasiNewton
from jaxopt_ext.solvers.smoothness import gradient_normalized_smoothness

__all__ = [
    "CBO",
    "AveragedHessian",
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
    "LipschitzHessian",
    "LowRank",
    "MatrixMetric",
    "NystromHessian",
    "OperatorMetric",
    "QuasiNewton",
    "QuasiSelfConcordant",
    "SuperUniversalNewton",
    "UserHessian",
    "ZeroHessian",
    "cbo",
    "gradient_normalized_smoothness",
]
