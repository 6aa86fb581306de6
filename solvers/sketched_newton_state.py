"""What the steps of `SketchedNewtonAL` hand to each other: its state, a trial, a place, a step."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxopt_ext.core.result import RESULTS
from jaxopt_ext.core.solver import Counts, Number
from jaxopt_ext.implicit import Multipliers
from jaxopt_ext.solvers.exact_augmented_lagrangian import Accuracy
from jaxopt_ext.solvers.flat_program import Evaluation, FlatProgram, Scaling
from jaxopt_ext.solvers.inner_solvers import InnerSolver
from jaxopt_ext.solvers.kkt_systems import Derivatives

Shift = Literal["inertia", "frobenius"]

MEASURE, FRESH, SEARCH = 0, 1, 2  # what the next evaluation is for, see `SketchedNewtonAL.step`


class Settings(NamedTuple):
    """The settings of `SketchedNewtonAL`, with those that were left open filled in.

    Attributes:
        inner: The inner solver.
        accuracy: How exact it is.
        shift: How the curvature is corrected.
        penalty: η₁ at the start.
        gradient_penalty: η₂ at the start.
        growth: ν.
        decrease: Constant of the line search.
        scaled: Whether objective and constraints are scaled.
        multipliers: To start from, or `None`.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
    """

    inner: InnerSolver
    accuracy: Accuracy
    shift: Shift
    penalty: Number
    gradient_penalty: Number
    growth: Number
    decrease: Number
    scaled: bool
    multipliers: Multipliers | None
    rtol: Number
    atol: Number


class Iterate(eqx.Module):
    """Primal and dual variables of the scaled program.

    Attributes:
        w: Variables and slack variables.
        rows: Multipliers of the constraints.
        walls: Multipliers of the walls, > 0.
    """

    w: Float[Array, " n"]
    rows: Float[Array, " m"]
    walls: Float[Array, " k"]


class SketchedNewtonALState(eqx.Module):
    """State of `SketchedNewtonAL`.

    Attributes:
        value: The last accepted point.
        iterate: The same with slack variables and multipliers, in the scaled program.
        step: The search direction from there.
        correction: What a second-order correction adds to the next trial.
        kept: What the inner solver keeps of its matrix.
        residual: c at the iterate.
        length: α of the next trial.
        walls_length: α of the walls' multipliers.
        merit: The parts of the merit function at the iterate.
        slope: Their derivatives along the step.
        penalty: η₁.
        gradient_penalty: η₂.
        sharpness: State of the accuracy rule.
        barrier: μ.
        kept_barrier: μ to go on with after steps for feasibility alone.
        shift: The last τ > 0.
        damping: Of the steps for feasibility.
        scaling: Of objective and constraints.
        phase: What the next evaluation is for.
        restoring: Whether the steps are for feasibility alone.
        entry: ‖c‖ when that began.
        halvings: Rejected trials of this search.
        short: Accepted steps in a row with a small α.
        resets: How often that had consequences.
        failure: Why the method cannot go on.
        objective: f at the value.
        optimality: See `Info`.
        optimality_scale: See `Info`.
        feasibility: See `Info`.
        multipliers: In the program's units.
        aux: Auxiliary output at the value.
        iterations: Accepted steps.
        key: For random inner solvers.
        counts: Evaluations so far.
    """

    value: PyTree
    iterate: Iterate
    step: Iterate
    correction: Iterate
    kept: PyTree
    residual: Float[Array, " m"]
    length: Float[Array, ""]
    walls_length: Float[Array, ""]
    merit: Float[Array, " 4"]
    slope: Float[Array, " 4"]
    penalty: Float[Array, ""]
    gradient_penalty: Float[Array, ""]
    sharpness: Float[Array, ""]
    barrier: Float[Array, ""]
    kept_barrier: Float[Array, ""]
    shift: Float[Array, ""]
    damping: Float[Array, ""]
    scaling: Scaling
    phase: Int[Array, ""]
    restoring: Bool[Array, ""]
    entry: Float[Array, ""]
    halvings: Int[Array, ""]
    short: Int[Array, ""]
    resets: Int[Array, ""]
    failure: RESULTS
    objective: Float[Array, ""]
    optimality: Float[Array, ""]
    optimality_scale: Float[Array, ""]
    feasibility: Float[Array, ""]
    multipliers: Multipliers
    aux: PyTree
    iterations: Int[Array, ""]
    key: PyTree
    counts: Counts


class Trial(NamedTuple):
    """An evaluated trial.

    Attributes:
        program: The program.
        w: Variables and slack variables.
        rows: Multipliers.
        found: The functions there, with the scaling so far.
        tangent: Their linear approximation.
        merit: The parts of the merit function there.
    """

    program: FlatProgram
    w: Array
    rows: Array
    found: Evaluation
    tangent: Callable[[Array, Array], tuple[Array, Array, Array]]
    merit: Array


class Place(NamedTuple):
    """A trial that is taken, in the scaling that holds from now on, and what is to be done there.

    Attributes:
        iterate: Primal and dual variables.
        scaling: Of the program.
        derivatives: There.
        objective: Scaled f.
        gradient: Of the scaled Lagrangian, without the walls; 0 for fixed variables.
        values: Scaled constraints, without slack variables.
        c: With them.
        distances: From the walls.
        barrier: μ.
        dual_error: Max norm of the gradient of the Lagrangian with the walls.
        product_error: Max norm of multipliers times distances.
        size: Mean size of the multipliers over 100, at least 1.
        norm: ‖c‖₂.
        estimating: No step from here: multipliers are estimated first.
        again: Likewise, because the method starts anew here.
        restoring: The step is for feasibility alone.
        slow: The last steps were short.
        short: How many of them were, in a row.
        hopeless: A stationary point of infeasibility.
        stuck: What the last steps could gain is rounding error of the merit function.
    """

    iterate: Iterate
    scaling: Scaling
    derivatives: Derivatives
    objective: Array
    gradient: Array
    values: Array
    c: Array
    distances: Array
    barrier: Array
    dual_error: Array
    product_error: Array
    size: Array
    norm: Array
    estimating: Array
    again: Array
    restoring: Array
    slow: Array
    short: Array
    hopeless: Array
    stuck: Array

    @property
    def newton(self) -> Array:
        """Whether the next step is for the program itself."""
        return ~(self.estimating | self.restoring)


class Step(NamedTuple):
    """A search direction and what was changed to find it."""

    iterate: Iterate
    multiplier: Array
    kept: PyTree
    merit: Array
    slope: Array
    penalty: Array
    gradient_penalty: Array
    sharpness: Array
    shift: Array
    damping: Array
    products: Array
    ok: Array


def weights(state: SketchedNewtonALState) -> Array:
    """What the parts of the merit function are multiplied by; for feasibility, f and L drop out."""
    one, zero = jnp.ones_like(state.penalty), jnp.zeros_like(state.penalty)
    normal = jnp.stack([one, one, state.penalty, state.gradient_penalty])
    return jnp.where(state.restoring, jnp.stack([zero, one, one, zero]), normal)


def zeros(tree: PyTree) -> PyTree:
    """Zeros of the shapes and dtypes of arrays, or of what stands for them."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)
