"""Constrained problems of Hock and Schittkowski with known minima.

Hock, Schittkowski, "Test Examples for Nonlinear Programming Codes", Lecture Notes in Economics and
Mathematical Systems 187, Springer 1981; the numbers are theirs. Inequalities are c(y) <= 0 here.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxopt_ext.bench.problem import Entry, Problem


class Row(NamedTuple):
    """A problem of the table; the functions take the variables alone."""

    number: int
    fun: Callable[[Any], Any]
    start: tuple[float, ...]
    optimum: float
    equality: Callable[[Any], tuple] | None = None
    inequality: Callable[[Any], tuple] | None = None
    lower: tuple[float, ...] | None = None
    upper: tuple[float, ...] | None = None


def _hs35(y):
    square = 2 * y[0] ** 2 + 2 * y[1] ** 2 + y[2] ** 2 + 2 * y[0] * y[1] + 2 * y[0] * y[2]
    return 9 - 8 * y[0] - 6 * y[1] - 4 * y[2] + square


def _hs43(y):
    square = y[0] ** 2 + y[1] ** 2 + 2 * y[2] ** 2 + y[3] ** 2
    return square - 5 * y[0] - 5 * y[1] - 21 * y[2] + 7 * y[3]


def _hs43_inequality(y):
    a, b, c, d = y
    return (
        a**2 + b**2 + c**2 + d**2 + a - b + c - d - 8,
        a**2 + 2 * b**2 + c**2 + 2 * d**2 - a - d - 10,
        2 * a**2 + b**2 + c**2 + 2 * a - b - d - 5,
    )


TABLE = (
    Row(
        6,
        lambda y: (1 - y[0]) ** 2,
        (-1.2, 1.0),
        0.0,
        equality=lambda y: (10 * (y[1] - y[0] ** 2),),
    ),
    Row(
        7,
        lambda y: jnp.log(1 + y[0] ** 2) - y[1],
        (2.0, 2.0),
        -(3**0.5),
        equality=lambda y: ((1 + y[0] ** 2) ** 2 + y[1] ** 2 - 4,),
    ),
    Row(
        28,
        lambda y: (y[0] + y[1]) ** 2 + (y[1] + y[2]) ** 2,
        (-4.0, 1.0, 1.0),
        0.0,
        equality=lambda y: (y[0] + 2 * y[1] + 3 * y[2] - 1,),
    ),
    Row(
        35,
        _hs35,
        (0.5, 0.5, 0.5),
        1 / 9,
        inequality=lambda y: (y[0] + y[1] + 2 * y[2] - 3,),
        lower=(0.0, 0.0, 0.0),
    ),
    Row(
        39,
        lambda y: -y[0],
        (2.0, 2.0, 2.0, 2.0),
        -1.0,
        equality=lambda y: (y[1] - y[0] ** 3 - y[2] ** 2, y[0] ** 2 - y[1] - y[3] ** 2),
    ),
    Row(
        40,
        lambda y: -y[0] * y[1] * y[2] * y[3],
        (0.8, 0.8, 0.8, 0.8),
        -0.25,
        equality=lambda y: (
            y[0] ** 3 + y[1] ** 2 - 1,
            y[0] ** 2 * y[3] - y[2],
            y[3] ** 2 - y[1],
        ),
    ),
    Row(43, _hs43, (0.0, 0.0, 0.0, 0.0), -44.0, inequality=_hs43_inequality),
    Row(
        71,
        lambda y: y[0] * y[3] * (y[0] + y[1] + y[2]) + y[2],
        (1.0, 5.0, 5.0, 1.0),
        17.0140172892,
        equality=lambda y: (jnp.sum(y**2) - 40,),
        inequality=lambda y: (25 - y[0] * y[1] * y[2] * y[3],),
        lower=(1.0, 1.0, 1.0, 1.0),
        upper=(5.0, 5.0, 5.0, 5.0),
    ),
)


def _rows(fun: Callable[[Any], tuple] | None) -> Callable[[Any, Any], Any] | None:
    return None if fun is None else lambda y, data: jnp.stack(fun(y))


def _build(row: Row) -> Problem:
    return Problem(
        name=f"hs{row.number}",
        fun=lambda y, data: row.fun(y),
        init=np.array(row.start),
        equality=_rows(row.equality),
        inequality=_rows(row.inequality),
        lower=None if row.lower is None else np.array(row.lower),
        upper=None if row.upper is None else np.array(row.upper),
        optimum=row.optimum,
        meta={"source": f"Hock and Schittkowski, problem {row.number}"},
    )


QUICK = (7, 39, 43, 71)
ENTRIES = {
    f"hs{row.number}": Entry(
        ("program",), functools.partial(_build, row), quick=row.number in QUICK
    )
    for row in TABLE
}
