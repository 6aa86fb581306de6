"""The consensus of a swarm: weights, temperature and the point they agree on."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxopt_ext.core import check
from jaxopt_ext.core.solver import Number


def exponents(
    energies: Float[Array, " particles"], alpha: Float[Array, ""]
) -> Float[Array, " particles"]:
    """−α (E − min E), exactly 0 for the best and −∞ for particles that are not finite.

    The minimum is subtracted before the multiplication, or a large offset of the objective would
    cost the weights their precision.

    Args:
        energies: Objective values.
        alpha: Inverse temperature, may be infinite.

    Returns:
        Logarithms of the weights before normalization.
    """
    least = jnp.min(jnp.where(jnp.isnan(energies), jnp.inf, energies))
    above = jnp.where(energies == least, 0, energies - least)
    exponent = jnp.where(above == 0, 0, -alpha * above)  # 0 · ∞ at infinite α
    usable = (energies < jnp.inf) | ((energies == least) & (least < jnp.inf))
    return jnp.where(usable, exponent, -jnp.inf)


def weights(
    energies: Float[Array, " particles"], alpha: Float[Array, ""]
) -> Float[Array, " particles"]:
    """Normalized weights exp(−α E); all 0 where no energy is finite.

    Args:
        energies: Objective values; NaN and +∞ get no weight, −∞ gets all of it.
        alpha: Inverse temperature, may be infinite: then the best particles share the weight.

    Returns:
        The weights.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.solvers import cbo
        >>> print(cbo.weights(jnp.array([1.0, 1.0, jnp.nan, 1e9]), jnp.array(10.0)))
        [0.5 0.5 0.  0. ]
    """
    unnormalized = jnp.exp(exponents(energies, alpha))
    total = jnp.sum(unnormalized)
    return unnormalized / jnp.where(total > 0, total, 1)


def effective_sample_size(weights: Float[Array, " particles"]) -> Float[Array, ""]:
    """1 / Σ wᵢ²: how many particles the consensus rests on.

    Args:
        weights: Normalized weights.

    Returns:
        A number between 1 and the number of particles (0 for weights that are all 0).
    """
    squared = jnp.sum(weights**2)
    return jnp.where(squared > 0, 1 / jnp.where(squared > 0, squared, 1), 0)


class Geometric(eqx.Module):
    """Schedule initial · factorᵏ, held at `limit`.

    Args:
        initial: At step 0, > 0.
        factor: Per step, > 0.
        limit: Not exceeded by a growing schedule, not undercut by a shrinking one.

    Raises:
        ValueError: A number is not positive.

    Example:
        >>> from jaxopt_ext.solvers import cbo
        >>> print(cbo.Geometric(1.0, 2.0, 5.0)(2), cbo.Geometric(1.0, 2.0, 5.0)(3))
        4.0 5.0
    """

    initial: Number
    factor: Number
    limit: Number

    def __check_init__(self):
        for name in ("initial", "factor", "limit"):
            check.number("Geometric", name, getattr(self, name), above=0)

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """The value at `step`."""
        initial, factor, limit = map(jnp.asarray, (self.initial, self.factor, self.limit))
        value = initial * factor ** jnp.asarray(step, factor.dtype)
        return jnp.where(factor > 1, jnp.minimum(value, limit), jnp.maximum(value, limit))


class EffectiveSampleSize(eqx.Module):
    """The α at which the consensus rests on a given share of the particles.

    Found by 40 bisections in log α; the effective sample size falls as α grows. It makes the
    method independent of the scale of the objective.

    Args:
        share: Effective sample size divided by the number of (finite) particles, in (0, 1).
        limit: α at most.

    Raises:
        ValueError: A number outside its range.

    Reference:
        Carrillo, Hoffmann, Stuart, Vaes, "Consensus-based sampling", 2022.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.solvers import cbo
        >>> energies = jnp.linspace(0.0, 100.0, 50)
        >>> alpha = cbo.EffectiveSampleSize(0.5).at(energies)
        >>> print(f"{cbo.effective_sample_size(cbo.weights(energies, alpha)):.3f}")
        25.000
    """

    share: Number = 0.5
    limit: Number = 1e15

    def __check_init__(self):
        check.number("EffectiveSampleSize", "share", self.share, above=0, below=1)
        check.number("EffectiveSampleSize", "limit", self.limit, above=0)

    def at(self, energies: Float[Array, " particles"]) -> Float[Array, ""]:
        """The α for these energies; `limit` where they are all equal."""
        dtype = energies.dtype
        finite = jnp.isfinite(energies)
        least = jnp.min(jnp.where(finite, energies, jnp.inf))
        above = jnp.where(finite, energies - least, 0)
        number = jnp.maximum(jnp.sum(finite), 1).astype(dtype)
        scale = jnp.sum(above) / number
        usable = jnp.isfinite(scale) & (scale > 0)
        relative = jnp.where(finite, above / jnp.where(usable, scale, 1), jnp.inf)
        wanted = jnp.asarray(self.share, dtype) * number

        def halve(_, bracket):
            low, high = bracket
            middle = (low + high) / 2
            weight = jnp.exp(-jnp.exp(middle) * relative)
            too_many = jnp.sum(weight) ** 2 > wanted * jnp.sum(weight**2)
            return jnp.where(too_many, middle, low), jnp.where(too_many, high, middle)

        ends = jnp.asarray(-14.0, dtype), jnp.asarray(14.0, dtype)
        low, high = jax.lax.fori_loop(0, 40, halve, ends)
        alpha = jnp.exp((low + high) / 2) / jnp.where(usable, scale, 1)
        return jnp.where(usable, jnp.minimum(alpha, self.limit), self.limit).astype(dtype)


Schedule = Number | Callable[[Array], Array]


def scheduled(setting: Schedule, step: Int[Array, ""], dtype) -> Float[Array, ""]:
    """The value of a number, or of a schedule (any of optax) at a step."""
    return jnp.asarray(setting(step) if callable(setting) else setting).astype(dtype)


def temperature(
    setting: Schedule | EffectiveSampleSize,
    energies: Float[Array, " particles"],
    step: Int[Array, ""],
) -> Float[Array, ""]:
    """α of a step, from a number, a schedule or the effective sample size."""
    if isinstance(setting, EffectiveSampleSize):
        return setting.at(energies)
    return scheduled(setting, step, energies.dtype)


def check_schedule(owner: str, name: str, setting, **limits) -> None:
    """Accept a callable, or a number within `limits`."""
    if not callable(setting):
        check.number(owner, name, setting, **limits)
