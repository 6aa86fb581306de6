"""Functions whose captured arrays are explicit leaves.

A user's function may close over arrays, also over values that an outer transformation traces.
Such captured values are invisible to a differentiation rule and to a compilation cache. `hoist`
calls the function once, keeps the resulting program, and turns everything it captured into leaves
of a PyTree, so that the rest of the library never calls the Python function again.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxopt_ext.implicit.tree import axes_of_type, varying_axes


def _identity_of(fun: Callable) -> Any:
    """What makes two functions the same program: the function, or the static part of a module."""
    try:
        hash(fun)
        return fun
    except TypeError:
        static = eqx.partition(fun, eqx.is_array)[1]
        leaves, structure = jax.tree.flatten(static)
        return structure, tuple(leaves)


def _fingerprint(jaxpr: jex.Jaxpr) -> tuple:
    """What a trace says: its operations, wiring and baked-in numbers, not its object identities.

    Python values that a function read while it was traced (a global number, a flag) show here, so
    a function traced again after such a change is another program.
    """
    order: dict[Any, int] = {}

    def operand(v):
        if isinstance(v, jex.Literal):
            return np.asarray(v.val).tobytes(), str(v.aval)
        return order.setdefault(v, len(order))

    def parameter(value):
        if isinstance(value, jex.ClosedJaxpr):
            return _fingerprint(value.jaxpr), tuple(id(const) for const in value.consts)
        if isinstance(value, jex.Jaxpr):
            return _fingerprint(value)
        if isinstance(value, tuple | list):
            return tuple(parameter(item) for item in value)
        if value is None or isinstance(value, str | int | float | np.dtype):
            return value
        return type(value)  # functions and the like: new objects in every trace

    def operation(eqn):
        return (
            eqn.primitive.name,
            tuple(operand(v) for v in eqn.invars),
            tuple((operand(v), str(v.aval)) for v in eqn.outvars),
            tuple((name, parameter(value)) for name, value in sorted(eqn.params.items())),
        )

    inputs = tuple(operand(v) for v in (*jaxpr.constvars, *jaxpr.invars))
    operations = tuple(operation(eqn) for eqn in jaxpr.eqns)
    return inputs, operations, tuple(operand(v) for v in jaxpr.outvars)


class _Program:
    """The traced function; equal to another trace of the same function that reads the same.

    Equality is by function, types and content rather than by identity of the trace, so that
    compiled code which takes a `Hoisted` as a static argument is found again when the same
    function is solved a second time.
    """

    def __init__(self, fun, jaxpr, const_types, in_tree, in_types, out_shape):
        self.jaxpr = jaxpr
        self.in_tree = in_tree
        self.in_types = in_types
        self.out_shape = out_shape
        self.out_tree = jax.tree.structure(out_shape)
        self.key = (_identity_of(fun), in_tree, in_types, const_types, _fingerprint(jaxpr))
        self.hash = hash(self.key)  # computed once: it is asked for at every call of a chunk

    def __hash__(self):
        return self.hash

    def __eq__(self, other):
        if self is other:
            return True
        return isinstance(other, _Program) and self.hash == other.hash and self.key == other.key


class Hoisted(eqx.Module):
    """A function traced once; the arrays it captured are leaves.

    Attributes:
        consts: The captured arrays, in the order in which the program takes them.
        program: The trace itself; static.
    """

    consts: list[Array]
    program: _Program = eqx.field(static=True)

    @property
    def out_shape(self) -> PyTree:
        """Shapes and dtypes of the output, as `jax.ShapeDtypeStruct` leaves."""
        return self.program.out_shape

    def __call__(self, *args: PyTree) -> PyTree:
        """Evaluate at arguments of the types that it was traced with."""
        leaves, in_tree, in_types = _signature(args)
        if in_tree != self.program.in_tree or in_types != self.program.in_types:
            raise TypeError(
                "a traced function was called with arguments of other types than it was traced "
                f"with: got {in_types}, expected {self.program.in_types}"
            )
        run = jex.jaxpr_as_fun(jex.ClosedJaxpr(self.program.jaxpr, self.consts))
        return jax.tree.unflatten(self.program.out_tree, run(*leaves))


def _has_type(leaf) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _signature(args):
    dynamic, static = eqx.partition(args, _has_type)
    leaves = jax.tree.leaves(dynamic)
    static_leaves, structure = jax.tree.flatten(static)
    in_tree = (jax.tree.structure(dynamic), structure, tuple(static_leaves))
    return leaves, in_tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def hoist(fun: Callable, *args: PyTree) -> Hoisted:
    """Trace `fun(*args)` once and make everything it captured a leaf.

    Args:
        fun: Any function of PyTrees that JAX can trace. It is called exactly once.
        args: The arguments it will be called with, or others of the same shapes and dtypes
            (`jax.ShapeDtypeStruct` leaves will do).
            Leaves that are not JAX arrays (strings, Python integers) are fixed in the program.

    Returns:
        The traced function, itself a PyTree whose leaves are the captured arrays.

    Raises:
        TypeError: An output leaf is not an array.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxopt_ext.implicit import hoist
        >>> def slope(scale):
        ...     square = hoist(lambda x: scale * x**2, jnp.array(1.0))  # captures `scale`
        ...     return square(jnp.array(3.0))
        >>> float(jax.grad(slope)(jnp.array(2.0)))
        9.0
    """
    if isinstance(fun, Hoisted):
        return fun
    _, in_tree, in_types = _signature(args)
    dynamic, static = eqx.partition(args, _has_type)
    closed, out_shape = jax.make_jaxpr(
        lambda d: fun(*eqx.combine(d, static)),
        return_shape=True,
    )(dynamic)
    consts = [jnp.asarray(c) for c in closed.consts]
    varied = vary_like((dynamic, consts))[1]
    if [varying_axes(c) for c in varied] != [varying_axes(c) for c in consts]:
        consts, closed = varied, _accepting_varied(closed, varied, jax.tree.leaves(dynamic))
    const_types = tuple((c.shape, c.dtype) for c in consts)
    program = _Program(fun, closed.jaxpr, const_types, in_tree, in_types, out_shape)
    return Hoisted(consts, program)


def _accepting_varied(closed: jex.ClosedJaxpr, consts: list, leaves: list) -> jex.ClosedJaxpr:
    """Inside `shard_map`, the program for captured arrays that vary as its arguments do.

    The trace marks each captured array as varying where it meets an argument. Marking it twice is
    an error, and a batched `cond` makes all its operands vary.
    """

    def run(consts, leaves):
        return _evaluate(closed.jaxpr, consts, leaves)

    again = jax.make_jaxpr(run)(consts, leaves)
    jaxpr = again.jaxpr
    n = len(consts)
    jaxpr = jaxpr.replace(constvars=[*jaxpr.constvars, *jaxpr.invars[:n]], invars=jaxpr.invars[n:])
    assert not again.consts
    return jex.ClosedJaxpr(jaxpr, consts)


def _evaluate(jaxpr: jex.Jaxpr, consts: list, leaves: list) -> list:
    """Run a jaxpr; what is to be marked as varying may vary already."""
    values: dict[Any, Any] = dict(
        zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *leaves), strict=True)
    )

    def read(v):
        if not isinstance(v, jex.Literal):
            return values[v]
        aval: Any = v.aval
        return jnp.asarray(v.val, aval.dtype)

    def varies_more(v, value):
        return not isinstance(v, jex.Literal) and varying_axes(value) != axes_of_type(v.aval)

    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        if eqn.primitive.name == "pvary":
            axes = frozenset(eqn.params["axes"])
            out = [
                jax.lax.pcast(v, missing, to="varying") if missing else v
                for v in inputs
                for missing in [tuple(sorted(axes - varying_axes(v), key=str))]
            ]
        elif eqn.primitive.name in ("jit", "pjit"):
            inner = eqn.params["jaxpr"]
            out = _evaluate(inner.jaxpr, inner.consts, inputs)
        else:
            if any(map(varies_more, eqn.invars, inputs)):
                inputs = vary_like(inputs)  # as the trace would have done
            bound = eqn.primitive.get_bind_params(eqn.params)
            subfuns, params = bound if isinstance(bound, tuple) else ((), bound)  # by version
            out = eqn.primitive.bind(*subfuns, *inputs, **params)
            out = out if eqn.primitive.multiple_results else [out]
        values.update(zip(eqn.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars]


def detach(tree: PyTree) -> PyTree:
    """The same values with every derivative dropped.

    Args:
        tree: Any PyTree; leaves that are not floating stay as they are.

    Returns:
        The detached tree.
    """
    return jax.tree.map(
        lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_inexact_array(leaf) else leaf, tree
    )


def strong(tree: PyTree, dtype: Any) -> PyTree:
    """Numbers as strongly typed JAX arrays; Python floats and weak floats get `dtype`.

    So a changed number is a changed input rather than a new program, no weak type travels through
    a loop, and a Python float never decides the precision. NumPy arrays become JAX arrays;
    integers, booleans, strings and functions stay as they are.
    """

    def convert(leaf):
        if isinstance(leaf, float):
            return jnp.asarray(leaf, dtype)
        if isinstance(leaf, complex):
            return jnp.asarray(leaf, jnp.result_type(dtype, jnp.complex64))
        if not (eqx.is_array(leaf) or hasattr(leaf, "__array__")):
            return leaf
        array = jnp.asarray(leaf)
        if jnp.issubdtype(array.dtype, jax.dtypes.extended):
            return array  # random keys have no weak types
        weak = getattr(jax.typeof(array), "weak_type", False)
        floating = jnp.issubdtype(array.dtype, jnp.floating)
        return array.astype(dtype if weak and floating else array.dtype)

    return jax.tree.map(convert, tree)


def vary_like(tree: PyTree, *others: PyTree) -> PyTree:
    """Inside `shard_map`, mark `tree` as varying over every mesh axis over which anything varies.

    Outside `shard_map`, and where its axes are not tracked, this is the identity.
    """
    union = frozenset().union(*(varying_axes(leaf) for leaf in jax.tree.leaves((tree, *others))))

    def vary(leaf):
        missing = tuple(sorted(union - varying_axes(leaf), key=str))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, tree)


def cond(predicate: Array, true: Callable[[], PyTree], false: Callable[[], PyTree]) -> PyTree:
    """`jax.lax.cond`; inside `shard_map` with tracked axes, a selection among both results.

    Under `vmap` it is a selection anyway, and JAX's rule for that fails (jax 0.10) where a branch
    reads an array that does not vary over the axes over which the predicate does.
    """
    axes = varying_axes(predicate)
    if not axes:
        return jax.lax.cond(predicate, true, false)
    return jax.tree.map(
        lambda a, b: jnp.where(predicate, a, b), *vary_like((true(), false()), predicate)
    )
