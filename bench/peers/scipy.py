"""SciPy: its methods run on the host and call compiled functions.

Tuned: L-BFGS-B with 30 pairs and without its test on the decrease of the objective.
"""

import warnings
from typing import Any

import jax
import numpy as np

from jaxopt_ext.bench.contender import Answer, Budget, Contender, cast, compiled
from jaxopt_ext.bench.problem import Problem


def _minimize(method: str, second: str = "", **options: Any):
    def make(problem: Problem, budget: Budget):
        from scipy.optimize import minimize

        start, data = cast((problem.init, problem.data), budget.dtype)
        value_and_grad = compiled(jax.value_and_grad(problem.fun), start, data)
        extra: dict[str, Any] = {}
        if second == "hess":
            hessian = compiled(jax.hessian(problem.fun), start, data)
            extra["hess"] = lambda y: np.asarray(hessian(_in(y, start), data), np.float64)
        if second == "hessp":

            def product(y, v, data):
                return jax.jvp(lambda y: jax.grad(problem.fun)(y, data), (y,), (v,))[1]

            hessp = compiled(product, start, start, data)
            extra["hessp"] = lambda y, v: np.asarray(
                hessp(_in(y, start), _in(v, start), data), np.float64
            )

        def fun(y):
            value, gradient = value_and_grad(_in(y, start), data)
            return float(value), np.asarray(gradient, np.float64)

        settings = {"maxiter": budget.steps, **options}
        # Newton-CG has no tolerance on the gradient, only one on the step
        settings["xtol" if method == "Newton-CG" else "gtol"] = budget.tolerance
        if method == "L-BFGS-B":
            settings["maxfun"] = budget.evaluations

        def solve():
            found = minimize(fun, problem.init, jac=True, method=method, options=settings, **extra)
            return Answer(found.x, found.nit, {}, str(found.message))

        return solve

    return make


def _least_squares(problem: Problem, budget: Budget):
    from scipy.optimize import least_squares

    start, data = cast((problem.init, problem.data), budget.dtype)
    fun: Any = problem.residual
    residual = compiled(fun, start, data)
    jacobian = compiled(jax.jacfwd(fun), start, data)

    def solve():
        found = least_squares(
            lambda y: np.asarray(residual(_in(y, start), data), np.float64),
            problem.init,
            lambda y: np.asarray(jacobian(_in(y, start), data), np.float64),  # type: ignore
            method="trf",
            ftol=None,  # type: ignore
            xtol=None,  # type: ignore
            gtol=budget.tolerance,
            max_nfev=budget.steps,
        )
        return Answer(found.x, found.njev, {}, str(found.message))

    return solve


def _program(method: str):
    def make(problem: Problem, budget: Budget):
        from scipy.optimize import Bounds, NonlinearConstraint, minimize

        start, data = cast((problem.init, problem.data), budget.dtype)

        def host(fun):
            program = compiled(fun, start, data)
            return lambda y: np.asarray(program(_in(y, start), data), np.float64)

        value_and_grad = compiled(jax.value_and_grad(problem.fun), start, data)

        def fun(y):
            value, gradient = value_and_grad(_in(y, start), data)
            return float(value), np.asarray(gradient, np.float64)

        constraints = []
        for rows, lowest in ((problem.equality, 0.0), (problem.inequality, -np.inf)):
            if rows is not None:
                jacobian = host(jax.jacrev(rows))
                constraints.append(
                    NonlinearConstraint(host(rows), lowest, 0.0, jac=jacobian)  # type: ignore
                )
        bounds = None
        if problem.lower is not None or problem.upper is not None:
            bounds = Bounds(*problem.box)  # type: ignore[arg-type]
        options: dict[str, Any] = {"maxiter": min(budget.steps, 1000)}
        if method == "SLSQP":
            options["ftol"] = budget.tolerance
        else:
            options["gtol"] = budget.tolerance

        def solve():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns of what the row tells
                found = minimize(
                    fun,
                    problem.init,
                    jac=True,
                    method=method,
                    bounds=bounds,
                    constraints=constraints,
                    options=options,
                )
            return Answer(found.x, found.nit, {}, str(found.message))

        return solve

    return make


def _differential_evolution(problem: Problem, budget: Budget):
    from scipy.optimize import differential_evolution

    start, data = cast((problem.init, problem.data), budget.dtype)
    batch = 15 * problem.size  # the size of its default population
    values = compiled(
        jax.vmap(problem.fun, (0, None)), cast(np.zeros((batch, problem.size)), budget.dtype), data
    )

    def fun(population):  # one point per column
        points = np.zeros((batch, problem.size))
        points[: population.shape[1]] = population.T
        return np.asarray(values(_in(points, start), data), np.float64)[: population.shape[1]]

    def solve():
        found = differential_evolution(
            fun,
            list(zip(*problem.box, strict=True)),
            maxiter=max(1, budget.evaluations // batch - 1),
            rng=budget.seed,
            polish=False,
            vectorized=True,
            updating="deferred",
            tol=0.0,
        )
        return Answer(found.x, found.nit, {}, str(found.message))

    return solve


def _in(y, like):
    return np.asarray(y, like.dtype)


def _contender(solver, kind, make, **more):
    return Contender("scipy", solver, (kind,), make, traced=False, module="scipy", **more)


_TUNED = {"maxcor": 30, "ftol": 0.0}
CONTENDERS = (
    _contender("BFGS", "smooth", _minimize("BFGS"), dense=True),
    _contender("L-BFGS-B", "smooth", _minimize("L-BFGS-B")),
    _contender(
        "L-BFGS-B", "smooth", _minimize("L-BFGS-B", **_TUNED), setting="tuned", config=_TUNED
    ),
    _contender("Newton-CG", "smooth", _minimize("Newton-CG", "hessp")),
    _contender("trust-exact", "smooth", _minimize("trust-exact", "hess"), dense=True),
    _contender("least_squares trf", "least_squares", _least_squares),
    _contender("SLSQP", "program", _program("SLSQP")),
    _contender("trust-constr", "program", _program("trust-constr")),
    _contender("differential_evolution", "blackbox", _differential_evolution, random=True),
)
