"""jaxopt. Its tolerance bounds the Euclidean norm of the gradient.

Tuned: 30 pairs instead of 10 in L-BFGS; other linear solvers in the implicit differentiation. On
bilevel problems a loop of its own parts: it has no bilevel solver.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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


def _layer(problem: Any, budget: Budget, **options: Any):
    """A constraint layer: Levenberg-Marquardt with implicit differentiation."""
    import jaxopt

    def rule(init, args):
        solver = jaxopt.LevenbergMarquardt(
            problem.residual, maxiter=budget.steps, tol=budget.tolerance, **options
        )
        return solver.run(init, args).params

    return rule


def _dense_layer(problem: Any, budget: Budget):
    """The same with a materialized Jacobian, and LU in the backward pass."""
    from jaxopt.linear_solve import solve_lu

    return _layer(
        problem, budget, materialize_jac=True, solver="cholesky", implicit_diff_solve=solve_lu
    )


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


class ImplicitLoop(NamedTuple):
    """A hypergradient loop: gradient steps from the last y, jaxopt's implicit derivative, a step.

    Attributes:
        problem: The bilevel problem, with its step sizes.
        lower_steps: Gradient steps per step of x.
        products: Most steps of the conjugate gradients in the derivative.
    """

    problem: Any
    lower_steps: int = 10
    products: int = 10

    def init(self, problem: Any, value: Any, args: Any, key: Any) -> "LoopState":
        """The start; `key` is not used."""
        return LoopState(value, jnp.asarray(jnp.nan, jax.tree.leaves(value)[0].dtype))

    def step(self, problem: Any, args: Any, state: "LoopState") -> tuple["LoopState", "LoopInfo"]:
        """One step of x; deterministic problems without sets only."""
        from jaxopt import GradientDescent, linear_solve

        x, y = state.value
        lower = GradientDescent(
            lambda y, x: problem.lower(x, y, args),
            maxiter=self.lower_steps,
            stepsize=self.problem.lower_step,
            acceleration=False,
            tol=0.0,
            implicit_diff=True,
            implicit_diff_solve=functools.partial(linear_solve.solve_cg, maxiter=self.products),
        )

        def outcome(x):
            moved = lower.run(y, x).params
            return problem.upper(x, moved, args), moved

        (objective, y), direction = jax.value_and_grad(outcome, has_aux=True)(x)
        rate = self.problem.upper_step
        x = jax.tree.map(lambda v, d: v - jnp.asarray(rate, v.dtype) * d, x, direction)
        counts = LoopCounts(jnp.asarray(self.lower_steps + 2), jnp.asarray(self.products + 1))
        return LoopState((x, y), objective), LoopInfo(counts)


class LoopState(NamedTuple):
    """The pair (x, y), and the upper objective before x moved."""

    value: Any
    objective: Any


class LoopCounts(NamedTuple):
    """Evaluations of one step."""

    gradient: Any
    hvp: Any


class LoopInfo(NamedTuple):
    """What a step reports."""

    counts: LoopCounts


def _contender(solver, kind, make, **more):
    return Contender("jaxopt", solver, (kind,), make, module="jaxopt", **more)


_TUNED = {"history_size": 30}
CONTENDERS = (
    _contender("BFGS", "smooth", _solver("BFGS"), dense=True),
    _contender("LBFGS", "smooth", _solver("LBFGS")),
    _contender("LBFGS", "smooth", _solver("LBFGS", options=_TUNED), setting="tuned", config=_TUNED),
    _contender("LevenbergMarquardt", "least_squares", _solver("LevenbergMarquardt", "residual")),
    _contender("ArmijoSGD", KIND, _line_search, random=True),
    _contender("GradientDescent", "deterministic", lambda problem, budget: ImplicitLoop(problem)),
    _contender("LevenbergMarquardt layer", "layer", _layer),
    _contender("LevenbergMarquardt layer", "layer", _dense_layer, setting="dense"),
    _rule("default", ("hypergradient",)),
    _rule("normal CG, tight", ("hypergradient",), "solve_normal_cg", tight=True),
    _rule("CG, tight", ("ridge",), "solve_cg", tight=True),
    _rule("Cholesky", ("ridge",), "solve_cholesky"),
    _rule("LU", ("equilibrium", "kkt", "lasso"), "solve_lu"),
)
