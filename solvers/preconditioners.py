"""Preconditioners of the saddle point systems of `SketchedNewtonAL`.

All are block diagonal and symmetric positive definite, P = blkdiag(P_y, P_λ) with P_y ≈ |W| and
P_λ ≈ J P_y⁻¹Jᵀ + Δ, given by factors of their inverse: P⁻¹ = S Sᵀ. With P_y = W and the exact P_λ
the matrix SᵀK S has three different eigenvalues, and MINRES takes three steps.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from jaxopt_ext.core import check, tree
from jaxopt_ext.solvers.kkt_systems import KKTSystem


class Preconditioner(eqx.Module):
    """Base: a symmetric positive definite P ≈ |K| by factors of its inverse, P⁻¹ = S Sᵀ.

    Attributes:
        needs_matrix: Whether K must be dense.
    """

    needs_matrix: ClassVar[bool] = False

    @abc.abstractmethod
    def prepare(self, system: KKTSystem) -> Any:
        """What is worth keeping for several right-hand sides; arrays."""

    @abc.abstractmethod
    def apply(self, system: KKTSystem, kept: Any, v: Array, transposed: bool) -> Float[Array, " N"]:
        """Sᵀ v where `transposed`, else S v.

        Args:
            system: K.
            kept: What `prepare` returned.
            v: A vector like those that K is multiplied by.
            transposed: Whether Sᵀ is asked for.
        """

    def products(self, system: KKTSystem) -> int:
        """Products with K that `prepare` takes."""
        return 0


class Diagonal(Preconditioner):
    """The absolute diagonal of W where it is known, and the barrier's part of it where not.

    Example:
        >>> from jaxopt_ext.solvers import kkt
        >>> print(kkt.MINRES(kkt.Diagonal()).preconditioner)
        Diagonal()
    """

    def prepare(self, system):
        """See `Preconditioner`."""
        return jnp.sqrt(positive_diagonal(system))

    def apply(self, system, kept, v, transposed):
        """See `Preconditioner`."""
        return v.at[: system.size].divide(kept)


class Schur(Preconditioner):
    """The absolute diagonal D of W, and the dense J D⁻¹Jᵀ + Δ.

    Reference:
        Benzi, Golub, Liesen, "Numerical solution of saddle point problems", Acta Numerica 2005.

    Example:
        >>> from jaxopt_ext.solvers import kkt
        >>> print(kkt.MINRES(kkt.Schur()).preconditioner)
        Schur()
    """

    needs_matrix: ClassVar[bool] = True

    def prepare(self, system):
        """See `Preconditioner`."""
        diagonal = positive_diagonal(system)
        return jnp.sqrt(diagonal), jnp.linalg.cholesky(schur(system, diagonal))

    def apply(self, system, kept, v, transposed):
        """See `Preconditioner`."""
        root, factor = kept
        return jnp.concatenate([v[: system.size] / root, _solve(factor, v, system, transposed)])


class Nystrom(Preconditioner):
    """A few leading eigenpairs of W from a random sketch, and the J Pᵧ⁻¹Jᵀ + Δ that belongs to it.

    For Hessians that are nearly of low rank beyond their diagonal, as those of many-sample
    regression, with few constraints: 2 `rank` products with W and one with Jᵀ per constraint, and
    (n + m) · (rank + m) numbers to keep. No dense K is needed. The rest of W, beyond the sketched
    subspace, is taken for its diagonal where that is known and for the smallest eigenvalue found
    where not. The sketch is drawn with a fixed key: it changes the cost, not the solution.

    Args:
        rank: Columns of the sketch.

    Raises:
        ValueError: `rank` is out of its range.

    Reference:
        Frangella, Tropp, Udell, "Randomized Nyström preconditioning", SIAM J. Matrix Anal. Appl.
        44, 2023; here with the Rayleigh–Ritz values of the sketched subspace, because W may be
        indefinite.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> program = jx.NonlinearProgram(
        ...     lambda y, args: jnp.sum(jnp.arange(1.0, 9.0) * (y - 1) ** 2),
        ...     equality=lambda y, args: jnp.sum(y) - 1.0,
        ... )
        >>> inner = solvers.kkt.MINRES(solvers.kkt.Nystrom(4))
        >>> found = jx.solve(program, solvers.SketchedNewtonAL(inner), jnp.zeros(8))
        >>> print(round(float(jnp.sum(found.value)), 4))
        1.0
    """

    rank: int = eqx.field(static=True, default=20)

    def __check_init__(self):
        check.count("Nystrom", "rank", self.rank)

    def products(self, system):
        """See `Preconditioner`."""
        return 2 * min(self.rank, system.size) + system.rows

    def prepare(self, system):
        """See `Preconditioner`: D^½, the sketched eigenvectors, their factors, and P_λ's factor."""
        n, dtype = system.size, system.diagonal.dtype
        root = jnp.sqrt(positive_diagonal(system))
        none = jnp.zeros(system.rows, dtype)

        def scaled(v):  # D^−½ W D^−½
            return system.product(jnp.concatenate([v / root, none]))[:n] / root

        probes = jax.random.normal(jax.random.key(0), (min(self.rank, n), n), dtype)
        basis, _ = jnp.linalg.qr(jax.vmap(scaled)(probes).T)
        image = jax.vmap(scaled)(basis.T).T
        core = basis.T @ image
        values, vectors = jnp.linalg.eigh((core + core.T) / 2)
        sizes = jnp.abs(values)
        known = jnp.any(system.diagonal != 0)  # else D is one, and no part of W
        least = jnp.maximum(jnp.min(sizes), 1e-8 * jnp.maximum(1, jnp.max(sizes)))
        rest = jnp.where(known, 1, least)
        sizes = jnp.maximum(sizes, 1e-8 * jnp.maximum(1, jnp.max(sizes)))
        basis, weights = basis @ vectors, jnp.sqrt(rest / sizes) - 1
        root = root * jnp.sqrt(rest)
        jacobian = jax.vmap(system.pull)(jnp.eye(system.rows, dtype=dtype))
        half = jacobian / root[None, :]
        half = half + (half @ basis * weights[None, :]) @ basis.T
        gram = half @ half.T + jnp.diag(system.relaxation)
        rounding = 100 * jnp.finfo(dtype).eps * jnp.max(jnp.diagonal(gram), initial=0)
        factor = jnp.linalg.cholesky(gram + rounding * jnp.eye(system.rows, dtype=dtype))
        return root, basis, weights, factor

    def apply(self, system, kept, v, transposed):
        """See `Preconditioner`."""
        root, basis, weights, factor = kept
        top = v[: system.size] / root if transposed else v[: system.size]
        top = top + basis @ (weights * (basis.T @ top))
        top = top if transposed else top / root
        return jnp.concatenate([top, _solve(factor, v, system, transposed)])


class BlockPreconditioner(Preconditioner):
    """Factors that the user knows: S_y S_yᵀ ≈ |W|⁻¹ and S_λ S_λᵀ ≈ (J W⁻¹Jᵀ)⁻¹.

    The way to solve large programs matrix-free, where the constraints are a discretized equation
    for which a fast approximate solver exists (multigrid, fast transforms, an incomplete
    factorization): a good S_λ makes the number of products independent of the grid.

    Args:
        constraints: S_λ, a linear function from PyTrees like those that `equality` returns to the
            same, or from pairs (equality, inequality) where there are both; JAX transposes it.
            `None` is the identity. In the units of the program; its scaling is taken care of.
        variables: S_y, a linear function from PyTrees like the variables to the same. `None` is
            the diagonal of W as far as it is known.

    Arrays that the functions capture must be concrete.

    Raises:
        TypeError: An argument is not a function.
        ValueError: A function does not return a PyTree like its argument.

    Reference:
        Rees, Dollar, Wathen, "Optimal solvers for PDE-constrained optimization", SIAM J. Sci.
        Comput. 32, 2010; Pearson, Wathen, Numer. Linear Algebra Appl. 19, 2012.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> rows = jnp.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
        >>> program = jx.NonlinearProgram(
        ...     lambda y, args: jnp.sum(y**2) / 2, equality=lambda y, args: rows @ y - 1.0
        ... )
        >>> inverse_root = jnp.linalg.inv(jnp.linalg.cholesky(rows @ rows.T)).T
        >>> block = solvers.kkt.BlockPreconditioner(lambda r: inverse_root @ r)
        >>> solver = solvers.SketchedNewtonAL(solvers.kkt.MINRES(block))
        >>> print(jnp.round(rows @ jx.solve(program, solver, jnp.zeros(3)).value, 4))
        [1. 1.]
    """

    constraints: Callable[[PyTree], PyTree] | None = None
    variables: Callable[[PyTree], PyTree] | None = None

    def __check_init__(self):
        check.function("BlockPreconditioner", "constraints", self.constraints, optional=True)
        check.function("BlockPreconditioner", "variables", self.variables, optional=True)

    def prepare(self, system):
        """See `Preconditioner`."""
        return jnp.sqrt(positive_diagonal(system))

    def apply(self, system, kept, v, transposed):
        """See `Preconditioner`."""
        top, rows = v[: system.size], v[system.size :]
        units = system.units
        if units is None:
            raise ValueError(
                "BlockPreconditioner: the system has no units, expected one that says what its "
                "vectors are, as those of SketchedNewtonAL do"
            )
        # of the scaled program W is o W and J is R J
        objective = jnp.sqrt(units.scaling.objective)
        if self.variables is None:
            top = top / kept
        else:
            top = _linear("variables", self.variables, units.variables, top, transposed) / objective
        if self.constraints is not None and rows.size:
            rows = rows if not transposed else rows / units.scaling.rows
            rows = objective * _linear(
                "constraints", self.constraints, units.constraints, rows, transposed
            )
            rows = rows / units.scaling.rows if not transposed else rows
        return jnp.concatenate([top, rows])


def positive_diagonal(system: KKTSystem) -> Float[Array, " n"]:
    """The absolute diagonal of W with a floor, or ones where nothing of it is known."""
    size = jnp.abs(system.diagonal)
    largest = jnp.max(size, initial=0)
    return jnp.where(largest > 0, jnp.maximum(size, 1e-8 * jnp.maximum(1, largest)), 1)


def schur(system: KKTSystem, diagonal: Array) -> Float[Array, "m m"]:
    """J D⁻¹Jᵀ + Δ, dense."""
    jacobian: Any = system.jacobian
    product = (jacobian / diagonal[None, :]) @ jacobian.T + jnp.diag(system.relaxation)
    rounding = 100 * jnp.finfo(product.dtype).eps * jnp.max(jnp.diagonal(product), initial=0)
    return product + rounding * jnp.eye(len(product), dtype=product.dtype)


def _solve(factor: Array, v: Array, system: KKTSystem, transposed: bool) -> Array:
    """S_λ = L⁻ᵀ, or its transpose, times the rows of v."""
    if system.rows == 0:
        return v[system.size :]
    return jax.scipy.linalg.solve_triangular(
        factor, v[system.size :], lower=True, trans=int(not transposed)
    )


def _linear(name: str, fun: Callable, unravel: Callable, v: Array, transposed: bool) -> Array:
    def flat(v):
        value = unravel(v)
        out = fun(value)
        if not tree.same_types(out, value):
            raise ValueError(
                f"BlockPreconditioner: {name} returned {tree.describe(out)}, expected a PyTree "
                f"like its argument, {tree.describe(value)}"
            )
        return ravel_pytree(out)[0]

    return jax.linear_transpose(flat, v)(v)[0] if transposed else flat(v)
