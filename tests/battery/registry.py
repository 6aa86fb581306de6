"""What the battery covers. To add a solver, add one line to REGISTRY."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

import jaxopt_ext as jx
from jaxopt_ext import solvers


@dataclasses.dataclass(frozen=True)
class Home:
    """A problem with its solution as a differentiable closed form of `args`."""

    name: str
    problem: jx.Problem
    init: Callable[[Any], Any]  # dtype -> starting point
    args: Callable[[Any], Any]  # dtype -> args
    solution: Callable[[Any], Any]  # args -> value


def _design(dtype):
    rows = jnp.arange(24, dtype=dtype).reshape(8, 3)
    return jnp.sin(rows) + jnp.cos(rows**2) / 2


def _ridge(w, args):
    X = _design(w.dtype)
    y = jnp.cos(jnp.arange(8, dtype=w.dtype))
    return jnp.sum((X @ w - y) ** 2) / 2 + jnp.sum(jnp.exp(args) * w**2) / 2


def _ridge_solution(args):
    X = _design(args.dtype)
    y = jnp.cos(jnp.arange(8, dtype=args.dtype))
    return jnp.linalg.solve(X.T @ X + jnp.diag(jnp.exp(args)), X.T @ y)


RIDGE = Home(
    "ridge",
    jx.Minimization(_ridge),
    lambda dtype: jnp.zeros(3, dtype),
    lambda dtype: jnp.array([-0.5, 0.3, 0.1], dtype),
    _ridge_solution,
)


def _cubic_root(t):
    """The root of y³ + y = t."""
    scale = jnp.asarray(3, t.dtype) ** 0.5
    return 2 / scale * jnp.sinh(jnp.arcsinh(3 * scale * t / 2) / 3)


# Not quadratic, and PyTrees on both sides.
QUARTIC = Home(
    "quartic",
    jx.Minimization(
        lambda y, args: (
            jnp.sum(y["a"] ** 4 / 4 + y["a"] ** 2 / 2 - args["t"] * y["a"])
            + (y["b"] - args["s"]) ** 2
        )
    ),
    lambda dtype: {"a": jnp.array([2.0, -1.0], dtype), "b": jnp.array(0.5, dtype)},
    lambda dtype: {"t": jnp.array([1.0, 3.0], dtype), "s": jnp.array(-1.0, dtype)},
    lambda args: {"a": _cubic_root(args["t"]), "b": args["s"]},
)

COMPOSED = Home(
    "composed",
    jx.ComposedMinimization(
        loss=lambda z, args: jnp.sum((z - 1) ** 2) / 2, model=lambda y, args: args * y
    ),
    lambda dtype: jnp.zeros(2, dtype),
    lambda dtype: jnp.array([2.0, 0.5], dtype),
    lambda args: 1 / args,
)

LEAST_SQUARES = Home(
    "least_squares",
    jx.LeastSquares(lambda y, args: {"data": y - args, "prior": 2 * y}),
    lambda dtype: jnp.ones(2, dtype),
    lambda dtype: jnp.array([1.0, -5.0], dtype),
    lambda args: args / 5,
)

SMOOTH = (RIDGE, QUARTIC, COMPOSED, LEAST_SQUARES)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A solver, the problems it must solve, and one numeric setting that can be varied.

    The first home must be a `Minimization` of a single array.
    """

    make: Callable[..., jx.AbstractSolver]
    homes: tuple[Home, ...]
    number: tuple[str, float]

    @property
    def name(self) -> str:
        return self.make.__name__


REGISTRY = (Entry(solvers.GradNormSmooth, SMOOTH, number=("radius", 0.5)),)
