"""A mixture of experts: one constrained solve per part of the domain, alone or coupled."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, PyTree

from jaxopt_ext.core import check, tree
from jaxopt_ext.layers.audit import Audit
from jaxopt_ext.layers.coupled_solve import solve_in_turn, solve_together
from jaxopt_ext.layers.coupling import Interface, PartitionOfUnity, Schwarz
from jaxopt_ext.layers.hard_constraint import HardConstraint
from jaxopt_ext.layers.report import ConstraintReport


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


class MixtureOfExperts(eqx.Module):
    """K constrained solves, one per part of the domain, each with its own unknowns.

    Without coupling the experts know nothing of each other: the answer is that of the
    block-diagonal global problem, found in parallel. A small residual in every part does then not
    mean a correct solution, because a differential equation on an inner box without boundary
    values has many. With an `Interface` all are solved as one least-squares problem: for linear
    rows each expert is reduced to a triangle first, so its rows meet the others only at the faces.
    With `Schwarz` the experts are solved again and again with their neighbours' traces as boundary
    values, and with a `PartitionOfUnity` the residual is that of one field blended from all.

    An expert that fails (NaN, singular, not converged) returns the best point it found, its start
    if there is none, is flagged in `report.ok`, and drops its cotangents, so the gradients of the
    others stay right.

    Args:
        constraint: What each expert solves. Its residual is called as r(variables, (local,
            shared)) with the expert's own arguments and those that all have.
        coupling: An `Interface`, `Schwarz`, `PartitionOfUnity`, or `None`.
        backend: `"vmap"` solves the experts of a device together, as many steps as the slowest
            needs; `"map"` one after the other, often faster on CPUs. Of no consequence where all
            are one problem.
        mesh: A mesh of devices to spread the experts over, by `shard_map`. Their number need not
            divide by that of the devices.
        axis: The mesh axis to spread over.

    Raises:
        TypeError: A setting is of the wrong kind.
        ValueError: Unknown backend, the mesh has no such axis, a mesh with a coupling that makes
            all experts one problem, or constraints of a kind that the coupling cannot honour.

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
    coupling: Interface | Schwarz | PartitionOfUnity | None = None
    backend: str = eqx.field(static=True, default="vmap", kw_only=True)
    mesh: Mesh | None = eqx.field(static=True, default=None, kw_only=True)
    axis: str = eqx.field(static=True, default="experts", kw_only=True)

    def __check_init__(self):
        name = type(self).__name__
        if not isinstance(self.constraint, HardConstraint):
            raise TypeError(
                f"{name}: constraint is a {type(self.constraint).__name__}, expected "
                "HardConstraint(...)"
            )
        coupled = self.coupling is not None
        if coupled and not isinstance(self.coupling, Interface | Schwarz | PartitionOfUnity):
            raise TypeError(
                f"{name}: coupling is a {type(self.coupling).__name__}, expected Interface(...), "
                "Schwarz(...), PartitionOfUnity(...) or None"
            )
        if coupled and self.constraint.constraints:
            raise ValueError(
                f"{name}: constraint has {', '.join(sorted(self.constraint.constraints))}, "
                "expected rows of the residual only with coupling"
            )
        check.choice(name, "backend", self.backend, ("vmap", "map"))
        if self.mesh is not None:
            if self.axis not in self.mesh.shape:
                raise ValueError(
                    f"{name}: axis is {self.axis!r}, expected an axis of the mesh: "
                    f"{', '.join(map(repr, self.mesh.shape))}"
                )
            if coupled and not isinstance(self.coupling, Schwarz):
                raise ValueError(
                    f"{name}: mesh is given, expected None with {type(self.coupling).__name__}, "
                    "which makes all experts one problem"
                )

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
        return self.solve(init, local, shared, mask, faces)[0]

    def solve(
        self,
        init: PyTree,
        local: PyTree,
        shared: PyTree,
        mask: dict[str, Array] | None,
        faces: PyTree,
        key: Array | None = None,
    ) -> tuple[Mixture, Audit | None]:
        """As `__call__`, and with a random key an audit of the derivative's linear systems."""
        mask = mask or {}
        experts = self._experts(init, local, mask)
        if self.coupling is not None:
            return self._coupled(self.coupling, experts, (init, local, shared, mask, faces), key)

        def one(init, local, mask, shared):
            return self.constraint.solve(init, (local, shared), mask, key)

        found, audit = self._spread(one, experts, (init, local, mask), shared)
        return Mixture(found.value, found.report), audit

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

    def _coupled(self, coupling, experts: int, inputs: tuple, key):
        faces = inputs[-1]
        if not isinstance(coupling, PartitionOfUnity):
            expected = len(coupling.pairs)
            if {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(faces)} != {(expected,)}:
                raise ValueError(
                    f"MixtureOfExperts: faces is {tree.describe(faces)}, expected leaves with "
                    f"first axis {expected}, one entry per face"
                )
        if isinstance(coupling, Schwarz):

            def spread(one, each, shared):
                return self._spread(one, experts, each, shared)

            found = solve_in_turn(self.constraint, coupling, spread, *inputs, key=key)
        else:
            found = solve_together(self.constraint, coupling, *inputs, key=key)
        return Mixture(found.value, found.report), found.audit
