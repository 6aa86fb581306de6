"""What a run of consensus-based optimization carries from step to step."""

from typing import NamedTuple

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from jaxopt_ext.core.result import RESULTS
from jaxopt_ext.core.solver import Counts
from jaxopt_ext.solvers.cbo_constraints import PenaltyState


class Personal(eqx.Module):
    """What the particles remember, with `Memory`.

    Attributes:
        points: The best point of each particle.
        energies: The objective there.
    """

    points: Float[Array, "particles n"]
    energies: Float[Array, " particles"]


class Agreement(NamedTuple):
    """What the particles agree on in one step.

    Attributes:
        alpha: Inverse temperature.
        weight: Of each particle.
        consensus: Their weighted mean.
        distance: Of each particle to the consensus, or to its own with `Polarized`.
    """

    alpha: Float[Array, ""]
    weight: Float[Array, " particles"]
    consensus: Float[Array, " n"]
    distance: Float[Array, "particles n"]


class CBOState(eqx.Module):
    """State of `CBO`.

    Attributes:
        value: The best particle so far.
        objective: The objective there.
        aux: Auxiliary output there.
        optimality: Max norm of the optimality conditions there; NaN unless polished.
        polished: Whether `value` is the result of polishing.
        result: How polishing ended.
        swarm: Positions of the particles, each raveled (their dual variables with `mirror`).
        personal: What the particles remember, or `None`.
        penalty: What adapts with `penalty`, or `None`.
        consensus: The point that the swarm agreed on in the last step.
        alpha: Inverse temperature of the last step.
        spread: Typical distance of a particle to the consensus in the last step.
        spread_scale: The same in the first step.
        key: Data of the random key.
        steps: Steps so far.
        since_best: Steps since the best particle was found.
        nonfinite: Evaluations so far that were NaN or infinite.
        counts: Evaluations so far.
        impl: The kind of random key.
    """

    value: PyTree
    objective: Float[Array, ""]
    aux: PyTree
    optimality: Float[Array, ""]
    polished: Bool[Array, ""]
    result: RESULTS
    swarm: Float[Array, "particles n"]
    personal: Personal | None
    penalty: PenaltyState | None
    consensus: PyTree
    alpha: Float[Array, ""]
    spread: Float[Array, ""]
    spread_scale: Float[Array, ""]
    key: UInt32[Array, " words"]
    steps: Int[Array, ""]
    since_best: Int[Array, ""]
    nonfinite: Int[Array, ""]
    counts: Counts
    impl: str = eqx.field(static=True)
