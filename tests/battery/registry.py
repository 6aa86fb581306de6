"""What the battery covers. To add a solver, add one line to REGISTRY."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxopt_ext as jx
from jaxopt_ext import implicit, solvers


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


def _ridge_hessian(w, args):
    """Of RIDGE; on the variations of it that have no args, an approximation."""
    X = _design(w.dtype)[:, : w.size]
    return X.T @ X + jnp.diag(jnp.ones_like(w) if args is None else jnp.exp(args))


def _ridge_factor(w, args):
    return jnp.linalg.cholesky(_ridge_hessian(w, args))


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

# Six equations in two unknowns that agree, two of them at a time: a stochastic method ends at the
# solution.
AGREEING = Home(
    "agreeing",
    solvers.sso.Minibatches(
        jx.ComposedMinimization(
            loss=lambda z, args: jnp.mean((z - args["X"] @ jnp.ones(2, z.dtype)) ** 2) / 2,
            model=lambda y, args: args["X"] @ (args["scale"][0] * y),
        ),
        2,
    ),
    lambda dtype: jnp.zeros(2, dtype),
    lambda dtype: {
        "X": _design(dtype)[:6, :2],
        "scale": jnp.full((6, 2), jnp.array([2.0, 0.5], dtype)),
    },
    lambda args: 1 / args["scale"][0],
)

# Nearest points of a plane, and of a box with active and inactive bounds.
PLANE = Home(
    "plane",
    jx.NonlinearProgram(
        lambda y, args: jnp.sum((y - args) ** 2) / 2,
        equality=lambda y, args: jnp.sum(y) - 1,
    ),
    lambda dtype: jnp.ones(3, dtype),
    lambda dtype: jnp.array([1.0, -0.5, 2.0], dtype),
    lambda args: args - (jnp.sum(args) - 1) / args.size,
)

BOX = Home(
    "box",
    jx.NonlinearProgram(
        lambda y, args: jnp.sum((y["v"] - args) ** 2) / 2,
        inequality=lambda y, args: {"below": y["v"] - 1},
        lower=0.0,
    ),
    lambda dtype: {"v": jnp.full(3, 0.5, dtype)},
    lambda dtype: jnp.array([0.3, -0.5, 2.0], dtype),
    lambda args: {"v": jnp.clip(args, 0, 1)},
)

# Well-conditioned, for methods that are slow on RIDGE.
COSH = Home(
    "cosh",
    jx.Minimization(lambda y, t: jnp.sum(jnp.array([1, 2, 4], y.dtype) * jnp.cosh(y - t))),
    lambda dtype: jnp.zeros(3, dtype),
    lambda dtype: jnp.array([1.0, -0.5, 2.0], dtype),
    lambda t: t,
)

SMOOTH = (RIDGE, QUARTIC, COMPOSED, LEAST_SQUARES)

BILEVEL = jx.Bilevel(
    upper=lambda x, y, t: jnp.sum((y - t) ** 2 + jnp.exp(t / 4) * x**2 / 2) / 2,
    lower=lambda x, y, t: jnp.sum(jnp.array([1, 2, 1.5], y.dtype) * (y - x) ** 2) / 2,
)


def _bilevel(name, sigma, central=False):
    """The minimizer of the penalty function at `sigma`; with σ = 0 that of the bilevel problem."""

    def solution(t):
        curvature = jnp.array([1, 2, 1.5], t.dtype)
        shrink = curvature / (curvature + sigma)
        if central:
            shrink = (shrink + curvature / (curvature - sigma)) / 2
        x = shrink * t / (shrink + jnp.exp(t / 4) / 2)
        return x, (sigma * t + curvature * x) / (sigma + curvature)

    def init(dtype):
        return jnp.zeros(3, dtype), jnp.ones(3, dtype)

    return Home(name, BILEVEL, init, lambda dtype: jnp.array([1.0, -0.5, 2.0], dtype), solution)


PENALIZED = _bilevel("penalized", 1e-2)
MILD = _bilevel("mild", 0.1)  # recursive estimates collect rounding errors, which are divided by σ
CENTRAL = _bilevel("central", 1e-2, central=True)
EXACT = _bilevel("exact", 0.0)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A solver, the problems it must solve, and one numeric setting that can be varied.

    The first home should be a `Minimization` of a single array; else only the tests of solutions
    and derivatives apply, for a `Bilevel` with args of shape (3,) also those that need no function
    of one array. `variant` names a choice of `settings`. A `brief` entry differs from
    another one by a setting only, and takes the tests in which that could matter; set
    JAXOPT_EXT_FULL_BATTERY=1 to give it all of them. `options` are passed to `solve`.
    """

    make: Callable[..., jx.AbstractSolver]
    homes: tuple[Home, ...]
    number: tuple[str, float]
    variant: str = ""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    brief: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def solver(self, **more: Any) -> jx.AbstractSolver:
        return self.make(**(self.settings | more))

    @property
    def name(self) -> str:
        return self.make.__name__ + (f"-{self.variant}" if self.variant else "")


def _model(variant, hessian, *homes, brief=True):
    settings = {"hessian": hessian}
    return Entry(solvers.GradNormSmooth, homes, ("radius", 0.5), variant, settings, brief)


CG = solvers.ConjugateGradient()
HESSIAN_MODELS = (
    _model("cg", solvers.ExactHessian(linear_solver=CG), RIDGE, brief=False),
    _model("eigh", solvers.ExactHessian(linear_solver=solvers.Eigendecomposition()), RIDGE),
    _model("diagonal", solvers.DiagonalHessian(), COSH),
    _model("nystrom", solvers.NystromHessian(2, jax.random.key(0)), COSH),
    _model("zero", solvers.ZeroHessian(), COSH),
    _model("bfgs", solvers.QuasiNewton(), COSH),
    _model("sr1", solvers.QuasiNewton("sr1"), COSH),
    _model("lbfgs", solvers.QuasiNewton(memory=3), COSH),
    _model("averaged", solvers.AveragedHessian(), RIDGE),
    _model("user", solvers.UserHessian(_ridge_hessian), RIDGE),
    _model("low-rank", solvers.LowRank(_ridge_factor), RIDGE),
    _model("gauss-newton", solvers.GaussNewton(), COMPOSED, LEAST_SQUARES),
    _model("gauss-newton-cg", solvers.GaussNewton(linear_solver=CG), COMPOSED, LEAST_SQUARES),
)


def _penalty(variant="", home=PENALIZED, brief=True, **settings):
    settings = {"sigma": 1e-2, "lower_step": 0.4, **settings}
    number = ("upper_step", 0.5)
    return Entry(solvers.PenaltyBilevel, (home,), number, variant, settings, brief)


def _hypergradient(make, variant="", brief=True, **settings):
    settings = {"lower_step": 0.4, **settings}
    return Entry(make, (EXACT,), ("upper_step", 0.3), variant, settings, brief)


BILEVEL_METHODS = (
    _penalty(brief=False),
    _penalty("central", CENTRAL, difference="central"),
    _penalty("momentum", MILD, sigma=0.1, lower_steps=1, momentum=0.5),
    Entry(
        solvers.F2SA,
        (PENALIZED,),
        ("ratio", 100.0),
        settings={"alpha": 4e-3, "gamma": 0.4, "multiplier": 100.0, "ratio": 100.0},
        brief=True,
    ),
    _hypergradient(solvers.ImplicitBilevel, brief=False),
    _hypergradient(solvers.ImplicitBilevel, "cg", linear_solver=implicit.CG(max_steps=3)),
    _hypergradient(solvers.UnrolledBilevel, lower_steps=60),
    _hypergradient(solvers.SOBA),
)

REGISTRY = (
    Entry(solvers.GradNormSmooth, SMOOTH, number=("radius", 0.5)),
    *HESSIAN_MODELS,
    Entry(solvers.SketchedNewtonAL, (PLANE, BOX), number=("penalty", 2.0)),
    Entry(
        solvers.SketchedNewtonAL,
        (PLANE, BOX),
        ("penalty", 2.0),
        "minres",
        {"inner_solver": solvers.kkt.MINRES()},
        brief=True,
    ),
    Entry(solvers.SuperUniversalNewton, (RIDGE,), number=("radius", 0.5), brief=True),
    Entry(solvers.CubicNewton, (RIDGE,), number=("radius", 0.5), brief=True),
    Entry(solvers.GradientMethod, (COSH,), number=("radius", 0.5), brief=True),
    Entry(solvers.SSO, (COSH, COMPOSED, LEAST_SQUARES), number=("step_size", 0.2)),
    Entry(
        solvers.StochasticSSO,
        (COMPOSED, AGREEING),
        ("step_size", 0.2),
        # a small gradient of one minibatch does not stop the method itself
        options={"stop": jx.Optimality(), "key": jax.random.key(0)},
    ),
    Entry(
        solvers.CBO,
        (RIDGE, QUARTIC),
        ("drift", 1.0),
        "polished",
        {"particles": 20, "polish": solvers.cbo.Polish(solvers.GradNormSmooth(), after=20)},
    ),
    *BILEVEL_METHODS,
)
