"""Metrics: the inner product ⟨Bh, h⟩ in which steps are measured, B symmetric positive definite.

A method in the metric B is the Euclidean method in the coordinates u with x = S u, B = (S Sᵀ)⁻¹.
So a metric is the linear map S, and everything else of a solver is written for B = I: a step is
S u, a gradient becomes Sᵀ∇f, its norm is the dual norm ‖∇f‖_* = ⟨∇f, B⁻¹∇f⟩^½, and a Hessian
becomes Sᵀ H S.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, PyTree

from jaxopt_ext.core import check, tree


class Coordinates(NamedTuple):
    """The maps of a metric on raveled vectors.

    Attributes:
        scale: u ↦ S u.
        dual: g ↦ Sᵀ g.
        unscale: h ↦ S⁻¹ h, or `None` where it is not available.
    """

    scale: Callable[[Array], Array]
    dual: Callable[[Array], Array]
    unscale: Callable[[Array], Array] | None


class Metric(eqx.Module, metaclass=check.SettingsMeta):
    """Base of the metrics."""

    @abc.abstractmethod
    def coordinates(self, value: PyTree) -> Coordinates:
        """The maps for variables like `value`.

        Raises:
            ValueError: The metric does not fit them.
        """


class EuclideanMetric(Metric):
    """B = I.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.solvers import EuclideanMetric
        >>> print(EuclideanMetric().coordinates(jnp.ones(2)).dual(jnp.array([3.0, 4.0])))
        [3. 4.]
    """

    def coordinates(self, value):
        """See `Metric`."""

        def same(v):
            return v

        return Coordinates(same, same, same)


class DiagonalMetric(Metric):
    """B diagonal: variables that are measured in different units.

    Args:
        diagonal: Positive entries of B, a PyTree like the variables; in units of 1 / variables².

    Raises:
        ValueError: An entry is not positive, or the PyTree does not fit the variables.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.solvers import DiagonalMetric
        >>> metric = DiagonalMetric(jnp.array([1.0, 4.0]))
        >>> print(metric.coordinates(jnp.ones(2)).dual(jnp.array([3.0, 4.0])))
        [3. 2.]
    """

    diagonal: PyTree

    def __check_init__(self):
        for leaf in jax.tree.leaves(check.variables("DiagonalMetric: diagonal", self.diagonal)):
            if not isinstance(leaf, Tracer) and not bool(jnp.all(leaf > 0)):
                raise ValueError(
                    f"DiagonalMetric: diagonal has the entry {float(jnp.min(leaf)):g}, expected "
                    "entries > 0"
                )

    def coordinates(self, value):
        """See `Metric`."""
        if jax.tree.map(jnp.shape, self.diagonal) != jax.tree.map(jnp.shape, value):
            raise ValueError(
                f"DiagonalMetric: diagonal is {tree.describe(self.diagonal)}, expected a PyTree "
                f"like init, {tree.describe(value)}"
            )
        root = jnp.sqrt(ravel_pytree(self.diagonal)[0]).astype(tree.dtype_of(value))
        return Coordinates(lambda u: u / root, lambda g: g / root, lambda h: h * root)


class MatrixMetric(Metric):
    """B a dense matrix on the raveled variables; factorized once, here.

    Args:
        matrix: B, symmetric positive definite.

    Attributes:
        factor: Its lower Cholesky factor L; S = L⁻ᵀ.

    Raises:
        ValueError: The matrix is not square or not positive definite, or it does not fit the
            variables.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.solvers import MatrixMetric
        >>> metric = MatrixMetric(jnp.array([[4.0, 0.0], [0.0, 1.0]]))
        >>> print(metric.coordinates(jnp.ones(2)).dual(jnp.array([4.0, 4.0])))
        [2. 4.]
    """

    factor: Float[Array, "n n"]

    def __init__(self, matrix: Any):
        matrix = jnp.asarray(matrix)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"MatrixMetric: matrix has shape {matrix.shape}, expected a square")
        self.factor = jnp.linalg.cholesky(matrix)
        if not isinstance(self.factor, Tracer) and not bool(jnp.all(jnp.isfinite(self.factor))):
            raise ValueError(
                "MatrixMetric: matrix is not positive definite, expected a symmetric positive "
                "definite one; add a small multiple of the identity"
            )

    def coordinates(self, value):
        """See `Metric`."""
        size = sum(leaf.size for leaf in jax.tree.leaves(value))
        if self.factor.shape != (size, size):
            raise ValueError(
                f"MatrixMetric: matrix has shape {self.factor.shape}, expected {(size, size)} for "
                f"init {tree.describe(value)}"
            )
        factor = self.factor.astype(tree.dtype_of(value))
        return Coordinates(
            lambda u: solve_triangular(factor, u, lower=True, trans=1),
            lambda g: solve_triangular(factor, g, lower=True),
            lambda h: factor.T @ h,
        )


class OperatorMetric(Metric):
    """B = (S Sᵀ)⁻¹ for a linear map S: B itself is never formed.

    For instance a smoothing operator, where B⁻¹ = S Sᵀ is cheap to apply and B is not.

    Args:
        scale: S, a linear function from PyTrees like the variables to the same; JAX transposes
            it. Arrays that it captures must be concrete.

    Raises:
        TypeError: `scale` is not a function.
        ValueError: It does not return a PyTree like the variables.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.solvers import OperatorMetric
        >>> metric = OperatorMetric(lambda u: jnp.cumsum(u))
        >>> print(metric.coordinates(jnp.ones(2)).dual(jnp.array([3.0, 4.0])))
        [7. 4.]
    """

    scale: Callable[[PyTree], PyTree]

    def __check_init__(self):
        check.function("OperatorMetric", "scale", self.scale)

    def coordinates(self, value):
        """See `Metric`."""
        flat, unravel = ravel_pytree(value)
        out = jax.eval_shape(self.scale, value)
        if not tree.same_types(out, value):
            raise ValueError(
                f"OperatorMetric: scale returned {tree.describe(out)}, expected a PyTree like "
                f"init, {tree.describe(value)}"
            )

        def scale(u):
            return ravel_pytree(self.scale(unravel(u)))[0]

        def dual(g):
            return jax.linear_transpose(scale, flat)(g)[0]

        return Coordinates(scale, dual, None)
