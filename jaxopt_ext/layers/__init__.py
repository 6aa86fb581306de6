"""Constraint layers: a constrained solve inside a network, and mixtures of experts of them."""

from jaxopt_ext.layers.hard_constraint import Constrained, ConstraintReport, HardConstraint
from jaxopt_ext.layers.mixture_of_experts import Interface, Mixture, MixtureOfExperts
from jaxopt_ext.layers.partition import BoxPartition, Groups, group
from jaxopt_ext.layers.physics import conserve, derivative, divergence_free, smooth_positive

__all__ = [
    "BoxPartition",
    "Constrained",
    "ConstraintReport",
    "Groups",
    "HardConstraint",
    "Interface",
    "Mixture",
    "MixtureOfExperts",
    "conserve",
    "derivative",
    "divergence_free",
    "group",
    "smooth_positive",
]
