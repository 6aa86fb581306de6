"""What a constraint layer says of its answer."""

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, Int

from jaxopt_ext.core.result import RESULTS


class STATUS(eqx.Enumeration):
    """What there is to say of a constrained solve. Members are arrays inside `jit` and `vmap`.

    All but `failed` have a finite answer and a derivative; the ridge decides what the rows do not.

    Example:
        >>> from jaxopt_ext.layers import STATUS
        >>> STATUS[STATUS.empty]
        'No row counts; the answer is that of the ridge alone.'
    """

    solved = "Enough rows, full rank, converged."
    starved = "Fewer than two rows per unknown; judge the answer at other points."
    rank_deficient = "The rows leave some direction of the unknowns to the ridge."
    underdetermined = "Fewer rows than unknowns; a small residual is no evidence."
    empty = "No row counts; the answer is that of the ridge alone."
    failed = "Not finite or not converged, see `result`; the answer has no derivative."


def status_names() -> dict[int, str]:
    """The names of statuses by the integer that stands for each in an array."""
    names = ("solved", "starved", "rank_deficient", "underdetermined", "empty", "failed")
    return {int(jax.tree.leaves(getattr(STATUS, name))[0]): name for name in names}


class ConstraintReport(eqx.Module):
    """How well the constraint holds, and what may be wrong; one entry per solve of a batch.

    Attributes:
        ok: Whether the solve succeeded. Where it did not, `value` is the best finite point found,
            or the start, and carries no derivative.
        result: How the solve ended, a member of `RESULTS`.
        steps: Steps of the solver; 1 for linear rows.
        optimality: max_j |J_jᵀr| / (‖J_j‖ ‖r‖), the largest cosine between a column of the
            Jacobian and the residual; dimensionless. With equalities, inequalities or bounds the
            residual of the KKT conditions instead. Of a coupled expert an upper bound, with r all
            rows that its unknowns enter and ‖J_j‖ of its own.
        max_residual: Largest absolute residual by block, in the block's own units.
        rms_residual: Root mean square residual by block.
        rows: Number of rows that count.
        rank: Numerical rank of the Jacobian of the rows and equalities, without the ridge.
        condition_number: Ratio of its singular values, with columns scaled to unit length.
        violation: Largest violation of an equality, inequality or bound, in its own units; 0
            where there is none.
        unknowns: Number of unknowns.
    """

    ok: Bool[Array, "*batch"]
    result: RESULTS
    steps: Int[Array, "*batch"]
    optimality: Float[Array, "*batch"]
    max_residual: dict[str, Array]
    rms_residual: dict[str, Array]
    rows: Int[Array, "*batch"]
    rank: Int[Array, "*batch"]
    condition_number: Float[Array, "*batch"]
    violation: Float[Array, "*batch"]
    unknowns: int = eqx.field(static=True)

    @property
    def empty(self) -> Array:
        """Whether no row counts: the answer is that of the ridge alone."""
        return self.rows == 0

    @property
    def underdetermined(self) -> Array:
        """Whether there are fewer rows than unknowns: a small residual is then no evidence."""
        return self.rows < self.unknowns

    @property
    def rank_deficient(self) -> Array:
        """Whether the rows leave some direction to the ridge."""
        return self.rank < self.unknowns

    @property
    def starved(self) -> Array:
        """Whether there are fewer than two rows per unknown: points between may be far off."""
        return self.rows < 2 * self.unknowns

    @property
    def status(self) -> STATUS:
        """The gravest thing to say of the solve."""
        status = STATUS.where(self.starved, STATUS.starved, STATUS.solved)
        status = STATUS.where(self.rank_deficient, STATUS.rank_deficient, status)
        status = STATUS.where(self.underdetermined, STATUS.underdetermined, status)
        status = STATUS.where(self.empty, STATUS.empty, status)
        return STATUS.where(self.ok, status, STATUS.failed)
