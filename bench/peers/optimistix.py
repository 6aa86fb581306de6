"""optimistix. It stops on the changes of variables and objective, not on the gradient.

Default: both of its tolerances are the one asked for. Tuned: a thousandth of it, because a small
change does not mean a small gradient. In the implicit differentiation: tags and linear solvers.
"""

from typing import Any

import equinox as eqx

from jaxopt_ext.bench.contender import Answer, Budget, Contender
from jaxopt_ext.bench.problem import Problem


def _solver(entry: str, name: str, field: str, factor: float = 1.0):
    def make(problem: Problem, budget: Budget):
        import optimistix

        tolerance = factor * budget.tolerance
        solver = getattr(optimistix, name)(rtol=tolerance, atol=tolerance)
        fun: Any = getattr(problem, field)

        def solve(start, data):
            found = getattr(optimistix, entry)(
                fun, solver, start, args=data, max_steps=budget.steps, throw=False
            )
            return Answer(found.value, found.stats["num_steps"])

        return solve

    return make


def _contenders(name, kind, entry, field):
    for setting, factor in (("default", 1.0), ("tuned", 1e-3)):
        make = _solver(entry, name, field, factor)
        config = {} if setting == "default" else {"tolerance_factor": factor}
        yield Contender(
            "optimistix",
            name,
            (kind,),
            make,
            setting=setting,
            config=config,
            module="optimistix",
            dense=True,
        )


def _known(inputs):
    return inputs[1], None


def _rewrite(root, residual, inputs):
    return inputs[0](root, inputs[2])


def _rule(name: str, kinds: tuple[str, ...], tag: str = "", solver: str = "") -> Contender:
    """`ImplicitAdjoint` around a solver that knows the solution.

    The condition is closure-converted first, as `optimistix.root_find` does.
    """

    def make(problem: Any, budget: Budget):
        import lineax
        import optimistix

        tags = frozenset([getattr(lineax, tag)] if tag else [])
        adjoint = optimistix.ImplicitAdjoint()
        if solver:
            linear = getattr(lineax, solver)(rtol=budget.tolerance, atol=budget.tolerance)
            adjoint = optimistix.ImplicitAdjoint(linear)

        def rule(condition, x, theta):
            fun = eqx.filter_closure_convert(condition, x, theta)
            return adjoint.apply(_known, _rewrite, (fun, x, theta), tags)[0]

        return rule

    return Contender(
        "optimistix", "ImplicitAdjoint", kinds, make, setting=name, module="optimistix"
    )


def _layer(name: str) -> Contender:
    """A constraint layer, with its default `ImplicitAdjoint`."""

    def make(problem: Any, budget: Budget):
        import optimistix

        solver = getattr(optimistix, name)(rtol=budget.tolerance, atol=budget.tolerance)

        def rule(init, args):
            return optimistix.least_squares(
                problem.residual, solver, init, args=args, max_steps=budget.steps, throw=False
            ).value

        return rule

    return Contender("optimistix", f"{name} layer", ("layer",), make, module="optimistix")


CONTENDERS = (
    _layer("LevenbergMarquardt"),
    _layer("GaussNewton"),
    *_contenders("BFGS", "smooth", "minimise", "fun"),
    *_contenders("LevenbergMarquardt", "least_squares", "least_squares", "residual"),
    _rule("default", ("hypergradient",)),
    _rule("positive definite", ("ridge",), "positive_semidefinite_tag"),
    _rule("CG, tight", ("ridge",), "positive_semidefinite_tag", "CG"),
    _rule("symmetric", ("kkt",), "symmetric_tag"),
)
