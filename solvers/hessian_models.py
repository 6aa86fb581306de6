"""Hessian models: an approximation H of ∇²f and the linear algebra that fits it.

A model allocates its data (`zero`), computes it at an accepted point (`build`), and solves
(H + λI) h = −g for one trial (`direction`). All vectors are raveled.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree


@runtime_checkable
class HessianModel(Protocol):
    """What `GradNormSmooth` needs of a Hessian model."""

    def zero(self, point: Float[Array, " n"]) -> PyTree:
        """Data of the shape that `build` returns, before there is any."""
        ...

    def build(
        self, fun: Callable[[Float[Array, " n"]], Float[Array, ""]], point: Float[Array, " n"]
    ) -> PyTree:
        """The model of the Hessian of `fun` at `point`."""
        ...

    def direction(
        self, model: PyTree, shift: Float[Array, ""], gradient: Float[Array, " n"]
    ) -> tuple[Float[Array, " n"], Bool[Array, ""]]:
        """The step −(H + shift·I)⁻¹ gradient, and whether it could be computed."""
        ...


class ExactHessian(eqx.Module):
    """The exact Hessian as a dense matrix; one Cholesky factorization per trial.

    A shifted Hessian that is not positive definite makes the factorization fail, and the trial is
    rejected, which raises the shift. Memory n², time n³/3 a trial.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.solvers import ExactHessian
        >>> model = ExactHessian()
        >>> H = model.build(lambda y: jnp.sum(y**2), jnp.ones(2))
        >>> step, ok = model.direction(H, jnp.array(0.0), jnp.array([2.0, 4.0]))
        >>> print(jnp.round(step, 3), bool(ok))
        [-1. -2.] True
    """

    def zero(self, point):
        """See `HessianModel`."""
        return jnp.zeros((point.size, point.size), point.dtype)

    def build(self, fun, point):
        """See `HessianModel`."""
        return jax.hessian(fun)(point)

    def direction(self, model, shift, gradient):
        """See `HessianModel`."""
        shifted = model + shift * jnp.eye(gradient.size, dtype=gradient.dtype)
        factor = jnp.linalg.cholesky(shifted, symmetrize_input=False)
        ok = jnp.isfinite(factor[-1, -1])  # a failed factorization is NaN throughout
        step = -jax.scipy.linalg.cho_solve((factor, True), gradient)
        return jnp.where(ok, step, 0), ok
