"""The one differentiation rule of the library.

`attach(condition, x, *args)` returns x unchanged and gives it the derivative that
condition(x, *args) = 0 implies (implicit function theorem):

    dx = -(∂F/∂x)⁻¹ (∂F/∂args) dargs.

It is a JAX primitive, not a `jax.custom_jvp`: inside `lax.scan` the rule of a custom_jvp is
dropped when a second derivative is taken with an inner reverse mode, and the result is silently
wrong. The rule of a primitive cannot be dropped. The rule reads the *attached* x, so
differentiating the rule again gives every higher order. Its linear solve is JAX's own and
transposes, so reverse mode follows, and the compiled program holds no host callback.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, PyTree

from jaxopt_ext.implicit.hoist import detach, hoist, strong, vary_like
from jaxopt_ext.implicit.linear_solvers import Auto, LinearOperator, LinearSolver
from jaxopt_ext.implicit.tree import describe

attach_p = Primitive("implicit_attach")
attach_p.multiple_results = True


@dataclasses.dataclass(frozen=True)
class _Rule:
    """The static half of one attachment: how leaves become (x, condition, args, solver)."""

    x_tree: Any
    theta_tree: Any
    theta_static: Any
    symmetric: bool
    positive_definite: bool

    def tangent(self, x_leaves, theta_leaves, active, active_tangents) -> list[Array]:
        """-(∂F/∂x)⁻¹ (∂F/∂θ) dθ, for the leaves of θ that `active` numbers."""
        x = jax.tree.unflatten(self.x_tree, x_leaves)

        def restore(active_leaves):
            leaves = list(theta_leaves)
            for i, leaf in zip(active, active_leaves, strict=True):
                leaves[i] = leaf
            static = jax.tree.unflatten(self.theta_static[0], self.theta_static[1])
            return eqx.combine(jax.tree.unflatten(self.theta_tree, leaves), static)

        def residual(active_leaves):
            condition, args, _ = restore(active_leaves)
            return condition(x, *args)

        active_leaves = [theta_leaves[i] for i in active]
        rhs = jax.jvp(residual, (active_leaves,), (list(active_tangents),))[1]
        condition, args, linear_solver = restore(active_leaves)
        _, mv = jax.linearize(lambda v: condition(v, *args), x)
        operator = LinearOperator(mv, x, self.symmetric, self.positive_definite)
        return jax.tree.leaves(linear_solver(operator, jax.tree.map(jnp.negative, rhs)))


def _bind(x_leaves, theta_leaves, rule: _Rule, axes: tuple) -> list[Array]:
    return attach_p.bind(*x_leaves, *theta_leaves, rule=rule, axes=axes)


def _impl(*leaves, rule: _Rule, axes):
    return list(leaves[: rule.x_tree.num_leaves])


def _jvp(primals, tangents, *, rule: _Rule, axes):
    n = rule.x_tree.num_leaves
    theta_leaves = list(primals[n:])
    x_leaves = _bind(primals[:n], theta_leaves, rule, axes)  # attached: right at every order
    active = tuple(
        i
        for i, t in enumerate(tangents[n:])
        if type(t) is not ad.Zero and t.dtype != jax.dtypes.float0
    )
    if not active:
        return x_leaves, [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in x_leaves]

    def tangent(x_leaves, theta_leaves, active_tangents):
        return rule.tangent(x_leaves, theta_leaves, active, active_tangents)

    for level in axes:  # innermost vmap first
        tangent = jax.vmap(
            tangent, in_axes=(0, list(level), [level[i] for i in active]), out_axes=0
        )
    return x_leaves, tangent(x_leaves, theta_leaves, [tangents[n + i] for i in active])


def _batch(leaves, dims, *, rule: _Rule, axes):
    n = rule.x_tree.num_leaves
    size = next(leaf.shape[d] for leaf, d in zip(leaves, dims, strict=True) if d is not None)
    leaves = [
        leaf if d is None else jnp.moveaxis(leaf, d, 0)
        for leaf, d in zip(leaves, dims, strict=True)
    ]
    x_leaves = [
        jnp.broadcast_to(leaf, (size, *leaf.shape)) if d is None else leaf
        for leaf, d in zip(leaves[:n], dims[:n], strict=True)
    ]
    level = tuple(None if d is None else 0 for d in dims[n:])
    return _bind(x_leaves, leaves[n:], rule, (*axes, level)), [0] * n


attach_p.def_impl(_impl)
attach_p.def_abstract_eval(_impl)
ad.primitive_jvps[attach_p] = _jvp
batching.primitive_batchers[attach_p] = _batch
mlir.register_lowering(
    attach_p, lambda ctx, *leaves, rule, axes: _impl(*leaves, rule=rule, axes=axes)
)


def _types(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def as_solution(x: PyTree) -> PyTree:
    """Check that `x` can be a solution and return it detached, as strongly typed JAX arrays.

    Raises:
        TypeError: A leaf of `x` is not floating.
        ValueError: `x` has no leaf.
    """
    x = detach(jax.tree.map(jnp.asarray, x))
    if not jax.tree.leaves(x):
        raise ValueError(f"x is {x!r}, expected a PyTree with at least one floating array")
    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"x{jax.tree_util.keystr(path)} has dtype {leaf.dtype}, expected a floating "
                "dtype: solution leaves are differentiated; pass integers through args or aux"
            )
    return jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), x)  # without weak types


def attach(
    condition: Callable[..., PyTree],
    x: PyTree,
    *args: PyTree,
    linear_solver: LinearSolver | None = None,
) -> PyTree:
    """Give `x`, found by anything at all, the derivative implied by condition(x, *args) = 0.

    The value is unchanged and nothing is computed unless a derivative is taken. Derivatives flow
    to `args` and to every array that the condition captured; any derivative of `x` itself (and of
    the starting point that led to it) is dropped.

    Args:
        condition: F, a function of (x, *args) that returns a PyTree like `x` and is zero at the
            solution. Its attributes `symmetric` and `positive_definite`, if present, tell the
            linear solver about ∂F/∂x.
        x: The solution, a PyTree of floating arrays.
        args: Further arguments of the condition, PyTrees.
        linear_solver: A callable `(operator, rhs) -> solution`; default `Auto()`.

    Returns:
        `x`, attached.

    Raises:
        TypeError: A leaf of `x` is not floating.
        ValueError: `x` is empty, or the condition does not return a PyTree like it.

    Reference:
        Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022, eq. (2).

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np
        >>> from jaxopt_ext import implicit
        >>> def square_root(t):
        ...     x = np.sqrt(2.0)  # found by anything at all
        ...     return implicit.attach(lambda x, t: x**2 - t, jnp.array(x), t)
        >>> print(round(float(jax.grad(square_root)(2.0)), 5))  # 1 / (2 √2)
        0.35355
    """
    x = as_solution(x)
    args = strong(args, jnp.result_type(*jax.tree.leaves(x)))
    symmetric = bool(getattr(condition, "symmetric", False))
    positive_definite = bool(getattr(condition, "positive_definite", False))
    hoisted = hoist(condition, x, *args)
    if _types(hoisted.out_shape) != _types(x):
        raise ValueError(
            "condition must return a PyTree like x: it returned "
            f"{describe(hoisted.out_shape)}, expected {describe(x)}"
        )
    return _attach(hoisted, x, args, linear_solver, symmetric, positive_definite)


def _attach(condition, x, args, linear_solver, symmetric, positive_definite):
    linear_solver = Auto() if linear_solver is None else linear_solver
    dynamic, static = eqx.partition((condition, args, detach(linear_solver)), eqx.is_array)
    static_leaves, static_tree = jax.tree.flatten(static)
    x_leaves, x_tree = jax.tree.flatten(x)
    theta_leaves, theta_tree = jax.tree.flatten(dynamic)
    # a tangent varies wherever a parameter does, and must have its primal's type
    x_leaves = vary_like(x_leaves, theta_leaves)
    rule = _Rule(
        x_tree, theta_tree, (static_tree, tuple(static_leaves)), symmetric, positive_definite
    )
    return jax.tree.unflatten(x_tree, _bind(x_leaves, theta_leaves, rule, ()))


def differentiable(
    condition: Callable[..., PyTree],
    *,
    has_aux: bool = False,
    linear_solver: LinearSolver | None = None,
) -> Callable[[Callable], Callable]:
    """Make any solver function differentiable by the conditions that its result satisfies.

    The decorated function is called with detached copies of its arguments, so it may be a
    `while_loop`, a call of scipy on concrete arrays, or a `jax.pure_callback`.

    Args:
        condition: F(x, *args), zero at the solution; see `attach`.
        has_aux: Whether the function returns `(x, aux)`. `aux` is returned detached.
        linear_solver: See `attach`.

    Returns:
        A decorator for functions `(init, *args) -> x` (or `(x, aux)`). The derivative with
        respect to `init` is zero.

    Raises:
        TypeError: The function does not return a pair although `has_aux=True`, or a leaf of the
            solution is not floating.
        ValueError: The condition does not return a PyTree like the solution.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxopt_ext import implicit
        >>> @implicit.differentiable(lambda x, t: x**3 + x - t)
        ... def root(init, t):
        ...     newton = lambda _, x: x - (x**3 + x - t) / (3 * x**2 + 1)
        ...     return jax.lax.fori_loop(0, 30, newton, init)
        >>> print(jax.grad(root, argnums=1)(0.0, 2.0))  # 1 / (3 x² + 1) at x = 1
        0.25
    """

    def decorate(solver: Callable) -> Callable:
        def solve(init: PyTree, *args: PyTree) -> PyTree:
            init = as_solution(init)
            args = strong(args, jnp.result_type(*jax.tree.leaves(init)))
            out = _call_detached(solver, init, *args)
            if has_aux and not (isinstance(out, tuple) and len(out) == 2):
                raise TypeError(
                    f"the solver returned {type(out).__name__}, expected a pair (x, aux) because "
                    "has_aux=True"
                )
            x, aux = out if has_aux else (out, None)
            x = attach(condition, x, *args, linear_solver=linear_solver)
            return (x, detach(aux)) if has_aux else x

        return functools.wraps(solver)(solve)

    return decorate


def _call_detached(solver: Callable, *args):
    """Call on detached arguments; what the solver captured is detached too if JAX can trace it."""
    try:
        solver = detach(hoist(solver, *args))
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
        pass  # a host-side solver: it needs concrete values and cannot capture traced ones
    return solver(*detach(args))


def attach_problem(
    condition: Callable[..., PyTree], x: PyTree, args: tuple, linear_solver: LinearSolver | None
) -> PyTree:
    """`attach` for a condition whose functions are `Hoisted` already: nothing is traced."""
    symmetric = bool(getattr(condition, "symmetric", False))
    positive_definite = bool(getattr(condition, "positive_definite", False))
    return _attach(condition, detach(x), args, linear_solver, symmetric, positive_definite)


def follow(fun: Callable[..., PyTree], out: PyTree, *args: PyTree) -> PyTree:
    """Give `out`, known to equal fun(*args), the derivative of fun without evaluating it now.

    Args:
        fun: A `Hoisted`-based function of PyTrees.
        out: Its value, known already; leaves that are not floating are returned as they are.
        args: Where it was evaluated.

    Returns:
        `out`, with derivatives with respect to `args`.
    """
    floating, rest = eqx.partition(out, eqx.is_inexact_array)
    if not jax.tree.leaves(floating):
        return out

    def residual(value, fun, args):
        return jax.tree.map(jnp.subtract, value, eqx.filter(fun(*args), eqx.is_inexact_array))

    attached = _attach(residual, detach(floating), (fun, args), _identity_solve, True, True)
    return eqx.combine(attached, rest)


def _identity_solve(operator, rhs):
    return rhs
