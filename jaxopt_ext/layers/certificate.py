"""A certificate of a constrained solve: what to look at before its answer is used."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from jaxopt_ext import implicit
from jaxopt_ext.core import tree
from jaxopt_ext.core.result import result_names
from jaxopt_ext.implicit.hoist import strong
from jaxopt_ext.layers.audit import Audit
from jaxopt_ext.layers.coupling import Interface, Schwarz, traces
from jaxopt_ext.layers.hard_constraint import Constrained, HardConstraint
from jaxopt_ext.layers.mixture_of_experts import Mixture, MixtureOfExperts
from jaxopt_ext.layers.report import ConstraintReport, status_names


class Certificate(eqx.Module):
    """What is known of an answer; per expert where there are experts. `print` shows it.

    It certifies residuals, not errors: how far the solution is from the true one follows from a
    residual only with a stability constant of the equation, and where experts are not pinned by
    boundary values or coupling there is none.

    Attributes:
        found: The answer.
        held_out: Judgement at points that were not used; `None` without such points.
        jumps: Largest difference of neighbours' traces, by block; empty without faces.
        audit: Of the linear systems of the derivative; one for all experts where they are coupled.
        derivative_error: Relative difference of a random directional derivative from finite
            differences; `None` without floating arguments.
    """

    found: Constrained | Mixture
    held_out: ConstraintReport | None
    jumps: dict[str, Array]
    audit: Audit
    derivative_error: Float[Array, ""] | None

    @property
    def report(self) -> ConstraintReport:
        """Judgement at the points that were used."""
        return self.found.report

    @property
    def failed(self) -> Bool[Array, "*batch"]:
        """Which experts failed; their answers are not solutions, the others' are intact."""
        return ~self.report.ok

    @property
    def largest_residual(self) -> dict[str, Array]:
        """Largest absolute residual by block, over all experts, used and held-out points."""
        reports = [self.report] + ([] if self.held_out is None else [self.held_out])
        return {
            b: jnp.max(jnp.stack([jnp.max(r.max_residual[b]) for r in reports]))
            for b in self.report.max_residual
            if all(b in r.max_residual for r in reports)
        }

    @property
    def trustworthy(self) -> Bool[Array, ""]:
        """No expert failed, the derivative's systems are solved, no point is a saddle.

        An adjoint residual up to 1e-4 is accepted, up to 0.1 where rounding explains it: even an
        exact answer has about eps / conditioning.
        """
        residual = self.audit.adjoint_residual
        rounding = 10 * jnp.finfo(residual.dtype).eps / self.audit.conditioning
        ok = jnp.all(self.report.ok)
        ok &= jnp.all(residual <= jnp.clip(rounding, 1e-4, 0.1))
        ok &= ~jnp.any(self.audit.lowest_curvature < 0)
        if self.derivative_error is not None:
            ok &= self.derivative_error <= 1e-2
        return ok

    def __str__(self) -> str:
        """A table with a line per expert, in words where something is wrong."""
        report = self.report
        blocks = list(report.max_residual)
        several = jnp.ndim(report.ok) == 1
        count = report.ok.shape[0] if several else 1

        def entry(array: Any, k: int):
            return np.asarray(array)[k] if several else np.asarray(array)

        lines = ["expert  status            rows   rank  steps  largest residual"]
        lines[0] += "" if self.held_out is None else ", held out"
        for k in range(count):
            pick = jax.tree.map(lambda leaf, k=k: leaf[k] if several else leaf, report)
            name = _name(status_names(), pick.status)
            if name == "failed":
                name += f" ({_name(result_names(), pick.result)})"
            parts = []
            for b in blocks:
                text = f"{b} {entry(report.max_residual[b], k):.1e}"
                if self.held_out is not None and b in self.held_out.max_residual:
                    text += f", {entry(self.held_out.max_residual[b], k):.1e}"
                parts.append(text)
            lines.append(
                f"{k:6d}  {name:16s} {entry(report.rows, k):5d}  {entry(report.rank, k):5d}  "
                f"{entry(report.steps, k):5d}  {'; '.join(parts)}"
            )
        if self.jumps:
            lines.append(
                "jumps: " + ", ".join(f"{b} {float(v):.1e}" for b, v in self.jumps.items())
            )
        lines.append(
            f"adjoint residual {float(jnp.max(self.audit.adjoint_residual)):.1e}, conditioning "
            f"{float(jnp.min(self.audit.conditioning)):.1e}"
        )
        if bool(jnp.any(self.audit.lowest_curvature < 0)):
            lines.append("a solve ended at a saddle point: its derivative is not that of a minimum")
        if self.derivative_error is not None:
            lines.append(f"derivative against differences {float(self.derivative_error):.1e}")
        lines.append("trustworthy" if bool(self.trustworthy) else "NOT trustworthy")
        return "\n".join(lines)


def certify(
    layer: HardConstraint | MixtureOfExperts,
    init: PyTree,
    args: PyTree = None,
    mask: dict[str, Array] | None = None,
    faces: PyTree = None,
    *,
    held_out: PyTree = None,
    held_out_mask: dict[str, Array] | None = None,
    interface: Interface | None = None,
    key: Array | None = None,
) -> Certificate:
    """Solve, and say how far the answer and its derivative can be trusted.

    It costs about four solves and one dense factorization of each derivative's system: for
    inference and for tests, not for every training step.

    Args:
        layer: A `HardConstraint` or a `MixtureOfExperts`.
        init: Starting point, as the layer takes it.
        args: The layer's arguments; for a mixture the pair (local, shared).
        mask: Rows that count, as the layer takes it.
        faces: Arguments of the traces, for a coupling or for `interface`.
        held_out: Other points: like `args`; for a mixture like `local`.
        held_out_mask: Rows of them that count.
        interface: Where to measure jumps if the layer is not coupled by one.
        key: For the random vectors; `None` means `jax.random.key(0)`.

    Returns:
        The certificate.

    Raises:
        TypeError: `layer` is neither.
        ValueError: `args` of a mixture is not a pair.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext import layers
        >>> layer = layers.HardConstraint(lambda c, x: c[0] + c[1] * x - x**2, linear=True)
        >>> points = jnp.linspace(0.0, 1.0, 10)
        >>> certificate = layers.certify(layer, jnp.zeros(2), points, held_out=points[1:] - 0.05)
        >>> print(f"{certificate.largest_residual['residual']:.2f}", certificate.trustworthy)
        0.15 True
    """
    key = jax.random.key(0) if key is None else key
    of_adjoint, of_direction, of_weights = jax.random.split(key, 3)
    jumps = {}
    held = None
    if isinstance(layer, HardConstraint):
        found, audit = layer.solve(init, args, mask, of_adjoint)
        if held_out is not None:
            held = layer.check(found.value, held_out, held_out_mask)
        value_at, moving = (lambda args: layer(init, args, mask).value), args
    elif isinstance(layer, MixtureOfExperts):
        if not (isinstance(args, tuple) and len(args) == 2):
            raise ValueError(
                f"certify: args is {tree.describe(args)}, expected a pair (local, shared)"
            )
        local, moving = args
        shared, coupling = moving, layer.coupling
        given = faces if coupling is not None else None
        found, audit = layer.solve(init, local, shared, mask, given, of_adjoint)
        if held_out is not None:
            held = layer.check(found.value, held_out, shared, held_out_mask)
        interface = coupling if isinstance(coupling, Interface) else interface
        if interface is not None:
            jumps = interface.jumps(found.value, faces, shared, found.report.ok)
        elif isinstance(coupling, Schwarz):
            pairs = np.asarray(coupling.pairs)
            sides = [
                traces(coupling.trace, found.value, faces, shared, pairs[:, s]) for s in (0, 1)
            ]
            jumps = jax.tree.map(jnp.subtract, *sides)
        jumps = {b: jnp.max(jnp.abs(v), initial=0) for b, v in jumps.items()}
        value_at = lambda shared: layer(init, local, shared, mask, given).value  # noqa: E731
    else:
        raise TypeError(
            f"certify: layer is a {type(layer).__name__}, expected HardConstraint(...) or "
            "MixtureOfExperts(...)"
        )
    assert audit is not None  # a key was given
    error = _derivative_error(value_at, moving, found.value, of_direction, of_weights)
    return implicit.detach(Certificate(found, held, jumps, audit, error))


def _derivative_error(value_at, args, value, of_direction, of_weights):
    """A random functional of the solution, differentiated in a random direction, both ways."""
    args = strong(args, tree.dtype_of(value))
    moving, rest = eqx.partition(args, eqx.is_inexact_array)
    if not jax.tree.leaves(moving):
        return None
    weights = _normal(of_weights, value)
    direction = _normal(of_direction, moving)
    step = float(jnp.finfo(tree.dtype_of(value)).eps) ** (1 / 3)

    def functional(by):
        moved = jax.tree.map(lambda a, d: a + jnp.asarray(by, a.dtype) * d, moving, direction)
        found = value_at(eqx.combine(moved, rest))
        terms = jax.tree.leaves(jax.tree.map(lambda w, v: jnp.sum(w * v), weights, found))
        return sum(terms[1:], terms[0])

    exact = jax.jvp(functional, (0.0,), (1.0,))[1]
    differences = (functional(step) - functional(-step)) / (2 * step)
    scale = jnp.maximum(jnp.abs(exact), jnp.abs(differences))
    return jnp.abs(exact - differences) / jnp.where(scale > 0, scale, 1)


def _normal(key, like):
    """Normal numbers of the size of the leaves."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))

    def one(key, leaf):
        size = jnp.sqrt(jnp.mean(leaf**2))
        size = jnp.where(size > 0, size, 1)
        return size * jax.random.normal(key, leaf.shape, leaf.dtype)

    return jax.tree.unflatten(structure, [one(k, v) for k, v in zip(keys, leaves, strict=True)])


def _name(names, item) -> str:
    """The name of a member of an enumeration."""
    return names[int(jax.tree.leaves(item)[0])]
