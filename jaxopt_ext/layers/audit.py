"""How well the linear system of a derivative is solved, and what kind of point it belongs to."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from jaxopt_ext import implicit


class Audit(eqx.Module):
    """One entry per linear system.

    Attributes:
        adjoint_residual: ‖Hλ − v‖ / ‖v‖ for a random v, with λ as the backward pass finds it.
        conditioning: Smallest over largest singular value of H.
        lowest_curvature: Lowest eigenvalue of H over the largest in size: negative at a saddle
            point. NaN where H is not a Hessian (constraints, solves in turn).
    """

    adjoint_residual: Float[Array, "*batch"]
    conditioning: Float[Array, "*batch"]
    lowest_curvature: Float[Array, "*batch"]


def audit(
    condition: Callable, variables: PyTree, args: PyTree, inverse: Callable, key: Array
) -> Audit:
    """Solve H λ = v for a random v as the backward pass would, H = ∂condition/∂variables.

    Args:
        condition: The optimality conditions, F(variables, args).
        variables: Where.
        args: Second argument.
        inverse: Linear solver of the rule.
        key: A JAX random key.

    Returns:
        The audit.
    """
    variables, args = implicit.detach((variables, args))
    _, mv = jax.linearize(lambda v: condition(v, args), variables)
    symmetric = bool(getattr(condition, "symmetric", False))
    operator = implicit.LinearOperator(mv, variables, symmetric)
    flat, unravel = ravel_pytree(variables)
    direction = jax.random.normal(key, flat.shape, flat.dtype)
    answer = inverse(operator, unravel(direction))
    missing = ravel_pytree(mv(answer))[0] - direction
    matrix = operator.as_matrix()
    matrix = jnp.where(jnp.all(jnp.isfinite(matrix)), matrix, jnp.eye(flat.size, dtype=flat.dtype))
    values = jnp.linalg.svd(matrix, compute_uv=False)
    lowest = jnp.full((), jnp.nan, flat.dtype)
    if isinstance(condition, implicit.LeastSquares):
        lowest = jnp.linalg.eigvalsh((matrix + matrix.T) / 2)[0] / values[0]
    return Audit(
        jnp.linalg.norm(missing) / jnp.linalg.norm(direction), values[-1] / values[0], lowest
    )
