"""The 24 noiseless functions of the BBOB suite, with the instances of COCO.

An instance is data: the optimum, its value, rotations. So each function compiles once for each
dimension. In the notation of the definitions, z is what the transformations make of x, R and Q are
rotations and Λ^α is diagonal from 1 to √α.

Reference:
    Hansen, Finck, Ros, Auger, "Real-Parameter Black-Box Optimization Benchmarking 2009: Noiseless
    Functions Definitions", INRIA RR-6829, 2009 (updated 2010).
    Hansen, Auger, Ros, Mersmann, Tušar, Brockhoff, "COCO: A Platform for Comparing Continuous
    Optimizers in a Black-Box Setting", Optimization Methods and Software 36(1), 2021.
"""

import functools

import jax.numpy as jnp
import numpy as np

from jaxopt_ext.bench.problem import Entry, Function, Problem

DIMENSIONS = (2, 5, 10, 20)
INSTANCES = (1, 2, 3, 4, 5)

# ---- transformations ----------------------------------------------------------------------------


def _ramp(x):
    """0 to 1 over the variables."""
    return jnp.arange(x.size, dtype=x.dtype) / (x.size - 1)


def _conditioned(x, alpha):
    """Λ^α x."""
    return alpha ** (_ramp(x) / 2) * x


def _oscillated(x):
    """T_osz."""
    size = jnp.where(x == 0, 1, jnp.abs(x))
    log = jnp.log(size)
    first, second = jnp.where(x > 0, 10.0, 5.5), jnp.where(x > 0, 7.9, 3.1)
    first, second = first.astype(x.dtype), second.astype(x.dtype)
    waves = 0.049 * (jnp.sin(first * log) + jnp.sin(second * log))
    return jnp.sign(x) * jnp.exp(log + waves)


def _asymmetric(x, beta):
    """T_asy^β."""
    positive = jnp.where(x > 0, x, 1)
    return jnp.where(x > 0, positive ** (1 + beta * _ramp(x) * jnp.sqrt(positive)), x)


def _outside(x):
    """The penalty f_pen: squared distance to the box [−5, 5]."""
    return jnp.sum(jnp.maximum(jnp.abs(x) - 5, 0) ** 2)


def _mixed(x, data, alpha):
    """R Λ^α Q (x − x_opt)."""
    return data["R"] @ _conditioned(data["Q"] @ (x - data["x"]), alpha)


# ---- functions, without the value of the optimum ------------------------------------------------


def _sphere(x, data):
    return jnp.sum((x - data["x"]) ** 2)


def _ellipsoid_sum(z):
    return jnp.sum(1e6 ** _ramp(z) * z**2)


def _separable_ellipsoid(x, data):
    return _ellipsoid_sum(_oscillated(x - data["x"]))


def _rastrigin_sum(z):
    return 10 * (z.size - jnp.sum(jnp.cos(2 * np.pi * z))) + jnp.sum(z**2)


def _separable_rastrigin(x, data):
    z = _asymmetric(_oscillated(x - data["x"]), 0.2)
    return _rastrigin_sum(_conditioned(z, 10.0))


def _bueche_rastrigin(x, data):
    z = _conditioned(_oscillated(x - data["x"]), 10.0)
    stretched = (z > 0) & (jnp.arange(x.size) % 2 == 0)
    return _rastrigin_sum(jnp.where(stretched, 10 * z, z)) + 100 * _outside(x)


def _linear_slope(x, data):
    slope = jnp.sign(data["x"]) * 10.0 ** _ramp(x)
    z = jnp.where(data["x"] * x < 25, x, data["x"])
    return jnp.sum(5 * jnp.abs(slope) - slope * z)


def _attractive_sector(x, data):
    z = _mixed(x, data, 10.0)
    z = jnp.where(z * data["x"] > 0, 100 * z, z)
    return _oscillated(jnp.sum(z**2)) ** 0.9


def _step_ellipsoid(x, data):
    rough = _conditioned(data["Q"] @ (x - data["x"]), 10.0)
    fine = jnp.floor(0.5 + 10 * rough) / 10
    z = data["R"] @ jnp.where(jnp.abs(rough) > 0.5, jnp.floor(0.5 + rough), fine)
    steps = jnp.sum(100.0 ** _ramp(x) * z**2)
    return 0.1 * jnp.maximum(jnp.abs(rough[0]) / 1e4, steps) + _outside(x)


def _rosenbrock_terms(z):
    return 100 * (z[:-1] ** 2 - z[1:]) ** 2 + (z[:-1] - 1) ** 2


def _stretch(n):
    return max(1.0, n**0.5 / 8)


def _rosenbrock(x, data):
    return jnp.sum(_rosenbrock_terms(_stretch(x.size) * (x - data["x"]) + 1))


def _rotated_rosenbrock(x, data):
    return jnp.sum(_rosenbrock_terms(_stretch(x.size) * (data["Q"] @ x) + 0.5))


def _ellipsoid(x, data):
    return _ellipsoid_sum(_oscillated(data["R"] @ (x - data["x"])))


def _discus(x, data):
    squares = _oscillated(data["R"] @ (x - data["x"])) ** 2
    return 1e6 * squares[0] + jnp.sum(squares[1:])


def _bent_cigar(x, data):
    z = data["R"] @ _asymmetric(data["R"] @ (x - data["x"]), 0.5)
    return z[0] ** 2 + 1e6 * jnp.sum(z[1:] ** 2)


def _sharp_ridge(x, data):
    z = _mixed(x, data, 10.0)
    return z[0] ** 2 + 100 * jnp.sqrt(jnp.sum(z[1:] ** 2))


def _different_powers(x, data):
    z = jnp.abs(data["R"] @ (x - data["x"]))
    return jnp.sqrt(jnp.sum(z ** (2 + 4 * _ramp(x))))


def _rastrigin(x, data):
    z = _asymmetric(_oscillated(data["R"] @ (x - data["x"])), 0.2)
    return _rastrigin_sum(data["R"] @ _conditioned(data["Q"] @ z, 10.0))


def _weierstrass(x, data):
    z = _oscillated(data["R"] @ (x - data["x"]))
    z = data["R"] @ _conditioned(data["Q"] @ z, 0.01)
    k = jnp.arange(12, dtype=x.dtype)
    weights, waves = 0.5**k, 2 * np.pi * 3.0**k
    sums = jnp.sum(weights[:, None] * jnp.cos(waves[:, None] * (z[None] + 0.5)))
    least = jnp.sum(weights * jnp.cos(waves / 2))
    return 10 * (sums / x.size - least) ** 3 + 10 / x.size * _outside(x)


def _schaffer(x, data, alpha):
    z = _asymmetric(data["R"] @ (x - data["x"]), 0.5)
    z = _conditioned(data["Q"] @ z, alpha)
    s = jnp.sqrt(z[:-1] ** 2 + z[1:] ** 2)
    mean = jnp.mean(jnp.sqrt(s) * (1 + jnp.sin(50 * s**0.2) ** 2))
    return mean**2 + 10 * _outside(x)


def _schaffer_10(x, data):
    return _schaffer(x, data, 10.0)


def _schaffer_1000(x, data):
    return _schaffer(x, data, 1000.0)


def _griewank_rosenbrock(x, data):
    s = _rosenbrock_terms(_stretch(x.size) * (data["Q"] @ x) + 0.5)
    return 10 * jnp.mean(s / 4000 - jnp.cos(s)) + 10


def _schwefel(x, data):
    centre = 2 * jnp.abs(data["x"])
    z = 2 * jnp.sign(data["x"]) * x
    z = z.at[1:].add(0.25 * (z[:-1] - centre[:-1]))
    z = 100 * (_conditioned(z - centre, 10.0) + centre)
    waves = jnp.mean(z * jnp.sin(jnp.sqrt(jnp.abs(z))))
    return 4.189828872724339 - waves / 100 + 100 * _outside(z / 100)


def _gallagher(x, data):
    offsets = (data["Q"] @ x)[None] - data["peaks"]
    distances = jnp.sum(data["scales"] * offsets**2, axis=1)
    highest = jnp.max(data["heights"] * jnp.exp(-distances / (2 * x.size)))
    return _oscillated(10 - highest) ** 2 + _outside(x)


def _katsuura(x, data):
    z = _mixed(x, data, 100.0)
    powers = 2.0 ** jnp.arange(1, 33, dtype=x.dtype)[:, None]
    rough = jnp.sum(jnp.abs(powers * z[None] - jnp.round(powers * z[None])) / powers, axis=0)
    factors = (1 + jnp.arange(1, x.size + 1, dtype=x.dtype) * rough) ** (10 / x.size**1.2)
    return 10 / x.size**2 * (jnp.prod(factors) - 1) + _outside(x)


def _lunacek(x, data):
    n, near = x.size, 2.5
    slope = 1 - 1 / (2 * (n + 20) ** 0.5 - 8.2)
    far = -(((near**2 - 1) / slope) ** 0.5)
    mirrored = 2 * jnp.sign(data["x"]) * x
    z = data["R"] @ _conditioned(data["Q"] @ (mirrored - near), 100.0)
    basins = jnp.minimum(
        jnp.sum((mirrored - near) ** 2), n + slope * jnp.sum((mirrored - far) ** 2)
    )
    return basins + 10 * (n - jnp.sum(jnp.cos(2 * np.pi * z))) + 1e4 * _outside(x)


BODIES: dict[int, Function] = dict(
    enumerate(
        (
            *(_sphere, _separable_ellipsoid, _separable_rastrigin, _bueche_rastrigin),
            *(_linear_slope, _attractive_sector, _step_ellipsoid, _rosenbrock),
            *(_rotated_rosenbrock, _ellipsoid, _discus, _bent_cigar, _sharp_ridge),
            *(_different_powers, _rastrigin, _weierstrass, _schaffer_10, _schaffer_1000),
            *(_griewank_rosenbrock, _schwefel, _gallagher, _gallagher, _katsuura, _lunacek),
        ),
        start=1,
    )
)


@functools.cache
def function(number: int) -> Function:
    """A function of the suite, the same object for all of its instances.

    Args:
        number: From 1 to 24.

    Returns:
        f(x, data) with the least value that `data` says.
    """
    body = BODIES[number]
    return lambda x, data: body(x, data) + data["least"]


# ---- instances ----------------------------------------------------------------------------------


def _uniform(count: int, seed: int) -> np.ndarray:
    """The suite's own generator: Park and Miller's, shuffled through a table of 32."""

    def following(state):
        state = 16807 * (state % 127773) - 2836 * (state // 127773)
        return state + 2147483647 if state < 0 else state

    state, table = max(1, abs(seed)), [0] * 32
    for i in reversed(range(40)):
        state = following(state)
        if i < 32:
            table[i] = state
    drawn, numbers = table[0], []
    for _ in range(count):
        state = following(state)
        place = drawn // 67108865
        drawn, table[place] = table[place], state
        numbers.append(drawn / 2147483647 or 1e-99)
    return np.array(numbers)


def _normal(count: int, seed: int) -> np.ndarray:
    radius, angle = _uniform(2 * count, seed).reshape(2, count)
    numbers = np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle)
    return np.where(numbers == 0, 1e-99, numbers)


def _rotation(n: int, seed: int) -> np.ndarray:
    """Gram and Schmidt's orthogonalization of a Gaussian matrix."""
    matrix = _normal(n * n, seed).reshape(n, n)  # one vector a row
    for i in range(n):
        for j in range(i):
            matrix[i] -= (matrix[i] @ matrix[j]) * matrix[j]
        matrix[i] /= np.linalg.norm(matrix[i])
    return matrix.T


def _least_value(number: int, instance: int) -> float:
    seed = number + 10000 * instance
    ratio = _normal(1, seed)[0] / _normal(1, seed + 1)[0]
    return float(np.clip(np.round(100 * 100 * ratio) / 100, -1000, 1000))


def _minimizer(number: int, n: int, seed: int, data: dict[str, np.ndarray]) -> np.ndarray:
    uniform = _uniform(n, seed + 1_000_000 if number == 12 else seed)
    x = 8 * np.floor(1e4 * uniform) / 1e4 - 4
    x = np.where(x == 0, -1e-5, x)
    match number:
        case 4:
            return np.where(np.arange(n) % 2 == 0, np.abs(x), x)
        case 5:
            return np.where(x < 0, -5.0, 5.0)
        case 8:
            return 0.75 * x
        case 9 | 19:
            return data["Q"].sum(axis=0) / (2 * _stretch(n))
        case 20:
            return np.where(uniform < 0.5, -1, 1) * 4.2096874637 / 2
        case 24:
            return np.where(_normal(n, seed) < 0, -1, 1) * 2.5 / 2
    return x


def _peaks(number: int, n: int, seed: int, rotation: np.ndarray) -> dict[str, np.ndarray]:
    count, first, width = (101, 1000**0.5, 10.0) if number == 21 else (21, 1000.0, 9.8)
    ranks = np.argsort(_uniform(count - 1, seed), kind="stable")
    conditions = np.concatenate([[first], 1000 ** (ranks / (count - 2))])
    orders = [np.argsort(_uniform(n, seed + 1000 * i), kind="stable") for i in range(count)]
    places = width * (_uniform(n * count, seed).reshape(count, n) - 0.5)
    places[0] *= 0.8
    return {
        "x": places[0],
        "peaks": places @ rotation.T,
        "scales": conditions[:, None] ** (np.stack(orders) / (n - 1) - 0.5),
        "heights": np.concatenate([[10.0], np.linspace(1.1, 9.1, count - 1)]),
    }


def build(number: int, n: int, instance: int) -> Problem:
    """One instance, the same as COCO's of that number.

    Args:
        number: Of the function, from 1 to 24.
        n: Dimension, at least 2.
        instance: Number of the instance, from 1.

    Returns:
        The problem, with a random start in [−4, 4]ⁿ.
    """
    # functions 4 and 18 share the seed of those that they vary
    source = {4: 3, 18: 17}.get(number, number)
    seed = source + 10000 * instance
    data = {"Q": _rotation(n, seed)}
    if number in (21, 22):
        data |= _peaks(number, n, seed, data["Q"])
    else:
        data |= {"R": _rotation(n, seed + 1_000_000), "x": _minimizer(number, n, seed, data)}
    least = _least_value(source, instance)
    return Problem(
        name=name(number, n, instance),
        fun=function(number),
        init=np.random.RandomState(seed).uniform(-4, 4, n),
        data=data | {"least": np.float64(least)},
        lower=np.full(n, -5.0),
        upper=np.full(n, 5.0),
        optimum=least,
        meta={"function": number, "instance": instance, "minimizer": data["x"].tolist()},
    )


def name(number: int, n: int, instance: int) -> str:
    """What the problem is called, as `bbob-f03-d05-i1`."""
    return f"bbob-f{number:02d}-d{n:02d}-i{instance}"


QUICK = (1, 3, 8, 15, 21)

ENTRIES = {
    name(number, n, instance): Entry(
        ("blackbox",),
        functools.partial(build, number, n, instance),
        number in QUICK and n <= 5 and instance == 1,
    )
    for number in BODIES
    for n in DIMENSIONS
    for instance in INSTANCES
}
