"""Constraint layers: a constrained solve inside a network, and mixtures of experts of them."""

from jaxopt_ext.layers.certificate import Certificate, certify
from jaxopt_ext.layers.coupling import (
    Interface,
    PartitionOfUnity,
    Schwarz,
    imbalance,
    soft_gates,
)
from jaxopt_ext.layers.hard_constraint import Constrained, HardConstraint
from jaxopt_ext.layers.mixture_of_experts import Mixture, MixtureOfExperts
from jaxopt_ext.layers.partition import (
    BoxPartition,
    Groups,
    group,
    group_by_label,
    group_randomly,
)
from jaxopt_ext.layers.physics import (
    conserve,
    curl,
    derivative,
    dirichlet,
    divergence,
    divergence_free,
    laplacian,
    neumann,
    periodic,
    smooth_clip,
    smooth_positive,
    with_values,
)
from jaxopt_ext.layers.projection import Projection
from jaxopt_ext.layers.report import STATUS, ConstraintReport

__all__ = [
    "STATUS",
    "BoxPartition",
    "Certificate",
    "Constrained",
    "ConstraintReport",
    "Groups",
    "HardConstraint",
    "Interface",
    "Mixture",
    "MixtureOfExperts",
    "PartitionOfUnity",
    "Projection",
    "Schwarz",
    "certify",
    "conserve",
    "curl",
    "derivative",
    "dirichlet",
    "divergence",
    "divergence_free",
    "group",
    "group_by_label",
    "group_randomly",
    "imbalance",
    "laplacian",
    "neumann",
    "periodic",
    "smooth_clip",
    "smooth_positive",
    "soft_gates",
    "with_values",
]
