"""Random increments of a swarm and the shapes that noise takes from the distance to the consensus.

Each step of a run has a key of its own, from the full Threefry cipher of JAX's keys. The words of
the increments are a hash of that key and their position: 13 operations that fuse with the step,
where the cipher has 80 and a loop. Normal increments take a rational quantile function instead of
`erf_inv`. Keys of another kind (`jax.random.key(0, impl="rbg")`) go through `jax.random.bits`.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32

from jaxopt_ext.core import check
from jaxopt_ext.core.solver import Number

ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
# minimax fit of Φ⁻¹((1 + x) / 2) / x as a function of −log(1 − x²); relative error 8e-6
NUMERATOR = (1.25330934, 0.421972247, 0.0756364653, 0.00803436569)
DENOMINATOR = (1.0, 0.0747771199, 0.0280527406, 0.000420533891)


def threefry(
    key: tuple[Array, Array],
    first: UInt32[Array, "*n"],
    second: UInt32[Array, "*n"],
) -> tuple[UInt32[Array, "*n"], UInt32[Array, "*n"]]:
    """Threefry-2x32 of the counter words `first` and `second`.

    Args:
        key: Its two words.
        first: First word of the counters.
        second: Second word of the counters.

    Returns:
        Two random words per counter.

    Reference:
        Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.solvers import cbo_noise
        >>> zero = jnp.zeros((), jnp.uint32)
        >>> [hex(int(word)) for word in cbo_noise.threefry((zero, zero), zero, zero)]
        ['0x6b200159', '0x99ba4efe']
    """
    parity = jnp.uint32(0x1BD11BDA)
    schedule = (key[0], key[1], key[0] ^ key[1] ^ parity)
    first, second = first + schedule[0], second + schedule[1]
    for number in range(20):
        first = first + second
        rotation = ROTATIONS[number % 8]
        second = ((second << rotation) | (second >> (32 - rotation))) ^ first
        if number % 4 == 3:
            block = number // 4 + 1
            first = first + schedule[block % 3]
            second = second + schedule[(block + 1) % 3] + jnp.uint32(block)
    return first, second


def _is_threefry(key: Key[Array, ""]) -> bool:
    return str(jax.random.key_impl(key)) in ("threefry2x32", "fry")


def fold(key: Key[Array, ""], number: Array | int) -> Key[Array, ""]:
    """`jax.random.fold_in`, for Threefry keys without its loop.

    Args:
        key: A typed key.
        number: What to fold in, non-negative.

    Returns:
        A new key.
    """
    if not _is_threefry(key):
        return jax.random.fold_in(key, number)
    data = jax.random.key_data(key)
    number = jnp.asarray(number).astype(jnp.uint32)
    pair = threefry((data[0], data[1]), jnp.zeros_like(number), number)
    return jax.random.wrap_key_data(jnp.stack(pair), impl="threefry2x32")


def words(key: Key[Array, ""], shape: tuple[int, int]) -> UInt32[Array, "rows columns"]:
    """Random 32-bit words.

    They depend on the position only, so a sharded swarm draws the same ones on any number of
    devices.

    Args:
        key: A typed key.
        shape: Rows (particles) and columns.

    Returns:
        The words.
    """
    if not _is_threefry(key):
        return jax.random.bits(key, shape, jnp.uint32)
    data = jax.random.key_data(key)
    counter = jax.lax.iota(jnp.uint32, shape[0] * shape[1])
    return hashed((data[0], data[1]), counter).reshape(shape)


def hashed(key: tuple[Array, Array], counter: UInt32[Array, "*n"]) -> UInt32[Array, "*n"]:
    """A hash of a counter that depends on both words of a key.

    Three rounds of xor-shift and multiplication, in which a changed bit of the counter changes
    every bit of the result with probability 1/2. It is no cipher: fit for noise, not for keys.

    Args:
        key: Two random words.
        counter: Positions.

    Returns:
        A word per position; for a fixed key, different ones.

    Reference:
        Wellons, "Prospecting for hash functions", 2018 (triple32).
    """
    x = counter + key[0]
    x = (x ^ (x >> 17)) * jnp.uint32(0xED5AD4BB) + key[1]
    x = (x ^ (x >> 11)) * jnp.uint32(0xAC4C1B51)
    x = (x ^ (x >> 15)) * jnp.uint32(0x31848BAB)
    return x ^ (x >> 14)


def _symmetric(bits: UInt32[Array, "*n"]) -> Float[Array, "*n"]:
    """Uniform numbers in (-1, 1), an even grid around 0 that has neither 0 nor the ends."""
    in_1_2 = jax.lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32)
    return (in_1_2 - jnp.float32(1.5)) * 2 + jnp.float32(2.0**-23)


def gaussian(key: Key[Array, ""], shape: tuple[int, int]) -> Float[Array, "rows columns"]:
    """Normal increments: the Euler–Maruyama scheme.

    Args:
        key: A typed key.
        shape: Rows (particles) and columns.

    Returns:
        Numbers of mean 0 and variance 1, float32.
    """
    x = _symmetric(words(key, shape))
    w = -jnp.log((1 - x) * (1 + x))
    a, b = (tuple(map(jnp.float32, each)) for each in (NUMERATOR, DENOMINATOR))
    above = a[0] + w * (a[1] + w * (a[2] + w * a[3]))
    below = b[0] + w * (b[1] + w * (b[2] + w * b[3]))
    return x * (above / below)


def uniform(key: Key[Array, ""], shape: tuple[int, int]) -> Float[Array, "rows columns"]:
    """Uniform increments on [-√3, √3]: a weak scheme of order 1, cheaper than `gaussian`.

    With anisotropic noise take σ about 1.2 times as large as for `gaussian`.

    Args:
        key: A typed key.
        shape: Rows (particles) and columns.

    Returns:
        Numbers of mean 0 and variance 1, float32.
    """
    return jnp.float32(3**0.5) * _symmetric(words(key, shape))


def rademacher(key: Key[Array, ""], shape: tuple[int, int]) -> Float[Array, "rows columns"]:
    """Increments ±1: a weak scheme of order 1, one random bit each.

    With anisotropic noise and σ√dt < 1 − λdt they never change the sign of a coordinate of
    x − c, and explore little; take σ about 1.4 times as large as for `gaussian`.

    Args:
        key: A typed key.
        shape: Rows (particles) and columns.

    Returns:
        Numbers of mean 0 and variance 1, float32.
    """
    rows, columns = shape
    packed = words(key, (rows, -(-columns // 32)))[:, :, None]
    place = jnp.arange(32, dtype=jnp.uint32)[None, None]
    signs = 1 - 2 * ((packed >> place) & jnp.uint32(1)).astype(jnp.float32)
    return signs.reshape(rows, -1)[:, :columns]


class StudentT(eqx.Module):
    """Heavy-tailed increments: Student's t distribution, scaled to variance 1.

    Args:
        degrees: Degrees of freedom, > 2; the fewer, the heavier the tails.

    Raises:
        ValueError: `degrees` is 2 or less.

    Example:
        >>> import jax
        >>> from jaxopt_ext.solvers import cbo
        >>> cbo.StudentT(3.0)(jax.random.key(0), (4, 2)).shape
        (4, 2)
    """

    degrees: Number = 3.0

    def __check_init__(self):
        check.number("StudentT", "degrees", self.degrees, above=2)

    def __call__(self, key: Key[Array, ""], shape: tuple[int, int]) -> Float[Array, "rows columns"]:
        """Draw increments of mean 0 and variance 1."""
        degrees = jnp.asarray(self.degrees, jnp.float32)
        draws = jax.random.t(key, degrees, shape, jnp.float32)
        return draws * jnp.sqrt((degrees - 2) / degrees)


Increments = Callable[[Array, tuple[int, int]], Float[Array, "rows columns"]]


@runtime_checkable
class Noise(Protocol):
    """How random increments are shaped: any callable of this form."""

    def __call__(
        self,
        distance: Float[Array, "particles n"],
        draws: Float[Array, "particles n"],
        weights: Float[Array, " particles"],
    ) -> Float[Array, "particles n"]:
        """The noise of one step, before its factor σ√dt.

        Args:
            distance: x − c of every particle.
            draws: Independent increments of mean 0 and variance 1.
            weights: The particles' weights in the consensus, summing to 1.

        Returns:
            The noise of every particle.
        """
        ...


class Anisotropic(eqx.Module):
    """Noise diag(x − c) ξ: each coordinate by its own distance, for any number of dimensions.

    Args:
        bound: Truncation: no coordinate counts as farther than this, in the variables' units.

    Raises:
        ValueError: `bound` is not positive.
    """

    bound: Number = float("inf")

    def __check_init__(self):
        check.number("Anisotropic", "bound", self.bound, above=0)

    def __call__(self, distance, draws, weights):
        """See `Noise`."""
        bound = jnp.asarray(self.bound, distance.dtype)
        return jnp.clip(distance, -bound, bound) * draws


class Isotropic(eqx.Module):
    """Noise ‖x − c‖ ξ: the same in all directions, so indifferent to rotations of the problem.

    In n dimensions it needs σ below about √(2λ / (n − 2)), else the swarm diverges.

    Args:
        bound: Truncation: no particle counts as farther than this, in the variables' units.

    Raises:
        ValueError: `bound` is not positive.
    """

    bound: Number = float("inf")

    def __check_init__(self):
        check.number("Isotropic", "bound", self.bound, above=0)

    def __call__(self, distance, draws, weights):
        """See `Noise`."""
        norm = jnp.sqrt(jnp.sum(distance**2, axis=1, keepdims=True))
        return jnp.minimum(norm, jnp.asarray(self.bound, distance.dtype)) * draws


class Constant(eqx.Module):
    """Noise ξ that does not vanish at the consensus; σ√dt is its width in the variables' units."""

    def __call__(self, distance, draws, weights):
        """See `Noise`."""
        return draws


class Covariance(eqx.Module):
    """Noise C^(1/2) ξ with the weighted covariance C of the swarm: it turns with the problem.

    C = Σ wᵢ (xᵢ − c)(xᵢ − c)ᵀ. The root is a Cholesky factor, which gives Gaussian increments the
    same distribution as the symmetric root, for n³/3 operations a step.

    Args:
        regularization: Multiple of the mean eigenvalue of C that is added to its diagonal.

    Raises:
        ValueError: `regularization` is negative.
    """

    regularization: Number = 1e-5

    def __check_init__(self):
        check.number("Covariance", "regularization", self.regularization, at_least=0)

    def __call__(self, distance, draws, weights):
        """See `Noise`."""
        dtype, size = distance.dtype, distance.shape[1]
        covariance = (distance * weights[:, None]).T @ distance
        mean = jnp.trace(covariance) / size
        scale = jnp.where(mean > 0, mean, 1)  # so that a small swarm does not underflow
        shift = jnp.asarray(self.regularization, dtype) + 10 * size * jnp.finfo(dtype).eps
        factor = jnp.linalg.cholesky(covariance / scale + shift * jnp.eye(size, dtype=dtype))
        noise = jnp.sqrt(mean) * (draws @ factor.T)
        return jnp.where(jnp.isfinite(factor[-1, -1]), noise, 0)
