"""Small bilevel problems of BOLIB that have fixed sets, from their mathematical statements.

Recorded optima are those of the library, except for two that a search over a fine grid corrects
(`FalkLiu1995` and `MitsosBarton2006Ex318`). With several lower-level solutions the optimum is the
optimistic one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import jaxopt_ext as jx
from jaxopt_ext.bench.problem import Entry

INF = np.inf
STARTS = 32
GRID = 4001  # points in y, on which the least g(x, ·) is sought


class Bolib(NamedTuple):
    """A problem of BOLIB: min F(x, y) with y in argmin f(x, ·), both on boxes.

    Attributes:
        upper: F(x, y) of flat arrays.
        lower: f(x, y).
        x_box: Lower and upper bound of every entry of x; infinite where there is none.
        y_box: The same for y.
        optimum: F at the solution.
        sizes: Numbers of variables of both levels.
        curvature: A bound on the second derivatives of f in y.
        least: min f(x, ·) where it has a closed form; `None` to search a grid.
        span: Where starts are drawn, if the boxes are infinite; the length scale of x.
        regular: Whether the optimum is within reach of a penalty method: the solution path is
            continuous there. Elsewhere S(x) jumps at the optimum: two minima of f(x, ·) are equally
            low, and the one that is best for F stays a local minimum where x goes on (examples 3.14
            at x = 1/4, 3.20 at 1/2, PaulaviciusAdjiman2017a at 1/2, Mirrlees1999 at 1), or f(x, ·)
            vanishes at x = 0 (example 3.11, KleniatiAdjiman2014Ex3; the latter's optimum is the
            limit of regular points from the right).
    """

    upper: Callable[[Array, Array], Array]
    lower: Callable[[Array, Array], Array]
    x_box: tuple[float, float]
    y_box: tuple[float, float]
    optimum: float
    sizes: tuple[int, int] = (1, 1)
    curvature: float = 4.0
    least: Callable[[Array], Array] | None = None
    span: float = 1.0
    regular: bool = True

    @property
    def bilevel(self) -> jx.Bilevel:
        """The problem for our solvers."""

        def level(fun):
            return lambda x, y, args: fun(x, y)

        def onto(box):
            if box == (-INF, INF):
                return None
            return lambda v: jnp.clip(v, *(jnp.asarray(b, v.dtype) for b in box))

        return jx.Bilevel(level(self.upper), level(self.lower), onto(self.x_box), onto(self.y_box))

    def starts(self, seed: int = 0) -> tuple[Float[np.ndarray, "s n"], Float[np.ndarray, "s m"]]:
        """Random starts in the boxes."""
        rng = np.random.default_rng(seed)

        def draw(box, size):
            low = box[0] if np.isfinite(box[0]) else -self.span
            high = box[1] if np.isfinite(box[1]) else self.span
            return rng.uniform(low, high, (STARTS, size))

        return draw(self.x_box, self.sizes[0]), draw(self.y_box, self.sizes[1])

    def judge(
        self, x: Float[np.ndarray, "s n"], y: Float[np.ndarray, "s m"]
    ) -> dict[str, Float[np.ndarray, " s"]]:
        """Upper objective and relative lower gap of each pair, (f − min f) / (1 + |min f|)."""
        points = jnp.asarray(x), jnp.asarray(y)
        upper, lower = jax.vmap(self.upper)(*points), jax.vmap(self.lower)(*points)
        if self.least is not None:
            least = jax.vmap(self.least)(jnp.asarray(x))
        else:
            grid = jnp.linspace(*self.y_box, GRID)[:, None]
            values = jax.vmap(lambda x: jnp.min(jax.vmap(lambda v: self.lower(x, v))(grid)))
            least = values(jnp.asarray(x))
        return {"upper": np.asarray(upper), "gap": np.asarray((lower - least) / (1 + abs(least)))}

    def hits(self, x: Any, y: Any, tolerance: float = 1e-2) -> dict[str, float]:
        """Shares of the starts that end at a global solution, and at an optimal y for their x."""
        found = self.judge(x, y)
        feasible = found["gap"] <= tolerance
        hit = feasible & (found["upper"] <= self.optimum + tolerance * (1 + abs(self.optimum)))
        best = np.min(np.where(feasible, found["upper"], np.inf))
        return {
            "hit_rate": float(hit.mean()),
            "feasible_rate": float(feasible.mean()),
            "best": float(best),
        }


def _one(fun: Callable[[Any, Any], Any]) -> Callable[[Array, Array], Array]:
    """A function of two numbers as one of two arrays of length one."""
    return lambda x, y: fun(x[0], y[0])


def _scalar(upper, lower, x_box, y_box, optimum, **more: Any) -> Bolib:
    return Bolib(_one(upper), _one(lower), x_box, y_box, optimum, **more)


ONE = (-1.0, 1.0)
UNIT = (0.0, 1.0)


def _quartic(x, y):
    return x * (16 * y**4 + 2 * y**3 - 8 * y**2 - 1.5 * y + 0.5)


def _cubic_family(x, y):
    """Of examples 3.21 and 3.22."""
    linear = 0.08 * x - 0.036 * x**2 + 0.004 * x**3
    square = 0.02 * x**2 - 0.16 * x + 0.4
    return y**4 + (2 / 15) * (1 - x) * y**3 - square * y**2 + linear * y


def _griewank(y):
    roots = jnp.sqrt(jnp.arange(1, y.size + 1, dtype=y.dtype))
    return jnp.sum(y**2) / 4000 - jnp.prod(jnp.cos(y / roots)) + 1


def _sum_squares(shift):
    return lambda x, y: jnp.sum((x - shift) ** 2) + jnp.sum(y**2)


def _distance(x, y):
    return jnp.sum((x - y) ** 2)


def _clipped(x):
    return jnp.sum((x - jnp.clip(x, 0.5, 1.5)) ** 2)


def _ones(x):
    return jnp.ones((), x.dtype)


def _mirrlees(x, y):
    return -jnp.exp(-((y - 1) ** 2)) - x * jnp.exp(-((y + 1) ** 2))


PROBLEMS = {
    "DempeEtal2012": _scalar(lambda x, y: x + 0 * y, lambda x, y: x * y, ONE, UNIT, -1.0),
    "DeSilva1978": Bolib(
        lambda x, y: _sum_squares(1.0)(x, y) - 2, _distance, (-INF, INF), (0.5, 1.5), -1.0,
        sizes=(2, 2), least=_clipped, span=2.0,
    ),
    "FalkLiu1995": Bolib(  # recorded as -2.1962
        lambda x, y: _sum_squares(1.5)(x, y) - 4.5, _distance, (-INF, INF), (0.5, 1.5), -2.25,
        sizes=(2, 2), least=_clipped, span=2.0,
    ),
    "FrankeEtal2018Ex53": Bolib(
        lambda x, y: jnp.sum(y**2), lambda x, y: (y[0] - 2) ** 2, ONE, UNIT, 1.0,
        sizes=(1, 2), least=_ones,
    ),
    "HendersonQuandt1958": _scalar(
        lambda x, y: x * (x / 2 + y / 2 - 95), lambda x, y: y * (x / 2 + y - 100),
        (0.0, 200.0), (0.0, INF), -9800 / 3,
        least=lambda x: -(jnp.maximum(50 - x[0] / 4, 0) ** 2), span=100.0,
    ),
    "KleniatiAdjiman2014Ex3": _scalar(
        lambda x, y: x - y, lambda x, y: x * y**2 / 2 - x * y**3, ONE, ONE, -1.0, curvature=7.0,
        regular=False,
    ),
    "LamparielloSagratella2017Ex32": _scalar(
        lambda x, y: x**2 + y**2, lambda x, y: (x + y - 1) ** 2, (-INF, INF), (-INF, INF), 0.5,
        least=lambda x: 0 * x[0], span=2.0,
    ),
    "LucchettiEtal1987": _scalar(
        lambda x, y: x * y - x / 2 + 0.5, lambda x, y: y * (x - 1), UNIT, UNIT, 0.0
    ),
    "MacalHurter1997": _scalar(
        lambda x, y: (x - 1) ** 2 + (y - 1) ** 2, lambda x, y: 500 * y - 50 * x * y + y**2 / 2,
        (-INF, INF), (-INF, INF), 81.327, curvature=1.0,
        least=lambda x: -((50 * x[0] - 500) ** 2) / 2, span=20.0,
    ),
    "Mirrlees1999": _scalar(
        lambda x, y: (x - 2) ** 2 + (y - 1) ** 2, _mirrlees, (-INF, INF), (-2.0, 2.0), 1.002,
        span=3.0, regular=False,
    ),
    "MitsosBarton2006Ex310": _scalar(
        lambda x, y: y + 0 * x, _quartic, (0.1, 1.0), ONE, 0.5, curvature=190.0
    ),
    "MitsosBarton2006Ex311": _scalar(
        lambda x, y: y + 0 * x, _quartic, ONE, (-0.8, 1.0), -0.8, curvature=190.0,
        regular=False,
    ),
    "MitsosBarton2006Ex312": _scalar(
        lambda x, y: x * y - x + 10 * y**2, lambda x, y: y**4 / 2 - x * y**2, ONE, ONE, 0.0,
        curvature=8.0,
    ),
    "MitsosBarton2006Ex313": _scalar(
        lambda x, y: x - y, lambda x, y: x * y * (y / 2 - x**2), ONE, ONE, -1.0
    ),
    "MitsosBarton2006Ex314": _scalar(
        lambda x, y: (x - 0.25) ** 2 + y**2, lambda x, y: y**3 / 3 - x * y, ONE, ONE, 0.25,
        regular=False,
    ),
    "MitsosBarton2006Ex315": _scalar(
        lambda x, y: x + y, lambda x, y: x * y**2 / 2 - y**3 / 3, ONE, ONE, 0.0
    ),
    "MitsosBarton2006Ex316": _scalar(
        lambda x, y: 2 * x + y, lambda x, y: -x * y**2 / 2 - y**4 / 4, ONE, ONE, -2.0
    ),
    "MitsosBarton2006Ex317": _scalar(
        lambda x, y: (x + 0.5) ** 2 + y**2 / 2, lambda x, y: x * y**2 / 2 + y**4 / 4, ONE, ONE,
        0.1875,
    ),
    "MitsosBarton2006Ex318": _scalar(  # recorded as -0.25
        lambda x, y: y**2 - x**2, lambda x, y: x * y**2 - y**4 / 2, ONE, ONE, -1.0, curvature=8.0
    ),
    "MitsosBarton2006Ex319": _scalar(
        lambda x, y: y * (x + y / 2 - 1), lambda x, y: -(y**2) * (x - y**2 / 2), ONE, ONE, -0.258,
        curvature=8.0,
    ),
    "MitsosBarton2006Ex320": _scalar(
        lambda x, y: (x - 0.25) ** 2 + y**2, lambda x, y: y**3 / 3 - x**2 * y, ONE, ONE, 0.3125,
        regular=False,
    ),
    "MitsosBarton2006Ex321": _scalar(
        lambda x, y: (x + 0.6) ** 2 + y**2, _cubic_family, ONE, ONE, 0.2095, curvature=15.0
    ),
    "MitsosBarton2006Ex324": _scalar(
        lambda x, y: x**2 - y, lambda x, y: (x / 2 + 0.5 - (1 + x / 10 - y) ** 2) ** 2,
        UNIT, (0.0, 3.0), -1.755, curvature=50.0,
    ),
    "MorganPatrone2006a": _scalar(
        lambda x, y: -x - y, lambda x, y: x * y, (-0.5, 0.5), ONE, -1.0
    ),
    "PaulaviciusAdjiman2017a": _scalar(
        lambda x, y: x**2 + y**2, lambda x, y: x * y**2 - y**4 / 2, ONE, ONE, 0.25, curvature=8.0,
        regular=False,
    ),
    "PaulaviciusAdjiman2017b": _scalar(
        lambda x, y: x + y, lambda x, y: x * y**2 / 2 - x**3 * y, ONE, ONE, -2.0
    ),
    "SinhaMaloDeb2014TP9": Bolib(
        _sum_squares(1.0), lambda x, y: jnp.exp(jnp.sum(x**2) * _griewank(y)), (-INF, INF),
        (-np.pi, np.pi), 0.0, sizes=(10, 10), least=_ones, curvature=40.0,
    ),
    "SinhaMaloDeb2014TP10": Bolib(
        _sum_squares(1.0), lambda x, y: jnp.exp(_griewank(x * y)), (-INF, INF), (-np.pi, np.pi),
        0.0, sizes=(10, 10), least=_ones, curvature=10.0,
    ),
    "Yezza1996Ex31": _scalar(
        lambda x, y: 2 * x - y * (4 * x - 3) + 1, lambda x, y: y * (4 * x - 1) - 2 * x - 2,
        UNIT, UNIT, 1.5,
    ),
}  # fmt: skip

ENTRIES = {
    f"bolib-{name}": Entry(("bolib",), functools.partial(PROBLEMS.__getitem__, name))
    for name in PROBLEMS
}
