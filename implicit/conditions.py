"""Optimality conditions: functions of (x, *args) that are zero at a solution.

Each condition is an `equinox.Module` with two facts about ∂F/∂x, `symmetric` and
`positive_definite`, which the linear solver of the implicit rule uses, and a `margin`: how far
the point is from one where F has no derivative.
"""

import abc
from collections.abc import Callable
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from jaxopt_ext.implicit.hoist import detach
from jaxopt_ext.implicit.tree import describe, subtract

Form = Literal["active", "complementarity", "fischer_burmeister", "barrier"]


def _require_callable(owner: object, **functions: Any) -> None:
    for name, fun in functions.items():
        if not callable(fun):
            raise TypeError(
                f"{type(owner).__name__}: {name} is a {type(fun).__name__}, expected a function"
            )


def _like(owner: object, name: str, tree: PyTree, like: PyTree, expected: str) -> None:
    """Refuse a tree whose structure or shapes differ from those of `like`."""
    same = jax.tree.structure(tree) == jax.tree.structure(like) and all(
        jnp.shape(a) == jnp.shape(b)
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True)
    )
    if not same:
        raise ValueError(
            f"{type(owner).__name__}: {name} is {describe(tree)}, expected {expected}, "
            f"{describe(like)}"
        )


def _apply(owner: object, name: str, fun: Callable, point: PyTree, *args: PyTree) -> PyTree:
    """fun(point, *args), which must be like the point: a projection, a prox, a map."""
    out = fun(point, *args)
    _like(owner, f"the output of {name}", out, point, "a PyTree like the point it was given")
    return out


def _scaled(tree: PyTree, scale: float | Array) -> PyTree:
    return jax.tree.map(lambda v: jnp.asarray(scale, v.dtype) * v, tree)


def _divided(tree: PyTree, scale: float | Array) -> PyTree:
    return jax.tree.map(lambda v: v / jnp.asarray(scale, v.dtype), tree)


def _largest(tree: PyTree) -> Array:
    leaves = [jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree) if leaf.size]
    return jnp.max(jnp.stack(leaves)) if leaves else jnp.zeros(())


class Condition(eqx.Module):
    """Base of all conditions: `condition(x, *args)` is a PyTree like `x`, zero at a solution.

    To write one, subclass it and define `__call__`; override the hints where they hold.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import Condition
        >>> class Cube(Condition):
        ...     def __call__(self, x, t):
        ...         return x**3 - t
        >>> print(Cube()(jnp.array(2.0), 8.0), Cube().symmetric, Cube().margin(jnp.array(2.0), 8.0))
        0.0 False inf
    """

    @property
    def symmetric(self) -> bool:
        """Whether ∂F/∂x equals its transpose."""
        return False

    @property
    def positive_definite(self) -> bool:
        """Whether ∂F/∂x is symmetric positive definite at the solution; believed, not checked."""
        return False

    @abc.abstractmethod
    def __call__(self, x: PyTree, *args: PyTree) -> PyTree:
        """Return the residual F(x, *args)."""

    def margin(self, x: PyTree, *args: PyTree) -> Float[Array, ""]:
        """How far x is from a point where F has no derivative; +inf where none is known.

        Args:
            x: The solution.
            args: Further arguments of the condition.

        Returns:
            A number ≥ 0. Close to zero, the implicit derivative is one-sided at best.
        """
        return jnp.asarray(jnp.inf, jnp.result_type(float, *jax.tree.leaves(x)))


class Root(Condition):
    """F(x, *args) = 0 as it stands.

    Args:
        fun: The function F.
        symmetric: Declares that ∂F/∂x equals its transpose at the solution.
        positive_definite: Declares that it is, besides, positive definite there. Both are
            believed, not checked; they choose the linear solver.

    Raises:
        TypeError: `fun` is not a function.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import Root
        >>> print(Root(lambda x, t: x**2 - t)(jnp.array(3.0), 9.0))
        0.0
    """

    fun: Callable[..., PyTree]
    symmetric: bool = eqx.field(static=True, default=False)  # pyright: ignore
    positive_definite: bool = eqx.field(static=True, default=False)  # pyright: ignore

    def __check_init__(self):
        _require_callable(self, fun=self.fun)

    def __call__(self, x: PyTree, *args: PyTree) -> PyTree:
        """Return F(x, *args)."""
        return self.fun(x, *args)


class FixedPoint(Condition):
    """x − T(x, *args) = 0.

    The sign makes ∂F/∂x the identity minus a contraction, so that dropping ∂T/∂x or summing its
    powers approximates the inverse.

    Args:
        fun: The map T.

    Raises:
        TypeError: `fun` is not a function.
        ValueError: T(x, *args) is not a PyTree like x.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import FixedPoint
        >>> print(FixedPoint(lambda x, t: x / 2 + t)(jnp.array(4.0), 2.0))
        0.0
    """

    fun: Callable[..., PyTree]

    def __check_init__(self):
        _require_callable(self, fun=self.fun)

    def __call__(self, x: PyTree, *args: PyTree) -> PyTree:
        """Return x − T(x, *args)."""
        return subtract(x, _apply(self, "fun", self.fun, x, *args))


class Stationary(Condition):
    """∇_x f(x, *args) = 0, the first-order condition of min f; ∂F/∂x is the Hessian.

    Args:
        fun: The function f, returning a scalar.
        strongly_convex: Declares that the Hessian is positive definite at the solution. The
            linear solve is then a Cholesky factorization or CG instead of LU or GMRES. It is
            believed, not checked; convexity alone is not enough (x⁴ has a zero Hessian at 0).

    Raises:
        TypeError: `fun` is not a function.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import Stationary
        >>> condition = Stationary(lambda x, t: (x - t) ** 2, strongly_convex=True)
        >>> print(condition(jnp.array(1.0), 3.0), condition.positive_definite)
        -4.0 True
    """

    fun: Callable[..., Array]
    strongly_convex: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        _require_callable(self, fun=self.fun)

    @property
    def symmetric(self) -> bool:
        """True: a Hessian."""
        return True

    @property
    def positive_definite(self) -> bool:
        """As declared by `strongly_convex`."""
        return self.strongly_convex

    def __call__(self, x: PyTree, *args: PyTree) -> PyTree:
        """Return ∇_x f(x, *args)."""
        return jax.grad(self.fun)(x, *args)


class LeastSquares(Condition):
    """J(x)ᵀ r(x, *args) = 0 with J = ∂r/∂x, the first-order condition of min ½‖r‖².

    ∂F/∂x is the full Hessian JᵀJ + Σ rᵢ∇²rᵢ, or with `gauss_newton=True` its first term alone,
    which is positive semidefinite and needs first derivatives of r only in x. The value F and
    ∂F/∂args stay the same. The derivative of the solution is then exact where Σ rᵢ∇²rᵢ = 0 (an
    exact fit, or r affine in x) and biased in proportion to ‖r‖ elsewhere. Second derivatives
    also leave out how J changes with x; they are exact where r is affine in x or the fit is exact
    for all args near by.

    Args:
        residual: The function r, returning a PyTree.
        gauss_newton: Whether ∂F/∂x is JᵀJ. Needs J of full column rank, because the linear
            solver is told that JᵀJ is positive definite.

    Raises:
        TypeError: `residual` is not a function.

    Reference:
        Nocedal and Wright, "Numerical Optimization", 2nd edition, 2006, section 10.3.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxopt_ext.implicit import LeastSquares
        >>> r = lambda x, t: jnp.array([x**2 - t, x])
        >>> full, short = LeastSquares(r), LeastSquares(r, gauss_newton=True)
        >>> x, t = jnp.array(1.0), jnp.array(3.0)
        >>> print(full(x, t), short(x, t), jax.grad(full)(x, t), jax.grad(short)(x, t))
        -3.0 -3.0 1.0 5.0
    """

    residual: Callable[..., PyTree]
    gauss_newton: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        _require_callable(self, residual=self.residual)

    @property
    def symmetric(self) -> bool:
        """True: a Hessian, or JᵀJ."""
        return True

    @property
    def positive_definite(self) -> bool:
        """With `gauss_newton=True`, for J of full column rank."""
        return self.gauss_newton

    def __call__(self, x: PyTree, *args: PyTree) -> PyTree:
        """Return J(x)ᵀ r(x, *args)."""
        if not self.gauss_newton:
            r, pull = jax.vjp(lambda x: self.residual(x, *args), x)
            return pull(r)[0]
        # J at a copy of x that has no derivative: ∂F/∂x is JᵀJ, ∂F/∂args is complete
        _, pull = jax.vjp(lambda x: self.residual(x, *args), detach(x))
        return pull(self.residual(x, *args))[0]


class ProjectedGradient(Condition):
    """x − P(x − η ∇_x f(x, *args), *args) = 0, the condition of min f over the set of P.

    Any step η > 0 has the same zeros and gives the same derivative. The conditioning of ∂F/∂x
    differs: on the active face it is max(1, ηL) / min(1, ημ) for μ ≤ ∇²f ≤ L, so take η = 1/L.

    Args:
        fun: f(x, *args) → scalar.
        projection: P(v, *args) → the point of the set nearest to v. It gets the same args as
            `fun` and ignores what it does not need, so the set may depend on them.
        step: η > 0, in units of x² per unit of f.

    Raises:
        TypeError: `fun` or `projection` is not a function.
        ValueError: The projection does not return a PyTree like x.

    Reference:
        Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022, table 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxopt_ext import implicit
        >>> f = lambda x, t: jnp.sum((x - t) ** 2)
        >>> condition = implicit.ProjectedGradient(f, lambda v, t: jnp.clip(v, 0.0, 1.0), step=0.5)
        >>> solution = lambda t: implicit.attach(condition, jnp.clip(t, 0.0, 1.0), t)
        >>> print(jax.grad(lambda t: jnp.sum(solution(t)))(jnp.array([-1.0, 0.5, 2.0])))
        [0. 1. 0.]
    """

    fun: Callable[..., Array]
    projection: Callable[..., PyTree]
    step: float | Array = 1.0

    def __check_init__(self):
        _require_callable(self, fun=self.fun, projection=self.projection)
        _require_positive(self, "step", self.step)

    def __call__(self, x: PyTree, *args: PyTree) -> PyTree:
        """Return x − P(x − η ∇f)."""
        moved = subtract(x, _scaled(jax.grad(self.fun)(x, *args), self.step))
        return subtract(x, _apply(self, "projection", self.projection, moved, *args))


class ProximalGradient(Condition):
    """(x − prox_{ηg}(x − η ∇_x f(x, *args))) / η = 0, the condition of min f + g.

    Divided by η, the residual has the units of a gradient and equals ∇f where g = 0. Any η > 0
    gives the same derivative; take η = 1/L for the conditioning (see `ProjectedGradient`). The
    derivative is exact where the prox is differentiable (for the lasso: no coordinate is on the
    edge of its threshold); elsewhere it is an element of a generalized Jacobian.

    Args:
        fun: f(x, *args) → scalar, the smooth part.
        prox: prox(v, step, *args) → argmin_x ½‖x − v‖² + step·g(x, *args). It gets the same args
            as `fun` and ignores what it does not need.
        step: η > 0, in units of x² per unit of f.

    Raises:
        TypeError: `fun` or `prox` is not a function.
        ValueError: The prox does not return a PyTree like x.

    Reference:
        Bertrand et al., "Implicit Differentiation for Fast Hyperparameter Selection in Non-Smooth
        Convex Learning", JMLR 2022.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxopt_ext import implicit
        >>> def soft(v, step, t):  # g = t ‖x‖₁
        ...     return jnp.sign(v) * jnp.maximum(jnp.abs(v) - step * t, 0.0)
        >>> b = jnp.array([3.0, -0.5, -2.0])
        >>> lasso = implicit.ProximalGradient(lambda x, t: jnp.sum((x - b) ** 2) / 2, soft)
        >>> solution = lambda t: implicit.attach(lasso, soft(b, 1.0, t), t)
        >>> print(jnp.abs(jax.jacobian(solution)(1.0)))
        [1. 0. 1.]
    """

    fun: Callable[..., Array]
    prox: Callable[..., PyTree]
    step: float | Array = 1.0

    def __check_init__(self):
        _require_callable(self, fun=self.fun, prox=self.prox)
        _require_positive(self, "step", self.step)

    def __call__(self, x: PyTree, *args: PyTree) -> PyTree:
        """Return (x − prox(x − η ∇f, η)) / η."""
        gradient = jax.grad(self.fun)(x, *args)
        return _prox_residual(self, "prox", self.prox, x, gradient, self.step, args)


def _require_positive(owner, name, value):
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number or eqx.is_array_like(value)) or (number and not value > 0):
        raise ValueError(f"{type(owner).__name__}: {name} is {value!r}, expected a number > 0")


def _prox_residual(owner, name, prox, x, gradient, step, args):
    moved = subtract(x, _scaled(gradient, step))
    if not isinstance(step, int | float):
        step = jnp.asarray(step, jnp.result_type(*jax.tree.leaves(x)))
    there = _apply(owner, name, prox, moved, step, *args)
    return _divided(subtract(x, there), step)


class MirrorDescent(Condition):
    """x − P_φ(∇φ(x) − η ∇_x f(x, *args), *args) = 0, the fixed point of a mirror-descent step.

    The step is taken in the dual variable ∇φ(x), and the Bregman projection maps a dual point to
    the set: for φ = Σ x log x on the simplex, ∇φ = log (up to a constant, which cancels) and P_φ
    is the softmax. No projection onto the boundary occurs, so F is as smooth as f inside the
    domain of φ. At an x with an entry on its boundary (a zero under the logarithm), cut the
    mirror map off, `jnp.log(jnp.maximum(x, tiny))`; the derivative of that entry is then zero.

    Args:
        fun: f(x, *args) → scalar.
        projection: P_φ(v, *args) → argmin over the set of φ(x) − ⟨v, x⟩, with v a dual point.
        mirror_map: ∇φ(x) → PyTree like x.
        step: η > 0, in units of φ per unit of f.

    Raises:
        TypeError: `fun`, `projection` or `mirror_map` is not a function.
        ValueError: One of the maps does not return a PyTree like x.

    Reference:
        Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022, table 1;
        Beck and Teboulle, "Mirror descent and nonlinear projected subgradient methods for convex
        optimization", Operations Research Letters 2003.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxopt_ext import implicit
        >>> f = lambda x, t: jnp.vdot(x, jnp.log(x) - t)  # minimized by softmax(t)
        >>> condition = implicit.MirrorDescent(f, lambda v, t: jax.nn.softmax(v), jnp.log, step=0.5)
        >>> solution = lambda t: implicit.attach(condition, jax.nn.softmax(t), t)
        >>> print(jnp.round(jax.jacobian(solution)(jnp.zeros(2)), 3))
        [[ 0.25 -0.25]
         [-0.25  0.25]]
    """

    fun: Callable[..., Array]
    projection: Callable[..., PyTree]
    mirror_map: Callable[[PyTree], PyTree]
    step: float | Array = 1.0

    def __check_init__(self):
        _require_callable(
            self, fun=self.fun, projection=self.projection, mirror_map=self.mirror_map
        )
        _require_positive(self, "step", self.step)

    def __call__(self, x: PyTree, *args: PyTree) -> PyTree:
        """Return x − P_φ(∇φ(x) − η ∇f)."""
        dual = _apply(self, "mirror_map", self.mirror_map, x)
        moved = subtract(dual, _scaled(jax.grad(self.fun)(x, *args), self.step))
        return subtract(x, _apply(self, "projection", self.projection, moved, *args))


class BlockCoordinate(Condition):
    """Per-block proximal-gradient residuals of min f(x_1, …, x_k, *args) + Σ_b g_b(x_b, *args).

    (x_b − prox_b(x_b − η_b ∇_b f)) / η_b = 0 for every block b. The derivative is that of
    `ProximalGradient` with one step; a step per block, η_b = 1/L_b, gives the better conditioned
    system when the blocks have different scales.

    Args:
        fun: f(x, *args) → scalar, where x is a tuple, list or dictionary of blocks (PyTrees).
        proxes: A container like x with `prox(v, step, *args)` per block, `None` for a block
            without g_b.
        step: One η > 0 for all blocks, or a container like x with one per block.

    Raises:
        TypeError: `fun` or a prox is not a function.
        ValueError: The containers do not match, or a prox does not return a PyTree like its block.

    Reference:
        Tseng, "Convergence of a Block Coordinate Descent Method for Nondifferentiable
        Minimization", JOTA 2001.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import BlockCoordinate
        >>> f = lambda x, t: (x["a"] - t) ** 2 / 2 + (x["b"] - x["a"]) ** 2 / 2
        >>> proxes = {"a": None, "b": lambda v, step, t: jnp.maximum(v, 0.0)}
        >>> x = {"a": jnp.array(-1.0), "b": jnp.array(0.0)}
        >>> residual = BlockCoordinate(f, proxes, step=0.5)(x, -2.0)
        >>> print(residual["a"], residual["b"])
        0.0 0.0
    """

    fun: Callable[..., Array]
    proxes: Any
    step: Any = 1.0

    def __check_init__(self):
        _require_callable(self, fun=self.fun)
        paths, proxes, structure = _blocks(self.proxes)
        if callable(self.proxes) or self.proxes is None:
            raise TypeError(
                f"BlockCoordinate: proxes is a {type(self.proxes).__name__}, expected a tuple, "
                "list or dictionary with one prox per block"
            )
        for path, prox in zip(paths, proxes, strict=True):
            if prox is not None and not callable(prox):
                raise TypeError(
                    f"BlockCoordinate: proxes{path} is a {type(prox).__name__}, expected a "
                    "function or None"
                )
        paths, steps, steps_structure = _blocks(self.step)
        if len(paths) != 1 or paths[0]:  # a container
            self._require_same("step", steps_structure, structure)
        for path, step in zip(paths, steps, strict=True):
            _require_positive(self, f"step{path}", step)

    def _require_same(self, name, structure, expected):
        if structure != expected:
            raise ValueError(
                f"BlockCoordinate: {name} has the blocks {structure}, expected those of proxes, "
                f"{expected}"
            )

    def __call__(self, x: PyTree, *args: PyTree) -> PyTree:
        """Return the residual of every block, in a container like x."""
        paths, proxes, expected = _blocks(self.proxes)
        _, blocks, structure = _blocks(x)
        self._require_same("x", structure, expected)
        _, gradients, _ = _blocks(jax.grad(self.fun)(x, *args))
        _, steps, steps_structure = _blocks(self.step)
        if steps_structure != structure:
            steps = [self.step] * len(blocks)
        residuals = [
            gradient
            if prox is None
            else _prox_residual(self, f"proxes{path}", prox, block, gradient, step, args)
            for path, prox, block, gradient, step in zip(
                paths, proxes, blocks, gradients, steps, strict=True
            )
        ]
        return jax.tree.unflatten(structure, residuals)


def _blocks(container):
    """Names, blocks and structure of a container, one level deep."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(
        container, is_leaf=lambda node: node is not container
    )
    return [jax.tree_util.keystr(path) for path, _ in pairs], [v for _, v in pairs], structure


class Multipliers(eqx.Module):
    """Lagrange multipliers of a nonlinear program, `None` where it has no such constraint.

    The Lagrangian is f + νᵀc_E + λᵀc_I + z_lᵀ(l − y) + z_uᵀ(y − u), with λ, z_l, z_u ≥ 0.

    Attributes:
        equality: ν, like the output of the equality constraints.
        inequality: λ ≥ 0, like the output of the inequality constraints.
        lower: z_l ≥ 0, like the variables.
        upper: z_u ≥ 0, like the variables.
    """

    equality: PyTree = None
    inequality: PyTree = None
    lower: PyTree = None
    upper: PyTree = None


class KKT(Condition):
    """Karush–Kuhn–Tucker conditions of min f(y) s.t. c_E(y) = 0, c_I(y) ≤ 0, l ≤ y ≤ u.

    The unknown is the pair `(y, multipliers)`. The residual is the gradient of the Lagrangian, c_E,
    and for every inequality c with multiplier λ (bounds are treated alike) a row by `form`:

    * `"active"`: c where λ > −c, else −λ; and only the active λ enter the Lagrangian. The
      indicator is locally constant away from weakly active constraints (λ = c = 0), so ∂F/∂x is
      symmetric and derivatives of all orders are exact under strict complementarity.
    * `"complementarity"`: λ·c. The same derivative, not symmetric, worse conditioned, and
      singular at a weakly active constraint.
    * `"fischer_burmeister"`: √(λ² + c²) − λ + c. The same derivative; at a weakly active
      constraint the row is linearized as c − λ, an element of the generalized Jacobian.
    * `"barrier"`: √(λ² + c² + 2κ) − λ + c, zero exactly where λ·c = −κ with λ > 0 > c: the
      optimality conditions of f − κ Σ log(−c). The derivative is smooth through every change of
      the active set and has a bias O(κ) away from weakly active constraints. It may be taken at
      the point of the barrier problem, where it is exact for that problem, or at the solution
      itself, where the rows are then off by about κ/max(λ, |c|).

    A variable with l = u counts as held by its lower bound, whose multiplier then has either sign.

    Args:
        fun: f(y, *args) → scalar.
        equality: c_E(y, *args) → PyTree, or `None`.
        inequality: c_I(y, *args) → PyTree, ≤ 0 where feasible, or `None`.
        lower: l, a PyTree like y, a single number, or `None`; −inf where there is none.
        upper: u, likewise, +inf where there is none.
        form: The form of complementarity, one of those above.
        kappa: κ > 0 for `form="barrier"`, in the units of f (as is λ·c); otherwise `None`.

    Raises:
        TypeError: A function is not one, or x is not a pair `(y, Multipliers)`.
        ValueError: Unknown `form`, `kappa` missing or not fitting the form, bounds or multipliers
            not like the variables or constraints they belong to.

    Reference:
        Jittorntrum, "Solution point differentiability without strict complementarity", 1984;
        active-set rows as in Amos and Kolter, "OptNet", ICML 2017, made symmetric; Fischer, "A
        special Newton-type optimization method", Optimization 1992; the barrier form as the
        relaxation of Tracy and Manchester, "On the Differentiability of the Primal-Dual
        Interior-Point Method", 2024.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import KKT, Multipliers
        >>> kkt = KKT(lambda y: jnp.sum(y**2) / 2, inequality=lambda y: 1.0 - y[0])
        >>> y, multipliers = jnp.array([1.0, 0.0]), Multipliers(inequality=jnp.array(1.0))
        >>> gradient, rows = kkt((y, multipliers))
        >>> print(gradient, rows.inequality)
        [0. 0.] 0.0
    """

    fun: Callable[..., Array]
    equality: Callable[..., PyTree] | None = None
    inequality: Callable[..., PyTree] | None = None
    lower: PyTree = None
    upper: PyTree = None
    form: Form = eqx.field(static=True, default="active")
    kappa: float | Array | None = None

    def __check_init__(self):
        _require_callable(self, fun=self.fun)
        for name in ("equality", "inequality"):
            if getattr(self, name) is not None:
                _require_callable(self, **{name: getattr(self, name)})
        _require_form(self, self.form, self.kappa)

    @property
    def symmetric(self) -> bool:
        """For `form="active"`, or without inequalities and bounds."""
        return self.form == "active" or not self._has_inequalities

    @property
    def _has_inequalities(self) -> bool:
        return not (self.inequality is None and self.lower is None and self.upper is None)

    def __call__(self, x: tuple[PyTree, Multipliers], *args: PyTree) -> tuple[PyTree, Multipliers]:
        """Return the gradient of the Lagrangian and the constraint rows."""
        y, multipliers = self._pair(x)
        (value, c_e, c_i), pull = jax.vjp(lambda y: self._functions(y, *args), y)
        below, above, fixed = self._bounds(y)
        self._require_multipliers(multipliers, c_e, c_i, y)
        nu, lam = multipliers.equality, multipliers.inequality
        z_l, z_u = multipliers.lower, multipliers.upper

        if self.form == "active":
            lam = _where(_active(lam, c_i), lam)
            z_l = _where(_active(z_l, below, fixed), z_l)
            z_u = _where(_active(z_u, above), z_u)
        if fixed is not None:
            z_u = jax.tree.map(lambda f, z: jnp.where(f, 0, z), fixed, z_u)

        gradient = pull((jnp.ones_like(value), nu, lam))[0]
        if z_l is not None:
            gradient = subtract(gradient, z_l)
        if z_u is not None:
            gradient = jax.tree.map(jnp.add, gradient, z_u)
        lower, upper = self._rows(below, multipliers.lower), self._rows(above, multipliers.upper)
        if fixed is not None:
            lower = jax.tree.map(jnp.where, fixed, below, lower)
            upper = jax.tree.map(
                lambda f, z, row: jnp.where(f, -z, row), fixed, multipliers.upper, upper
            )
        rows = self._rows(c_i, multipliers.inequality)
        return gradient, Multipliers(c_e, rows, lower, upper)

    def margin(self, x: tuple[PyTree, Multipliers], *args: PyTree) -> Float[Array, ""]:
        """Strict-complementarity margin: min |λ + c| over inequalities and bounds.

        That is |λ − |c|| at feasible points, and max(λ, |c|) at a solution: the change of λ and c
        together after which a constraint enters or leaves the active set. Variables with l = u
        and infinite bounds do not count. The smooth `form="barrier"` has no kink: +inf.

        Args:
            x: The pair `(y, multipliers)`.
            args: Further arguments of the functions.

        Returns:
            The margin, ≥ 0, in the mixed units of λ + c; +inf without inequalities and bounds.
        """
        y, multipliers = self._pair(x)
        _, c_e, c_i = self._functions(y, *args)
        self._require_multipliers(multipliers, c_e, c_i, y)
        if self.form == "barrier":
            return super().margin(y)
        below, above, fixed = self._bounds(y)

        def gaps(constraint, multiplier, skip=None):
            if constraint is None:
                return []
            gap = jax.tree.map(lambda c, v: jnp.abs(v + c), constraint, multiplier)
            if skip is not None:
                gap = jax.tree.map(lambda s, g: jnp.where(s, jnp.inf, g), skip, gap)
            return jax.tree.leaves(gap)

        leaves = (
            gaps(c_i, multipliers.inequality)
            + gaps(below, multipliers.lower, fixed)
            + gaps(above, multipliers.upper, fixed)
        )
        smallest = [jnp.min(leaf) for leaf in leaves if leaf.size]
        return jnp.min(jnp.stack([*smallest, super().margin(y)]))

    def multipliers(
        self, y: PyTree, *args: PyTree, tolerance: float | Array | None = None
    ) -> Multipliers:
        """Least-squares estimate of the multipliers from a primal point alone.

        Constraints with c ≥ −tolerance count as active. Their multipliers minimize the norm of
        the gradient of the Lagrangian (the smallest such multipliers, where there are several);
        negative estimates of λ, z_l, z_u are then set to zero. `from_primal` also returns what
        remains of the gradient. Costs one dense Jacobian of c_E and c_I and one least-squares
        solve; bounds need neither.

        Args:
            y: The primal point, close to a solution.
            args: Further arguments of the functions.
            tolerance: ≥ 0, in the units of the constraints; default eps^(1/3) of the dtype (6e-6
                in float64, 5e-3 in float32).

        Returns:
            The multipliers; they carry no derivative, so give the pair to `attach`.

        Reference:
            Nocedal and Wright, "Numerical Optimization", 2nd edition, 2006, chapter 18.

        Example:
            >>> import jax.numpy as jnp
            >>> from jaxopt_ext.implicit import KKT
            >>> kkt = KKT(lambda y: jnp.sum((y - 3.0) ** 2) / 2, inequality=lambda y: y[0] - 1.0)
            >>> print(jnp.round(kkt.multipliers(jnp.array([1.0, 3.0])).inequality, 4))
            2.0
        """
        (_, multipliers), _ = self.from_primal(y, *args, tolerance=tolerance)
        return multipliers

    def from_primal(
        self, y: PyTree, *args: PyTree, tolerance: float | Array | None = None
    ) -> tuple[tuple[PyTree, Multipliers], Float[Array, ""]]:
        """The unknown `(y, multipliers)` with estimated multipliers, and how well they fit.

        Args:
            y: The primal point, close to a solution.
            args: Further arguments of the functions.
            tolerance: See `multipliers`.

        Returns:
            The pair `(y, multipliers)`, and the largest absolute entry of the gradient of the
            Lagrangian there; a large one says that y is no solution, or that `tolerance` missed
            an active constraint.
        """
        y = detach(jax.tree.map(jnp.asarray, y))
        (value, c_e, c_i), pull = jax.vjp(lambda y: self._functions(y, *args), y)
        below, above, fixed = self._bounds(y)
        g_flat, unravel_y = ravel_pytree(pull((jnp.ones_like(value), *_zeros((c_e, c_i))))[0])
        g_flat = detach(g_flat)
        if tolerance is None:
            tolerance = float(jnp.finfo(g_flat.dtype).eps) ** (1 / 3)

        def near(constraint):
            return jax.tree.map(lambda c: c >= -jnp.asarray(tolerance, c.dtype), constraint)

        at_lower, at_upper = near(below), near(above)
        if fixed is not None:
            at_lower = jax.tree.map(jnp.logical_or, at_lower, fixed)
            at_upper = jax.tree.map(lambda a, f: a & ~f, at_upper, fixed)
        nowhere = jax.tree.map(lambda v: jnp.zeros(v.shape, bool), y)
        held = ravel_pytree(
            jax.tree.map(
                jnp.logical_or,
                nowhere if at_lower is None else at_lower,
                nowhere if at_upper is None else at_upper,
            )
        )[0]
        mu_flat, unravel_mu = ravel_pytree((c_e, c_i))
        nu = lam = None
        if mu_flat.size:
            in_use = ravel_pytree(
                (jax.tree.map(lambda c: jnp.ones(c.shape, bool), c_e), near(c_i))
            )[0]
            rows = jax.vmap(
                lambda mu: ravel_pytree(pull((jnp.zeros_like(value), *unravel_mu(mu)))[0])[0]
            )(jnp.eye(mu_flat.size, dtype=mu_flat.dtype))
            rows = detach(jnp.where(in_use[:, None], rows, 0))
            free = jnp.where(held[None, :], 0, rows)
            mu = jnp.linalg.lstsq(free.T, -jnp.where(held, 0, g_flat))[0]
            nu, lam = unravel_mu(mu)
            lam = jax.tree.map(lambda v: jnp.maximum(v, 0), lam)
            g_flat = g_flat + ravel_pytree((nu, lam))[0] @ rows
        gradient = unravel_y(g_flat)
        z_l = z_u = None
        if at_lower is not None:
            z_l = _where(at_lower, gradient)
            positive = jax.tree.map(lambda z: jnp.maximum(z, 0), z_l)
            z_l = positive if fixed is None else jax.tree.map(jnp.where, fixed, z_l, positive)
            gradient = subtract(gradient, z_l)
        if at_upper is not None:
            z_u = jax.tree.map(lambda a, g: jnp.where(a, jnp.maximum(-g, 0), 0), at_upper, gradient)
            gradient = jax.tree.map(jnp.add, gradient, z_u)
        return (y, Multipliers(nu, lam, z_l, z_u)), _largest(gradient)

    def _functions(self, y, *args):
        return (
            self.fun(y, *args),
            None if self.equality is None else self.equality(y, *args),
            None if self.inequality is None else self.inequality(y, *args),
        )

    def _bounds(self, y):
        """Return l − y, y − u (−inf where there is no bound), and where l = u; or `None`."""
        lower = None if self.lower is None else self._broadcast("lower", y)
        upper = None if self.upper is None else self._broadcast("upper", y)
        below = None if lower is None else subtract(lower, y)
        above = None if upper is None else subtract(y, upper)
        fixed = None
        if lower is not None and upper is not None:
            fixed = jax.tree.map(jnp.equal, lower, upper)
        return below, above, fixed

    def _broadcast(self, name, like):
        """A bound for every variable: PyTrees like the variables, or one number for all of them."""
        bound = getattr(self, name)
        structures = jax.tree.structure(bound), jax.tree.structure(like)
        try:
            if structures[0] == structures[1]:
                return jax.tree.map(
                    lambda b, v: jnp.broadcast_to(jnp.asarray(b, v.dtype), v.shape), bound, like
                )
            return jax.tree.map(
                lambda v: jnp.broadcast_to(jnp.asarray(bound, v.dtype), v.shape), like
            )
        except (TypeError, ValueError):
            raise ValueError(
                f"KKT: {name} is {describe(bound)}, expected one number or a PyTree like y, "
                f"{describe(like)}"
            ) from None

    def _pair(self, x):
        if isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], Multipliers):
            return x
        kind = type(x).__name__
        if isinstance(x, tuple):
            kind += f" of ({', '.join(type(part).__name__ for part in x)})"
        raise TypeError(
            f"KKT: x is a {kind}, expected a pair (y, Multipliers(...)); `from_primal` makes one "
            "from y"
        )

    def _require_multipliers(self, multipliers, c_e, c_i, y):
        lower = None if self.lower is None else y
        upper = None if self.upper is None else y
        for name, like, of in (
            ("equality", c_e, "the equality constraints"),
            ("inequality", c_i, "the inequality constraints"),
            ("lower", lower, "y"),
            ("upper", upper, "y"),
        ):
            value = getattr(multipliers, name)
            if like is None:
                if value is not None:
                    raise ValueError(
                        f"KKT: multipliers.{name} is {describe(value)}, expected None because "
                        f"the condition has no {name}"
                    )
            else:
                _like(self, f"multipliers.{name}", value, like, f"a PyTree like {of}")

    def _rows(self, constraint, multiplier):
        if constraint is None:
            return None

        def row(c, v):
            if self.form == "active":
                return jnp.where(v > -c, c, -v)
            if self.form == "complementarity":
                return v * c
            return _smooth_row(c, v, 0 if self.kappa is None else jnp.asarray(self.kappa, c.dtype))

        def guarded(c, v):
            # the constraint is −inf where a bound is absent; `where`, never a product, and on the
            # inside too, so that no derivative meets the infinity
            finite = jnp.isfinite(c)
            return jnp.where(finite, row(jnp.where(finite, c, -1), v), -v)

        return jax.tree.map(guarded, constraint, multiplier)


def _smooth_row(c, v, kappa):
    square = v * v + c * c + 2 * kappa
    positive = square > 0
    root = jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
    return root - v + c


def _active(multiplier, constraint, always=None):
    if constraint is None:
        return None
    active = jax.tree.map(lambda m, c: m > -c, multiplier, constraint)
    return active if always is None else jax.tree.map(jnp.logical_or, active, always)


def _where(mask, values):
    return jax.tree.map(lambda m, v: jnp.where(m, v, 0), mask, values)


def _zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def _require_form(owner, form, kappa):
    name = type(owner).__name__
    if form not in get_args(Form):
        choices = ", ".join(repr(choice) for choice in get_args(Form))
        raise ValueError(f"{name}: form is {form!r}, expected one of {choices}")
    if form == "barrier":
        if kappa is None:
            raise ValueError(f"{name}: kappa is None, expected a number > 0 with form='barrier'")
        _require_positive(owner, "kappa", kappa)
    elif kappa is not None:
        raise ValueError(
            f"{name}: kappa is {kappa!r}, expected None: only form='barrier' has one, and form is "
            f"{form!r}"
        )


class QuadraticProgram(Condition):
    """KKT conditions of min ½ yᵀQy + cᵀy s.t. A y = b, G y ≤ h.

    The unknown is the pair `(y, multipliers)` with the multipliers ν of A y = b and λ ≥ 0 of
    G y ≤ h. The data are the arguments, in the order (Q, c, A, b, G, h), so all of them have
    derivatives; each may be `None` (A with b, G with h). Only the symmetric part of Q counts.
    The linear system is regular if the active constraints are independent and Q is positive
    definite on the directions they leave free; for a linear program (Q = `None`), at a
    nondegenerate vertex.

    Args:
        form: The form of complementarity; see `KKT`.
        kappa: κ > 0 for `form="barrier"`, in the units of the objective; see `KKT`.

    Raises:
        TypeError: x is not a pair `(y, Multipliers)`.
        ValueError: Unknown `form`, a matrix without its right-hand side, or shapes that do not
            match.

    Reference:
        Amos and Kolter, "OptNet: Differentiable Optimization as a Layer in Neural Networks",
        ICML 2017.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxopt_ext import implicit
        >>> Q, A, b = jnp.eye(2), jnp.ones((1, 2)), jnp.ones(1)
        >>> def solution(c):  # the point of the line y₁ + y₂ = 1 closest to −c
        ...     nu = (-jnp.sum(c) - 1) / 2
        ...     x = -c - nu, implicit.Multipliers(equality=nu[None])
        ...     return implicit.attach(implicit.QuadraticProgram(), x, Q, c, A, b)[0]
        >>> print(jax.jacobian(solution)(jnp.zeros(2)))
        [[-0.5  0.5]
         [ 0.5 -0.5]]
    """

    form: Form = eqx.field(static=True, default="active")
    kappa: float | Array | None = None

    def __check_init__(self):
        _require_form(self, self.form, self.kappa)

    @property
    def symmetric(self) -> bool:
        """For `form="active"`."""
        return self.form == "active"

    def _kkt(self, y, Q=None, c=None, A=None, b=None, G=None, h=None) -> KKT:
        if jnp.ndim(y) != 1:
            raise ValueError(f"QuadraticProgram: y is {describe(y)}, expected a vector")
        if Q is None and c is None:
            raise ValueError("QuadraticProgram: Q and c are both None, expected at least one")
        _require_shape("QuadraticProgram", "Q", Q, (y.size, y.size))
        _require_shape("QuadraticProgram", "c", c, (y.size,))
        for matrix, vector, names in ((A, b, "Ab"), (G, h, "Gh")):
            if (matrix is None) != (vector is None):
                missing, given = names if matrix is None else names[::-1]
                raise ValueError(
                    f"QuadraticProgram: {missing} is None although {given} is given, expected "
                    "both or neither"
                )
            if vector is not None:
                _require_shape("QuadraticProgram", names[0], matrix, (jnp.size(vector), y.size))
                _require_shape("QuadraticProgram", names[1], vector, (jnp.size(vector),))

        def fun(y):
            value = jnp.zeros((), y.dtype) if c is None else jnp.vdot(c, y)
            return value if Q is None else value + jnp.vdot(y, Q @ y) / 2

        return KKT(
            fun,
            None if A is None else lambda y: A @ y - b,
            None if G is None else lambda y: G @ y - h,
            form=self.form,
            kappa=self.kappa,
        )

    def __call__(self, x: tuple[Array, Multipliers], *args: Array | None) -> PyTree:
        """Return the gradient of the Lagrangian and the constraint rows."""
        return self._kkt(_primal(x), *args)(x)

    def margin(self, x: tuple[Array, Multipliers], *args: Array | None) -> Float[Array, ""]:
        """Strict-complementarity margin min |λ + (G y − h)|; see `KKT.margin`.

        Args:
            x: The pair `(y, multipliers)`.
            args: (Q, c, A, b, G, h).

        Returns:
            The margin, ≥ 0; +inf without inequalities.
        """
        return self._kkt(_primal(x), *args).margin(x)

    def from_primal(
        self, y: Array, *args: Array | None, tolerance: float | Array | None = None
    ) -> tuple[tuple[Array, Multipliers], Float[Array, ""]]:
        """The unknown `(y, multipliers)` with estimated multipliers; see `KKT.from_primal`.

        Args:
            y: The primal point, close to a solution.
            args: (Q, c, A, b, G, h).
            tolerance: See `KKT.multipliers`.

        Returns:
            The pair `(y, multipliers)`, and the largest absolute entry of the gradient of the
            Lagrangian there.
        """
        return self._kkt(y, *args).from_primal(y, tolerance=tolerance)

    def multipliers(
        self, y: Array, *args: Array | None, tolerance: float | Array | None = None
    ) -> Multipliers:
        """Least-squares estimate of the multipliers; see `KKT.multipliers`.

        Args:
            y: The primal point, close to a solution.
            args: (Q, c, A, b, G, h).
            tolerance: See `KKT.multipliers`.

        Returns:
            The multipliers; they carry no derivative.
        """
        return self._kkt(y, *args).multipliers(y, tolerance=tolerance)


def _primal(x):
    return x[0] if isinstance(x, tuple) and x else x


def _require_shape(owner, name, array, shape):
    if array is not None and jnp.shape(array) != shape:
        raise ValueError(f"{owner}: {name} is {describe(array)}, expected shape {list(shape)}")


class ConicResidual(Condition):
    """Conditions of min ½ xᵀQx + cᵀx s.t. A x + s = b, s ∈ K, for a closed convex cone K.

    The unknown is the triple (x, y, s) with y in the dual cone K*, and the residual

        Q x + Aᵀy + c,    A x + s − b,    s − Π_K(s − y);

    the last is zero exactly where s ∈ K, y ∈ K*, ⟨s, y⟩ = 0 (Moreau). No homogeneous embedding
    is involved: the system is regular at a solution that is unique, with unique y and
    s − y where Π_K is differentiable (strict complementarity). With w = s − y it is the
    normal-map equation of Robinson. A linear program has Q = `None`.

    Args:
        projection: Π_K(v) → the point of K nearest to v, an array like v. For a product of cones,
            the projections on the parts of the vector.

    Raises:
        TypeError: `projection` is not a function, or the unknown is not a triple.
        ValueError: Shapes do not match.

    Reference:
        Busseti, Moursi, Boyd, "Solution refinement at regular points of conic problems",
        Computational Optimization and Applications 2019; Robinson, "Normal maps induced by linear
        transformations", Mathematics of Operations Research 1992.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxopt_ext import implicit
        >>> positive = implicit.ConicResidual(lambda v: jnp.maximum(v, 0.0))
        >>> def solution(b):  # min x s.t. x ≥ −b, as −x + s = b
        ...     one = jnp.ones(1)
        ...     xys = (-b, one, jnp.zeros(1))
        ...     return implicit.attach(positive, xys, one, -jnp.eye(1), b)[0]
        >>> print(jax.jacobian(solution)(jnp.array([2.0])))
        [[-1.]]
    """

    projection: Callable[[Array], Array]

    def __check_init__(self):
        _require_callable(self, projection=self.projection)

    def __call__(
        self,
        xys: tuple[Array, Array, Array],
        c: Float[Array, " n"],
        A: Float[Array, "m n"],
        b: Float[Array, " m"],
        Q: Float[Array, "n n"] | None = None,
    ) -> tuple[Array, Array, Array]:
        """Return the dual, primal and complementarity residuals."""
        if not (isinstance(xys, tuple) and len(xys) == 3):
            raise TypeError(
                f"ConicResidual: the unknown is a {type(xys).__name__}, expected a triple (x, y, s)"
            )
        x, y, s = xys
        n, m = jnp.size(c), jnp.size(b)
        for name, array, shape in (
            ("x", x, (n,)),
            ("y", y, (m,)),
            ("s", s, (m,)),
            ("A", A, (m, n)),
            ("Q", Q, (n, n)),
        ):
            _require_shape("ConicResidual", name, array, shape)
        dual = A.T @ y + c if Q is None else (Q + Q.T) @ x / 2 + A.T @ y + c
        return dual, A @ x + s - b, s - _apply(self, "projection", self.projection, s - y)


class PenaltySystem(Condition):
    """First-order system of a penalized bilevel problem; the unknown is the triple (x, y, z).

    With h = σ f + g: y minimizes h(x, ·), z minimizes g(x, ·), and x is stationary for
    ψ_σ(x) = (min h(x, ·) − min g(x, ·)) / σ:

        ∇_x f(x, y) + (∇_x g(x, y) − ∇_x g(x, z)) / σ = 0,
        ∇_y h(x, y) = 0,    ∇_z g(x, z) = 0,

    each as a projected-gradient fixed point v − P(v − ∇) where a set is given.

    Args:
        upper: f(x, y, *args) → scalar.
        lower: g(x, y, *args) → scalar.
        sigma: Penalty σ > 0, dimensionless.
        upper_set: Projection onto the set of x, or `None`.
        lower_set: Projection onto the set of y and z, or `None`.

    Reference:
        Kwon, Kwon, Wright, Nowak, "On Penalty Methods for Nonconvex Bilevel Optimization and
        First-Order Stochastic Approximation", ICLR 2024.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import PenaltySystem
        >>> f = lambda x, y: (y - 1.0) ** 2 / 2
        >>> g = lambda x, y: (y - x) ** 2 / 2
        >>> one = jnp.array(1.0)
        >>> residual = PenaltySystem(f, g, sigma=0.1)((one, one, one))
        >>> print(*residual)
        0.0 0.0 0.0
    """

    upper: Callable[..., Array]
    lower: Callable[..., Array]
    sigma: float | Array
    upper_set: Callable[[PyTree], PyTree] | None = None
    lower_set: Callable[[PyTree], PyTree] | None = None

    def __call__(
        self, xyz: tuple[PyTree, PyTree, PyTree], *args: PyTree
    ) -> tuple[PyTree, PyTree, PyTree]:
        """Return the three gradient (or projected-gradient) residuals."""
        x, y, z = xyz
        upper_x, upper_y = jax.grad(self.upper, argnums=(0, 1))(x, y, *args)
        lower_x, lower_y = jax.grad(self.lower, argnums=(0, 1))(x, y, *args)
        other_x, other_z = jax.grad(self.lower, argnums=(0, 1))(x, z, *args)
        grad_x = jax.tree.map(lambda f, g, o: f + (g - o) / self.sigma, upper_x, lower_x, other_x)
        grad_y = jax.tree.map(lambda f, g: self.sigma * f + g, upper_y, lower_y)
        return (
            _projected(x, grad_x, self.upper_set),
            _projected(y, grad_y, self.lower_set),
            _projected(z, other_z, self.lower_set),
        )


def _projected(x, gradient, projection):
    if projection is None:
        return gradient
    moved = projection(jax.tree.map(jnp.subtract, x, gradient))
    return jax.tree.map(jnp.subtract, x, moved)
