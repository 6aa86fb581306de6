"""The parts of `SketchedNewtonAL`: inner solvers for its linear systems, and how exact they are."""

from jaxopt_ext.solvers.exact_augmented_lagrangian import (
    Accuracy,
    PublishedAccuracy,
    RelativeAccuracy,
)
from jaxopt_ext.solvers.inner_solvers import (
    GMRES,
    MINRES,
    Direct,
    InnerSolver,
    ProjectedCG,
    SketchAndProject,
    Solved,
)
from jaxopt_ext.solvers.kkt_systems import KKTSystem
from jaxopt_ext.solvers.preconditioners import (
    BlockPreconditioner,
    Diagonal,
    Nystrom,
    Preconditioner,
    Schur,
)

__all__ = [
    "GMRES",
    "MINRES",
    "Accuracy",
    "BlockPreconditioner",
    "Diagonal",
    "Direct",
    "InnerSolver",
    "KKTSystem",
    "Nystrom",
    "Preconditioner",
    "ProjectedCG",
    "PublishedAccuracy",
    "RelativeAccuracy",
    "Schur",
    "SketchAndProject",
    "Solved",
]
