"""Our own contenders."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

import jaxopt_ext as jx
from jaxopt_ext import implicit, solvers
from jaxopt_ext.bench.contender import OURS, Answer, Budget, Contender
from jaxopt_ext.bench.problem import Problem


def _answer(found: jx.Solution) -> Answer:
    counts = found.stats.counts
    declared = {name: getattr(counts, name) for name in counts.__dataclass_fields__}
    return Answer(found.value, found.stats.steps, declared)


def to_small_gradient(solver: jx.AbstractSolver, least_squares: bool = False):
    """A contender that minimises until the gradient is small.

    Args:
        solver: One of our solvers.
        least_squares: Whether it gets the residual instead of the objective.

    Returns:
        The `make` of a contender.
    """

    def make(problem: Problem, budget: Budget):
        stop = jx.Optimality(rtol=0.0, atol=budget.tolerance)

        def solve(start, data):
            residual: Any = problem.residual
            return _answer(
                jx.solve(
                    jx.LeastSquares(residual) if least_squares else jx.Minimization(problem.fun),
                    solver,
                    start,
                    data,
                    max_steps=budget.steps,
                    stop=stop,
                    adjoint=implicit.DetachedAdjoint(),
                )
            )

        return solve

    return make


def consensus(**settings: Any):
    """A contender that spends its evaluations on consensus-based optimization in the box.

    Args:
        **settings: Of `CBO`.

    Returns:
        The `make` of a contender.
    """

    def make(problem: Problem, budget: Budget):
        def solve(start, data):
            lower, upper = (jnp.asarray(bound, start.dtype) for bound in problem.box)
            swarm = solvers.cbo.Uniform(lower, upper)
            solver = solvers.CBO(start=swarm, **settings)
            return _answer(
                jx.solve(
                    jx.Minimization(problem.fun),
                    solver,
                    start,
                    data,
                    key=jax.random.key(budget.seed),
                    max_steps=max(1, budget.evaluations // solver.particles),
                    stop=jx.Evaluations(budget.evaluations),
                    adjoint=implicit.DetachedAdjoint(),
                )
            )

        return solve

    return make


def to_kkt_point(**settings: Any):
    """A contender that solves nonlinear programs to a small KKT residual.

    Args:
        **settings: Of `SketchedNewtonAL`.

    Returns:
        The `make` of a contender.
    """

    def make(problem: Problem, budget: Budget):
        tolerance = {"rtol": budget.tolerance, "atol": budget.tolerance}
        solver = solvers.SketchedNewtonAL(**tolerance, **settings)

        def solve(start, data):
            lower, upper = (
                None if bound is None else jnp.asarray(bound, start.dtype)
                for bound in (problem.lower, problem.upper)
            )
            program = jx.NonlinearProgram(
                problem.fun, problem.equality, problem.inequality, lower, upper
            )
            return _answer(
                jx.solve(
                    program,
                    solver,
                    start,
                    data,
                    max_steps=budget.steps,
                    adjoint=implicit.DetachedAdjoint(),
                )
            )

        return solve

    return make


class SymmetricRoot(implicit.Root):
    """F(x, θ) = 0 with a symmetric Jacobian."""

    symmetric: ClassVar[bool] = True


class PositiveDefiniteRoot(SymmetricRoot):
    """F(x, θ) = 0 with a symmetric positive definite Jacobian."""

    positive_definite: ClassVar[bool] = True


def _rule(
    name: str,
    kinds: tuple[str, ...],
    condition: type[implicit.Root] = implicit.Root,
    linear_solver: Any = None,
) -> Contender:
    def make(problem: Any, budget: Budget):
        def rule(fun, x, theta):
            return implicit.attach(condition(fun), x, theta, linear_solver=linear_solver)

        return rule

    setting = "default" if name == "attach" else name
    return Contender(OURS, "attach", kinds, make, setting=setting)


# For functions that are not separable: noise in the shape of the swarm.
COVARIANCE = {
    "noise": solvers.cbo.Covariance(),
    "alpha": solvers.cbo.EffectiveSampleSize(0.3),
    "sigma": 1.2,
    "drift": 1.0,
    "dt": 1.0,
}
MATRIX_FREE = solvers.ConjugateGradient()
CONTENDERS = (
    Contender(
        OURS,
        "GradNormSmooth",
        ("smooth",),
        to_small_gradient(solvers.GradNormSmooth()),
        dense=True,
    ),
    Contender(
        OURS,
        "GradNormSmooth matrix-free",
        ("smooth",),
        to_small_gradient(solvers.GradNormSmooth(solvers.ExactHessian(linear_solver=MATRIX_FREE))),
    ),
    Contender(
        OURS,
        "GradNormSmooth",
        ("smooth",),
        to_small_gradient(solvers.GradNormSmooth(solvers.QuasiNewton(memory=10))),
        setting="L-BFGS",
        config={"memory": 10},
    ),
    Contender(
        OURS,
        "GradNormSmooth Gauss-Newton",
        ("least_squares",),
        to_small_gradient(solvers.GradNormSmooth(solvers.GaussNewton()), least_squares=True),
        dense=True,
    ),
    Contender(
        OURS,
        "SketchedNewtonAL",
        ("program",),
        to_kkt_point(inner_solver=solvers.kkt.Direct()),
        dense=True,
    ),
    Contender(
        OURS,
        "SketchedNewtonAL matrix-free",
        ("program",),
        to_kkt_point(inner_solver=solvers.kkt.MINRES("diagonal")),
    ),
    Contender(OURS, "CBO", ("blackbox",), consensus(), random=True),
    Contender(
        OURS,
        "CBO",
        ("blackbox",),
        consensus(**COVARIANCE),
        setting="tuned",
        config={"noise": "covariance", "alpha": "effective sample size"},
        random=True,
    ),
    _rule("attach", ("hypergradient",)),
    _rule("positive definite", ("ridge",), PositiveDefiniteRoot),
    _rule("CG", ("ridge",), PositiveDefiniteRoot, implicit.CG()),
    _rule("symmetric", ("kkt",), SymmetricRoot),
    _rule("MINRES", ("kkt",), SymmetricRoot, implicit.MINRES()),
    _rule("Neumann, 30 terms", ("equilibrium",), linear_solver=implicit.Neumann(terms=30)),
    _rule("Neumann, 100 terms", ("lasso",), linear_solver=implicit.Neumann(terms=100)),
    _rule("NormalCG", ("equilibrium", "lasso"), linear_solver=implicit.NormalCG()),
)
