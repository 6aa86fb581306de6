"""Problems: what is to be solved, and the optimality conditions of a solution.

A problem holds the user's functions, all of signature `(variables, args)`. It states its
optimality conditions (for the implicit layer) and measures how far a point is from them. No
problem knows a solver.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from jaxopt_ext import implicit
from jaxopt_ext.core import check, tree

P = TypeVar("P", bound="Problem")


class Problem(eqx.Module):
    """Base of all problems.

    Subclasses hold the user's functions and implement `trace` and `condition`.

    Attributes:
        has_objective: Whether there is something to minimize; `False` for equations.
    """

    has_objective: ClassVar[bool] = True

    @property
    def constraints(self) -> frozenset[str]:
        """Which of `equality`, `inequality`, `bounds` and `sets` are present."""
        return frozenset()

    @abc.abstractmethod
    def trace(self: P, value: PyTree, args: PyTree) -> P:
        """Call each user function once, check its output, and keep it as a program.

        Args:
            value: Variables, a PyTree of floating arrays.
            args: Further arguments of the functions.

        Returns:
            The same problem; its functions are `implicit.Hoisted`, and what they captured are
            leaves of it.

        Raises:
            ValueError: A function cannot be evaluated at `value` and `args`, or its output does
                not have the shape that the problem needs.
        """

    def objective(self, value: PyTree, args: PyTree) -> tuple[Float[Array, ""], PyTree]:
        """The objective and the auxiliary output (`None` without `has_aux`).

        Raises:
            TypeError: The problem has none; see `has_objective`.
        """
        raise TypeError(
            f"{type(self).__name__} has no objective; take its conditions, or a problem with "
            "has_objective"
        )

    @abc.abstractmethod
    def condition(self) -> implicit.Condition:
        """The optimality conditions, a function of `(variables, args)`."""

    def variables(self, value: PyTree, multipliers: PyTree) -> PyTree:
        """What the conditions are a function of, from the parts of a `Solution`."""
        return value

    def split(self, variables: PyTree) -> tuple[PyTree, PyTree]:
        """The inverse of `variables`."""
        return variables, None

    def _hoist(self, name: str, value: PyTree, args: PyTree, *inputs: PyTree) -> implicit.Hoisted:
        fun = getattr(self, name)
        owner = type(self).__name__
        return check.call(owner, name, lambda: implicit.hoist(fun, *inputs), value, args)

    def _with(self: P, **changes: Any) -> P:
        return dataclasses.replace(self, **changes)


def _output(owner: str, name: str, fun: implicit.Hoisted, has_aux: bool) -> PyTree:
    """The shape of what `fun` returns, without the auxiliary part."""
    out = fun.out_shape
    if not has_aux:
        return out
    if not (isinstance(out, tuple) and len(out) == 2):
        raise ValueError(
            f"{owner}: {name} returned {tree.describe(out)}, expected a pair (value, aux) because "
            "has_aux=True"
        )
    return out[0]


def _require_scalar(owner: str, name: str, out: PyTree) -> None:
    if not (isinstance(out, jax.ShapeDtypeStruct) and out.shape == ()):
        raise ValueError(f"{owner}: {name} returned {tree.describe(out)}, expected a scalar")
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(f"{owner}: {name} returned {out.dtype}, expected a real floating scalar")


def _require_like(owner: str, name: str, out: PyTree, value: PyTree) -> None:
    if not tree.same_types(out, value):
        raise ValueError(
            f"{owner}: {name} returned {tree.describe(out)}, expected the structure, shapes and "
            f"dtypes of init, {tree.describe(value)}"
        )


def _require_floating(owner: str, name: str, out: PyTree) -> None:
    for leaf in jax.tree.leaves(out):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"{owner}: {name} returned {tree.describe(out)}, expected real floating arrays"
            )


def _without_aux(fun: Callable, has_aux: bool) -> Callable:
    return _First(fun) if has_aux else fun


class _First(eqx.Module):
    """A function whose auxiliary output is dropped."""

    fun: Callable

    def __call__(self, *args):
        return self.fun(*args)[0]


class Minimization(Problem):
    """min_y f(y, θ); conditions ∇_y f = 0.

    Args:
        fun: f(variables, args) → scalar, or (scalar, aux).
        has_aux: Whether `fun` returns a pair whose second part is auxiliary output.

    Raises:
        TypeError: `fun` is not a function.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> problem = jx.Minimization(lambda y, a: jnp.sum((y - a) ** 2))
        >>> print(problem.condition()(jnp.array([1.0, 2.0]), 1.0))
        [0. 2.]
    """

    fun: Callable
    has_aux: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        check.function("Minimization", "fun", self.fun)

    def trace(self, value, args):
        """See `Problem.trace`."""
        fun = self._hoist("fun", value, args, value, args)
        _require_scalar("Minimization", "fun", _output("Minimization", "fun", fun, self.has_aux))
        return self._with(fun=fun)

    def objective(self, value, args):
        """See `Problem.objective`."""
        out = self.fun(value, args)
        return out if self.has_aux else (out, None)

    def condition(self):
        """∇_y f = 0."""
        return implicit.Stationary(_without_aux(self.fun, self.has_aux))


class ComposedMinimization(Problem):
    """min_y ℓ(m(y, θ), θ) with target z = m(y, θ); conditions J_mᵀ ∇_z ℓ = 0.

    The split tells solvers where the cheap model m ends and the (perhaps expensive) loss ℓ of its
    output, the target, begins.

    Args:
        loss: ℓ(target, args) → scalar, or (scalar, aux).
        model: m(variables, args) → target, any PyTree of floating arrays.
        has_aux: Whether `loss` returns a pair whose second part is auxiliary output.

    Raises:
        TypeError: `loss` or `model` is not a function.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> problem = jx.ComposedMinimization(
        ...     loss=lambda z, args: jnp.sum((z - 1.0) ** 2), model=lambda y, args: 2.0 * y
        ... )
        >>> print(problem.condition()(jnp.array([0.5, 1.0]), None))
        [0. 4.]
    """

    loss: Callable
    model: Callable
    has_aux: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        check.function("ComposedMinimization", "loss", self.loss)
        check.function("ComposedMinimization", "model", self.model)

    def trace(self, value, args):
        """See `Problem.trace`."""
        owner = "ComposedMinimization"
        model = self._hoist("model", value, args, value, args)
        _require_floating(owner, "model", model.out_shape)
        loss = self._hoist("loss", value, args, model.out_shape, args)
        _require_scalar(owner, "loss", _output(owner, "loss", loss, self.has_aux))
        return self._with(loss=loss, model=model)

    def target(self, value: PyTree, args: PyTree) -> PyTree:
        """The model's output z = m(y, θ)."""
        return self.model(value, args)

    def objective(self, value, args):
        """See `Problem.objective`."""
        out = self.loss(self.model(value, args), args)
        return out if self.has_aux else (out, None)

    def condition(self):
        """J_mᵀ ∇ℓ = 0."""
        return implicit.Stationary(_Composed(_without_aux(self.loss, self.has_aux), self.model))


class _Composed(eqx.Module):
    loss: Callable
    model: Callable

    def __call__(self, value, args):
        return self.loss(self.model(value, args), args)


class LeastSquares(Problem):
    """min_y ½‖r(y, θ)‖²; conditions Jᵀr = 0.

    Args:
        residual: r(variables, args) → PyTree of floating arrays, or (PyTree, aux).
        has_aux: Whether `residual` returns a pair whose second part is auxiliary output.

    Raises:
        TypeError: `residual` is not a function.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> problem = jx.LeastSquares(lambda y, t: jnp.array([y - t, 2.0 * y]))
        >>> print(problem.objective(jnp.array(1.0), 5.0)[0])
        10.0
    """

    residual: Callable
    has_aux: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        check.function("LeastSquares", "residual", self.residual)

    def trace(self, value, args):
        """See `Problem.trace`."""
        residual = self._hoist("residual", value, args, value, args)
        out = _output("LeastSquares", "residual", residual, self.has_aux)
        _require_floating("LeastSquares", "residual", out)
        return self._with(residual=residual)

    def objective(self, value, args):
        """See `Problem.objective`: ½‖r‖² and the auxiliary output."""
        out = self.residual(value, args)
        residual, aux = out if self.has_aux else (out, None)
        squares = [jnp.sum(leaf**2) for leaf in jax.tree.leaves(residual)]
        return sum(squares[1:], squares[0]) / 2, aux

    def condition(self):
        """Jᵀr = 0."""
        return implicit.LeastSquares(_without_aux(self.residual, self.has_aux))


class CompositeMinimization(Problem):
    """min_y f(y, θ) + ψ(y, θ), f smooth and ψ simple; conditions y − prox_ψ(y − ∇_y f) = 0.

    ψ is convex, may have kinks or be the indicator of a set, and is given by its proximal operator
    (see `implicit.proximal` and `implicit.projections`).

    Args:
        fun: f(variables, args) → scalar, or (scalar, aux).
        prox: prox(v, step, args) → argmin_y ½‖y − v‖² + step · ψ(y, args), a PyTree like v. For
            the indicator of a set it is the projection, whatever the step.
        penalty: ψ(variables, args) → scalar; `None` where it is the indicator of a set.
        has_aux: Whether `fun` returns a pair whose second part is auxiliary output.

    Raises:
        TypeError: A function is not callable.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> from jaxopt_ext.implicit import proximal
        >>> lasso = jx.CompositeMinimization(
        ...     fun=lambda y, args: jnp.sum((y - args["b"]) ** 2) / 2,
        ...     prox=lambda v, step, args: proximal.prox_lasso(v, args["weight"], step),
        ...     penalty=lambda y, args: args["weight"] * jnp.sum(jnp.abs(y)),
        ... )
        >>> args = {"b": jnp.array([3.0, -0.5, -2.0]), "weight": 1.0}
        >>> sol = jx.solve(lasso, solvers.GradNormSmooth(), jnp.zeros(3), args)
        >>> print(jnp.round(sol.value, 3))
        [ 2.  0. -1.]
    """

    fun: Callable
    prox: Callable
    penalty: Callable | None = None
    has_aux: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        check.function("CompositeMinimization", "fun", self.fun)
        check.function("CompositeMinimization", "prox", self.prox)
        check.function("CompositeMinimization", "penalty", self.penalty, optional=True)

    def trace(self, value, args):
        """See `Problem.trace`."""
        owner = "CompositeMinimization"
        fun = self._hoist("fun", value, args, value, args)
        _require_scalar(owner, "fun", _output(owner, "fun", fun, self.has_aux))
        step = jnp.ones((), tree.dtype_of(value))
        prox = self._hoist("prox", value, args, value, step, args)
        _require_like(owner, "prox", prox.out_shape, value)
        penalty = None
        if self.penalty is not None:
            penalty = self._hoist("penalty", value, args, value, args)
            _require_scalar(owner, "penalty", penalty.out_shape)
        return self._with(fun=fun, prox=prox, penalty=penalty)

    def smooth(self, value: PyTree, args: PyTree) -> tuple[Float[Array, ""], PyTree]:
        """The smooth part f and the auxiliary output."""
        out = self.fun(value, args)
        return out if self.has_aux else (out, None)

    def objective(self, value, args):
        """See `Problem.objective`: f + ψ and the auxiliary output."""
        smooth, aux = self.smooth(value, args)
        if self.penalty is None:
            return smooth, aux
        return smooth + jnp.asarray(self.penalty(value, args), smooth.dtype), aux

    def condition(self):
        """Y − prox(y − ∇f) = 0."""
        return implicit.ProximalGradient(
            _without_aux(self.fun, self.has_aux), self.prox, jnp.ones(())
        )


class NonlinearProgram(Problem):
    """min_y f(y, θ) s.t. c_E(y, θ) = 0, c_I(y, θ) ≤ 0, l ≤ y ≤ u; conditions: KKT.

    The conditions are those of `implicit.KKT`, in the variables `(y, multipliers)`.

    Args:
        fun: f(variables, args) → scalar, or (scalar, aux).
        equality: c_E(variables, args) → PyTree, zero where feasible; or `None`.
        inequality: c_I(variables, args) → PyTree, ≤ 0 where feasible; or `None`.
        lower: l: a PyTree like the variables, one number for all of them, or `None`.
        upper: u, likewise.
        has_aux: Whether `fun` returns a pair whose second part is auxiliary output.

    Raises:
        TypeError: A function is not callable.
        ValueError: (from `trace`) a bound does not fit the variables, or lower > upper somewhere.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> problem = jx.NonlinearProgram(lambda y, args: jnp.sum(y**2), lower=1.0)
        >>> sorted(problem.constraints)
        ['bounds']
    """

    fun: Callable
    equality: Callable | None = None
    inequality: Callable | None = None
    lower: PyTree = None
    upper: PyTree = None
    has_aux: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        check.function("NonlinearProgram", "fun", self.fun)
        check.function("NonlinearProgram", "equality", self.equality, optional=True)
        check.function("NonlinearProgram", "inequality", self.inequality, optional=True)

    @property
    def constraints(self):
        """Kinds of constraint present."""
        present = {
            "equality": self.equality is not None,
            "inequality": self.inequality is not None,
            "bounds": self.lower is not None or self.upper is not None,
        }
        return frozenset(kind for kind, here in present.items() if here)

    def trace(self, value, args):
        """See `Problem.trace`; the bounds become PyTrees like the variables."""
        owner = "NonlinearProgram"
        fun = self._hoist("fun", value, args, value, args)
        _require_scalar(owner, "fun", _output(owner, "fun", fun, self.has_aux))
        changes: dict[str, Any] = {"fun": fun}
        for name in ("equality", "inequality"):
            if getattr(self, name) is not None:
                changes[name] = self._hoist(name, value, args, value, args)
                _require_floating(owner, name, changes[name].out_shape)
        for name in ("lower", "upper"):
            if getattr(self, name) is not None:
                changes[name] = _bound(name, getattr(self, name), value)
        lower, upper = changes.get("lower"), changes.get("upper")
        if lower is not None and upper is not None:
            _require_ordered(lower, upper)
        return self._with(**changes)

    def objective(self, value, args):
        """See `Problem.objective`."""
        out = self.fun(value, args)
        return out if self.has_aux else (out, None)

    def condition(self):
        """The KKT system in `(y, multipliers)`."""
        fun = _without_aux(self.fun, self.has_aux)
        return implicit.KKT(fun, self.equality, self.inequality, self.lower, self.upper)

    def variables(self, value, multipliers):
        """The pair `(y, multipliers)`."""
        return value, multipliers

    def split(self, variables):
        """The pair `(y, multipliers)`."""
        return variables

    def feasibility(self, value: PyTree, args: PyTree) -> Float[Array, ""]:
        """Largest violation of any constraint, in the constraint's own units; 0 if feasible."""
        violations = []
        if self.equality is not None:
            violations.append(tree.max_norm(self.equality(value, args)))
        parts = []
        if self.inequality is not None:
            parts.append(self.inequality(value, args))
        if self.lower is not None:
            parts.append(jax.tree.map(jnp.subtract, self.lower, value))
        if self.upper is not None:
            parts.append(jax.tree.map(jnp.subtract, value, self.upper))
        violations += [tree.max_norm(jax.tree.map(lambda c: jnp.maximum(c, 0), p)) for p in parts]
        return jnp.max(jnp.stack(violations)) if violations else jnp.zeros(())


def _bound(name, bound, value):
    structures = jax.tree.structure(bound), jax.tree.structure(value)
    if structures[0] == structures[1]:
        pairs = bound
    elif structures[0] == jax.tree.structure(0) and jnp.ndim(bound) == 0:
        pairs = jax.tree.map(lambda _: bound, value)
    else:
        raise ValueError(
            f"NonlinearProgram: {name} is {tree.describe(bound)}, expected one number or a PyTree "
            f"like init, {tree.describe(value)}"
        )

    def fit(path, b, y):
        try:
            return jnp.broadcast_to(jnp.asarray(b, y.dtype), y.shape)
        except ValueError:
            raise ValueError(
                f"NonlinearProgram: {name}{jax.tree_util.keystr(path)} has shape "
                f"{list(jnp.shape(b))}, expected {list(y.shape)} as in init"
            ) from None

    return jax.tree_util.tree_map_with_path(fit, pairs, value)


def _require_ordered(lower, upper):
    for path, (low, high) in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: (a, b), lower, upper), is_leaf=lambda x: isinstance(x, tuple)
    ):
        if isinstance(low, Tracer) or isinstance(high, Tracer):
            continue
        crossed = low > high
        if isinstance(crossed, Tracer):
            continue
        if bool(crossed.any()):
            raise ValueError(
                f"NonlinearProgram: lower{jax.tree_util.keystr(path)} exceeds upper in "
                f"{int(crossed.sum())} of {crossed.size} entries, expected lower <= upper"
            )


class Bilevel(Problem):
    """min_{x ∈ X, y} f(x, y, θ) s.t. y ∈ argmin_{y ∈ Y} g(x, y, θ); conditions: penalty system.

    Args:
        upper: f(x, y, args) → scalar, or (scalar, aux).
        lower: g(x, y, args) → scalar.
        upper_set: Projection onto X, a function PyTree → PyTree (as in `optax.projections`), or
            `None` for no constraint.
        lower_set: Projection onto Y, likewise.
        has_aux: Whether `upper` returns a pair whose second part is auxiliary output.

    Raises:
        TypeError: A function is not callable.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> problem = jx.Bilevel(
        ...     upper=lambda x, y, args: (y - 1.0) ** 2, lower=lambda x, y, args: (y - x) ** 2
        ... )
        >>> one = jnp.array(1.0)
        >>> print(*problem.condition(sigma=0.1)((one, one, one), None))
        0.0 0.0 0.0
    """

    upper: Callable
    lower: Callable
    upper_set: Callable | None = None
    lower_set: Callable | None = None
    has_aux: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        check.function("Bilevel", "upper", self.upper)
        check.function("Bilevel", "lower", self.lower)
        check.function("Bilevel", "upper_set", self.upper_set, optional=True)
        check.function("Bilevel", "lower_set", self.lower_set, optional=True)

    @property
    def constraints(self):
        """`sets` where a projection is given."""
        given = self.upper_set is not None or self.lower_set is not None
        return frozenset({"sets"}) if given else frozenset()

    def trace(self, value, args):
        """See `Problem.trace`; here `value` is the pair (x, y)."""
        if not (isinstance(value, tuple) and len(value) == 2):
            raise ValueError(
                f"Bilevel: init is {tree.describe(value)}, expected a pair (x, y) of PyTrees"
            )
        x, y = value
        upper = self._hoist("upper", value, args, x, y, args)
        lower = self._hoist("lower", value, args, x, y, args)
        _require_scalar("Bilevel", "upper", _output("Bilevel", "upper", upper, self.has_aux))
        _require_scalar("Bilevel", "lower", lower.out_shape)
        changes: dict[str, Any] = {"upper": upper, "lower": lower}
        for name, part in (("upper_set", x), ("lower_set", y)):
            if getattr(self, name) is not None:
                changes[name] = self._hoist(name, value, args, part)
                _require_like("Bilevel", name, changes[name].out_shape, part)
        return self._with(**changes)

    def objective(self, value, args):
        """The upper objective f(x, y, θ) and the auxiliary output."""
        out = self.upper(*value, args)
        return out if self.has_aux else (out, None)

    def variables(self, value, multipliers):
        """See `Problem.variables`: (x, y, z) where a second lower-level point z is known."""
        return value if multipliers is None else (*value, multipliers)

    def split(self, variables):
        """See `Problem.split`: the pair (x, y), and z or `None`."""
        return variables[:2], variables[2] if len(variables) == 3 else None

    def condition(self, sigma: float | Array = 1e-2):
        """The penalty system in (x, y, z) at penalty `sigma` (dimensionless, > 0)."""
        check.number("Bilevel.condition", "sigma", sigma, above=0)
        upper = _without_aux(self.upper, self.has_aux)
        return implicit.PenaltySystem(upper, self.lower, sigma, self.upper_set, self.lower_set)


class RootFinding(Problem):
    """F(y, θ) = 0.

    Args:
        fun: F(variables, args) → PyTree like the variables, or (PyTree, aux).
        has_aux: Whether `fun` returns a pair whose second part is auxiliary output.

    Raises:
        TypeError: `fun` is not a function.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> print(jx.RootFinding(lambda y, t: y**2 - t).condition()(jnp.array(3.0), 9.0))
        0.0
    """

    has_objective: ClassVar[bool] = False
    fun: Callable
    has_aux: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        check.function("RootFinding", "fun", self.fun)

    def trace(self, value, args):
        """See `Problem.trace`."""
        fun = self._hoist("fun", value, args, value, args)
        out = _output("RootFinding", "fun", fun, self.has_aux)
        _require_like("RootFinding", "fun", out, value)
        return self._with(fun=fun)

    def condition(self):
        """F = 0."""
        return implicit.Root(_without_aux(self.fun, self.has_aux))


class FixedPoint(Problem):
    """y = T(y, θ); conditions y − T(y, θ) = 0.

    Args:
        fun: T(variables, args) → PyTree like the variables, or (PyTree, aux).
        has_aux: Whether `fun` returns a pair whose second part is auxiliary output.

    Raises:
        TypeError: `fun` is not a function.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> print(jx.FixedPoint(lambda y, t: y / 2 + t).condition()(jnp.array(4.0), 2.0))
        0.0
    """

    has_objective: ClassVar[bool] = False
    fun: Callable
    has_aux: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        check.function("FixedPoint", "fun", self.fun)

    def trace(self, value, args):
        """See `Problem.trace`."""
        fun = self._hoist("fun", value, args, value, args)
        out = _output("FixedPoint", "fun", fun, self.has_aux)
        _require_like("FixedPoint", "fun", out, value)
        return self._with(fun=fun)

    def condition(self):
        """The residual y − T(y, θ)."""
        return implicit.FixedPoint(_without_aux(self.fun, self.has_aux))
