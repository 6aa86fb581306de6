"""Inner solvers of `SketchedNewtonAL`: how the system of a Newton step is solved, and how well.

All of them start from the last approximation and go on until the residual is small enough, so that
they can be compared under the same test.
"""

import abc
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxopt_ext.core import check
from jaxopt_ext.implicit.linear_solvers import minres
from jaxopt_ext.solvers.kkt_systems import KKTSystem
from jaxopt_ext.solvers.preconditioners import (
    Diagonal,
    Nystrom,
    Preconditioner,
    Schur,
    positive_diagonal,
    schur,
)

Sketch = Literal["gaussian", "coordinate", "countsketch", "srht"]
Named = Literal["none", "diagonal", "schur", "nystrom"]


class Solved(NamedTuple):
    """What an inner solver returns.

    Attributes:
        solution: Of K d = b, approximately.
        products: Matrix-vector products that it took, rounded up; 0 for a factorization.
    """

    solution: Float[Array, " N"]
    products: Int[Array, ""]


class InnerSolver(eqx.Module, metaclass=check.SettingsMeta):
    """Base: solves K d = b to a given residual.

    Attributes:
        needs_matrix: Whether K must be dense.
        exact: Whether the residual is rounding error whatever is asked for.
        random: Whether it draws random numbers.
    """

    needs_matrix: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    random: ClassVar[bool] = False

    def prepare(self, system: KKTSystem) -> Any:
        """What is worth keeping for several right-hand sides; arrays."""
        return None

    @abc.abstractmethod
    def solve(
        self,
        system: KKTSystem,
        kept: Any,
        rhs: Float[Array, " N"],
        start: Float[Array, " N"],
        tolerance: Float[Array, ""],
        key: Array | None,
    ) -> Solved:
        """Go on from `start` until ‖K d − b‖₂ ≤ tolerance, or no further progress.

        Args:
            system: K.
            kept: What `prepare` returned.
            rhs: b.
            start: d to begin with.
            tolerance: On the residual, in its own units.
            key: Random key where `random`.
        """


class Direct(InnerSolver):
    """LU factorization of the dense K, with one step of iterative refinement.

    Inequalities are eliminated first, so that n + m counts equalities only: thousands of
    inequalities in a few variables cost products, not factorizations. K is made to have the right
    inertia before; (n + m)³ · 2/3 operations.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> program = jx.NonlinearProgram(
        ...     lambda y, args: jnp.sum(y**2), equality=lambda y, args: jnp.sum(y) - 1.0
        ... )
        >>> solver = solvers.SketchedNewtonAL(solvers.kkt.Direct())
        >>> print(jnp.round(jx.solve(program, solver, jnp.zeros(2)).value, 4))
        [0.5 0.5]
    """

    needs_matrix: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    def prepare(self, system):
        """See `InnerSolver`: the factorization, and what eliminates the inequalities."""
        matrix, rows = _matrix(system), system.rows
        equalities = rows if system.units is None else system.units.equalities
        if equalities == rows:
            return jax.scipy.linalg.lu_factor(matrix)
        jacobian: Any = system.jacobian
        inequality, stiffness = jacobian[equalities:], 1 / system.relaxation[equalities:]
        left = system.size + equalities
        stiff = inequality.T @ (stiffness[:, None] * inequality)
        condensed = matrix[:left, :left].at[: system.size, : system.size].add(stiff)
        return jax.scipy.linalg.lu_factor(condensed), inequality, stiffness

    def apply(self, kept: Any, rhs: Float[Array, " N"]) -> Float[Array, " N"]:
        """K⁻¹ rhs, by what `prepare` returned."""
        if len(kept) == 2:
            return jax.scipy.linalg.lu_solve(kept, rhs)
        factor, inequality, stiffness = kept
        n, left = inequality.shape[1], rhs.size - stiffness.size
        sides = rhs[left:]
        top = rhs[:left].at[:n].add(inequality.T @ (stiffness * sides))
        solution = jax.scipy.linalg.lu_solve(factor, top)
        rows = stiffness * (inequality @ solution[:n] - sides)
        return jnp.concatenate([solution, rows])

    def solve(self, system, kept, rhs, start, tolerance, key):
        """See `InnerSolver`."""
        first = self.apply(kept, rhs)
        refined = first + self.apply(kept, rhs - system.product(first))
        return Solved(refined, jnp.zeros((), jnp.int32))


class MINRES(InnerSolver):
    """Minimum residual method on products with K alone, optionally preconditioned.

    Args:
        preconditioner: `"none"`, or one of `"diagonal"`, `"schur"` and `"nystrom"`, which stand for
            `Diagonal()`, `Schur()` and `Nystrom()`; or such an object, among them
            `BlockPreconditioner(...)` with approximate solves that the user knows.
        max_steps: Iterations of one solve at most; `None` means 4 (n + m) + 50.

    Raises:
        ValueError: A setting is out of its range.

    Reference:
        Paige and Saunders, SIAM J. Numer. Anal. 12, 1975; block diagonal preconditioners as in
        Benzi, Golub, Liesen, "Numerical solution of saddle point problems", Acta Numerica 2005.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> program = jx.NonlinearProgram(
        ...     lambda y, args: jnp.sum(y**2), equality=lambda y, args: jnp.sum(y) - 1.0
        ... )
        >>> solver = solvers.SketchedNewtonAL(solvers.kkt.MINRES())
        >>> print(jnp.round(jx.solve(program, solver, jnp.zeros(2)).value, 4))
        [0.5 0.5]
    """

    preconditioner: Named | Preconditioner = "none"
    max_steps: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if not isinstance(self.preconditioner, Preconditioner):
            check.choice("MINRES", "preconditioner", self.preconditioner, get_args(Named))
        check.count("MINRES", "max_steps", self.max_steps, optional=True)

    @property
    def _preconditioner(self) -> Preconditioner | None:
        if isinstance(self.preconditioner, Preconditioner):
            return self.preconditioner
        return {"none": None, "diagonal": Diagonal(), "schur": Schur(), "nystrom": Nystrom()}[
            self.preconditioner
        ]

    @property
    def needs_matrix(self) -> bool:  # pyright: ignore
        """Whether K must be dense."""
        chosen = self._preconditioner
        return chosen is not None and chosen.needs_matrix

    def prepare(self, system):
        """See `InnerSolver`: what the preconditioner keeps."""
        chosen = self._preconditioner
        return None if chosen is None else chosen.prepare(system)

    def solve(self, system, kept, rhs, start, tolerance, key):
        """See `InnerSolver`."""
        chosen = self._preconditioner

        def half(v, transposed):
            return v if chosen is None else chosen.apply(system, kept, v, transposed)

        def product(v):
            return half(system.product(half(v, False)), True)

        limit = 4 * rhs.size + 50 if self.max_steps is None else self.max_steps

        def going(carry):
            _, residual, _, rounds, stalled = carry
            return (jnp.linalg.norm(residual) > tolerance) & (rounds < 3) & ~stalled

        def body(carry):
            d, residual, products, rounds, _ = carry
            size = jnp.linalg.norm(residual)
            unit = half(residual / size, True)
            found, steps = minres(product, unit, 0.5 * tolerance / size, limit)
            d_new = d + size * half(found, False)
            left = rhs - system.product(d_new)
            better = jnp.linalg.norm(left) < size
            d = jnp.where(better, d_new, d)
            stalled = ~(jnp.linalg.norm(left) < 0.5 * size)
            residual = jnp.where(better, left, residual)
            return d, residual, products + steps + 1, rounds + 1, stalled

        first = 1 if chosen is None else 1 + chosen.products(system)
        first, zero = jnp.array(first, jnp.int32), jnp.zeros((), jnp.int32)
        carry = (start, rhs - system.product(start), first, zero, jnp.array(False))
        d, _, products, _, _ = jax.lax.while_loop(going, body, carry)
        return Solved(d, products.astype(jnp.int32))


class GMRES(InnerSolver):
    """Restarted GMRES (JAX's own) on products with K alone.

    Args:
        restart: Size of the Krylov space; `restart` + 1 vectors are kept.
        max_restarts: Cycles of one solve at most.

    Raises:
        ValueError: A setting is out of its range.

    Reference:
        Saad and Schultz, SIAM J. Sci. Stat. Comput. 7, 1986.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> program = jx.NonlinearProgram(
        ...     lambda y, args: jnp.sum(y**2), equality=lambda y, args: jnp.sum(y) - 1.0
        ... )
        >>> solver = solvers.SketchedNewtonAL(solvers.kkt.GMRES(restart=3))
        >>> print(jnp.round(jx.solve(program, solver, jnp.zeros(2)).value, 4))
        [0.5 0.5]
    """

    restart: int = eqx.field(static=True, default=30)
    max_restarts: int = eqx.field(static=True, default=20)

    def __check_init__(self):
        check.count("GMRES", "restart", self.restart)
        check.count("GMRES", "max_restarts", self.max_restarts)

    def solve(self, system, kept, rhs, start, tolerance, key):
        """See `InnerSolver`; one cycle costs `restart` + 1 products."""
        restart = min(self.restart, rhs.size)

        def going(carry):
            _, residual, cycles, stalled = carry
            return (jnp.linalg.norm(residual) > tolerance) & (cycles < self.max_restarts) & ~stalled

        def body(carry):
            d, residual, cycles, _ = carry
            size = jnp.linalg.norm(residual)
            moved, _ = jax.scipy.sparse.linalg.gmres(
                system.product, residual / size, tol=0.0, atol=0.5 * tolerance / size,
                restart=restart, maxiter=1,
            )  # fmt: skip
            d_new = d + size * moved
            left = rhs - system.product(d_new)
            better = jnp.linalg.norm(left) < size
            stalled = ~(jnp.linalg.norm(left) < 0.99 * size)
            d, residual = jnp.where(better, d_new, d), jnp.where(better, left, residual)
            return d, residual, cycles + 1, stalled

        zero = jnp.zeros((), jnp.int32)
        carry = (start, rhs - system.product(start), zero, jnp.array(False))
        d, _, cycles, _ = jax.lax.while_loop(going, body, carry)
        return Solved(d, 1 + cycles * (restart + 2))


class ProjectedCG(InnerSolver):
    """Conjugate gradients with a constraint preconditioner: every iterate meets the rows of J.

    The preconditioner is K with the diagonal of W in place of W, factorized by its m × m Schur
    complement. Needs W positive definite on the null space of J, as it is after the correction of
    its curvature; it gives up where it finds otherwise.

    Args:
        max_steps: Iterations of one solve at most; `None` means 2 n + 50.

    Raises:
        ValueError: A setting is out of its range.

    Reference:
        Gould, Hribar, Nocedal, "On the solution of equality constrained quadratic programming
        problems arising in optimization", SIAM J. Sci. Comput. 23, 2001; with Δ > 0: Dollar,
        Gould, Schilders, Wathen, SIAM J. Matrix Anal. Appl. 28, 2006.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> program = jx.NonlinearProgram(
        ...     lambda y, args: jnp.sum(y**2), equality=lambda y, args: jnp.sum(y) - 1.0
        ... )
        >>> solver = solvers.SketchedNewtonAL(solvers.kkt.ProjectedCG())
        >>> print(jnp.round(jx.solve(program, solver, jnp.zeros(2)).value, 4))
        [0.5 0.5]
    """

    needs_matrix: ClassVar[bool] = True

    max_steps: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check.count("ProjectedCG", "max_steps", self.max_steps, optional=True)

    def prepare(self, system):
        """See `InnerSolver`: D, and the Cholesky factor of J D⁻¹Jᵀ + Δ."""
        diagonal = positive_diagonal(system)
        return diagonal, jnp.linalg.cholesky(schur(system, diagonal))

    def solve(self, system, kept, rhs, start, tolerance, key):
        """See `InnerSolver`."""
        diagonal, factor = kept
        n = system.size

        def precondition(v):
            rows = system.push(v[:n] / diagonal) - v[n:]
            rows = jax.scipy.linalg.cho_solve((factor, True), rows) if system.rows else rows
            return jnp.concatenate([(v[:n] - system.pull(rows)) / diagonal, rows])

        limit = 2 * n + 50 if self.max_steps is None else self.max_steps

        def going(carry):
            _, _, z, _, rz, steps, ok = carry
            left = jnp.linalg.norm(diagonal * z[:n])  # of the residual beyond the range of Jᵀ
            return ok & (rz > 0) & (left > 0.1 * tolerance) & (steps < limit)

        def body(carry):
            d, residual, _, direction, rz, steps, _ = carry
            along = system.product(direction)
            curvature = direction @ along
            ok = curvature > 0
            size = jnp.where(ok, rz / jnp.where(ok, curvature, 1), 0)
            d, residual = d + size * direction, residual - size * along
            z = precondition(residual)
            rz_new = residual @ z
            return d, residual, z, z + rz_new / rz * direction, rz_new, steps + 1, ok

        # a first step that meets the rows; the residuals of the rows stay zero after it
        d = start + precondition(rhs - system.product(start))
        residual = rhs - system.product(d)
        z = precondition(residual)
        zero = jnp.zeros((), jnp.int32)
        carry = (d, residual, z, z, residual @ z, zero, jnp.array(True))
        d, _, z, _, _, steps, _ = jax.lax.while_loop(going, body, carry)
        d = d + z  # the multipliers that belong to dy
        return Solved(d, steps + 2)


class SketchAndProject(InnerSolver):
    """The paper's inner solver: project onto the solutions of a random sketch of the system.

    One step draws S with q columns and moves to the nearest d with Sᵀ K d = Sᵀ b:
    d ← d − W (WᵀW)⁺ Sᵀ r with W = K S, r = K d − b. The error falls in every step, and in the mean
    by the factor 1 − λ_min(E[W (WᵀW)⁺ Wᵀ]); the number of steps grows with the square of the
    condition number, that of Krylov methods with the condition number itself.

    Args:
        sketch: Distribution of S: `"gaussian"` entries; `"coordinate"`, unit vectors, which is the
            randomized Kaczmarz method and costs O((n + m) q) per step; `"countsketch"`, one ±1 per
            row; `"srht"`, columns of a randomized Hadamard matrix.
        block: Number q of columns.
        by_row_norm: For `"coordinate"`: rows drawn in proportion to their squared norms rather
            than uniformly. The paper's code draws uniformly, which is immune to bad row scales.
        max_sweeps: At most this many times n + m (divided by q) steps in one solve.

    Raises:
        ValueError: A setting is out of its range.

    Reference:
        Hong, Na, Mahoney, Kolar, ICML 2023; Gower and Richtárik, "Randomized iterative methods for
        linear systems", SIAM J. Matrix Anal. Appl. 36, 2015.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> program = jx.NonlinearProgram(
        ...     lambda y, args: jnp.sum(y**2), equality=lambda y, args: jnp.sum(y) - 1.0
        ... )
        >>> solver = solvers.SketchedNewtonAL(solvers.kkt.SketchAndProject("coordinate"))
        >>> key = jax.random.key(0)
        >>> print(jnp.round(jx.solve(program, solver, jnp.zeros(2), key=key).value, 3))
        [0.5 0.5]
    """

    random: ClassVar[bool] = True
    needs_matrix: ClassVar[bool] = True

    sketch: Sketch = eqx.field(static=True, default="gaussian")
    block: int = eqx.field(static=True, default=1)
    by_row_norm: bool = eqx.field(static=True, default=False)
    max_sweeps: int = eqx.field(static=True, default=10_000)

    def __check_init__(self):
        check.choice("SketchAndProject", "sketch", self.sketch, get_args(Sketch))
        check.count("SketchAndProject", "block", self.block)
        check.count("SketchAndProject", "max_sweeps", self.max_sweeps)

    def prepare(self, system):
        """See `InnerSolver`: the logarithms of the rows' probabilities."""
        norms = jnp.sum(_matrix(system) ** 2, axis=1)
        return jnp.log(norms) if self.by_row_norm else jnp.zeros_like(norms)

    def draw(self, key: Array, size: int, dtype) -> Float[Array, "N q"]:
        """S, for the sketches other than `"coordinate"`."""
        q = self.block
        if self.sketch == "gaussian":
            return jax.random.normal(key, (size, q), dtype)
        signs_key, rows_key = jax.random.split(key)
        signs = jax.random.rademacher(signs_key, (size, 1), dtype)
        if self.sketch == "countsketch":
            buckets = jax.random.randint(rows_key, (size, 1), 0, q)
            return jnp.where(buckets == jnp.arange(q)[None, :], signs, 0)
        order = 1 << max(size - 1, 1).bit_length()
        columns = jax.random.randint(rows_key, (1, q), 0, order)
        ones = jax.lax.population_count(jnp.arange(size)[:, None] & columns)
        return signs * jnp.where(ones % 2 == 0, 1, -1).astype(dtype)

    def project(self, columns, sketched):
        """W (WᵀW)⁺ y with W = `columns`."""
        gram = columns.T @ columns
        ridge = 1e-14 * jnp.trace(gram) + jnp.finfo(gram.dtype).tiny
        if self.block == 1:
            weights = sketched / (gram[0] + ridge)
        else:
            ridge = jnp.maximum(ridge, 10 * jnp.finfo(gram.dtype).eps * jnp.trace(gram))
            factor = jnp.linalg.cholesky(gram + ridge * jnp.eye(self.block, dtype=gram.dtype))
            weights = jax.scipy.linalg.cho_solve((factor, True), sketched)
        return columns @ weights

    def sweep(self, matrix, logits, rhs, d, key):
        """About as many steps as touch each row once; their residual is not needed between them."""
        size, q = rhs.size, self.block
        steps = max(1, size // q)

        def coordinate(d, key):
            if self.block == 1:
                rows = jax.random.categorical(key, logits)[None]
            else:  # without replacement, by the Gumbel trick
                _, rows = jax.lax.top_k(logits + jax.random.gumbel(key, logits.shape), q)
            columns = matrix[rows].T
            return d - self.project(columns, columns.T @ d - rhs[rows]), None

        def general(carry, key):
            d, residual = carry
            sketch = self.draw(key, size, rhs.dtype)
            move = self.project(matrix @ sketch, sketch.T @ residual)
            return (d - move, residual - matrix @ move), None

        keys = jax.random.split(key, steps)
        if self.sketch == "coordinate":
            return jax.lax.scan(coordinate, d, keys)[0]
        start = (d, matrix @ d - rhs)
        return jax.lax.scan(general, start, keys)[0][0]

    def solve(self, system, kept, rhs, start, tolerance, key):
        """See `InnerSolver`; the residual is tested after every sweep."""
        matrix = _matrix(system)
        cost = self._sweep_cost(rhs.size)

        def going(carry):
            d, sweeps, _ = carry
            left = jnp.linalg.norm(matrix @ d - rhs)
            return (left > tolerance) & (sweeps < self.max_sweeps)

        def body(carry):
            d, sweeps, key = carry
            key, now = jax.random.split(key)
            d = self.sweep(matrix, kept, rhs, d, now)
            return d, sweeps + 1, key

        zero = jnp.zeros((), jnp.int32)
        d, sweeps, _ = jax.lax.while_loop(going, body, (start, zero, key))
        return Solved(d, sweeps * cost + 1)

    def _sweep_cost(self, size):
        """Products of one sweep, rounded up: a coordinate step costs q / (n + m) of one."""
        steps = max(1, size // self.block)
        if self.sketch == "coordinate":
            return -(-steps * self.block // size) + 1
        return steps * (self.block + 1) + 1


def automatic(size: int) -> InnerSolver:
    """`Direct` for up to 500 variables and equalities together, `MINRES` beyond.

    A factorization of 500 unknowns takes about as long as the derivatives that it needs; beyond,
    its cost grows with the cube and its memory with the square. Inequalities are eliminated first
    and do not count.
    """
    return Direct() if size <= 500 else MINRES("diagonal")


def _matrix(system: KKTSystem) -> Array:
    assert system.matrix is not None  # `needs_matrix`
    return system.matrix
