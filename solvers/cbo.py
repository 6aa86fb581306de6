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
from jaxopt_ext.solvers.cbo_pieces import Batch, Cutoff, Jumps, Kick, Memory, Polarized, Polish
from jaxopt_ext.solvers.cbo_presets import (
    consensus_based_sampling,
    consensus_hopping,
    truncated_cbo,
)
from jaxopt_ext.solvers.cbo_solver import CBO, CBOState, Personal
from jaxopt_ext.solvers.cbo_start import Normal, Particles, Start, Uniform

__all__ = [
    "CBO",
    "Anisotropic",
    "Batch",
    "CBOState",
    "Constant",
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
    "Particles",
    "Personal",
    "Polarized",
    "Polish",
    "Start",
    "StudentT",
    "Uniform",
    "consensus_based_sampling",
    "consensus_hopping",
    "effective_sample_size",
    "gaussian",
    "rademacher",
    "truncated_cbo",
    "uniform",
    "weights",
]
