"""Pieces of physical constraints: derivatives, projections on conservation laws, smooth kinks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxopt_ext.core import check


def derivative(fun: Callable[[Array], Array], axis: int = 0, order: int = 1) -> Callable:
    """The partial derivative of a function of a point, in forward mode.

    Args:
        fun: u(point) → array, e.g. the values of all basis functions there; point is a vector.
        axis: Along which coordinate.
        order: How often, at least 1.

    Returns:
        A function of the point with the shape of u.

    Raises:
        ValueError: `axis` is negative or `order` is less than 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext import layers
        >>> u = lambda p: p[0] ** 3 * p[1]
        >>> print(layers.derivative(u, axis=0, order=2)(jnp.array([2.0, 5.0])))
        60.0
    """
    check.function("derivative", "fun", fun)
    check.count("derivative", "axis", axis, at_least=0)
    check.count("derivative", "order", order)

    def once(inner):
        def along(point):
            direction = jnp.zeros_like(point).at[axis].set(1)
            return jax.jvp(inner, (point,), (direction,))[1]

        return along

    for _ in range(order):
        fun = once(fun)
    return fun


def conserve(
    field: Float[Array, " points"],
    weights: Float[Array, " points"],
    total: float | Float[Array, ""],
    variance: Float[Array, " points"] | None = None,
) -> Float[Array, " points"]:
    """The nearest field with a given integral Σ wᵢ uᵢ.

    Args:
        field: u.
        weights: w, the weights of a quadrature rule, not all zero.
        total: The integral, in units of w · u.
        variance: Where the field is uncertain it is changed more, in proportion; `None` means
            everywhere alike.

    Returns:
        The field after the change of least ‖·‖, or of least Mahalanobis length with `variance`.

    Raises:
        ValueError: The shapes differ.

    Reference:
        Hansen et al., "Learning Physical Models that Can Respect Conservation Laws", ICML 2023.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext import layers
        >>> print(layers.conserve(jnp.array([1.0, 2.0]), jnp.array([0.5, 0.5]), 2.0))
        [1.5 2.5]
    """
    for name, other in (("weights", weights), ("variance", variance)):
        if other is not None and jnp.shape(other) != jnp.shape(field):
            raise ValueError(
                f"conserve: {name} has shape {list(jnp.shape(other))}, expected "
                f"{list(jnp.shape(field))} as the field"
            )
    direction = weights if variance is None else variance * weights
    missing = jnp.asarray(total, field.dtype) - jnp.vdot(weights, field)
    return field + missing / jnp.vdot(weights, direction) * direction


def divergence_free(velocity: Float[Array, "axes ..."]) -> Float[Array, "axes ..."]:
    """The nearest divergence-free field on a periodic grid of equal spacing along all axes.

    The divergence meant is the spectral one. At the highest frequency of an even grid, where the
    derivative of a real field is ambiguous, it is taken as zero.

    Args:
        velocity: Components along the first axis, as many as the grid has axes.

    Returns:
        Its Leray projection.

    Raises:
        ValueError: The number of components is not that of the grid's axes.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext import layers
        >>> x = jnp.arange(8.0) * jnp.pi / 4
        >>> gradient = jnp.stack([jnp.cos(x)[:, None] * jnp.ones((8, 8)), jnp.zeros((8, 8))])
        >>> bool(jnp.max(jnp.abs(layers.divergence_free(gradient))) < 1e-6)
        True
    """
    axes = velocity.ndim - 1
    if velocity.shape[0] != axes:
        raise ValueError(
            f"divergence_free: velocity has shape {list(velocity.shape)}, expected one component "
            "per axis of the grid along its first axis"
        )
    waves = []
    for axis, n in enumerate(velocity.shape[1:]):
        k = jnp.fft.fftfreq(n, dtype=velocity.dtype)
        if n % 2 == 0:
            k = k.at[n // 2].set(0)
        shape = [1] * axes
        shape[axis] = n
        waves.append(jnp.broadcast_to(k.reshape(shape), velocity.shape[1:]))
    wave = jnp.stack(waves)
    grid = tuple(range(1, axes + 1))
    transformed = jnp.fft.fftn(velocity, axes=grid)
    squared = jnp.sum(wave**2, axis=0)
    along = jnp.sum(wave.astype(transformed.dtype) * transformed, axis=0) / jnp.where(
        squared > 0, squared, 1
    ).astype(transformed.dtype)
    return jnp.real(
        jnp.fft.ifftn(transformed - wave.astype(transformed.dtype) * along[None], axes=grid)
    )


def smooth_positive(value: Array, width: float | Array) -> Array:
    """A smooth max(value, 0), for residuals that must have a derivative at zero.

    Args:
        value: Any array.
        width: Size of the region in which it differs from max(value, 0), in its units, > 0.

    Returns:
        (v + √(v² + width²)) / 2.

    Raises:
        ValueError: `width` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext import layers
        >>> print(layers.smooth_positive(jnp.array([0.0, 30.0]), 0.1).round(2))
        [ 0.05 30.  ]
    """
    check.number("smooth_positive", "width", width, above=0)
    width = jnp.asarray(width, value.dtype)
    return (value + jnp.sqrt(value**2 + width**2)) / 2
