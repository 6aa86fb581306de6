"""Coupled experts: one least-squares problem for all, or solves in turn with neighbours' traces."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from jaxopt_ext import implicit
from jaxopt_ext.core import check, tree
from jaxopt_ext.core.drive import solve
from jaxopt_ext.core.problem import LeastSquares
from jaxopt_ext.core.result import RESULTS
from jaxopt_ext.implicit.attach import attach_problem
from jaxopt_ext.implicit.hoist import strong
from jaxopt_ext.layers.audit import Audit, audit
from jaxopt_ext.layers.coupling import Interface, PartitionOfUnity, Schwarz, traces
from jaxopt_ext.layers.hard_constraint import (
    HardConstraint,
    Packed,
    gate,
    half_square,
    jacobian,
    named,
    ridge_of,
    rows,
)
from jaxopt_ext.layers.least_squares import DenseOrZero, reduce_rows, solve_stacked
from jaxopt_ext.layers.report import ConstraintReport


class CoupledSolution(NamedTuple):
    """What coupled experts return.

    Attributes:
        value: Solutions with their derivatives, experts first.
        report: One per expert.
        audit: Of the linear system of the derivative, if asked for.
    """

    value: PyTree
    report: ConstraintReport
    audit: Audit | None


class _Coupled(eqx.Module):
    """Arguments of the rows of all experts together."""

    experts: Packed
    faces: PyTree
    shared: PyTree
    coupling: Interface | PartitionOfUnity


class _Blended(eqx.Module):
    """A residual of the blended field, as a function of the unknowns of all experts."""

    residual: Callable
    coupling: PartitionOfUnity

    def __call__(self, variables, args):
        return self.residual(self.coupling.blend(variables, args[1]), args)


class _OwnPart(eqx.Module):
    """A residual as a function of one expert's unknowns, with the others' held."""

    residual: Callable
    value: PyTree
    number: Array

    def __call__(self, variables, args):
        every = jax.tree.map(lambda v, own: v.at[self.number].set(own), self.value, variables)
        return self.residual(every, args)


def solve_together(
    constraint: HardConstraint,
    coupling: Interface | PartitionOfUnity,
    init: PyTree,
    local: PyTree,
    shared: PyTree,
    mask: dict[str, Array],
    faces: PyTree,
    key: Array | None = None,
) -> CoupledSolution:
    """All experts as one least-squares problem.

    Args:
        constraint: What each expert solves.
        coupling: What they have in common.
        init: Starting points, experts first.
        local: Arguments of the experts.
        shared: Arguments that all have.
        mask: Rows that count.
        faces: Arguments of the traces, or `None`.
        key: A random key asks for an audit.

    Returns:
        Solutions and reports.
    """
    blended = isinstance(coupling, PartitionOfUnity)
    value = check.variables("init", init)
    if blended:
        constraint = eqx.tree_at(
            lambda c: c.residual, constraint, _Blended(constraint.residual, coupling)
        )

    def pack(init, local, mask):
        return constraint.pack(init, (local, shared), mask)[1]

    packed = jax.vmap(pack, in_axes=(None if blended else 0, 0, 0))(value, local, mask)

    def finite_rows(v, p):
        return tree.all_finite(_row_jacobian(v, p))

    finite = jax.vmap(finite_rows, in_axes=(None if blended else 0, 0))(
        *implicit.detach((value, packed))
    )
    packed = eqx.tree_at(lambda p: p.ok, packed, finite)
    args = strong(_Coupled(packed, faces, shared, coupling), tree.dtype_of(value))
    problem = LeastSquares(_coupled_rows).trace(value, args)
    inputs = implicit.detach((problem, value, args))
    found, result, steps, inverse = (
        _direct(inputs[1], inputs[2]) if constraint.linear else _iterate(constraint, *inputs)
    )
    done = result == RESULTS.successful
    ok = finite & done
    # a blended field has parts of experts without rows of their own: all unknowns are kept
    kept = jnp.broadcast_to(done, ok.shape) if blended else ok
    usable = jnp.ones_like(finite) if blended else finite
    found = jax.tree.map(lambda a, b: jnp.where(_along(usable, a), a, b), found, value)
    report = _reports(constraint, problem, found, args, result, steps)
    report = eqx.tree_at(lambda r: r.ok, report, ok)
    args = eqx.tree_at(lambda a: a.experts.ok, args, ok)
    condition = problem.condition()
    checked = None if key is None else audit(condition, found, args, inverse, key)
    found = attach_problem(condition, found, (args,), inverse)
    return CoupledSolution(jax.vmap(gate)(kept, found), implicit.detach(report), checked)


def _iterate(constraint, problem, value, args):
    found = solve(
        problem, constraint.iterative_solver(), value, args,
        max_steps=constraint.max_steps, adjoint=implicit.DetachedAdjoint(),
    )  # fmt: skip
    return found.value, found.result, found.stats.steps, DenseOrZero()


def _direct(value, args: _Coupled):
    """Linear rows: each expert's to a triangle, then triangles, ridge and faces together."""
    origin = jax.tree.map(jnp.zeros_like, value)
    order = _ByExpert.of(value)
    flat = order.pack(origin)
    experts, ok = args.experts, args.experts.ok
    if isinstance(args.coupling, PartitionOfUnity):

        def of_all(p):
            return jacobian(lambda v: rows(order.unpack(v), p)[0], flat)

        matrix, target = jax.vmap(of_all)(experts)
    else:
        matrix, target = jax.vmap(_row_jacobian)(origin, experts)
    matrix = jnp.where(ok[:, None, None], matrix, 0)
    triangles = jax.vmap(reduce_rows)(matrix, -jnp.where(ok[:, None], target, 0))
    n = flat.size // ok.size
    ridge = jnp.broadcast_to(_ridge(args)[:, None], (ok.size, n)).reshape(-1)
    blocks = [jnp.diag(ridge)]
    targets = [triangles.target.reshape(-1), jnp.zeros_like(flat)]
    if isinstance(args.coupling, PartitionOfUnity):
        blocks.insert(0, triangles.matrix.reshape(-1, flat.size))
    else:
        blocks.insert(0, _block_diagonal(triangles.matrix))
        jumps, offset = jacobian(lambda v: _weighted_jumps(order.unpack(v), args), flat)
        blocks.append(jumps)
        targets.append(-offset)
    found, inverse = solve_stacked(jnp.concatenate(blocks), jnp.concatenate(targets))
    good = jnp.all(jnp.isfinite(found))
    result = RESULTS.where(good, RESULTS.successful, RESULTS.linear_solve_failed)
    found = order.unpack(jnp.where(good, found, 0))
    return found, result, jnp.ones((), jnp.int32), _Numbered(inverse)


def _reports(constraint, problem, value, args: _Coupled, result, steps):
    """One report per expert: its own rows, and the cosines with all rows."""
    value, args, problem = implicit.detach((value, args, problem))
    every, pull = jax.vjp(lambda v: problem.residual(v, args), value)
    gradient = _ByExpert.of(value).pack(pull(every)[0]).reshape(args.experts.ok.size, -1)
    size = jnp.sqrt(sum(jnp.sum(r**2) for r in jax.tree.leaves(every)))

    def report(v, p, slope, number):
        if isinstance(args.coupling, PartitionOfUnity):
            own = _OwnPart(p.residual, value, number)
            p = eqx.tree_at(lambda p: p.residual, p, own)
        return constraint.report(v, p, result, steps, slope=(slope, size))

    numbers = jnp.arange(args.experts.ok.size)
    return jax.vmap(report)(value, args.experts, gradient, numbers)


def _coupled_rows(value, args: _Coupled):
    """The rows of all experts and what couples them."""
    if not isinstance(args.coupling, PartitionOfUnity):
        return jax.vmap(rows)(value, args.experts), _weighted_jumps(value, args)
    blocks = jax.vmap(lambda p: rows(value, p)[0])(args.experts)
    ridge = _ridge(args)
    return blocks, jax.tree.map(lambda v: _along(ridge, v).astype(v.dtype) * v, value)


def _ridge(args: _Coupled):
    """ρ by expert."""
    if isinstance(args.coupling, PartitionOfUnity):
        return args.experts.ridge  # neighbours' rows hold the unknowns of a failed expert
    return ridge_of(args.experts)


def _weighted_jumps(value, args: _Coupled):
    good = args.experts.ok
    assert isinstance(args.coupling, Interface)
    value = jax.vmap(gate)(good, value)
    jumps = args.coupling.jumps(value, args.faces, args.shared, good)
    weights = args.coupling.weights or {}
    return {b: jnp.asarray(weights.get(b, 1.0), v.dtype) * v for b, v in jumps.items()}


def _row_jacobian(value, packed):
    """Jacobian and value of rows without the ridge."""
    flat, unravel = ravel_pytree(value)
    return jacobian(lambda v: rows(unravel(v), packed)[0], flat)


class _ByExpert(eqx.Module):
    """Unknowns as one vector, expert by expert, whatever the PyTree."""

    unravel: Callable = eqx.field(static=True)
    size: int = eqx.field(static=True)

    @classmethod
    def of(cls, value: PyTree) -> "_ByExpert":
        shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape[1:], v.dtype), value)
        leaves, structure = jax.tree.flatten(shapes)
        sizes = [math.prod(leaf.shape) for leaf in leaves]

        def unravel(flat):
            parts = jnp.split(flat, np.cumsum(sizes)[:-1], axis=1)
            reshaped = [p.reshape(-1, *s.shape) for p, s in zip(parts, leaves, strict=True)]
            return jax.tree.unflatten(structure, reshaped)

        return cls(unravel, sum(sizes))

    def pack(self, value):
        leaves = [v.reshape(v.shape[0], -1) for v in jax.tree.leaves(value)]
        return jnp.concatenate(leaves, axis=1).reshape(-1)

    def unpack(self, flat):
        return self.unravel(flat.reshape(-1, self.size))


class _Numbered(eqx.Module):
    """A linear solver for unknowns that are numbered expert by expert."""

    inner: Any

    def __call__(self, operator, rhs):
        order = _ByExpert.of(rhs)
        flat = implicit.LinearOperator(
            lambda v: order.pack(operator.mv(order.unpack(v))),
            order.pack(operator.structure),
            operator.symmetric,
        )
        return order.unpack(self.inner(flat, order.pack(rhs)))


def _block_diagonal(blocks):
    """(K, p, n) to (K p, K n)."""
    experts, p, n = blocks.shape
    eye = jnp.eye(experts, dtype=blocks.dtype)
    spread = blocks[:, :, None, :] * eye[:, None, :, None]
    return spread.reshape(experts * p, experts * n)


def _along(flags, leaf):
    """Flags by expert, to be combined with an array that has the experts first."""
    return flags.reshape(-1, *(1,) * (leaf.ndim - 1))


# ---- solves in turn ------------------------------------------------------------------------


class _WithFaces(eqx.Module):
    """A residual, and an expert's traces minus its neighbours'."""

    residual: Callable
    trace: Callable

    def __call__(self, variables, args):
        (local, faces, incoming), shared = args
        own = named(jax.vmap(lambda face: self.trace(variables, (face, shared)))(faces))
        blocks = named(self.residual(variables, (local, shared)))
        return blocks | {f"face {b}": v - incoming[b] for b, v in own.items()}


class _Neighbours(eqx.Module):
    """The faces at which each expert takes boundary values, padded to the same number.

    Attributes:
        faces: Numbers of faces by expert.
        real: False at the padding.
        givers: By face, the expert whose trace is taken.
    """

    faces: np.ndarray
    real: np.ndarray
    givers: np.ndarray

    @classmethod
    def of(cls, pairs, experts: int) -> "_Neighbours":
        taken = [[f for f, (to, _) in enumerate(pairs) if to == k] for k in range(experts)]
        most = max(1, max(map(len, taken)))
        faces = np.array([own + [0] * (most - len(own)) for own in taken])
        real = np.array([[True] * len(own) + [False] * (most - len(own)) for own in taken])
        return cls(faces, real, np.array([giver for _, giver in pairs]))


def solve_in_turn(
    constraint: HardConstraint,
    coupling: Schwarz,
    spread: Callable,
    init: PyTree,
    local: PyTree,
    shared: PyTree,
    mask: dict[str, Array],
    faces: PyTree,
    key: Array | None = None,
) -> CoupledSolution:
    """Sweeps of solves with the neighbours' last traces as boundary values.

    Args:
        constraint: What each expert solves.
        coupling: Where they take boundary values.
        spread: `spread(one, each, shared)` calls one(*entry of each, shared) for every expert.
        init: Starting points, experts first.
        local: Arguments of the experts.
        shared: Arguments that all have.
        mask: Rows that count.
        faces: Arguments of the traces.
        key: A random key asks for an audit.

    Returns:
        Solutions and reports, in which `steps` counts sweeps.
    """
    value = check.variables("init", init)
    dtype = tree.dtype_of(value)
    local, shared, faces = strong((local, shared, faces), dtype)
    experts = jax.tree.leaves(value)[0].shape[0]
    table = _Neighbours.of(coupling.pairs, experts)
    own_faces = jax.tree.map(lambda v: v[table.faces], faces)

    def incoming(value, faces, shared):
        given = traces(coupling.trace, value, faces, shared, table.givers)
        return {b: v[table.faces] for b, v in given.items()}

    first = implicit.detach(incoming(value, faces, shared))
    weights = {f"face {b}": w for b, w in (coupling.weights or {}).items()}
    layer = eqx.tree_at(
        lambda c: (c.residual, c.weights),
        constraint,
        (_WithFaces(constraint.residual, coupling.trace), (constraint.weights or {}) | weights),
        is_leaf=lambda x: x is None,
    )

    def pack(init, local, own, given, mask, shared):
        return layer.pack(init, ((local, own, given), shared), mask)

    def masks(ok):
        real = jnp.asarray(table.real) & ok[table.givers][table.faces]
        return mask | {f"face {b}": real for b in first}

    def finite_rows(init, local, own, given, mask, shared):
        _, packed = pack(init, local, own, given, mask, shared)
        return tree.all_finite(_row_jacobian(init, packed))

    def one(init, local, own, given, mask, shared):
        found = layer(init, ((local, own, given), shared), mask)
        return found.value, found.report

    # everything that finds the point is detached; the rule below gives it its derivative
    held = implicit.detach((value, local, own_faces, faces, shared))
    start, local_, own_, faces_, shared_ = held
    everyone = masks(jnp.ones(experts, bool))
    finite = spread(finite_rows, (start, local_, own_, first, everyone), shared_)
    count = masks(finite)

    def sweep(value, given):
        return spread(one, (value, local_, own_, given, count), shared_)

    if constraint.linear:
        at_zero = jax.tree.map(jnp.zeros_like, first)
        base, push = jax.linearize(lambda given: sweep(start, given)[0], at_zero)

        next_value = lambda _, given: jax.tree.map(jnp.add, base, push(given))  # noqa: E731
    else:
        next_value = lambda value, given: sweep(value, given)[0]  # noqa: E731

    tolerance = coupling.tolerance
    tolerance = float(jnp.finfo(dtype).eps) ** (2 / 3) if tolerance is None else tolerance

    def change(new, old):
        def largest(arrays):
            real = [jnp.where(_fit(table.real, a), a, 0) for a in jax.tree.leaves(arrays)]
            return jnp.max(jnp.stack([jnp.max(jnp.abs(a)) for a in real]))

        return largest(jax.tree.map(jnp.subtract, new, old)) <= tolerance * largest(new)

    def going(carry):
        _, _, settled, sweeps = carry
        return ~settled & (sweeps < coupling.max_sweeps)

    def body(carry):
        value, given, _, sweeps = carry
        value = next_value(value, given)
        new = incoming(value, faces_, shared_)
        return value, new, change(new, given), sweeps + 1

    zero = jnp.zeros((), jnp.int32)
    carry = (start, first, jnp.array(False), zero)
    found, given, settled, sweeps = jax.lax.while_loop(going, body, carry)
    # one more solve for the reports, from where the sweeps ended
    found, report = sweep(found, given)
    ok = report.ok & settled
    result = RESULTS.where(settled, report.result, RESULTS.max_steps_reached)
    report = eqx.tree_at(
        lambda r: (r.ok, r.result, r.steps),
        report,
        (ok, result, jnp.broadcast_to(sweeps, ok.shape)),
    )
    usable = jax.vmap(tree.all_finite)(found)
    found = jax.tree.map(lambda a, b: jnp.where(_along(usable, a), a, b), found, value)

    def equilibrium(value, local, own, faces, shared):
        """Each expert's gradient, with its neighbours' traces as they are."""
        given = incoming(value, faces, shared)

        def gradient(v, local, own, given, mask, ok):
            _, packed = pack(v, local, own, given, mask, shared)
            packed = eqx.tree_at(lambda p: p.ok, packed, ok)
            return jax.grad(lambda v: half_square(v, packed))(v)

        return jax.vmap(gradient)(value, local, own, given, count, ok)

    moving = local, own_faces, faces, shared
    checked = None
    if key is not None:
        checked = audit(lambda v, args: equilibrium(v, *args), found, moving, DenseOrZero(), key)
    found = implicit.attach(equilibrium, found, *moving, linear_solver=DenseOrZero())
    return CoupledSolution(jax.vmap(gate)(ok, found), implicit.detach(report), checked)


def _fit(real, leaf):
    return jnp.asarray(real).reshape(*real.shape, *(1,) * (leaf.ndim - 2))
