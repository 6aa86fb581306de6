"""How experts are made to agree: rows on faces, alternating solves, or one blended field."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxopt_ext.core import check
from jaxopt_ext.core.solver import Number
from jaxopt_ext.layers.hard_constraint import named


def _rows_of_numbers(pairs: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(i) for i in pair) for pair in pairs)


class Interface(eqx.Module):
    """Rows that make neighbouring experts agree on the faces between them; one coupled solve.

    The rows of a face are weight · (trace of one side − trace of the other). With the value and
    the normal derivative as traces the solution is continuously differentiable across faces; with
    the value and the flux k ∂u/∂n it conserves what flows where the coefficient k jumps.

    Args:
        trace: t(variables, (face, shared)) → array, or dict of arrays by block, of one expert on
            one face.
        pairs: The two experts of each face, e.g. from `BoxPartition.interfaces`.
        weights: By block of the trace; a block that is not named has 1.

    Raises:
        TypeError: `trace` is not a function.
        ValueError: `pairs` has not two columns, or a weight is negative.
    """

    trace: Callable
    pairs: Int[Array, "faces 2"] = eqx.field(converter=jnp.asarray)
    weights: dict[str, Number] | None = None

    def __check_init__(self):
        _check_trace("Interface", self.trace, self.weights)
        if jnp.ndim(self.pairs) != 2 or jnp.shape(self.pairs)[1] != 2:
            raise ValueError(
                f"Interface: pairs has shape {list(jnp.shape(self.pairs))}, expected [faces, 2]"
            )

    def jumps(
        self, value: PyTree, faces: PyTree, shared: PyTree, good: Bool[Array, " experts"]
    ) -> dict[str, Array]:
        """Differences of the traces by block, zero on faces of an expert that is not good.

        Args:
            value: Solutions, experts first.
            faces: Arguments of the traces, faces first.
            shared: Arguments that all experts have.
            good: By expert.

        Returns:
            Own side minus the other, faces first.
        """
        pairs = jnp.asarray(self.pairs)
        both = good[pairs[:, 0]] & good[pairs[:, 1]]

        def difference(a, b):
            return jnp.where(both.reshape(-1, *(1,) * (a.ndim - 1)), a - b, 0)

        one, other = (traces(self.trace, value, faces, shared, pairs[:, side]) for side in (0, 1))
        return jax.tree.map(difference, one, other)


class Schwarz(eqx.Module):
    """Solves in turn, each with its neighbours' last traces as boundary values.

    Every sweep solves all experts, independently of each other, so sweeps spread over a mesh. The
    boxes must overlap: a face is the boundary of one expert, inside the box of the other. The more
    they overlap the fewer sweeps are needed; the number grows with that of boxes in a row. The
    answer and its derivative are those of the state in which no sweep changes anything.

    Args:
        trace: t(variables, (face, shared)) → array, or dict of arrays by block. The rows that are
            added to an expert are its own trace minus its neighbour's, in blocks `"face <name>"`.
        pairs: By face, who takes the boundary values and who gives them, e.g. from
            `BoxPartition.interfaces(overlap=...)`; known numbers, also under `jit`.
        weights: By block of the trace; a block that is not named has 1.
        max_sweeps: Sweeps at most.
        tolerance: Change of the traces in a sweep, relative to the largest, at which sweeps end;
            `None` means eps^(2/3) of the dtype.

    Raises:
        TypeError: `trace` is not a function.
        ValueError: `pairs` has not two columns, or a setting is out of its range.

    Reference:
        Lions, "On the Schwarz alternating method I", 1988; Gander, "Schwarz methods over the
        course of time", ETNA 31 (2008), for the parallel form used here.
    """

    trace: Callable
    pairs: tuple[tuple[int, ...], ...] = eqx.field(static=True, converter=_rows_of_numbers)
    weights: dict[str, Number] | None = None
    max_sweeps: int = eqx.field(static=True, default=200, kw_only=True)
    tolerance: Number | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self):
        _check_trace("Schwarz", self.trace, self.weights)
        if any(len(pair) != 2 for pair in self.pairs):
            raise ValueError("Schwarz: pairs has rows of other lengths, expected [faces, 2]")
        check.count("Schwarz", "max_sweeps", self.max_sweeps)
        if self.tolerance is not None:
            check.number("Schwarz", "tolerance", self.tolerance, above=0)


class PartitionOfUnity(eqx.Module):
    """One field blended from all experts, u(x) = Σ_k g_k(x) u_k(x), inside the residual.

    The residual of the constraint is called as r(u, (local, shared)) with the blended field u, a
    function of a point that can be differentiated (`derivative(u, ...)`), at the expert's own
    points. Derivatives of the gates are part of it, so nothing is lost where experts do not agree,
    as it would be if they were solved apart and blended later. All unknowns are found in one least
    squares, whose cost is that of K times as many unknowns.

    Args:
        field: u_k(variables, (point, shared)) → array: one expert's field at one point.
        gates: g(point, shared) → weights of all experts, smooth, with sum 1; e.g.
            `BoxPartition.windows` or `soft_gates` with parameters in `shared`, which are then
            trained through the solve.

    Raises:
        TypeError: A function is none.

    Reference:
        Moseley, Markham, Nissen-Meyer, "Finite basis physics-informed neural networks", 2023.
    """

    field: Callable
    gates: Callable

    def __check_init__(self):
        check.function("PartitionOfUnity", "field", self.field)
        check.function("PartitionOfUnity", "gates", self.gates)

    def blend(self, value: PyTree, shared: PyTree = None) -> Callable[[Array], Array]:
        """The blended field.

        Args:
            value: Solutions, experts first: of this coupling, or of experts that were solved alone.
            shared: Arguments that all experts have.

        Returns:
            u(point) → array like that of `field`.
        """

        def u(point):
            own = jax.vmap(lambda v: self.field(v, (point, shared)))(value)
            return jnp.tensordot(self.gates(point, shared), own, axes=1)

        return u


def soft_gates(
    point: Float[Array, " axes"],
    centres: Float[Array, "experts axes"],
    widths: float | Float[Array, "..."],
    offsets: float | Float[Array, " experts"] = 0.0,
) -> Float[Array, " experts"]:
    """Gates that can be learned: a softmax of −½ ‖(point − centre) / width‖² + offset.

    The smaller the widths, the harder the choice. At widths far below the distance of neighbours
    the gates are a step, and collocation points see no derivative of it.

    Args:
        point: Where.
        centres: One row per expert.
        widths: > 0, in units of the point: one number, or like `centres` or a row or column of it.
        offsets: One number per expert; the larger, the more it takes from its neighbours.

    Returns:
        Weights > 0 with sum 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext import layers
        >>> gates = layers.soft_gates(jnp.array([0.5]), jnp.array([[0.0], [1.0]]), 0.2)
        >>> print(gates)
        [0.5 0.5]
    """
    widths = jnp.broadcast_to(jnp.asarray(widths, point.dtype), centres.shape)
    away = (point[None, :] - centres) / widths
    return jax.nn.softmax(jnp.asarray(offsets, point.dtype) - jnp.sum(away**2, axis=1) / 2)


def imbalance(weights: Float[Array, "points experts"]) -> Float[Array, ""]:
    """How unevenly points are shared: 1 if every expert has the same share, K if one has all.

    A multiple of it in the training loss keeps learned gates from starving experts.

    Args:
        weights: Gates at some points, rows with sum 1.

    Returns:
        K Σ_k s_k², with s_k the mean weight of expert k.

    Reference:
        Shazeer et al., "Outrageously large neural networks", ICLR 2017, section 4.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext import layers
        >>> print(layers.imbalance(jnp.array([[1.0, 0.0], [1.0, 0.0]])))
        2.0
    """
    share = jnp.mean(weights, axis=0)
    return share.size * jnp.sum(share**2) / jnp.sum(share) ** 2


def traces(trace: Callable, value: PyTree, faces: PyTree, shared: PyTree, of: Any) -> dict:
    """The traces on all faces by block, `of` numbering the expert whose trace is meant."""
    own = jax.tree.map(lambda v: v[of], value)
    return named(jax.vmap(lambda v, face: trace(v, (face, shared)))(own, faces))


def _check_trace(owner, trace, weights):
    check.function(owner, "trace", trace)
    for block, weight in (weights or {}).items():
        check.number(owner, f"weights[{block!r}]", weight, at_least=0)
