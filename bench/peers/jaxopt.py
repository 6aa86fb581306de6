"""jaxopt. Its tolerance bounds the Euclidean norm of the gradient.

Tuned: 30 pairs instead of 10 in L-BFGS; other linear solvers in the implicit differentiation.
"""

import functools
from typing import Any

from jax.flatten_util import ravel_pytree

from jaxopt_ext.bench.contender import Answer, Budget, Contender
from jaxopt_ext.bench.problem import Problem
from jaxopt_ext.bench.problems.supervised import KIND, Method, Supervised


def _solver(name: str, field: str = "fun", options: Any = None):
    def make(problem: Problem, budget: Budget):
        import jaxopt

        solver = getattr(jaxopt, name)(
            getattr(problem, field),
            maxiter=budget.steps,
            tol=budget.tolerance,
            implicit_diff=False,
            **(options or {}),
        )

        def solve(start, data):
            found, state = solver.run(start, data)
            return Answer(found, state.iter_num)

        return solve

    return make


def _rule(name: str, kinds: tuple[str, ...], solver: str = "", tight: bool = False) -> Contender:
    """`custom_root` around a solver that knows the solution."""

    def make(problem: Any, budget: Budget):
        from jaxopt import implicit_diff, linear_solve

        options: dict[str, Any] = {}
        if solver:
            solve = getattr(linear_solve, solver)

            def dense(matvec, b):  # its dense solvers take no PyTrees
                flat, unravel = ravel_pytree(b)
                return unravel(solve(lambda v: ravel_pytree(matvec(unravel(v)))[0], flat))

            options["solve"] = functools.partial(solve, tol=budget.tolerance) if tight else dense

        def rule(condition, x, theta):
            known = implicit_diff.custom_root(condition, **options)(lambda init, theta: init)
            return known(x, theta)

        return rule

    return Contender("jaxopt", "custom_root", kinds, make, setting=name, module="jaxopt")


def _line_search(problem: Supervised, budget: Budget) -> Any:
    """SGD with Armijo's line search (SLS); the largest step size is a number of the grid."""
    import jaxopt

    def solver(rate):
        return jaxopt.ArmijoSGD(problem.fun, max_stepsize=rate, tol=0.0)

    def init(w, batch, rate):
        return w, solver(rate).init_state(w, data=batch), rate

    def step(state, batch):
        w, memory, rate = state
        w, memory = solver(rate).update(w, memory, data=batch)
        return w, memory, rate

    return Method(init, step, lambda state: state[0], (1.0, 10.0, 100.0))


def _contender(solver, kind, make, **more):
    return Contender("jaxopt", solver, (kind,), make, module="jaxopt", **more)


_TUNED = {"history_size": 30}
CONTENDERS = (
    _contender("BFGS", "smooth", _solver("BFGS"), dense=True),
    _contender("LBFGS", "smooth", _solver("LBFGS")),
    _contender("LBFGS", "smooth", _solver("LBFGS", options=_TUNED), setting="tuned", config=_TUNED),
    _contender("LevenbergMarquardt", "least_squares", _solver("LevenbergMarquardt", "residual")),
    _contender("ArmijoSGD", KIND, _line_search, random=True),
    _rule("default", ("hypergradient",)),
    _rule("normal CG, tight", ("hypergradient",), "solve_normal_cg", tight=True),
    _rule("CG, tight", ("ridge",), "solve_cg", tight=True),
    _rule("Cholesky", ("ridge",), "solve_cholesky"),
    _rule("LU", ("equilibrium", "kkt", "lasso"), "solve_lu"),
)
