"""Proximal operators, with derivatives of every order.

The convention is `prox(x, hyperparams, step=1.0)`, which computes

    argmin_y step · g(y; hyperparams) + ½‖y − x‖²

for a PyTree x, unless the operator needs a vector or a matrix. `hyperparams` and `step` are
differentiable. In the condition and the solvers of proximal-gradient type, whose operator is called
as `prox(v, step, *args)`, a lambda swaps the arguments:

    prox=lambda v, step, weight: proximal.prox_lasso(v, weight, step)

A proximal operator is differentiable almost everywhere. At a kink (an entry exactly at its
threshold) the derivative is that of one of the neighboring pieces, and finite.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from jaxopt_ext.implicit.hoist import detach, vary_like
from jaxopt_ext.implicit.projections import (
    as_floating,
    as_parameter,
    non_negative,
    positive_part,
    projection_psd_cone,
    safe_norm,
    tuple_of,
)

__all__ = [
    "prox_elastic_net",
    "prox_from_projection",
    "prox_group_lasso",
    "prox_lasso",
    "prox_non_negative_lasso",
    "prox_non_negative_ridge",
    "prox_none",
    "prox_nuclear",
    "prox_ridge",
    "prox_total_variation_1d",
]


def _like(name: str, value: PyTree, x: PyTree) -> PyTree:
    """`value >= 0` for every entry of x: a PyTree like x, or one number for all of it."""
    if jax.tree.structure(value) != jax.tree.structure(x):
        if len(jax.tree.leaves(value)) != 1 or jnp.shape(jax.tree.leaves(value)[0]) != ():
            raise ValueError(
                f"{name} has structure {jax.tree.structure(value)}, expected a number or "
                f"{jax.tree.structure(x)}"
            )
        value = jax.tree.map(lambda _: jax.tree.leaves(value)[0], x)
    for leaf in jax.tree.leaves(value):
        non_negative(name, leaf)
    return jax.tree.map(lambda v, leaf: as_parameter(name, v, leaf.shape, leaf.dtype), value, x)


def _variables(x: PyTree) -> PyTree:
    if not jax.tree.leaves(x):
        raise ValueError(f"x is {x!r}, expected a PyTree with at least one floating array")
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: as_floating(f"x{jax.tree_util.keystr(path)}", leaf), x
    )


def _scaled(name: str, weight: PyTree, step: Any, x: PyTree) -> PyTree:
    """Weight times step, a PyTree like x."""
    non_negative("step", step)
    return jax.tree.map(
        lambda w: as_parameter("step", step, (), w.dtype) * w, _like(name, weight, x)
    )


def _one_number(name: str, weight: Any, step: Any, dtype: Any) -> Array:
    """Weight times step, both single numbers."""
    non_negative(name, weight)
    non_negative("step", step)
    return as_parameter("step", step, (), dtype) * as_parameter(name, weight, (), dtype)


def _soft(x, threshold):
    """Soft thresholding; the identity, with its derivative, where the threshold is zero."""
    moved = jnp.where(x > 0, x - threshold, x + threshold)
    return jnp.where((jnp.abs(x) > threshold) | (threshold == 0), moved, 0)


def prox_none(x: PyTree, hyperparams: Any = None, step: ArrayLike = 1.0) -> PyTree:
    """Proximal operator of g = 0: the identity.

    Args:
        x: A PyTree of floating arrays.
        hyperparams: Ignored.
        step: Ignored.

    Returns:
        The point x itself.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import proximal
        >>> print(proximal.prox_none(jnp.array([1.0, -2.0])))
        [ 1. -2.]
    """
    return x


def prox_lasso(x: PyTree, weight: PyTree, step: ArrayLike = 1.0) -> PyTree:
    """Proximal operator of the weighted l1 norm, by soft thresholding.

    argmin_y step · Σ weight |y| + ½‖y − x‖².

    Args:
        x: A PyTree of floating arrays.
        weight: Weights >= 0: a number, or a PyTree like x.
        step: Step size >= 0, a number.

    Returns:
        The minimizer, a PyTree like x.

    Raises:
        TypeError: x is not floating.
        ValueError: A weight or the step is negative, or does not have the structure of x.

    Reference:
        Parikh and Boyd, "Proximal Algorithms", 2014, section 6.5.2.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import proximal
        >>> print(proximal.prox_lasso(jnp.array([3.0, -0.5, -2.0]), 1.0))
        [ 2.  0. -1.]
    """
    x = _variables(x)
    return jax.tree.map(_soft, x, _scaled("weight", weight, step, x))


def prox_non_negative_lasso(x: PyTree, weight: PyTree, step: ArrayLike = 1.0) -> PyTree:
    """Proximal operator of the weighted l1 norm on the nonnegative orthant.

    argmin_{y >= 0} step · Σ weight y + ½‖y − x‖² = max(x − step · weight, 0).

    Args:
        x: A PyTree of floating arrays.
        weight: Weights >= 0: a number, or a PyTree like x.
        step: Step size >= 0, a number.

    Returns:
        The minimizer, a PyTree like x.

    Raises:
        TypeError: x is not floating.
        ValueError: A weight or the step is negative, or does not have the structure of x.

    Reference:
        Parikh and Boyd, "Proximal Algorithms", 2014, section 6.5.2.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import proximal
        >>> print(proximal.prox_non_negative_lasso(jnp.array([3.0, -0.5]), 1.0))
        [2. 0.]
    """
    x = _variables(x)
    threshold = _scaled("weight", weight, step, x)
    return jax.tree.map(lambda leaf, t: positive_part(leaf - t), x, threshold)


def prox_elastic_net(
    x: PyTree, hyperparams: tuple[PyTree, PyTree], step: ArrayLike = 1.0
) -> PyTree:
    """Proximal operator of the elastic net.

    argmin_y step · Σ weight (|y| + gamma y²/2) + ½‖y − x‖².

    Args:
        x: A PyTree of floating arrays.
        hyperparams: The pair (weight, gamma), each >= 0: a number, or a PyTree like x.
        step: Step size >= 0, a number.

    Returns:
        The minimizer, a PyTree like x.

    Raises:
        TypeError: x is not floating.
        ValueError: A hyper-parameter or the step is negative, or does not have the structure of x.

    Reference:
        Zou and Hastie, "Regularization and variable selection via the elastic net", JRSS B 67,
        2005.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import proximal
        >>> print(proximal.prox_elastic_net(jnp.array([3.0, -0.5]), (1.0, 1.0)))
        [1. 0.]
    """
    x = _variables(x)
    weight, gamma = tuple_of("hyperparams", hyperparams, "weight, gamma")
    threshold, gamma = _scaled("weight", weight, step, x), _like("gamma", gamma, x)
    return jax.tree.map(lambda leaf, t, g: _soft(leaf, t) / (1 + t * g), x, threshold, gamma)


def prox_group_lasso(x: PyTree, weight: ArrayLike, step: ArrayLike = 1.0) -> PyTree:
    """Proximal operator of the Euclidean norm of the whole PyTree, by block soft thresholding.

    argmin_y step · weight · ‖y‖₂ + ½‖y − x‖². For many groups, `jax.vmap` over them.

    Args:
        x: A PyTree of floating arrays, one group.
        weight: Weight >= 0, a number.
        step: Step size >= 0, a number.

    Returns:
        The minimizer, a PyTree like x. Its derivative at x = 0 is zero.

    Raises:
        TypeError: x is not floating.
        ValueError: The weight or the step is negative or not a number.

    Reference:
        Yuan and Lin, "Model selection and estimation in regression with grouped variables", JRSS B
        68, 2006.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import proximal
        >>> print(proximal.prox_group_lasso(jnp.array([3.0, 4.0]), 2.5))
        [1.5 2. ]
    """
    x = _variables(x)
    norm = safe_norm(x)
    threshold = _one_number("weight", weight, step, norm.dtype)
    kept = (norm > threshold) | (threshold == 0)
    factor = jnp.where(kept, 1 - threshold / jnp.where(norm > 0, norm, 1), 0)
    return jax.tree.map(lambda leaf: factor.astype(leaf.dtype) * leaf, x)


def prox_ridge(x: PyTree, weight: PyTree, step: ArrayLike = 1.0) -> PyTree:
    """Proximal operator of half the weighted squared norm.

    argmin_y step · Σ weight y²/2 + ½‖y − x‖² = x / (1 + step · weight).

    Args:
        x: A PyTree of floating arrays.
        weight: Weights >= 0: a number, or a PyTree like x.
        step: Step size >= 0, a number.

    Returns:
        The minimizer, a PyTree like x.

    Raises:
        TypeError: x is not floating.
        ValueError: A weight or the step is negative, or does not have the structure of x.

    Reference:
        Parikh and Boyd, "Proximal Algorithms", 2014, section 6.1.1.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import proximal
        >>> print(proximal.prox_ridge(jnp.array([3.0, -6.0]), 1.0, step=2.0))
        [ 1. -2.]
    """
    x = _variables(x)
    return jax.tree.map(lambda leaf, t: leaf / (1 + t), x, _scaled("weight", weight, step, x))


def prox_non_negative_ridge(x: PyTree, weight: PyTree, step: ArrayLike = 1.0) -> PyTree:
    """Proximal operator of half the weighted squared norm on the nonnegative orthant.

    argmin_{y >= 0} step · Σ weight y²/2 + ½‖y − x‖² = max(x, 0) / (1 + step · weight).

    Args:
        x: A PyTree of floating arrays.
        weight: Weights >= 0: a number, or a PyTree like x.
        step: Step size >= 0, a number.

    Returns:
        The minimizer, a PyTree like x.

    Raises:
        TypeError: x is not floating.
        ValueError: A weight or the step is negative, or does not have the structure of x.

    Reference:
        Parikh and Boyd, "Proximal Algorithms", 2014, section 6.1.1.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import proximal
        >>> print(proximal.prox_non_negative_ridge(jnp.array([3.0, -6.0]), 1.0, step=2.0))
        [1. 0.]
    """
    return jax.tree.map(positive_part, prox_ridge(x, weight, step))


def prox_nuclear(
    x: Float[ArrayLike, "m n"], weight: ArrayLike, step: ArrayLike = 1.0
) -> Float[Array, "m n"]:
    """Proximal operator of the nuclear norm: soft thresholding of the singular values.

    argmin_Y step · weight · ‖Y‖_* + ½‖Y − x‖² (Frobenius). It is twice the upper right block of
    the projection of [[0, x], [xᵀ, 0]] − step · weight · I onto the semidefinite cone, and inherits
    its derivative, which never divides by differences of singular values. One eigendecomposition,
    O((m + n)³).

    Args:
        x: A matrix, shape (m, n).
        weight: Weight >= 0, a number.
        step: Step size >= 0, a number.

    Returns:
        The minimizer, shape (m, n). Derivatives of all orders are exact unless a singular value
        equals step · weight, also where singular values repeat or are zero.

    Raises:
        TypeError: x is not floating.
        ValueError: x is not a matrix, or the weight or the step is negative or not a number.

    Reference:
        Cai, Candès, Shen, "A singular value thresholding algorithm for matrix completion", SIAM
        Journal on Optimization 20, 2010.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import proximal
        >>> print(proximal.prox_nuclear(jnp.array([[3.0, 0.0], [0.0, 1.0]]), 2.0).round(3) + 0.0)
        [[1. 0.]
         [0. 0.]]
    """
    x = as_floating("x", x, 2)
    threshold = _one_number("weight", weight, step, x.dtype)
    m, n = x.shape
    dilation = jnp.block([[jnp.zeros((m, m), x.dtype), x], [x.T, jnp.zeros((n, n), x.dtype)]])
    shifted = dilation - threshold * jnp.eye(m + n, dtype=x.dtype)
    return 2 * projection_psd_cone(shifted)[:m, m:]


def _segments(x, threshold):
    """Condat's direct algorithm: where the constant pieces of the solution start.

    At each start it also says whether the jump at the end of the piece is up (1), down (−1) or,
    for the last piece, absent (0).

    Names follow the paper: k is the current sample, k0 the start of the current piece, lower and
    upper hold the bounds of its value with the dual variable at these bounds, and low_end, high_end
    are the last places where a downward or an upward jump was possible.
    """
    n = x.size
    last = n - 1

    def at(i):
        return x[jnp.clip(i, 0, last)]

    def body(state):
        _, k, k0, low_end, high_end, low, high, u_low, u_high, starts, jumps = state
        end = k == last
        next_low, next_high = u_low + at(k + 1) - low, u_high + at(k + 1) - high
        down = jnp.where(end, u_low < 0, next_low < -threshold)
        up = jnp.where(end, u_high > 0, next_high > threshold) & ~down
        finish = end & ~down & ~up
        # a piece is complete: up to the last sample where its value touches the bound
        close = down | up | finish
        sign = jnp.where(down, -1, jnp.where(up, 1, 0)).astype(x.dtype)
        starts = starts.at[k0].set(starts[k0] | close)
        jumps = jumps.at[k0].set(sign)
        begin = jnp.where(down, low_end, high_end) + 1
        sample = at(begin)
        # no jump: the piece grows by one sample, and its bounds tighten
        grown = (k + 1 - k0 + 1).astype(x.dtype)
        tight_low, tight_high = next_low >= threshold, next_high <= -threshold
        grow_low = jnp.where(tight_low, low + (next_low - threshold) / grown, low)
        grow_high = jnp.where(tight_high, high + (next_high + threshold) / grown, high)
        # after a jump, at the end of the signal only the side that jumped starts afresh
        from_down = (
            begin,
            jnp.where(end, high_end, begin),
            sample,
            jnp.where(end, high, sample + 2 * threshold),
            threshold,
            jnp.where(end, sample + threshold - high, -threshold),
        )
        from_up = (
            jnp.where(end, low_end, begin),
            begin,
            jnp.where(end, low, sample - 2 * threshold),
            sample,
            jnp.where(end, sample - threshold - low, threshold),
            -threshold,
        )
        grow = (
            jnp.where(tight_low, k + 1, low_end),
            jnp.where(tight_high, k + 1, high_end),
            grow_low,
            grow_high,
            jnp.where(tight_low, threshold, next_low),
            jnp.where(tight_high, -threshold, next_high),
        )
        rest = (
            jnp.where(down, d, jnp.where(up, u, g))
            for d, u, g in zip(from_down, from_up, grow, strict=True)
        )
        jump = down | up
        k, k0 = jnp.where(jump, begin, k + 1), jnp.where(jump, begin, k0)
        return finish, k, k0, *rest, starts, jumps

    zero = jnp.zeros((), jnp.int32)
    start = (
        jnp.zeros((), bool),
        *(zero,) * 4,
        x[0] - threshold,
        x[0] + threshold,
        threshold,
        -threshold,
        jnp.zeros(n, bool),
        jnp.zeros_like(x),
    )
    out = jax.lax.while_loop(lambda s: ~s[0], body, vary_like(start, (x, threshold)))
    return out[-2], out[-1]


def prox_total_variation_1d(
    x: Float[ArrayLike, " n"], weight: ArrayLike, step: ArrayLike = 1.0
) -> Float[Array, " n"]:
    """Proximal operator of the total variation of a signal; exact.

    argmin_y step · weight · Σ |y[i+1] − y[i]| + ½‖y − x‖². A direct algorithm finds the constant
    pieces of y, in O(n) steps for typical signals and O(n²) for the worst; on each piece, y is the
    mean of x moved by the jumps at its ends, and this formula is what is differentiated.

    Args:
        x: The signal, shape (n,).
        weight: Weight >= 0, a number.
        step: Step size >= 0, a number.

    Returns:
        The minimizer, shape (n,). Derivatives of all orders are exact where a small change of x
        does not split or merge pieces.

    Raises:
        TypeError: x is not floating.
        ValueError: x is not a vector, or the weight or the step is negative or not a number.

    Reference:
        Condat, "A direct algorithm for 1-D total variation denoising", IEEE Signal Processing
        Letters 20, 2013.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import proximal
        >>> print(proximal.prox_total_variation_1d(jnp.array([0.0, 1.0, 5.0, 6.0]), 1.0))
        [1. 1. 5. 5.]
    """
    x = as_floating("x", x, 1)
    threshold = _one_number("weight", weight, step, x.dtype)
    n = x.size
    if n < 2:
        return x
    # a NaN anywhere would make no comparison true; the result is NaN, found without the loop
    finite = jnp.all(jnp.isfinite(x)) & jnp.isfinite(threshold)
    starts, jumps = _segments(*detach((jnp.where(finite, x, 0), jnp.where(finite, threshold, 0))))
    piece = jnp.cumsum(starts) - 1
    after = jax.ops.segment_sum(jnp.where(starts, jumps, 0), piece, num_segments=n)
    pull = after - jnp.concatenate([jnp.zeros(1, x.dtype), after[:-1]])
    total = jax.ops.segment_sum(x, piece, num_segments=n)
    count = jax.ops.segment_sum(jnp.ones_like(x), piece, num_segments=n)
    level = (total + threshold * pull) / jnp.maximum(count, 1)
    return jnp.where(finite, level[piece], jnp.nan)


def prox_from_projection(
    projection: Callable[..., PyTree],
) -> Callable[..., PyTree]:
    """Proximal operator of the indicator of a set: its projection, whatever the step.

    Args:
        projection: A function `projection(x)` or `projection(x, hyperparams)`, as those of
            `jaxopt_ext.implicit.projections`. One that takes several hyper-parameters is wrapped in
            a lambda first.

    Returns:
        `prox(x, hyperparams=None, step=1.0)`; the hyper-parameters are passed on unless `None`.

    Raises:
        TypeError: `projection` is not callable.

    Reference:
        Parikh and Boyd, "Proximal Algorithms", 2014, section 1.2.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.implicit import projections, proximal
        >>> prox = proximal.prox_from_projection(projections.projection_non_negative)
        >>> print(prox(jnp.array([1.0, -2.0]), step=0.1))
        [1. 0.]
    """
    if not callable(projection):
        raise TypeError(f"projection is a {type(projection).__name__}, expected a function")

    def prox(x, hyperparams=None, step=1.0):
        return projection(x) if hyperparams is None else projection(x, hyperparams)

    return prox
