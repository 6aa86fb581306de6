"""Quasi-Newton models: H from differences of gradients."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxopt_ext.core import check
from jaxopt_ext.solvers.curvature import Curvature, Matrix, Spectrum, check_psd, semidefinite
from jaxopt_ext.solvers.hessian_models import HessianModel


class QuasiNewton(HessianModel):
    """H from differences of gradients by the secant equation; costs no evaluation.

    The matrix starts as a multiple of B (zero before the first pair, so the first step is one of
    the normalized gradient) and is updated by the pairs of displacements s and gradient
    differences y. Pairs without information (for BFGS: ⟨s, y⟩ ≤ 0) are left out.

    Args:
        update: `"bfgs"`, or `"sr1"`, whose negative eigenvalues are treated as `psd` says.
        memory: Pairs kept; O(n memory²) per point and O(n memory) per trial. `None` keeps a dense
            matrix that remembers all.
        psd: `"abs"`, `"clip"` or `"none"`, see `Eigendecomposition`.

    Raises:
        ValueError: A setting is outside its range.

    Reference:
        Nocedal, Wright, "Numerical Optimization", 2nd ed., Springer (2006), chapters 6 and 7.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> problem = jx.Minimization(lambda y, t: jnp.sum(jnp.cosh(y - t)))
        >>> solver = solvers.GradNormSmooth(solvers.QuasiNewton(memory=5))
        >>> solution = jx.solve(problem, solver, jnp.zeros(3), jnp.array([1.0, 2.0, 3.0]))
        >>> print(jnp.round(solution.value, 1), int(solution.stats.counts.hvp))
        [1. 2. 3.] 0
    """

    update: str = eqx.field(static=True, default="bfgs")
    memory: int | None = eqx.field(static=True, default=None)
    psd: str = eqx.field(static=True, default="abs")

    def __check_init__(self):
        if self.update not in ("bfgs", "sr1"):
            raise ValueError(f"QuasiNewton: update is {self.update!r}, expected 'bfgs' or 'sr1'")
        if self.memory is not None:
            check.count("QuasiNewton", "memory", self.memory)
        check_psd("QuasiNewton", self.psd)

    def init(self, local):
        """See `HessianModel`."""
        if local.coordinates.unscale is None:
            raise ValueError(
                "QuasiNewton: it needs displacements in the coordinates of the metric, which an "
                "OperatorMetric does not give, expected another metric"
            )
        n, zeros = local.size, local.origin
        pairs = None if self.memory is None else jnp.zeros((2, self.memory, n), zeros.dtype)
        size = n if self.memory is None else min(2 * self.memory, n)
        matrix = jnp.zeros((size, size), zeros.dtype)
        if self.memory is None and self.update == "bfgs":
            form: Curvature = Matrix(matrix)
        else:
            basis = jnp.zeros((n, size), zeros.dtype)
            form = Spectrum(basis, zeros[:size], jnp.zeros((), zeros.dtype))
        return SecantMemory(jnp.array(False), zeros, zeros, pairs, matrix, form)

    def build(self, local, data):
        """See `HessianModel`."""
        old = self.init(local) if data is None else data
        unscale = local.coordinates.unscale
        assert unscale is not None  # see init
        s = unscale(local.point - old.point)
        y = local.gradient - old.gradient
        s, y = jnp.where(old.known, s, 0), jnp.where(old.known, y, 0)
        if old.pairs is None:
            pairs, matrix = None, _secant(self.update, old.matrix, s, y, fresh=True)
            form: Curvature = Matrix(matrix)
            if self.update == "sr1":
                form = Spectrum.of_matrix(matrix, self.psd)
        else:
            useful = _informative(s, y) if self.update == "bfgs" else jnp.any(s != 0)
            shifted = jnp.roll(old.pairs, -1, axis=1).at[:, -1].set(jnp.stack([s, y]))
            pairs = jnp.where(useful, shifted, old.pairs)
            matrix, form = old.matrix, self._limited(pairs)
        return SecantMemory(jnp.array(True), local.point, local.gradient, pairs, matrix, form)

    def at(self, local, data):
        """See `HessianModel`."""
        return data.form

    def _limited(self, pairs):
        """The updates of σI by the pairs, carried out in the space that these span."""
        steps, changes = pairs
        basis = jnp.linalg.qr(jnp.concatenate([steps, changes]).T)[0]
        products = jnp.sum(steps * changes, axis=1)
        squares = jnp.sum(changes**2, axis=1)
        sigma = jnp.where(products > 0, squares / jnp.where(products > 0, products, 1), 0)
        known = jnp.argmax(jnp.where(sigma > 0, jnp.arange(sigma.size), -1))
        sigma = sigma[known]
        small = sigma * jnp.eye(basis.shape[1], dtype=basis.dtype)

        def one(matrix, pair):
            s, y = pair
            return _secant(self.update, matrix, s @ basis, y @ basis, fresh=False), None

        small, _ = jax.lax.scan(one, small, (steps, changes))
        values, vectors = jnp.linalg.eigh(small)
        return Spectrum(basis @ vectors, semidefinite(values, self.psd), sigma)


class SecantMemory(eqx.Module):
    """What `QuasiNewton` keeps.

    Attributes:
        known: Whether there is a previous point.
        point: It.
        gradient: The gradient there.
        pairs: Displacements and gradient differences, newest last; `None` for a dense matrix.
        matrix: The dense matrix.
        form: The form of H.
    """

    known: Array
    point: Float[Array, " n"]
    gradient: Float[Array, " n"]
    pairs: Float[Array, "2 memory n"] | None
    matrix: Float[Array, "k k"]
    form: Curvature


def _informative(s, y):
    """Whether BFGS can use the pair: clearly positive curvature along s."""
    eps = jnp.finfo(s.dtype).eps
    return jnp.dot(s, y) > 10 * eps * jnp.linalg.norm(s) * jnp.linalg.norm(y)


def _secant(update, matrix, s, y, fresh):
    """The matrix after one pair; with `fresh`, a zero matrix is first set to a multiple of I."""
    eps = jnp.finfo(s.dtype).eps
    curved = _informative(s, y)
    product = jnp.where(curved, jnp.dot(s, y), 1)
    if fresh:
        start = (jnp.dot(y, y) / product) * jnp.eye(s.size, dtype=s.dtype)
        matrix = jnp.where(jnp.any(matrix != 0) | ~curved, matrix, start)
    image = matrix @ s
    if update == "bfgs":
        bend = jnp.dot(s, image)
        use = curved & (bend > 0)
        new = matrix + jnp.outer(y, y) / product - jnp.outer(image, image) / jnp.where(use, bend, 1)
        return jnp.where(use, new, matrix)
    error = y - image
    bend = jnp.dot(s, error)
    floor = jnp.sqrt(eps) * jnp.linalg.norm(s) * jnp.linalg.norm(error)
    use = (jnp.abs(bend) >= floor) & (bend != 0)
    return jnp.where(use, matrix + jnp.outer(error, error) / jnp.where(use, bend, 1), matrix)
