"""The gradient-normalized smoothness γ(x) itself, for diagnosis."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxopt_ext.core import check
from jaxopt_ext.core.problem import Minimization
from jaxopt_ext.solvers.curvature import Curvature
from jaxopt_ext.solvers.hessian_models import HessianModel, LocalProblem
from jaxopt_ext.solvers.metrics import EuclideanMetric, Metric


def gradient_normalized_smoothness(
    fun: Callable[[PyTree, PyTree], Array],
    hessian: HessianModel,
    x: PyTree,
    args: PyTree = None,
    *,
    gradient: PyTree = None,
    metric: Metric | None = None,
    directions: int = 64,
    lengths: int = 64,
    max_radius: float | Array = 1e3,
    key: PRNGKeyArray | None = None,
) -> Float[Array, ""]:
    """Estimate γ(x), the radius within which a Hessian model explains the gradient.

    γ(x) is the largest γ with ‖∇f(x + h) − ∇f(x) − H h‖_* ≤ ‖g‖_* ‖h‖ / γ for all h of length at
    most γ with ⟨∇²f(x) h, h⟩ + ⟨g, h⟩ ≤ 0. The estimate samples h on rays, so it is an upper bound;
    with one variable it is exact up to the resolution of the lengths.

    Args:
        fun: f(variables, args) → scalar.
        hessian: A Hessian model for `Minimization`.
        x: The point, a PyTree of floating arrays.
        args: Second argument of `fun`.
        gradient: g; `None` takes ∇f(x).
        metric: B; `None` is the Euclidean one.
        directions: Random rays, besides those of −g, the Newton step and the largest error found.
        lengths: Points per ray.
        max_radius: Longest h that is looked at, in the metric.
        key: Random key of the rays; `None` takes a fixed one.

    Returns:
        The estimate of γ(x), at most `max_radius`; 0 where g = 0.

    Raises:
        TypeError: `hessian` is not a Hessian model.
        ValueError: A count is less than 1.

    Reference:
        Semenov, Jaggi, Doikov, arXiv 2506.13710: definition of γ.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext import solvers
        >>> f = lambda y, args: y**4 / 4
        >>> gamma = solvers.gradient_normalized_smoothness(f, solvers.ExactHessian(), 2.0)
        >>> print(jnp.round(gamma, 2))  # 9 x / 8
        2.25
    """
    check.count("gradient_normalized_smoothness", "directions", directions)
    check.count("gradient_normalized_smoothness", "lengths", lengths)
    if not isinstance(hessian, HessianModel):
        raise TypeError(
            f"gradient_normalized_smoothness: hessian is a {type(hessian).__name__}, expected a "
            "Hessian model such as ExactHessian()"
        )
    value = check.variables("x", x)
    problem = Minimization(fun).trace(value, args)
    flat, unravel = ravel_pytree(value)
    coordinates = (EuclideanMetric() if metric is None else metric).coordinates(value)
    here = jax.grad(lambda v: problem.fun(unravel(v), args).astype(flat.dtype))(flat)
    local = LocalProblem(
        problem, args, problem.fun, flat, unravel, coordinates, coordinates.dual(here),
        jnp.zeros((), jnp.int32),
    )  # fmt: skip
    g = local.gradient if gradient is None else coordinates.dual(ravel_pytree(gradient)[0])
    curvature = hessian.at(local, hessian.build(local, hessian.init(local)))
    rays = _rays(local, g, curvature, directions, key)
    length, ratio = _along(local, g, curvature, rays, lengths, max_radius)
    order = jnp.argsort(length)
    length, ratio = length[order], ratio[order]
    worst = jax.lax.cummin(ratio)  # of all h up to this length
    longest = jnp.append(length[1:], jnp.asarray(max_radius, flat.dtype))
    return jnp.max(jnp.minimum(worst, longest), initial=0)


def _rays(local: LocalProblem, g, curvature: Curvature, directions, key):
    """Unit vectors: ±random, −g, and the Newton step, as far as they descend."""
    key = jax.random.key(0) if key is None else key
    random = jax.random.normal(key, (directions, local.size), g.dtype)
    newton = curvature.direction(jnp.asarray(1e-6, g.dtype), g).step
    rays = jnp.concatenate([random, jnp.stack([-g, newton])])
    rays = jnp.where(jnp.sum(rays * g[None], axis=1, keepdims=True) > 0, -rays, rays)
    size = jnp.linalg.norm(rays, axis=1, keepdims=True)
    return rays / jnp.where(size > 0, size, 1)


def _along(local: LocalProblem, g, curvature: Curvature, rays, lengths, max_radius):
    """Lengths and ratios ‖g‖‖h‖ / ‖error‖ at points of the rays that are in the region."""
    _, exact = jax.linearize(jax.grad(local.objective), local.origin)
    norm = jnp.linalg.norm(g)

    def one(ray):
        slope, bend = jnp.dot(ray, g), jnp.dot(ray, exact(ray))
        end = jnp.where(bend > 0, -slope / jnp.where(bend > 0, bend, 1), max_radius)
        end = jnp.minimum(end, max_radius)
        # geometric from the smallest length that is not rounding error, and the end itself
        steps = jnp.linspace(jnp.log(jnp.asarray(1e-3, ray.dtype)), 0, lengths)

        def at(t):
            h = end * jnp.exp(t) * ray
            error = jax.grad(local.objective)(h) - local.gradient - curvature.product(h)
            size = jnp.linalg.norm(error)
            length = jnp.linalg.norm(h)
            return length, jnp.where(
                size > 0, norm * length / jnp.where(size > 0, size, 1), jnp.inf
            )

        return jax.lax.map(at, steps)

    length, ratio = jax.lax.map(one, rays)
    return length.ravel(), ratio.ravel()
