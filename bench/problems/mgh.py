"""Test functions of Moré, Garbow and Hillstrom, all sums of squares.

Two conventions differ from the paper: the objective is ½‖r‖², so optima are half of those printed
there (here to full precision, by Levenberg-Marquardt iterations from the paper's start or the
formula that it gives), and measurements enter the residuals as data. The optimum is the global one:
from the standard start many methods end in another local minimum of `freudenstein-roth`, `biggs`,
`trigonometric` and, for some n, `chebyquad` and `brown-almost-linear`.

Reference:
    Moré, Garbow, Hillstrom, "Testing Unconstrained Optimization Software", ACM Transactions on
    Mathematical Software 7(1), 1981.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxopt_ext.bench.problem import Entry, Function, Problem


class Row(NamedTuple):
    """One function of the paper.

    Attributes:
        number: Of the problem in the paper.
        residual: r(y, data).
        start: The paper's starting point; a function of n where n can be chosen.
        optimum: Least ½‖r‖² by n.
        data: Arrays that enter the residual; a function of n where they depend on it.
    """

    number: int
    residual: Function
    start: list[float] | Callable[[int], np.ndarray]
    optimum: dict[int, float]
    data: dict | Callable[[int], dict] = {}  # noqa: RUF012


def _stack(*residuals):
    return jnp.concatenate([jnp.atleast_1d(r) for r in residuals])


def _indices(y):
    """1, ..., n in the dtype of y."""
    return jnp.arange(1, y.size + 1, dtype=y.dtype)


def _neighbours(y):
    """Left and right neighbour of each variable, 0 beyond the ends."""
    return jnp.pad(y[:-1], (1, 0)), jnp.pad(y[1:], (0, 1))


# ---- fixed size ---------------------------------------------------------------------------------


def _freudenstein_roth(y, data):
    a, b = y
    return jnp.stack([-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b])


def _powell_badly_scaled(y, data):
    a, b = y
    return jnp.stack([1e4 * a * b - 1, jnp.exp(-a) + jnp.exp(-b) - 1.0001])


def _brown_badly_scaled(y, data):
    a, b = y
    return jnp.stack([a - 1e6, b - 2e-6, a * b - 2])


def _beale(y, data):
    a, b = y
    return data["y"] - a * (1 - jnp.stack([b, b**2, b**3]))


def _jennrich_sampson(y, data):
    return 2 + 2 * data["t"] - jnp.exp(data["t"] * y[0]) - jnp.exp(data["t"] * y[1])


def _helical_valley(y, data):
    a, b, c = y
    # the paper's angle, continuous but on the negative second axis
    turns = jnp.arctan2(-a, b) / (2 * np.pi) + 0.25
    return jnp.stack([10 * (c - 10 * turns), 10 * (jnp.sqrt(a**2 + b**2) - 1), c])


def _bard(y, data):
    return data["y"] - y[0] - data["u"] / (data["v"] * y[1] + data["w"] * y[2])


def _gaussian(y, data):
    return y[0] * jnp.exp(-y[1] * (data["t"] - y[2]) ** 2 / 2) - data["y"]


def _meyer(y, data):
    return y[0] * jnp.exp(y[1] / (data["t"] + y[2])) - data["y"]


def _gulf(y, data):
    # the absolute value is differentiated only where its argument is not zero
    distance = jnp.abs(data["y"] - y[1])
    return jnp.exp(-(distance ** y[2]) / y[0]) - data["t"]


def _box(y, data):
    t = data["t"]
    return jnp.exp(-t * y[0]) - jnp.exp(-t * y[1]) - y[2] * (jnp.exp(-t) - jnp.exp(-10 * t))


def _wood(y, data):
    a, b, c, d = y
    first = [10 * (b - a**2), 1 - a, np.sqrt(90.0).item() * (d - c**2), 1 - c]
    return jnp.stack([*first, np.sqrt(10.0).item() * (b + d - 2), (b - d) / np.sqrt(10.0).item()])


def _kowalik_osborne(y, data):
    u = data["u"]
    return data["y"] - y[0] * (u**2 + u * y[1]) / (u**2 + u * y[2] + y[3])


def _brown_dennis(y, data):
    t = data["t"]
    return (y[0] + t * y[1] - jnp.exp(t)) ** 2 + (y[2] + y[3] * jnp.sin(t) - jnp.cos(t)) ** 2


def _osborne_1(y, data):
    t = data["t"]
    return data["y"] - y[0] - y[1] * jnp.exp(-t * y[3]) - y[2] * jnp.exp(-t * y[4])


def _biggs(y, data):
    t = data["t"]
    model = y[2] * jnp.exp(-t * y[0]) - y[3] * jnp.exp(-t * y[1]) + y[5] * jnp.exp(-t * y[4])
    return model - data["y"]


def _osborne_2(y, data):
    t = data["t"][:, None]
    bumps = jnp.exp(-((t - y[None, 8:11]) ** 2) * y[None, 5:8]) @ y[1:4]
    return data["y"] - y[0] * jnp.exp(-t[:, 0] * y[4]) - bumps


# ---- any size -----------------------------------------------------------------------------------


def _watson(y, data):
    sums = data["slopes"] @ y - (data["powers"] @ y) ** 2 - 1
    return _stack(sums, y[0], y[1] - y[0] ** 2 - 1)


def _watson_data(n):
    t, j = np.arange(1, 30)[:, None] / 29, np.arange(n)
    return {"powers": t**j, "slopes": j * t ** np.maximum(j - 1, 0)}


def _rosenbrock(y, data):
    odd, even = y[0::2], y[1::2]
    return _stack(10 * (even - odd**2), 1 - odd)


def _powell_singular(y, data):
    a, b, c, d = y[0::4], y[1::4], y[2::4], y[3::4]
    last = np.sqrt(10.0).item() * (a - d) ** 2
    return _stack(a + 10 * b, np.sqrt(5.0).item() * (c - d), (b - 2 * c) ** 2, last)


def _penalty_1(y, data):
    return _stack(np.sqrt(1e-5).item() * (y - 1), jnp.sum(y**2) - 0.25)


def _penalty_2(y, data):
    root = np.sqrt(1e-5).item()
    e = jnp.exp(y / 10)
    middle = e[1:] + e[:-1] - data["e"]
    weights = _indices(y)[::-1]
    edge = root * (e[1:] - np.exp(-0.1).item())
    return _stack(y[0] - 0.2, root * middle, edge, jnp.sum(weights * y**2) - 1)


def _penalty_2_data(n):
    i = np.arange(2, n + 1)
    return {"e": np.exp(i / 10) + np.exp((i - 1) / 10)}


def _variably_dimensioned(y, data):
    moment = jnp.sum(_indices(y) * (y - 1))
    return _stack(y - 1, moment, moment**2)


def _trigonometric(y, data):
    cosines = jnp.cos(y)
    return y.size - jnp.sum(cosines) + _indices(y) * (1 - cosines) - jnp.sin(y)


def _brown_almost_linear(y, data):
    return _stack(y[:-1] + jnp.sum(y) - (y.size + 1), jnp.prod(y) - 1)


def _boundary_value(y, data):
    h = 1 / (y.size + 1)
    left, right = _neighbours(y)
    return 2 * y - left - right + h**2 / 2 * (y + h * _indices(y) + 1) ** 3


def _integral_equation(y, data):
    h = 1 / (y.size + 1)
    t = h * _indices(y)
    cubes = (y + t + 1) ** 3
    below = jnp.cumsum(t * cubes)
    above = jnp.sum((1 - t) * cubes) - jnp.cumsum((1 - t) * cubes)
    return y + h / 2 * ((1 - t) * below + t * above)


def _broyden_tridiagonal(y, data):
    left, right = _neighbours(y)
    return (3 - 2 * y) * y - left - 2 * right + 1


def _broyden_banded(y, data):
    terms = jnp.pad(y * (1 + y), (5, 1))
    band = sum(terms[k : k + y.size] for k in (0, 1, 2, 3, 4, 6))  # five before, one after
    return y * (2 + 5 * y**2) + 1 - band


def _linear_full_rank(y, data):
    m = 2 * y.size  # twice as many residuals as variables
    return jnp.pad(y, (0, m - y.size)) - 2 / m * jnp.sum(y) - 1


def _linear_rank_one(y, data):
    i = jnp.arange(1, 2 * y.size + 1, dtype=y.dtype)
    return i * jnp.sum(_indices(y) * y) - 1


def _linear_rank_one_with_zeros(y, data):
    middle = jnp.arange(1, 2 * y.size - 1, dtype=y.dtype)
    inner = jnp.sum(_indices(y)[1:-1] * y[1:-1])
    return jnp.pad(middle * inner, 1) - 1


def _chebyquad(y, data):
    shifted = 2 * y - 1
    before, now, means = jnp.ones_like(y), shifted, []
    for _ in range(y.size):
        means.append(jnp.mean(now))
        before, now = now, 2 * shifted * now - before
    return jnp.stack(means) - data["integrals"]


def _chebyquad_data(n):
    i = np.arange(1, n + 1)
    return {"integrals": np.where(i % 2 == 0, -1 / np.where(i == 1, 2, i**2 - 1.0), 0.0)}


# ---- measurements -------------------------------------------------------------------------------


def _numbers(text: str) -> np.ndarray:
    return np.array(text.split(), np.float64)


def _steps(m: int, first: float, step: float) -> np.ndarray:
    return first + step * np.arange(m)


_i15 = np.arange(1.0, 16)
_BARD = {
    "y": _numbers(".14 .18 .22 .25 .29 .32 .35 .39 .37 .58 .73 .96 1.34 2.10 4.39"),
    "u": _i15,
    "v": 16 - _i15,
    "w": np.minimum(_i15, 16 - _i15),
}
_bell = _numbers(".0009 .0044 .0175 .0540 .1295 .2420 .3521 .3989")
_GAUSSIAN = {"y": np.concatenate([_bell, _bell[-2::-1]]), "t": (8 - _i15) / 2}
_MEYER = {
    "y": _numbers(
        "34780 28610 23650 19630 16370 13720 11540 9744 8261 7030 6005 5147 4427 3820 3307 2872"
    ),
    "t": _steps(16, 50.0, 5.0),
}
_t99 = np.arange(1, 100) / 100
_GULF = {"t": _t99, "y": 25 + (-50 * np.log(_t99)) ** (2 / 3)}
_KOWALIK = {
    "y": _numbers(".1957 .1947 .1735 .1600 .0844 .0627 .0456 .0342 .0323 .0235 .0246"),
    "u": _numbers("4 2 1 .5 .25 .167 .125 .1 .0833 .0714 .0625"),
}
_OSBORNE_1 = {
    "y": _numbers(
        ".844 .908 .932 .936 .925 .908 .881 .850 .818 .784 .751 .718 .685 .658 .628 .603 .580 "
        ".558 .538 .522 .506 .490 .478 .467 .457 .448 .438 .431 .424 .420 .414 .411 .406"
    ),
    "t": _steps(33, 0.0, 10.0),
}
_t13 = _steps(13, 0.1, 0.1)
_BIGGS = {"y": np.exp(-_t13) - 5 * np.exp(-10 * _t13) + 3 * np.exp(-4 * _t13), "t": _t13}
_OSBORNE_2 = {
    "y": _numbers(
        "1.366 1.191 1.112 1.013 .991 .885 .831 .847 .786 .725 .746 .679 .608 .655 .616 .606 .602 "
        ".626 .651 .724 .649 .649 .694 .644 .624 .661 .612 .558 .533 .495 .500 .423 .395 .375 .372 "
        ".391 .396 .405 .428 .429 .523 .562 .607 .653 .672 .708 .633 .668 .645 .632 .591 .559 .597 "
        ".625 .739 .710 .729 .720 .636 .581 .428 .292 .162 .098 .054"
    ),
    "t": _steps(65, 0.0, 0.1),
}


# ---- the table ----------------------------------------------------------------------------------


def _tiled(*values: float) -> Callable[[int], np.ndarray]:
    return lambda n: np.tile(values, n // len(values))


def _ramp(n):
    return np.arange(1.0, n + 1)


def _parabola(n):
    t = np.arange(1, n + 1) / (n + 1)
    return t * (t - 1)


TABLE = {
    "freudenstein-roth": Row(2, _freudenstein_roth, [0.5, -2.0], {2: 0.0}),
    "powell-badly-scaled": Row(3, _powell_badly_scaled, [0.0, 1.0], {2: 0.0}),
    "brown-badly-scaled": Row(4, _brown_badly_scaled, [1.0, 1.0], {2: 0.0}),
    "beale": Row(5, _beale, [1.0, 1.0], {2: 0.0}, {"y": np.array([1.5, 2.25, 2.625])}),
    "jennrich-sampson": Row(
        6, _jennrich_sampson, [0.3, 0.4], {2: 62.18109117780742}, {"t": _ramp(10)}
    ),
    "helical-valley": Row(7, _helical_valley, [-1.0, 0.0, 0.0], {3: 0.0}),
    "bard": Row(8, _bard, [1.0, 1.0, 1.0], {3: 0.004107438653289491}, _BARD),
    "gaussian": Row(9, _gaussian, [0.4, 1.0, 0.0], {3: 5.639663848094776e-09}, _GAUSSIAN),
    "meyer": Row(10, _meyer, [0.02, 4000.0, 250.0], {3: 43.97292758534739}, _MEYER),
    "gulf": Row(11, _gulf, [5.0, 2.5, 0.15], {3: 0.0}, _GULF),
    "box": Row(12, _box, [0.0, 10.0, 20.0], {3: 0.0}, {"t": _steps(10, 0.1, 0.1)}),
    "wood": Row(14, _wood, [-3.0, -1.0, -3.0, -1.0], {4: 0.0}),
    "kowalik-osborne": Row(
        15, _kowalik_osborne, [0.25, 0.39, 0.415, 0.39], {4: 0.0001537528019246185}, _KOWALIK
    ),
    "brown-dennis": Row(
        16, _brown_dennis, [25.0, 5.0, -5.0, -1.0], {4: 42911.10081317841}, {"t": _ramp(20) / 5}
    ),
    "osborne-1": Row(
        17, _osborne_1, [0.5, 1.5, -1.0, 0.01, 0.02], {5: 2.732447348741386e-05}, _OSBORNE_1
    ),
    "biggs": Row(18, _biggs, [1.0, 2.0, 1.0, 1.0, 1.0, 1.0], {6: 0.0}, _BIGGS),
    "osborne-2": Row(
        19,
        _osborne_2,
        [1.3, 0.65, 0.65, 0.7, 0.6, 3.0, 5.0, 7.0, 2.0, 4.5, 5.5],
        {11: 0.02006886814677385},
        _OSBORNE_2,
    ),
    "watson": Row(
        20,
        _watson,
        np.zeros,
        {6: 0.0011438350267761836, 9: 6.9988006904601e-07, 12: 2.361190551727011e-10},
        _watson_data,
    ),
    "rosenbrock": Row(21, _rosenbrock, _tiled(-1.2, 1.0), {2: 0.0, 100: 0.0, 1000: 0.0}),
    "powell-singular": Row(
        22, _powell_singular, _tiled(3.0, -1.0, 0.0, 1.0), {4: 0.0, 100: 0.0, 1000: 0.0}
    ),
    "penalty-1": Row(23, _penalty_1, _ramp, {4: 1.1249887504499688e-05, 10: 3.54382573354519e-05}),
    "penalty-2": Row(
        24,
        _penalty_2,
        _tiled(0.5),
        {4: 4.688146503677724e-06, 10: 0.00014683026872837297},
        _penalty_2_data,
    ),
    "variably-dimensioned": Row(
        25, _variably_dimensioned, lambda n: 1 - _ramp(n) / n, {10: 0.0, 100: 0.0}
    ),
    "trigonometric": Row(
        26, _trigonometric, lambda n: np.full(n, 1 / n), {10: 0.0, 100: 0.0, 1000: 0.0}
    ),
    "brown-almost-linear": Row(27, _brown_almost_linear, _tiled(0.5), {10: 0.0, 40: 0.0}),
    "boundary-value": Row(28, _boundary_value, _parabola, {10: 0.0, 100: 0.0}),
    "integral-equation": Row(29, _integral_equation, _parabola, {10: 0.0, 100: 0.0}),
    "broyden-tridiagonal": Row(
        30, _broyden_tridiagonal, _tiled(-1.0), {10: 0.0, 100: 0.0, 1000: 0.0}
    ),
    "broyden-banded": Row(31, _broyden_banded, _tiled(-1.0), {10: 0.0, 100: 0.0, 1000: 0.0}),
    "linear-full-rank": Row(32, _linear_full_rank, np.ones, {10: 5.0}),
    "linear-rank-one": Row(33, _linear_rank_one, np.ones, {10: 95 / 41}),
    "linear-rank-one-zeros": Row(34, _linear_rank_one_with_zeros, np.ones, {10: 227 / 74}),
    "chebyquad": Row(
        35,
        _chebyquad,
        lambda n: _ramp(n) / (n + 1),
        {7: 0.0, 8: 0.0017584368628389647, 9: 0.0, 10: 0.003251977400441152},
        _chebyquad_data,
    ),
}
QUICK = ("rosenbrock-n100", "watson-n6")


def _build(key: str, row: Row, n: int) -> Problem:
    def objective(y, data):
        return jnp.sum(row.residual(y, data) ** 2) / 2

    return Problem(
        name=key,
        fun=objective,
        residual=row.residual,
        init=np.asarray(row.start(n) if callable(row.start) else row.start, np.float64),
        data=row.data(n) if callable(row.data) else row.data,
        optimum=row.optimum[n],
        meta={"source": f"More, Garbow, Hillstrom 1981, problem {row.number}"},
    )


ENTRIES = {
    f"mgh-{name}-n{n}": Entry(
        ("smooth", "least_squares"),
        lambda name=name, row=row, n=n: _build(f"mgh-{name}-n{n}", row, n),
        f"{name}-n{n}" in QUICK,
    )
    for name, row in TABLE.items()
    for n in row.optimum
}
