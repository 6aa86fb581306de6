"""Consensus-based optimization: derivative-free global minimization by a swarm of particles.

The solver `CBO`, its pieces and the presets for published variants; everything about the method
can be had from here.

Pinnau, Totzeck, Tse, Martin, "A consensus-based model for global optimization and its mean-field
limit", 2017; Carrillo, Jin, Li, Zhu, "A consensus-based global optimization method for high
dimensional machine learning problems", 2021.
"""

from jaxopt_ext.solvers.cbo_consensus import (
    EffectiveSampleSize,
    Geometric,
    effective_sample_size,
    weights,
)
from jaxopt_ext.solvers.cbo_constraints import (
    ConstraintDrift,
    Penalty,
    PenaltyState,
    Sphere,
    Stiefel,
)
from jaxopt_ext.solvers.cbo_noise import (
    Anisotropic,
    Constant,
    Covariance,
    Isotropic,
    Noise,
    StudentT,
    gaussian,
    rademacher,
    uniform,
)
from jaxopt_ext.solvers.cbo_pareto import ParetoFront, efficient, pareto_front
from jaxopt_ext.solvers.cbo_pieces import Batch, Cutoff, Jumps, Kick, Memory, Polarized, Polish
from jaxopt_ext.solvers.cbo_presets import (
    consensus_based_sampling,
    consensus_hopping,
    truncated_cbo,
)
from jaxopt_ext.solvers.cbo_record import SwarmHistory, record
from jaxopt_ext.solvers.cbo_solver import CBO
from jaxopt_ext.solvers.cbo_start import Normal, Particles, Start, Uniform
from jaxopt_ext.solvers.cbo_state import CBOState, Personal

__all__ = [
    "CBO",
    "Anisotropic",
    "Batch",
    "CBOState",
    "Constant",
    "ConstraintDrift",
    "Covariance",
    "Cutoff",
    "EffectiveSampleSize",
    "Geometric",
    "Isotropic",
    "Jumps",
    "Kick",
    "Memory",
    "Noise",
    "Normal",
    "ParetoFront",
    "Particles",
    "Penalty",
    "PenaltyState",
    "Personal",
    "Polarized",
    "Polish",
    "Sphere",
    "Start",
    "Stiefel",
    "StudentT",
    "SwarmHistory",
    "Uniform",
    "consensus_based_sampling",
    "consensus_hopping",
    "effective_sample_size",
    "efficient",
    "gaussian",
    "pareto_front",
    "rademacher",
    "record",
    "truncated_cbo",
    "uniform",
    "weights",
]
