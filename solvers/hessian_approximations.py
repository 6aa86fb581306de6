"""Cheaper approximations of another Hessian model: its diagonal, a sketch, an average over time."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jaxopt_ext.core import check
from jaxopt_ext.core.solver import Number
from jaxopt_ext.implicit.linear_solvers import nystrom_approximation
from jaxopt_ext.solvers.curvature import Diagonal, Matrix, Spectrum
from jaxopt_ext.solvers.hessian_models import ExactHessian, HessianModel, OperatorModel


class DiagonalHessian(HessianModel):
    """H = |diag| of another model, exactly by n products or estimated from random ones.

    Args:
        of: The model whose diagonal it is, one with products.
        samples: Random products per point (Hutchinson's estimator); `None` takes all n unit
            vectors, a few at a time.
        key: Random key, needed with `samples`.

    Raises:
        TypeError: A setting is of the wrong kind.
        ValueError: `samples` without a key.

    Reference:
        Bekas, Kokiopoulou, Saad, "An Estimator for the Diagonal of a Matrix", Appl. Numer. Math.
        57 (2007).

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> problem = jx.Minimization(lambda y, t: jnp.sum(jnp.cosh(y - t)))
        >>> solver = solvers.GradNormSmooth(solvers.DiagonalHessian())
        >>> print(jnp.round(jx.solve(problem, solver, jnp.zeros(2), 2.0).value, 3))
        [2. 2.]
    """

    of: OperatorModel = ExactHessian()
    samples: int | None = eqx.field(static=True, default=None)
    key: PRNGKeyArray | None = None

    def __check_init__(self):
        _require_products(self, self.of)
        if self.samples is not None:
            check.count("DiagonalHessian", "samples", self.samples)
            _require_key(self, self.key)

    def evaluations(self, size):
        """See `HessianModel`."""
        return {"hvp": size if self.samples is None else self.samples}

    def check(self, problem):
        """See `HessianModel`."""
        self.of.check(problem)

    def build(self, local, data):
        """See `HessianModel`."""
        product, n, dtype = self.of.product(local), local.size, local.point.dtype
        if self.samples is None:

            def entry(i):
                unit = jnp.zeros(n, dtype).at[i].set(1)
                return product(unit)[i]

            return Diagonal(jnp.abs(jax.lax.map(entry, jnp.arange(n), batch_size=min(n, 64))))

        assert self.key is not None
        signs = jax.random.rademacher(local.key(self.key), (self.samples, n), dtype)
        return Diagonal(jnp.abs(jnp.mean(jax.lax.map(lambda z: z * product(z), signs), axis=0)))


class NystromHessian(HessianModel):
    """Randomized Nyström approximation of another model: its largest eigenvalues, from r products.

    On the complement of the r eigenvectors it takes the smallest of the r eigenvalues, so that it
    overestimates there rather than neglects. The other model must be positive semidefinite.

    Args:
        rank: r, products per point.
        key: Random key.
        of: The model that it approximates, one with products.

    Raises:
        TypeError: A setting is of the wrong kind.
        ValueError: `rank` is less than 1.

    Reference:
        Frangella, Tropp, Udell, "Randomized Nyström Preconditioning", SIAM J. Matrix Anal. Appl.
        44 (2023).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> problem = jx.Minimization(lambda y, t: jnp.sum(jnp.cosh(y - t)))
        >>> model = solvers.NystromHessian(rank=2, key=jax.random.key(0))
        >>> solver = solvers.GradNormSmooth(model)
        >>> print(jnp.round(jx.solve(problem, solver, jnp.zeros(4), 2.0).value))
        [2. 2. 2. 2.]
    """

    rank: int = eqx.field(static=True)
    key: PRNGKeyArray
    of: OperatorModel = ExactHessian()

    def __check_init__(self):
        check.count("NystromHessian", "rank", self.rank)
        _require_key(self, self.key)
        _require_products(self, self.of)

    def evaluations(self, size):
        """See `HessianModel`."""
        return {"hvp": min(self.rank, size)}

    def check(self, problem):
        """See `HessianModel`."""
        self.of.check(problem)

    def build(self, local, data):
        """See `HessianModel`."""
        product = self.of.product(local)
        basis, values = nystrom_approximation(product, local.point, self.rank, local.key(self.key))
        return Spectrum(basis, values, values[-1])


class AveragedHessian(HessianModel):
    """Exponential average over time of a dense or diagonal model, for stochastic objectives.

    H ← decay · H + (1 − decay) · H(x), with the first H as it is. The noise of minibatches averages
    out, at the price of curvature from earlier points. This is beyond the theory of the method.

    Args:
        of: The model that is averaged, one that keeps a matrix or a diagonal.
        decay: In [0, 1), dimensionless.

    Raises:
        TypeError: A setting is of the wrong kind, or (from `solve`) the model keeps neither.
        ValueError: `decay` is outside its range.

    Reference:
        Na, Dereziński, Mahoney, "Hessian Averaging in Stochastic Newton Methods Achieves
        Superlinear Convergence", Math. Program. 201 (2023).

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> problem = jx.Minimization(lambda y, t: jnp.sum(jnp.cosh(y - t)))
        >>> solver = solvers.GradNormSmooth(solvers.AveragedHessian(decay=0.5))
        >>> print(jnp.round(jx.solve(problem, solver, jnp.zeros(2), 2.0).value, 3))
        [2. 2.]
    """

    of: HessianModel = ExactHessian()
    decay: Number = 0.9

    def __check_init__(self):
        if not isinstance(self.of, HessianModel):
            raise TypeError(
                f"AveragedHessian: of is a {type(self.of).__name__}, expected a Hessian model"
            )
        check.number("AveragedHessian", "decay", self.decay, at_least=0, below=1)

    def evaluations(self, size):
        """See `HessianModel`."""
        return self.of.evaluations(size)

    def check(self, problem):
        """See `HessianModel`."""
        self.of.check(problem)

    def init(self, local):
        """See `HessianModel`."""
        curvature = self.of.init(local)
        if not isinstance(curvature, Matrix | Diagonal):
            raise TypeError(
                f"AveragedHessian: {type(self.of).__name__} with these settings keeps neither a "
                "matrix nor a diagonal, expected for instance ExactHessian() or DiagonalHessian()"
            )
        return curvature, jnp.array(False)

    def build(self, local, data):
        """See `HessianModel`."""
        old, known = self.init(local) if data is None else data
        new = self.of.build(local, None)
        keep = jnp.where(known, jnp.asarray(self.decay, local.point.dtype), 0)
        return jax.tree.map(lambda a, b: keep * a + (1 - keep) * b, old, new), jnp.array(True)

    def at(self, local, data):
        """See `HessianModel`."""
        return data[0]


def _require_products(owner, model):
    if not isinstance(model, OperatorModel):
        raise TypeError(
            f"{type(owner).__name__}: of is a {type(model).__name__}, expected a model with "
            "Hessian-vector products such as ExactHessian()"
        )


def _require_key(owner, key):
    if not isinstance(key, jax.Array):
        raise TypeError(
            f"{type(owner).__name__}: key is a {type(key).__name__}, expected a random key such as "
            "jax.random.key(0)"
        )
