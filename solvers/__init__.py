"""Solvers: one file per method. `REGISTRY` lists what the shared test battery covers."""

if __name__ != "jaxopt_ext.solvers":  # reached as a bare folder of the checkout
    raise ImportError("import jaxopt_ext.solvers, not solvers")

from jaxopt_ext.solvers.grad_norm_smooth import GradNormSmooth, GradNormSmoothState
from jaxopt_ext.solvers.hessian_models import ExactHessian, HessianModel

__all__ = ["ExactHessian", "GradNormSmooth", "GradNormSmoothState", "HessianModel"]
