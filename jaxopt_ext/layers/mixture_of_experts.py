"""A mixture of experts: one constrained solve per part of the domain, alone or coupled."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Int, PyTree

from jaxopt_ext import implicit
from jaxopt_ext.core import check, tree
from jaxopt_ext.core.drive import solve
from jaxopt_ext.core.problem import LeastSquares
from jaxopt_ext.core.result import RESULTS
from jaxopt_ext.core.solver import Number
from jaxopt_ext.implicit.attach import attach_problem
from jaxopt_ext.implicit.hoist import strong
from jaxopt_ext.layers.hard_constraint import (
    Constrained,
    ConstraintReport,
    HardConstraint,
    Packed,
    gate,
    jacobian,
    named,
    rows,
)
from jaxopt_ext.layers.least_squares import DenseOrZero, reduce_rows, solve_stacked
from jaxopt_ext.solvers.gauss_newton import GaussNewton
from jaxopt_ext.solvers.grad_norm_smooth import GradNormSmooth


class Interface(eqx.Module):
    """Rows that make neighbouring experts agree on the faces between them.

    The rows of a face are weight · (trace of one side − trace of the other). With the value and
    the normal derivative as traces the solution is continuously differentiable across faces.

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
        check.function("Interface", "trace", self.trace)
        if jnp.ndim(self.pairs) != 2 or jnp.shape(self.pairs)[1] != 2:
            raise ValueError(
                f"Interface: pairs has shape {list(jnp.shape(self.pairs))}, expected [faces, 2]"
            )
        for block, weight in (self.weights or {}).items():
            check.number("Interface", f"weights[{block!r}]", weight, at_least=0)

    def jumps(
        self, value: PyTree, faces: PyTree, shared: PyTree, good: Bool[Array, " experts"]
    ) -> dict[str, Array]:
        """Differences of the traces by block, zero on faces of an expert that is not good."""
        pairs = jnp.asarray(self.pairs)

        def side(column):
            own = jax.tree.map(lambda v: v[pairs[:, column]], value)
            traces = jax.vmap(lambda v, face: self.trace(v, (face, shared)))(own, faces)
            return named(traces)

        both = good[pairs[:, 0]] & good[pairs[:, 1]]

        def difference(a, b):
            return jnp.where(both.reshape(-1, *(1,) * (a.ndim - 1)), a - b, 0)

        return jax.tree.map(difference, side(0), side(1))


class Mixture(eqx.Module):
    """What a mixture of experts returns; every array has the experts along its first axis.

    Attributes:
        value: The solutions, with their derivative.
        report: One report per expert.
    """

    value: PyTree
    report: ConstraintReport

    def gate(self, tree: PyTree, fill: float = 0.0) -> PyTree:
        """Arrays over experts, with failed experts' values replaced and their derivatives cut.

        Args:
            tree: Leaves with the experts along their first axis, e.g. losses per expert.
            fill: The value that replaces those of failed experts.

        Returns:
            The gated tree.
        """

        def one(leaf):
            ok = self.report.ok.reshape(-1, *(1,) * (leaf.ndim - 1))
            return jnp.where(ok, leaf, jnp.asarray(fill, leaf.dtype))

        return jax.tree.map(one, tree)


class _Coupled(eqx.Module):
    """Arguments of the rows of all experts together."""

    experts: Packed
    faces: PyTree
    shared: PyTree
    interface: Interface


class MixtureOfExperts(eqx.Module):
    """K constrained solves, one per part of the domain, each with its own unknowns.

    Without coupling the experts know nothing of each other: the answer is that of the
    block-diagonal global problem, found in parallel. A small residual in every part does then not
    mean a correct solution, because a differential equation on an inner box without boundary
    values has many. With an `Interface` all are solved as one least-squares problem: for linear
    rows each expert is reduced to a triangle first, so its rows meet the others only at the faces.

    An expert that fails (NaN, singular, not converged) keeps its start, is flagged in
    `report.ok`, and drops its cotangents, so the gradients of the others stay right.

    Args:
        constraint: What each expert solves. Its residual is called as r(variables, (local,
            shared)) with the expert's own arguments and those that all have.
        coupling: An `Interface`, or `None`.
        backend: `"vmap"` solves the experts of a device together, as many steps as the slowest
            needs; `"map"` one after the other, often faster on CPUs.
        mesh: A mesh of devices to spread the experts over, by `shard_map`. Their number need not
            divide by that of the devices.
        axis: The mesh axis to spread over.

    Raises:
        TypeError: A setting is of the wrong kind.
        ValueError: Unknown backend, the mesh has no such axis, or a mesh with coupling.

    Reference:
        Chalapathi, Du, Krishnapriyan, "Scaling physics-informed hard constraints with
        mixture-of-experts", ICLR 2024.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext import layers
        >>> def residual(c, args):  # a line through the expert's own data
        ...     (x, y), _ = args
        ...     return c[0] + c[1] * x - y
        >>> x = jnp.linspace(0.0, 1.0, 12).reshape(2, 6)
        >>> experts = layers.MixtureOfExperts(layers.HardConstraint(residual, linear=True))
        >>> found = experts(jnp.zeros((2, 2)), (x, jnp.abs(x - 0.5)))
        >>> print(jnp.round(found.value, 2))
        [[ 0.5 -1. ]
         [-0.5  1. ]]
    """

    constraint: HardConstraint
    coupling: Interface | None = None
    backend: str = eqx.field(static=True, default="vmap", kw_only=True)
    mesh: Mesh | None = eqx.field(static=True, default=None, kw_only=True)
    axis: str = eqx.field(static=True, default="experts", kw_only=True)

    def __check_init__(self):
        name = type(self).__name__
        for setting, kind in (("constraint", HardConstraint), ("coupling", Interface)):
            given = getattr(self, setting)
            if not isinstance(given, kind) and not (setting == "coupling" and given is None):
                raise TypeError(
                    f"{name}: {setting} is a {type(given).__name__}, expected {kind.__name__}(...)"
                )
        check.choice(name, "backend", self.backend, ("vmap", "map"))
        if self.mesh is not None:
            if self.axis not in self.mesh.shape:
                raise ValueError(
                    f"{name}: axis is {self.axis!r}, expected an axis of the mesh: "
                    f"{', '.join(map(repr, self.mesh.shape))}"
                )
            if self.coupling is not None:
                raise ValueError(f"{name}: mesh is given, expected None with coupling")

    def __call__(
        self,
        init: PyTree,
        local: PyTree,
        shared: PyTree = None,
        mask: dict[str, Array] | None = None,
        faces: PyTree = None,
    ) -> Mixture:
        """Solve all experts.

        Args:
            init: Starting points, leaves with the experts along their first axis.
            local: Arguments of the experts, likewise.
            shared: Arguments that all experts have, e.g. parameters of the equation.
            mask: Rows that count by block, likewise with the experts first, e.g. `Groups.mask`.
            faces: Arguments of the traces, with the faces along the first axis; for coupling.

        Returns:
            Solutions and reports.

        Raises:
            ValueError: The leaves have no common number of experts, or `faces` does not fit.
        """
        mask = mask or {}
        experts = self._experts(init, local, mask)
        if self.coupling is not None:
            return self._coupled(self.coupling, experts, init, local, shared, mask, faces)
        found = self._spread(self._one, experts, (init, local, mask), shared)
        return Mixture(found.value, found.report)

    def check(
        self,
        value: PyTree,
        local: PyTree,
        shared: PyTree = None,
        mask: dict[str, Array] | None = None,
    ) -> ConstraintReport:
        """Judge solutions on rows that may be others than those they were solved on.

        Args:
            value: Solutions, experts first.
            local: See `__call__`, e.g. with points that were held out.
            shared: See `__call__`.
            mask: See `__call__`.

        Returns:
            One report per expert.
        """
        mask = mask or {}
        experts = self._experts(value, local, mask)

        def one(v, local, mask, shared):
            return self.constraint.check(v, (local, shared), mask)

        return self._spread(one, experts, (value, local, mask), shared)

    def _one(self, init, local, mask, shared) -> Constrained:
        return self.constraint(init, (local, shared), mask)

    def _experts(self, *trees) -> int:
        sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(trees)}
        if len(sizes) != 1 or () in sizes:
            raise ValueError(
                f"MixtureOfExperts: init, local and mask have leaves with first axes {sizes}, "
                "expected one number of experts"
            )
        return sizes.pop()[0]

    def _spread(self, one, experts: int, each: tuple, shared: PyTree):
        """`one` for every expert: batched or in sequence, over the devices of the mesh."""

        def several(each, shared):
            if self.backend == "map":
                return jax.lax.map(lambda e: one(*e, shared), each)
            return jax.vmap(lambda e: one(*e, shared))(each)

        if self.mesh is None:
            return several(each, shared)
        devices = self.mesh.shape[self.axis]
        padded = -(-experts // devices) * devices
        if padded != experts:  # idle places repeat the last expert
            places = jnp.minimum(jnp.arange(padded), experts - 1)
            each = jax.tree.map(lambda leaf: leaf[places], each)
        split = PartitionSpec(self.axis)
        out = jax.shard_map(
            several, mesh=self.mesh, in_specs=(split, PartitionSpec()), out_specs=split
        )(each, shared)
        return out if padded == experts else jax.tree.map(lambda leaf: leaf[:experts], out)

    # ---- coupled experts ------------------------------------------------------------------

    def _coupled(self, interface, experts, init, local, shared, mask, faces) -> Mixture:
        pairs = jnp.asarray(interface.pairs)
        if {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(faces)} != {pairs.shape[:1]}:
            raise ValueError(
                f"MixtureOfExperts: faces is {tree.describe(faces)}, expected leaves with first "
                f"axis {pairs.shape[0]}, one entry per face"
            )

        def pack(init, local, mask):
            return self.constraint.pack(init, (local, shared), mask)

        value, packed = jax.vmap(pack)(init, local, mask)
        finite = jax.vmap(lambda v, p: tree.all_finite(_expert_jacobian(v, p)))(
            *implicit.detach((value, packed))
        )
        packed = eqx.tree_at(lambda p: p.ok, packed, finite)
        args = strong(_Coupled(packed, faces, shared, interface), tree.dtype_of(value))
        problem = LeastSquares(_coupled_rows).trace(value, args)
        found, result, steps, inverse = self._solve(problem, *implicit.detach((value, args)))
        ok = finite & (result == RESULTS.successful)
        found = jax.tree.map(
            lambda a, b: jnp.where(ok.reshape(-1, *(1,) * (a.ndim - 1)), a, b), found, value
        )
        report = jax.vmap(lambda v, p: self.constraint.report(v, p, result, steps))(found, packed)
        report = eqx.tree_at(lambda r: r.ok, report, ok)
        args = eqx.tree_at(lambda a: a.experts.ok, args, ok)
        found = attach_problem(problem.condition(), found, (args,), inverse)
        return Mixture(jax.vmap(gate)(ok, found), implicit.detach(report))

    def _solve(self, problem, value, args):
        if not self.constraint.linear:
            solver = self.constraint.solver
            solver = GradNormSmooth(GaussNewton()) if solver is None else solver
            found = solve(
                problem, solver, value, args,
                max_steps=self.constraint.max_steps, adjoint=implicit.DetachedAdjoint(),
            )  # fmt: skip
            return found.value, found.result, found.stats.steps, DenseOrZero()
        origin = jax.tree.map(jnp.zeros_like, value)
        flat = ravel_pytree(origin)[0]
        matrix, target = jax.vmap(_expert_jacobian)(origin, args.experts)
        n = matrix.shape[-1]
        ok = args.experts.ok
        matrix = jnp.where(ok[:, None, None], matrix, 0)
        triangles = jax.vmap(reduce_rows)(matrix, -jnp.where(ok[:, None], target, 0))

        # unknowns expert by expert, whatever the PyTree
        def stacked(by_expert):
            _, one = ravel_pytree(jax.tree.map(lambda v: v[0], value))
            return jax.vmap(one)(by_expert.reshape(-1, n))

        def border(by_expert):
            return _weighted_jumps(stacked(by_expert), args)

        jumps, offset = jacobian(border, flat)
        ridge = jnp.broadcast_to(args.experts.ridge[:, None], (ok.size, n)).reshape(-1)
        every = jnp.concatenate([_block_diagonal(triangles.matrix), jnp.diag(ridge), jumps])
        zero = jnp.zeros_like(flat)
        found, inverse = solve_stacked(
            every, jnp.concatenate([triangles.target.reshape(-1), zero, -offset])
        )
        good = jnp.all(jnp.isfinite(found))
        result = RESULTS.where(good, RESULTS.successful, RESULTS.linear_solve_failed)
        found = stacked(jnp.where(good, found, zero))
        return found, result, jnp.ones((), jnp.int32), _ByExpert(inverse)


class _ByExpert(eqx.Module):
    """A linear solver for unknowns that are numbered expert by expert."""

    inner: Any

    def __call__(self, operator, rhs):
        first = jax.tree.map(lambda v: v[0], rhs)
        n = ravel_pytree(first)[0].size

        def pack(v):
            return jax.vmap(lambda e: ravel_pytree(e)[0])(v).reshape(-1)

        def unpack(v):
            return jax.vmap(ravel_pytree(first)[1])(v.reshape(-1, n))

        flat = implicit.LinearOperator(
            lambda v: pack(operator.mv(unpack(v))), pack(operator.structure), operator.symmetric
        )
        return unpack(self.inner(flat, pack(rhs)))


def _expert_jacobian(value, packed):
    """Jacobian and value of one expert's rows, without the ridge."""
    flat, unravel = ravel_pytree(value)
    return jacobian(lambda v: rows(unravel(v), packed)[0], flat)


def _coupled_rows(value, args: _Coupled):
    """The rows of all experts, and those of the faces."""
    return jax.vmap(rows)(value, args.experts), _weighted_jumps(value, args)


def _weighted_jumps(value, args: _Coupled):
    good = args.experts.ok
    value = jax.vmap(gate)(good, value)
    jumps = args.interface.jumps(value, args.faces, args.shared, good)
    weights = args.interface.weights or {}
    return {b: jnp.asarray(weights.get(b, 1.0), v.dtype) * v for b, v in jumps.items()}


def _block_diagonal(blocks):
    """(K, p, n) to (K p, K n)."""
    experts, p, n = blocks.shape
    eye = jnp.eye(experts, dtype=blocks.dtype)
    spread = blocks[:, :, None, :] * eye[:, None, :, None]
    return spread.reshape(experts * p, experts * n)
