"""Linear solves for the implicit rule.

A linear solver is a callable `(operator, rhs) -> solution` on PyTrees. It must be built from
operations that JAX can transpose: dense factorizations from `jnp.linalg`, or an iterative method
inside `jax.lax.custom_linear_solve`. Then one rule in forward mode gives all the others.

A solver that only approximates the inverse is differentiated as if it were the inverse: every
tangent and every cotangent is one more solve with the same solver. No solver raises when it does
not reach its tolerance; it returns what it has, and `solve_linear` reports how good that is.
"""

import abc
import numbers
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from jaxopt_ext.implicit.hoist import detach, vary_like
from jaxopt_ext.implicit.tree import subtract, varying_axes


def _number(owner: Any, name: str, value: Any, *, positive: bool, optional: bool = False) -> None:
    """Refuse a setting that is no number, or not one above zero; arrays pass unread."""
    if (optional and value is None) or eqx.is_array(value):
        return
    good = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not good or value != value or (positive and not value > 0):  # type: ignore[operator]
        expected = "a number > 0" if positive else "a number"
        raise ValueError(f"{type(owner).__name__}: {name} is {value!r}, expected {expected}")


def _integer(owner: Any, name: str, value: Any, least: int, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"{type(owner).__name__}: {name} is {value!r}, expected an integer >= {least}"
        )


def _solver(owner: Any, name: str, value: Any) -> None:
    if not callable(value) or isinstance(value, type):
        raise ValueError(
            f"{type(owner).__name__}: {name} is {value!r}, expected a linear solver such as Dense()"
        )


def _key(owner: Any, value: Any) -> None:
    if not eqx.is_array(value) or not (
        jnp.issubdtype(value.dtype, jax.dtypes.prng_key) or value.dtype == jnp.uint32
    ):
        raise ValueError(
            f"{type(owner).__name__}: key is {value!r}, expected a random key such as "
            "jax.random.key(0)"
        )


def _dtype(tree: PyTree) -> Any:
    return jnp.result_type(*jax.tree.leaves(tree))


def _dot(a: PyTree, b: PyTree) -> Array:
    products = jax.tree.map(lambda u, v: jnp.sum(u * v), a, b)
    return jnp.sum(jnp.stack(jax.tree.leaves(products)))


def _times(scalar: Any, tree: PyTree) -> PyTree:
    return jax.tree.map(lambda v: jnp.asarray(scalar, v.dtype) * v, tree)


def _add(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, a, b)


def _where(condition: Array, a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(lambda u, v: jnp.where(condition, u, v), a, b)


def _unit(tree: PyTree) -> tuple[PyTree, Array]:
    """The tree over its largest entry, and that entry (1 where it is zero or not finite)."""
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(v), initial=0) for v in jax.tree.leaves(tree)]))
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return jax.tree.map(lambda v: v / scale.astype(v.dtype), tree), scale


def _norm(tree: PyTree) -> Array:
    """The 2-norm, safe where squares of the entries underflow or overflow."""
    unit, scale = _unit(tree)
    return jnp.sqrt(_dot(unit, unit)) * scale


def _varies(tree: PyTree) -> bool:
    """Whether a leaf varies over a mesh axis that `shard_map(..., check_vma=True)` tracks."""
    return any(varying_axes(leaf) for leaf in jax.tree.leaves(tree))


class LinearOperator(eqx.Module):
    """A square linear map on PyTrees with what is known of its structure.

    Attributes:
        mv: The map, PyTree to PyTree of the same structure.
        structure: A PyTree with the shapes and dtypes of its argument.
        symmetric: Whether the matrix equals its transpose.
        positive_definite: Whether it is, besides, symmetric positive definite. It is believed,
            not checked.
    """

    mv: Callable[[PyTree], PyTree]
    structure: PyTree
    symmetric: bool = eqx.field(static=True, default=False)
    positive_definite: bool = eqx.field(static=True, default=False)

    @property
    def size(self) -> int:
        """Number of unknowns."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.structure))

    def as_matrix(self) -> Float[Array, "n n"]:
        """The dense matrix on raveled PyTrees; costs `n` products.

        Built by rows, with the transposed map: that leaves no transposition to do, and XLA turns
        the products of a Jacobian into better kernels that way round. By columns where the map
        cannot be transposed (a condition that has a forward derivative only).
        """
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.structure)
        zeros = vary_like(zeros, self.structure)
        flat, unravel = ravel_pytree(zeros)
        identity = vary_like(jnp.eye(flat.size, dtype=flat.dtype), self.structure)

        def apply(v):
            return ravel_pytree(self.mv(unravel(v)))[0]

        try:
            pull = jax.linear_transpose(apply, flat)
            return jax.vmap(lambda v: pull(v)[0])(identity)
        except (NotImplementedError, ValueError):
            # How JAX says that it cannot transpose the map: the first where a primitive has no
            # rule (sort, a `custom_vjp`), the second for `while_loop` and callbacks. The columns
            # are the same matrix; an error of the map itself is raised again here.
            return jax.vmap(apply)(identity).T

    def transpose(self) -> "LinearOperator":
        """The transposed operator, itself where the operator is symmetric."""
        if self.symmetric or self.positive_definite:
            return self
        pull = jax.linear_transpose(self.mv, self.structure)
        return LinearOperator(lambda v: pull(v)[0], self.structure)


@runtime_checkable
class LinearSolver(Protocol):
    """The protocol: any callable `(operator, rhs) -> solution` that JAX can transpose."""

    def __call__(self, operator: LinearOperator, rhs: PyTree) -> PyTree:
        """Return x with operator(x) = rhs."""
        ...


class LinearStatus(eqx.Module):
    """How well x solves A x = b; see `solve_linear`.

    Attributes:
        residual: ‖A x − b‖ / ‖b‖ in the 2-norm, dimensionless; ‖A x‖ where b = 0.
        converged: Whether `residual` is within the tolerance that was asked for.
    """

    residual: Float[Array, ""]
    converged: Bool[Array, ""]


def _varied(solver: Any, operator: LinearOperator, rhs: PyTree) -> Any:
    """The solver with arrays that vary, inside `shard_map`, wherever the system does.

    A constant that a solve closes over comes back as a varying residual in the backward pass.
    """
    dynamic, static = eqx.partition(solver, eqx.is_array)
    if not _varies((rhs, operator.structure)):
        return solver
    return eqx.combine(vary_like(dynamic, rhs, operator.structure), static)


def _as_inverse(operator: LinearOperator, rhs: PyTree, solve, transpose_solve=None) -> PyTree:
    """`solve(mv, rhs)`, taken for the inverse by every derivative."""
    return jax.lax.custom_linear_solve(
        operator.mv,
        vary_like(rhs, operator.structure),
        solve,
        transpose_solve=solve if transpose_solve is None else transpose_solve,
        symmetric=operator.symmetric or operator.positive_definite,
    )


def _like(operator: LinearOperator, mv: Callable[[PyTree], PyTree]) -> LinearOperator:
    return LinearOperator(mv, operator.structure, operator.symmetric, operator.positive_definite)


class Dense(eqx.Module):
    """Direct solve with the dense matrix: Cholesky if positive definite, else LU.

    Costs `n` operator products and O(n³) operations; one factorization serves all right-hand
    sides of a `vmap` over cotangents.

    Reference:
        Golub, Van Loan, "Matrix Computations", 4th ed. (2013), chapters 3 and 4.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import Dense, LinearOperator
        >>> A = jnp.array([[2.0, 1.0], [1.0, 3.0]])
        >>> operator = LinearOperator(lambda v: A @ v, jnp.zeros(2), symmetric=True)
        >>> print(Dense()(operator, jnp.array([3.0, 4.0])))
        [1. 1.]
    """

    def __call__(self, operator: LinearOperator, rhs: PyTree) -> PyTree:
        """Return x with operator(x) = rhs."""
        matrix = operator.as_matrix()
        flat, unravel = ravel_pytree(rhs)
        if operator.positive_definite:
            factor = jax.scipy.linalg.cho_factor(matrix, lower=True)
            return unravel(jax.scipy.linalg.cho_solve(factor, flat))
        return unravel(jnp.linalg.solve(matrix, flat))


class _Krylov(eqx.Module):
    """Shared by the iterative methods: scaled right-hand side, warm start, transposable solve.

    The right-hand side is divided by its largest entry first. Cotangents can be as small as the
    loss that a user chose, and squared norms of theirs underflow.
    """

    rtol: Any = None
    max_steps: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        _number(self, "rtol", self.rtol, positive=True, optional=True)
        _integer(self, "max_steps", self.max_steps, 1, optional=True)

    @abc.abstractmethod
    def method(self, mv, rhs, tol, max_steps) -> PyTree:
        """Run the iteration on a right-hand side of unit size."""

    def __call__(self, operator: LinearOperator, rhs: PyTree) -> PyTree:
        """Return x with operator(x) = rhs to relative residual `rtol`."""
        return self.start_at(None, operator, rhs)

    def start_at(self, x0: PyTree | None, operator: LinearOperator, rhs: PyTree) -> PyTree:
        """The same, starting at `x0` wherever `x0` is better than zero."""
        dtype = _dtype(rhs)
        self = _varied(self, operator, rhs)
        tol = float(jnp.finfo(dtype).eps) ** 0.75 if self.rtol is None else self.rtol
        tol = tol.astype(dtype) if eqx.is_array(tol) else float(tol)
        max_steps = min(10 * operator.size, 1000) if self.max_steps is None else self.max_steps

        def solve(mv, b):
            unit, scale = _unit(b)
            if x0 is None:
                return _times(scale, self.method(mv, unit, tol, max_steps))
            start = jax.tree.map(lambda v: v / scale.astype(v.dtype), x0)
            residual = subtract(unit, mv(start))
            # derivatives bring other right-hand sides, for which x0 may be a bad start
            better = _norm(residual) < _norm(unit)
            start = _where(better, start, jax.tree.map(jnp.zeros_like, start))
            residual = _where(better, residual, unit)
            size = _norm(residual)
            # the tolerance of the correction: relative to b, not to what is left of it
            relative = jnp.where(size > 0, tol * _norm(unit) / jnp.where(size > 0, size, 1), tol)
            residual, left = _unit(residual)
            correction = _times(left, self.method(mv, residual, relative, max_steps))
            return _times(scale, _add(start, correction))

        return _as_inverse(operator, rhs, solve)


class CG(_Krylov):
    """Conjugate gradients (JAX's own), for positive definite operators; matrix-free.

    One operator product and O(n) per step; the steps grow like the square root of the condition
    number.

    Args:
        rtol: Relative residual ‖A x − b‖ / ‖b‖, dimensionless; `None` means eps^(3/4) of the
            dtype.
        max_steps: Iterations at most; `None` means min(10 n, 1000).

    Raises:
        ValueError: A setting is out of its range.

    Reference:
        Hestenes, Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", J. Res.
        Nat. Bur. Standards 49 (1952).

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import CG, LinearOperator
        >>> d = jnp.array([1.0, 2.0, 4.0])
        >>> operator = LinearOperator(lambda v: d * v, d, positive_definite=True)
        >>> x = CG()(operator, jnp.array([1e-30, 2e-30, 4e-30]))
        >>> bool(jnp.allclose(x, 1e-30, rtol=1e-5, atol=0.0))
        True
    """

    def method(self, mv, rhs, tol, max_steps) -> PyTree:
        """Run the iteration on a right-hand side of unit size."""
        return jax.scipy.sparse.linalg.cg(mv, rhs, tol=tol, maxiter=max_steps)[0]


def minres(mv, b: PyTree, tol: Array, max_steps: int) -> tuple[PyTree, Array]:
    """Paige and Saunders' recurrences: Lanczos with a QR factorization that is updated.

    Args:
        mv: v → A v, symmetric.
        b: Right-hand side.
        tol: Relative residual to reach.
        max_steps: Iterations at most.

    Returns:
        x with A x ≈ b, and the number of iterations.
    """
    dtype = _dtype(b)
    eps = 10 * float(jnp.finfo(dtype).eps)
    flat = float(jnp.finfo(dtype).eps) ** 0.8
    norm = jnp.sqrt(_dot(b, b))
    zeros = jax.tree.map(jnp.zeros_like, b)
    zero = jnp.zeros_like(norm)
    state = dict(
        x=zeros, old=zeros, new=b, w=zeros, w_old=zeros, beta_old=zero + 1, beta=norm,
        cosine=zero - 1, sine=zero, epsilon=zero, delta_bar=zero, size=zero, left=norm,
        stationary=zero > 1, k=0,
    )  # fmt: skip
    state = vary_like({k: v for k, v in state.items() if k != "k"}, b) | {"k": 0}

    def proceed(s):
        going = (s["k"] < max_steps) & (s["left"] > tol * norm) & ~s["stationary"]
        return going & (s["beta"] > eps * s["size"])  # else the Krylov space is exhausted

    def step(s):
        v = _times(1 / s["beta"], s["new"])
        u = subtract(mv(v), _times(s["beta"] / s["beta_old"], s["old"]))
        alpha = _dot(v, u)
        u = subtract(u, _times(alpha / s["beta"], s["new"]))
        beta = jnp.sqrt(_dot(u, u))
        size = jnp.maximum(s["size"], jnp.maximum(jnp.abs(alpha), beta))
        delta = s["cosine"] * s["delta_bar"] + s["sine"] * alpha
        gamma_bar = s["sine"] * s["delta_bar"] - s["cosine"] * alpha
        delta_bar = -s["cosine"] * beta
        # ‖A r‖ tiny beside ‖A‖ ‖r‖: a least-squares solution of an inconsistent system
        stationary = jnp.hypot(gamma_bar, delta_bar) <= flat * size
        gamma = jnp.hypot(gamma_bar, beta)
        regular = (gamma > eps * size) & ~stationary
        gamma = jnp.where(regular, gamma, 1)
        cosine, sine = gamma_bar / gamma, beta / gamma
        w = subtract(v, _add(_times(s["epsilon"], s["w_old"]), _times(delta, s["w"])))
        w = _times(1 / gamma, w)
        moved = _add(s["x"], _times(cosine * s["left"], w))
        return dict(
            x=_where(regular, moved, s["x"]), old=s["new"], new=u, w=w, w_old=s["w"],
            beta_old=s["beta"], beta=beta, cosine=cosine, sine=sine, epsilon=s["sine"] * beta,
            delta_bar=delta_bar, size=size, left=jnp.where(regular, sine * s["left"], s["left"]),
            stationary=stationary | ~regular, k=s["k"] + 1,
        )  # fmt: skip

    found = jax.lax.while_loop(proceed, step, state)
    return found["x"], jnp.asarray(found["k"])


class MINRES(_Krylov):
    """Minimum residual method, for symmetric operators that may be indefinite; matrix-free.

    One operator product and O(n) per step. The residual never grows from one step to the next.
    KKT systems and Hessians at saddle points are its home.

    Args:
        rtol: Relative residual ‖A x − b‖ / ‖b‖, dimensionless; `None` means eps^(3/4) of the
            dtype.
        max_steps: Iterations at most; `None` means min(10 n, 1000).

    Raises:
        ValueError: A setting is out of its range.

    Reference:
        Paige, Saunders, "Solution of Sparse Indefinite Systems of Linear Equations", SIAM J.
        Numer. Anal. 12 (1975).

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import MINRES, LinearOperator
        >>> d = jnp.array([1.0, -2.0, 4.0])
        >>> operator = LinearOperator(lambda v: d * v, d, symmetric=True)
        >>> print(jnp.round(MINRES()(operator, jnp.array([1.0, 2.0, 4.0])), 4))
        [ 1. -1.  1.]
    """

    def method(self, mv, rhs, tol, max_steps) -> PyTree:
        """Run the iteration on a right-hand side of unit size."""
        return minres(mv, rhs, tol, max_steps)[0]


def _refuse_varying(owner: Any, rhs: PyTree) -> None:
    """Say what to do where JAX's `gmres` and `bicgstab` cannot run (jax 0.10).

    Their loops start from constants, which are the same on all devices, and go on with what the
    right-hand side makes different; `check_vma` takes that for a change of type and raises a
    TypeError about the loop's carry, which nobody could act on.
    """
    if _varies(rhs):
        raise NotImplementedError(
            f"{type(owner).__name__}: JAX's implementation does not run inside "
            "shard_map(..., check_vma=True); use check_vma=False, or Dense, NormalCG or MINRES"
        )


class GMRES(_Krylov):
    """Restarted GMRES (JAX's own), for any nonsingular operator; matrix-free.

    One operator product per inner step, `restart` of them between restarts, and `restart + 1`
    vectors of memory.

    Args:
        rtol: Relative residual ‖A x − b‖ / ‖b‖, dimensionless; `None` means eps^(3/4) of the
            dtype.
        max_steps: Restarts at most; `None` means min(10 n, 1000).
        restart: Size of the Krylov space between restarts.

    Raises:
        ValueError: A setting is out of its range.
        NotImplementedError: It is called inside `shard_map(..., check_vma=True)`, where JAX's
            implementation does not run.

    Reference:
        Saad, Schultz, "GMRES: A Generalized Minimal Residual Algorithm for Solving Nonsymmetric
        Linear Systems", SIAM J. Sci. Stat. Comput. 7 (1986).

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import GMRES, LinearOperator
        >>> operator = LinearOperator(lambda v: jnp.array([v[0] + v[1], -v[1]]), jnp.zeros(2))
        >>> print(jnp.round(GMRES()(operator, jnp.array([3.0, -1.0])), 4))
        [2. 1.]
    """

    restart: int = eqx.field(static=True, default=20)

    def __check_init__(self):
        _integer(self, "restart", self.restart, 1)

    def method(self, mv, rhs, tol, max_steps) -> PyTree:
        """Run the iteration on a right-hand side of unit size."""
        _refuse_varying(self, rhs)
        return jax.scipy.sparse.linalg.gmres(
            mv, rhs, tol=tol, maxiter=max_steps, restart=self.restart, solve_method="batched"
        )[0]


class BiCGStab(_Krylov):
    """Stabilized biconjugate gradients (JAX's own), for nonsymmetric operators; matrix-free.

    Two operator products and O(n) per step, with less memory than GMRES. It can break down; then
    the last iterate is kept and `solve_linear` says that it did not converge.

    Args:
        rtol: Relative residual ‖A x − b‖ / ‖b‖, dimensionless; `None` means eps^(3/4) of the
            dtype.
        max_steps: Iterations at most; `None` means min(10 n, 1000).

    Raises:
        ValueError: A setting is out of its range.
        NotImplementedError: It is called inside `shard_map(..., check_vma=True)`, where JAX's
            implementation does not run.

    Reference:
        van der Vorst, "Bi-CGSTAB: A Fast and Smoothly Converging Variant of Bi-CG for the
        Solution of Nonsymmetric Linear Systems", SIAM J. Sci. Stat. Comput. 13 (1992).

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import BiCGStab, LinearOperator
        >>> A = jnp.array([[2.0, 1.0], [0.0, 3.0]])
        >>> operator = LinearOperator(lambda v: A @ v, jnp.zeros(2))
        >>> print(jnp.round(BiCGStab()(operator, jnp.array([3.0, 3.0])), 4))
        [1. 1.]
    """

    def method(self, mv, rhs, tol, max_steps) -> PyTree:
        """Run the iteration on a right-hand side of unit size."""
        _refuse_varying(self, rhs)
        return jax.scipy.sparse.linalg.bicgstab(mv, rhs, tol=tol, maxiter=max_steps)[0]


class NormalCG(_Krylov):
    """Conjugate gradients on AᵀA x = Aᵀb, for any nonsingular operator; matrix-free.

    Two operator products (one of them transposed) and O(n) per step. The condition number is
    squared: the steps grow like the condition number itself. Where A is singular it tends to the
    solution of least norm of the least-squares problem.

    Args:
        rtol: Relative residual ‖Aᵀ(A x − b)‖ / ‖Aᵀb‖ of the normal equations, dimensionless;
            `None` means eps^(3/4) of the dtype. ‖A x − b‖ / ‖b‖ can be larger by the condition
            number.
        max_steps: Iterations at most; `None` means min(10 n, 1000).

    Raises:
        ValueError: A setting is out of its range.

    Reference:
        Hestenes, Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", J. Res.
        Nat. Bur. Standards 49 (1952), section 10.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import LinearOperator, NormalCG
        >>> A = jnp.array([[0.0, 2.0], [-1.0, 0.0]])
        >>> operator = LinearOperator(lambda v: A @ v, jnp.zeros(2))
        >>> print(jnp.round(NormalCG()(operator, jnp.array([2.0, -3.0])), 4))
        [3. 1.]
    """

    def method(self, mv, rhs, tol, max_steps) -> PyTree:
        """Run the iteration on a right-hand side of unit size."""
        pull = jax.linear_transpose(mv, rhs)
        normal = pull(rhs)[0]
        normal, scale = _unit(normal)
        x = jax.scipy.sparse.linalg.cg(
            lambda v: pull(mv(v))[0], normal, tol=tol, maxiter=max_steps
        )[0]
        return _times(scale, x)


def _lsmr(mv, b: PyTree, tol: Array, max_steps: int) -> PyTree:
    """Fong and Saunders' recurrences: Golub–Kahan bidiagonalization and two QR factorizations."""
    pull = jax.linear_transpose(mv, b)
    tiny = float(jnp.finfo(_dtype(b)).tiny)
    flat = float(jnp.finfo(_dtype(b)).eps)

    def normalized(v):
        size = jnp.sqrt(_dot(v, v))
        return _times(1 / jnp.maximum(size, tiny), v), size

    u, beta = normalized(b)
    v, alpha = normalized(pull(u)[0])
    zeros = jax.tree.map(jnp.zeros_like, b)
    zero, one = jnp.zeros_like(beta), jnp.ones_like(beta)
    state = dict(
        x=zeros, u=u, v=v, h=v, h_bar=zeros, alpha=alpha, alpha_bar=alpha, rho=one, rho_bar=one,
        c_bar=one, s_bar=zero, zeta=zero, zeta_bar=alpha * beta, beta_dd=beta, beta_d=zero,
        rho_d=one, tau=zero, theta=zero, d=zero, size=alpha**2, left=beta,
    )  # fmt: skip
    state = vary_like(state, b) | {"k": 0}

    def proceed(s):
        unsolved = s["left"] > tol * beta
        # ‖Aᵀr‖ tiny beside ‖A‖ ‖r‖: a least-squares solution of an inconsistent system
        moving = jnp.abs(s["zeta_bar"]) > flat * jnp.sqrt(s["size"]) * s["left"]
        return (s["k"] < max_steps) & unsolved & moving

    def step(s):
        u, beta = normalized(subtract(mv(s["v"]), _times(s["alpha"], s["u"])))
        v, alpha = normalized(subtract(pull(u)[0], _times(beta, s["v"])))
        rho = jnp.hypot(s["alpha_bar"], beta)
        c, sine = s["alpha_bar"] / rho, beta / rho
        theta_new, alpha_bar = sine * alpha, c * alpha
        theta_bar, rho_temp = s["s_bar"] * rho, s["c_bar"] * rho
        rho_bar = jnp.hypot(rho_temp, theta_new)
        c_bar, s_bar = rho_temp / rho_bar, theta_new / rho_bar
        zeta, zeta_bar = c_bar * s["zeta_bar"], -s_bar * s["zeta_bar"]
        along = theta_bar * rho / (s["rho"] * s["rho_bar"])
        h_bar = subtract(s["h"], _times(along, s["h_bar"]))
        x = _add(s["x"], _times(zeta / (rho * rho_bar), h_bar))
        h = subtract(v, _times(theta_new / rho, s["h"]))
        # ‖r‖, by a third sequence of rotations
        beta_hat, beta_dd = c * s["beta_dd"], -sine * s["beta_dd"]
        rho_tilde = jnp.hypot(s["rho_d"], theta_bar)
        c_tilde, s_tilde = s["rho_d"] / rho_tilde, theta_bar / rho_tilde
        theta, rho_d = s_tilde * rho_bar, c_tilde * rho_bar
        beta_d = -s_tilde * s["beta_d"] + c_tilde * beta_hat
        tau = (s["zeta"] - s["theta"] * s["tau"]) / rho_tilde
        tau_d = (zeta - theta * tau) / rho_d
        left = jnp.sqrt(s["d"] + (beta_d - tau_d) ** 2 + beta_dd**2)
        return dict(
            x=x, u=u, v=v, h=h, h_bar=h_bar, alpha=alpha, alpha_bar=alpha_bar, rho=rho,
            rho_bar=rho_bar, c_bar=c_bar, s_bar=s_bar, zeta=zeta, zeta_bar=zeta_bar,
            beta_dd=beta_dd, beta_d=beta_d, rho_d=rho_d, tau=tau, theta=theta, d=s["d"],
            size=s["size"] + beta**2 + alpha**2, left=left, k=s["k"] + 1,
        )  # fmt: skip

    return jax.lax.while_loop(proceed, step, state)["x"]


class LSMR(_Krylov):
    """Least-squares minimum residual method, for any operator; matrix-free.

    Two operator products (one of them transposed) and O(n) per step. In exact arithmetic it is
    MINRES on AᵀA x = Aᵀb, but it never forms the squared matrix: it measures ‖A x − b‖ itself and
    stays accurate where `NormalCG` does not. Where A is singular it tends to the solution of least
    norm of the least-squares problem.

    Args:
        rtol: Relative residual ‖A x − b‖ / ‖b‖, dimensionless; `None` means eps^(3/4) of the
            dtype. It also stops at a least-squares solution of an inconsistent system.
        max_steps: Iterations at most; `None` means min(10 n, 1000).

    Raises:
        ValueError: A setting is out of its range.

    Reference:
        Fong, Saunders, "LSMR: An Iterative Algorithm for Sparse Least-Squares Problems", SIAM J.
        Sci. Comput. 33 (2011).

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import LSMR, LinearOperator
        >>> A = jnp.array([[0.0, 2.0], [-1.0, 0.0]])
        >>> operator = LinearOperator(lambda v: A @ v, jnp.zeros(2))
        >>> print(jnp.round(LSMR()(operator, jnp.array([2.0, -3.0])), 4))
        [3. 1.]
    """

    def method(self, mv, rhs, tol, max_steps) -> PyTree:
        """Run the iteration on a right-hand side of unit size."""
        return _lsmr(mv, rhs, tol, max_steps)


class Auto(eqx.Module):
    """Dense up to a size, matrix-free above it.

    Above `direct_below` unknowns: CG where the operator is positive definite, MINRES where it is
    symmetric, else GMRES.

    Args:
        direct_below: Largest number of unknowns that is solved by a dense factorization.

    Raises:
        ValueError: `direct_below` is not an integer >= 0.

    Reference:
        Barrett et al., "Templates for the Solution of Linear Systems", SIAM (1994), figure D.1.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import Auto, LinearOperator
        >>> operator = LinearOperator(lambda v: -2.0 * v, jnp.zeros(600), symmetric=True)
        >>> type(Auto().choose(operator)).__name__
        'MINRES'
    """

    direct_below: int = eqx.field(static=True, default=512)

    def __check_init__(self):
        _integer(self, "direct_below", self.direct_below, 0)

    def choose(self, operator: LinearOperator) -> Any:
        """The solver that this operator gets."""
        if operator.size <= self.direct_below:
            return Dense()
        if operator.positive_definite:
            return CG()
        return MINRES() if operator.symmetric else GMRES()

    def __call__(self, operator: LinearOperator, rhs: PyTree) -> PyTree:
        """Return x with operator(x) = rhs."""
        return self.choose(operator)(operator, rhs)


class Ridge(eqx.Module):
    """Solves (A + eps I) x = b with another solver.

    It makes singular and nearly singular problems solvable. On a direction with eigenvalue λ the
    answer is wrong by the factor λ / (λ + eps). It helps where A is positive semidefinite; an
    indefinite A can become singular by the shift.

    Args:
        inner: The linear solver of the shifted system.
        eps: The shift, in the units of the operator.

    Raises:
        ValueError: `inner` is not callable or `eps` is not a number > 0.

    Reference:
        Tikhonov, "Solution of Incorrectly Formulated Problems and the Regularization Method",
        Soviet Math. Dokl. 4 (1963).

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import Dense, LinearOperator, Ridge
        >>> singular = LinearOperator(lambda v: jnp.array([3.0 * v[0], 0.0]), jnp.zeros(2))
        >>> print(jnp.round(Ridge(Dense(), eps=1.0)(singular, jnp.array([4.0, 1.0])), 4))
        [1. 1.]
    """

    inner: Any
    eps: Any

    def __check_init__(self):
        _solver(self, "inner", self.inner)
        _number(self, "eps", self.eps, positive=True)

    def __call__(self, operator: LinearOperator, rhs: PyTree) -> PyTree:
        """Return x with operator(x) + eps x = rhs."""
        self = _varied(self, operator, rhs)
        shifted = _like(operator, lambda v: _add(operator.mv(v), _times(self.eps, v)))
        return self.inner(shifted, rhs)


class Neumann(eqx.Module):
    """The truncated series A⁻¹ ≈ step Σₖ (I − step A)ᵏ, k = 0, ..., terms.

    The error is at most ‖I − step A‖^(terms + 1) times the norm of the solution, so it is of use
    only where that norm is below 1: on fixed points x − T(x), where I − A = ∂T/∂x contracts. It
    costs `terms` operator products and needs no inner products and no stopping test. With
    step < 1 and few terms it is the phantom gradient.

    Args:
        terms: The highest power in the sum; 0 gives step · b.
        step: Factor of the operator, in the units of its inverse.

    Raises:
        ValueError: A setting is out of its range.

    Reference:
        Lorraine, Vicol, Duvenaud, "Optimizing Millions of Hyperparameters by Implicit
        Differentiation", AISTATS 2020; Geng et al., "On Training Implicit Models", NeurIPS 2021.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import LinearOperator, Neumann
        >>> operator = LinearOperator(lambda v: 0.5 * v, jnp.zeros(()))
        >>> print(Neumann(terms=3)(operator, jnp.array(1.0)))  # 2 (1 - 0.5⁴)
        1.875
    """

    terms: int = eqx.field(static=True)
    step: Any = 1.0

    def __check_init__(self):
        _integer(self, "terms", self.terms, 0)
        _number(self, "step", self.step, positive=True)

    def __call__(self, operator: LinearOperator, rhs: PyTree) -> PyTree:
        """Return the partial sum applied to rhs."""
        self = _varied(self, operator, rhs)

        def solve(mv, b):
            def add_term(_, x):
                return _add(x, _times(self.step, subtract(b, mv(x))))

            return jax.lax.fori_loop(0, self.terms, add_term, _times(self.step, b))

        return _as_inverse(operator, rhs, solve)


class JacobianFree(eqx.Module):
    """Takes A⁻¹ for scale · I; no operator product at all.

    On a fixed point x − T(x) the relative error is at most ‖∂T/∂x‖: exact where T is a Newton
    map, a rough direction otherwise.

    Args:
        scale: The factor, in the units of the inverse of the operator.

    Raises:
        ValueError: `scale` is not a number > 0.

    Reference:
        Fung et al., "JFB: Jacobian-Free Backpropagation for Implicit Networks", AAAI 2022; Bolte,
        Pauwels, Vaiter, "One-step Differentiation of Iterative Algorithms", NeurIPS 2023.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import JacobianFree, LinearOperator
        >>> operator = LinearOperator(lambda v: 0.9 * v, jnp.zeros(2))
        >>> print(JacobianFree()(operator, jnp.array([1.0, 2.0])))
        [1. 2.]
    """

    scale: Any = 1.0

    def __check_init__(self):
        _number(self, "scale", self.scale, positive=True)

    def __call__(self, operator: LinearOperator, rhs: PyTree) -> PyTree:
        """Return scale · rhs."""
        self = _varied(self, operator, rhs)
        return _as_inverse(operator, rhs, lambda mv, b: _times(self.scale, b))


def nystrom_approximation(mv, like: PyTree, rank: int, key: PRNGKeyArray) -> tuple[Array, Array]:
    """Eigenvectors and eigenvalues, largest first, of the randomized Nyström approximation.

    Frangella, Tropp, Udell, algorithm 2.1, with an eigenvalue decomposition in place of the
    Cholesky factorization of the core, which fails where the rank exceeds that of the operator.

    Args:
        mv: Product with a symmetric positive semidefinite operator.
        like: A PyTree of the form that `mv` takes.
        rank: Products made, and columns returned; at most n.
        key: Random key of the test matrix.

    Returns:
        Orthonormal columns, (n, rank), and the eigenvalues.
    """
    flat, unravel = ravel_pytree(like)
    test = jax.random.normal(key, (flat.size, min(rank, flat.size)), flat.dtype)
    test = vary_like(jnp.linalg.qr(test)[0], like)
    products = jax.vmap(lambda v: ravel_pytree(mv(unravel(v)))[0])(test.T).T
    tiny = jnp.finfo(flat.dtype)
    shift = jnp.maximum(tiny.eps * jnp.linalg.norm(products), tiny.tiny)
    shifted = products + shift * test
    core = test.T @ shifted
    weights, vectors = jnp.linalg.eigh((core + core.T) / 2)
    root = (shifted @ vectors) / jnp.sqrt(jnp.maximum(weights, shift))[None, :]
    basis, singular, _ = jnp.linalg.svd(root, full_matrices=False)
    return basis, jnp.maximum(singular**2 - shift, 0)


def coordinates_and_rest(basis: Array, v: Array) -> tuple[Array, Array]:
    """Coordinates of v in an orthonormal basis, and what is left of v, accurate when small.

    Args:
        basis: Orthonormal columns, (n, r).
        v: A vector, (n,).

    Returns:
        basisᵀ v, and v − basis basisᵀ v.
    """
    coordinates = basis.T @ v
    rest = v - basis @ coordinates
    return coordinates, rest - basis @ (basis.T @ rest)


class Nystrom(eqx.Module):
    """(Â + rho I)⁻¹ for a randomized low-rank approximation Â of a positive semidefinite A.

    `rank` operator products, one QR, one small SVD. Where the rank of A is at most `rank`, the
    answer is that of (A + rho I) x = b up to rounding. Where the spectrum decays slowly it is a
    poor inverse; then take `NystromCG`.

    The sketch is of the operator as it is given. If the operator contains a ridge term already
    (A = H + mu I), rho comes on top of it: the shift is counted twice. Pass the operator without
    its ridge term and rho = mu instead, or take `NystromCG`, which needs no such care.

    Args:
        rank: Columns of the sketch; at most n are used.
        rho: The shift, in the units of the operator.
        key: Random key of the sketch.

    Raises:
        ValueError: A setting is out of its range.

    Reference:
        Frangella, Tropp, Udell, "Randomized Nyström Preconditioning", SIAM J. Matrix Anal. Appl.
        44 (2023); Hataya, Yamada, "Nyström Method for Accurate and Scalable Implicit
        Differentiation", AISTATS 2023.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxopt_ext.implicit import LinearOperator, Nystrom
        >>> d = jnp.array([3.0, 0.0, 0.0, 0.0])  # rank 1
        >>> operator = LinearOperator(lambda v: d * v, d, symmetric=True)
        >>> inverse = Nystrom(rank=2, rho=1.0, key=jax.random.key(0))
        >>> x = inverse(operator, jnp.array([4.0, 1.0, 2.0, 3.0]))
        >>> bool(jnp.allclose(x, jnp.array([1.0, 1.0, 2.0, 3.0]), rtol=1e-4))
        True
    """

    rank: int = eqx.field(static=True)
    rho: Any
    key: PRNGKeyArray

    def __check_init__(self):
        _integer(self, "rank", self.rank, 1)
        _number(self, "rho", self.rho, positive=True)
        _key(self, self.key)

    def __call__(self, operator: LinearOperator, rhs: PyTree) -> PyTree:
        """Return (Â + rho I)⁻¹ rhs."""
        self = _varied(self, operator, rhs)

        def solve(mv, b):
            basis, values = nystrom_approximation(mv, b, self.rank, self.key)
            flat, unravel = ravel_pytree(b)
            rho = jnp.asarray(self.rho, flat.dtype)
            coordinates, rest = coordinates_and_rest(basis, flat)
            return unravel(basis @ (coordinates / (values + rho)) + rest / rho)

        return _as_inverse(operator, rhs, solve)


class NystromCG(_Krylov):
    """Conjugate gradients preconditioned by a randomized Nyström approximation; matrix-free.

    For positive definite operators with a few large eigenvalues and a flat rest. `rank` operator
    products for the sketch, then one product and O(n · rank) per step. The sketch is of the
    operator as it is given, with its ridge term if it has one; the answer does not depend on the
    sketch, only the number of steps does.

    Args:
        rank: Columns of the sketch; at most n are used.
        key: Random key of the sketch.
        rtol: Relative residual ‖A x − b‖ / ‖b‖, dimensionless; `None` means eps^(3/4) of the
            dtype.
        max_steps: Iterations at most; `None` means min(10 n, 1000).

    Raises:
        ValueError: A setting is out of its range.

    Reference:
        Frangella, Tropp, Udell, "Randomized Nyström Preconditioning", SIAM J. Matrix Anal. Appl.
        44 (2023).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxopt_ext.implicit import LinearOperator, NystromCG
        >>> d = jnp.array([1e3, 1e2, 1.0, 1.0])
        >>> operator = LinearOperator(lambda v: d * v, d, positive_definite=True)
        >>> print(jnp.round(NystromCG(rank=2, key=jax.random.key(0))(operator, 2 * d), 3))
        [2. 2. 2. 2.]
    """

    rank: int = eqx.field(static=True, kw_only=True)
    key: PRNGKeyArray = eqx.field(kw_only=True)

    def __init__(self, rank: int, key: PRNGKeyArray, rtol=None, max_steps: int | None = None):
        self.rank = rank
        self.key = key
        self.rtol = rtol
        self.max_steps = max_steps

    def __check_init__(self):
        _integer(self, "rank", self.rank, 1)
        _key(self, self.key)

    def method(self, mv, rhs, tol, max_steps) -> PyTree:
        """Run the iteration on a right-hand side of unit size."""
        basis, values = nystrom_approximation(mv, rhs, self.rank, self.key)
        floor = jnp.finfo(values.dtype).eps * values[0]
        values = jnp.where(values > floor, values, jnp.where(floor > 0, floor, 1))

        def precondition(v):
            flat, unravel = ravel_pytree(v)
            coordinates, rest = coordinates_and_rest(basis, flat)
            return unravel(basis @ (coordinates * (values[-1] / values)) + rest)

        return jax.scipy.sparse.linalg.cg(mv, rhs, tol=tol, maxiter=max_steps, M=precondition)[0]


class MinimumNorm(eqx.Module):
    """The pseudo-inverse: of all x that minimize ‖A x − b‖, the one of least norm.

    For singular A, as where a solution is not isolated. Costs `n` operator products, one singular
    value decomposition (eigenvalue decomposition if symmetric) and a few dense inverses. Its
    derivative with respect to the operator is that of the Moore–Penrose inverse, to every order,
    as long as the rank does not change nearby.

    A derivative of a solution that is not isolated is one choice of many: this one moves the
    solution as little as possible.

    Args:
        rcond: Singular values below `rcond` times the largest one count as zero, dimensionless;
            `None` means 10 n eps of the dtype.

    Raises:
        ValueError: `rcond` is not a number > 0.

    Reference:
        Golub, Pereyra, "The Differentiation of Pseudo-Inverses and Nonlinear Least Squares
        Problems Whose Variables Separate", SIAM J. Numer. Anal. 10 (1973).

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import LinearOperator, MinimumNorm
        >>> A = jnp.array([[1.0, 1.0], [1.0, 1.0]])
        >>> operator = LinearOperator(lambda v: A @ v, jnp.zeros(2), symmetric=True)
        >>> print(jnp.round(MinimumNorm()(operator, jnp.array([2.0, 2.0])), 4))
        [1. 1.]
    """

    rcond: Any = None

    def __check_init__(self):
        _number(self, "rcond", self.rcond, positive=True, optional=True)

    def __call__(self, operator: LinearOperator, rhs: PyTree) -> PyTree:
        """Return the pseudo-inverse applied to rhs.

        The value comes from the decomposition. For the derivative: with N = U₀V₀ᵀ from
        orthonormal bases of both kernels, taken at the point and fixed, G = (A + sN)⁻¹ satisfies
        A G A = A for every A of the same rank nearby. A G and G A are then projectors, and
        E (E + Eᵀ − I)⁻¹ is the orthogonal projector onto the range of a projector E. So
        A⁺ = Q G P with smooth factors only, which JAX differentiates without a rule that a loop
        could lose; that of `jnp.linalg.pinv` is lost in second derivatives inside `lax.scan`.
        """
        matrix = operator.as_matrix()
        n = operator.size
        symmetric = operator.symmetric or operator.positive_definite
        fixed = jax.lax.stop_gradient(matrix)
        rcond = 10 * n * jnp.finfo(matrix.dtype).eps if self.rcond is None else self.rcond
        if symmetric:
            values, left = jnp.linalg.eigh((fixed + fixed.T) / 2)
            right = left.T
        else:
            left, values, right = jnp.linalg.svd(fixed)
        largest = jnp.max(jnp.abs(values))
        kernel = jnp.abs(values) <= jnp.asarray(rcond, matrix.dtype) * largest
        reciprocals = jnp.where(kernel, 0, 1 / jnp.where(kernel, 1, values))
        value = (right.T * reciprocals[None, :]) @ left.T
        shift = jnp.where(kernel, jnp.where(largest > 0, largest, 1), 0)
        identity = jnp.eye(n, dtype=matrix.dtype)
        inverse = jnp.linalg.inv(matrix + (left * shift[None, :]) @ right)

        def projector(e):  # orthogonal, onto the range of the projector e
            return e @ jnp.linalg.inv(e + e.T - identity)

        onto_range = projector(matrix @ inverse)
        onto_rows = onto_range if symmetric else projector((inverse @ matrix).T)
        smooth = onto_rows @ inverse @ onto_range
        pseudo_inverse = value + (smooth - jax.lax.stop_gradient(smooth))
        flat, unravel = ravel_pytree(rhs)
        return unravel(pseudo_inverse @ flat)


class Refined(eqx.Module):
    """Iterative refinement: x ← x + inner(b − A x), `steps` times.

    It brings a solve with error factor q < 1 down to q^(steps + 1), and recovers digits that an
    ill-conditioned solve lost in its own dtype. One more inner solve and one operator product
    per step.

    Args:
        inner: The linear solver that is refined.
        steps: Corrections after the first solve.

    Raises:
        ValueError: `inner` is not callable or `steps` is not an integer >= 0.

    Reference:
        Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM (2002), chapter 12.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import JacobianFree, LinearOperator, Refined
        >>> operator = LinearOperator(lambda v: 0.5 * v, jnp.zeros(()))
        >>> print(Refined(JacobianFree(), steps=3)(operator, jnp.array(1.0)))
        1.875
    """

    inner: Any
    steps: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        _solver(self, "inner", self.inner)
        _integer(self, "steps", self.steps, 0)

    def __call__(self, operator: LinearOperator, rhs: PyTree) -> PyTree:
        """Return the refined solution of operator(x) = rhs."""
        self = _varied(self, operator, rhs)

        def solve(mv, b):
            same = _like(operator, mv)
            x = self.inner(same, b)
            for _ in range(self.steps):  # unrolled: equal factorizations are found by XLA
                x = _add(x, self.inner(same, subtract(b, mv(x))))
            return x

        return _as_inverse(operator, rhs, solve)


class Shared(eqx.Module):
    """An approximate inverse that somebody else has, refined by a few Krylov steps.

    Quasi-Newton solvers end with an approximation of the inverse; this uses it again. `steps`
    steps of GMRES preconditioned with it correct the answer; 0 takes it as it is.

    Args:
        inverse: P ≈ A⁻¹: a matrix on raveled PyTrees, or a linear function from PyTrees like the
            right-hand side to PyTrees like the solution. A function that uses arrays should carry
            them, as `jax.tree_util.Partial` and `equinox.Module` do, rather than capture them.
        steps: Krylov steps, one operator product each.

    Raises:
        ValueError: A setting is out of its range, or the matrix does not fit the operator.
        NotImplementedError: It is called with `steps > 0` inside
            `shard_map(..., check_vma=True)`, where JAX's GMRES does not run.

    Reference:
        Ramzi et al., "SHINE: SHaring the INverse Estimate from the Forward Pass for Bi-level
        Optimization and Implicit Models", ICLR 2022.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import LinearOperator, Shared
        >>> operator = LinearOperator(lambda v: 4.0 * v, jnp.zeros(2))
        >>> print(Shared(0.25 * jnp.eye(2))(operator, jnp.array([4.0, 8.0])))
        [1. 2.]
    """

    inverse: Any
    steps: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        shape = getattr(self.inverse, "shape", None)
        if shape is None and not callable(self.inverse):
            raise ValueError(
                f"Shared: inverse is {self.inverse!r}, expected a square matrix or a function"
            )
        if shape is not None and (len(shape) != 2 or shape[0] != shape[1]):
            raise ValueError(
                f"Shared: inverse has shape {shape}, expected a square matrix or a function"
            )
        _integer(self, "steps", self.steps, 0)

    def __call__(self, operator: LinearOperator, rhs: PyTree) -> PyTree:
        """Return P rhs, refined."""
        self = _varied(self, operator, rhs)
        inverse = self.inverse
        if not callable(inverse):
            matrix = jnp.asarray(inverse)
            if matrix.shape[0] != operator.size:
                raise ValueError(
                    f"Shared: inverse has shape {matrix.shape}, expected "
                    f"{(operator.size, operator.size)}"
                )

            def inverse(v):
                flat, unravel = ravel_pytree(v)
                return unravel(matrix.astype(flat.dtype) @ flat)

        structure = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), rhs)

        def transposed(v):
            return jax.linear_transpose(inverse, structure)(v)[0]

        def refine(approximate):
            def solve(mv, b):
                unit, scale = _unit(b)
                x = approximate(unit)
                if self.steps:
                    _refuse_varying(self, b)
                    residual = subtract(unit, mv(x))
                    correction = jax.scipy.sparse.linalg.gmres(
                        mv, residual, tol=0.0, maxiter=1, restart=self.steps, M=approximate
                    )[0]
                    x = _add(x, correction)
                return _times(scale, x)

            return solve

        symmetric = operator.symmetric or operator.positive_definite
        back = refine(inverse if symmetric else transposed)
        return _as_inverse(operator, rhs, refine(inverse), back)


def solve_linear(
    solver: LinearSolver,
    operator: LinearOperator,
    rhs: PyTree,
    x0: PyTree | None = None,
    *,
    transpose: bool = False,
    rtol: float | None = None,
) -> tuple[PyTree, LinearStatus]:
    """Solve A x = b explicitly: with a starting point and a report, which no solver raises.

    Args:
        solver: Any linear solver.
        operator: A.
        rhs: b, a PyTree like the structure of the operator.
        x0: Where to start, a PyTree like `rhs`, for instance the solution of a similar system;
            used where ‖A x0 − b‖ < ‖b‖ and ignored elsewhere. A Krylov method then stops at the
            same residual after fewer steps; for any other solver the correction
            A d = b − A x0 is solved. Its derivative is dropped: the solution does not depend on
            it.
        transpose: Solve Aᵀ x = b instead.
        rtol: Largest relative residual ‖A x − b‖ / ‖b‖ that counts as converged, dimensionless.
            `None` means ten times the solver's own `rtol` (its recurrences drift a little from
            the true residual), and ten times eps^(3/4) of the dtype where it has none. It does
            not change the solve.

    Returns:
        x and a `LinearStatus`. Derivatives flow through x to the operator and to `rhs`.

    Raises:
        ValueError: `x0` or `rhs` is not a PyTree like the structure of the operator, or `rtol` is
            not a number > 0.

    Reference:
        Arbel, Mairal, "Amortized Implicit Differentiation for Stochastic Bilevel Optimization",
        ICLR 2022, on warm-started adjoints.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import CG, LinearOperator, solve_linear
        >>> d = jnp.array([1.0, 2.0, 4.0])
        >>> operator = LinearOperator(lambda v: d * v, d, positive_definite=True)
        >>> x, status = solve_linear(CG(), operator, jnp.ones(3))
        >>> print(jnp.round(x, 3), bool(status.converged))
        [1.   0.5  0.25] True
        >>> x, status = solve_linear(CG(max_steps=1), operator, jnp.ones(3))
        >>> bool(status.converged)
        False
    """
    if rtol is not None and not eqx.is_array(rtol) and not rtol > 0:
        raise ValueError(f"solve_linear: rtol is {rtol!r}, expected a number > 0")
    for name, tree in (("rhs", rhs), ("x0", x0)):
        if tree is not None and _shapes(tree) != _shapes(operator.structure):
            raise ValueError(
                f"solve_linear: {name} has leaves {_shapes(tree)[1]} in {_shapes(tree)[0]}, "
                f"expected {_shapes(operator.structure)[1]} in {_shapes(operator.structure)[0]}"
            )
    operator = operator.transpose() if transpose else operator
    if isinstance(solver, Auto):
        solver = solver.choose(operator)
    if x0 is None:
        x = solver(operator, rhs)
    elif isinstance(solver, _Krylov):
        x = solver.start_at(detach(x0), operator, rhs)
    else:
        left = _norm(detach(subtract(rhs, operator.mv(detach(x0)))))
        x0 = _where(left < _norm(detach(rhs)), detach(x0), jax.tree.map(jnp.zeros_like, x0))
        x = _add(x0, solver(operator, subtract(rhs, operator.mv(x0))))
    return x, _status(operator, detach(x), detach(rhs), rtol, solver)


def _shapes(tree: PyTree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(jnp.shape(leaf), str(jnp.result_type(leaf))) for leaf in leaves]


def _status(operator, x, rhs, rtol, solver) -> LinearStatus:
    dtype = _dtype(rhs)
    unit, scale = _unit(rhs)
    residual = subtract(jax.tree.map(lambda v: v / scale.astype(v.dtype), operator.mv(x)), unit)
    size = _norm(unit)
    relative = jax.lax.stop_gradient(_norm(residual) / jnp.where(size > 0, size, 1))
    if rtol is None:
        own = getattr(solver, "rtol", None)
        rtol = 10 * (jnp.finfo(dtype).eps ** 0.75 if own is None else own)
    return LinearStatus(relative, relative <= jnp.asarray(rtol, dtype))
