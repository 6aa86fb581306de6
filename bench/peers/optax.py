"""optax: L-BFGS in the loop that its documentation gives. Tuned: 30 pairs instead of 10.

First-order methods on minibatches, each with the best step size of a grid.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_ext.bench.contender import Answer, Budget, Contender
from jaxopt_ext.bench.problem import Problem
from jaxopt_ext.bench.problems.supervised import KIND, Method, Supervised


def _lbfgs(**options):
    def make(problem: Problem, budget: Budget):
        import optax

        optimizer = optax.lbfgs(**options)

        def solve(start, data):
            def fun(y):
                return problem.fun(y, data)

            value_and_grad = optax.value_and_grad_from_state(fun)

            def going(carry):
                _, _, gradient, steps = carry
                far = jnp.max(jnp.abs(gradient)) > budget.tolerance
                return (steps == 0) | ((steps < budget.steps) & far)

            def step(carry):
                y, state, _, steps = carry
                value, gradient = value_and_grad(y, state=state)
                change, state = optimizer.update(
                    gradient, state, y, value=value, grad=gradient, value_fn=fun
                )
                # the line search keeps the gradient at the new point in the state
                gradient = optax.tree.get(state, "grad")
                return optax.apply_updates(y, change), state, gradient, steps + 1

            carry = (start, optimizer.init(start), jnp.zeros_like(start), jnp.zeros((), jnp.int32))
            y, _, _, steps = jax.lax.while_loop(going, step, carry)
            return Answer(y, steps)

        return solve

    return make


def _stochastic(name: str, **options):
    """A first-order method on minibatches; the step size is a number of the grid."""

    def make(problem: Supervised, budget: Budget) -> Any:
        import optax

        optimizer = getattr(optax, name)(learning_rate=1.0, **options)

        def init(w, batch, rate):
            return w, optimizer.init(w), rate

        def step(state, batch):
            w, memory, rate = state
            gradient = jax.grad(problem.fun)(w, batch)
            update, memory = optimizer.update(gradient, memory, w)
            return jax.tree.map(lambda y, u: y + rate * u, w, update), memory, rate

        return Method(init, step, lambda state: state[0], RATES)

    return Contender("optax", name, (KIND,), make, module="optax", random=True)


RATES = tuple(10.0**k for k in range(-3, 4))
_TUNED = {"memory_size": 30}
_DEFAULT = Contender("optax", "lbfgs", ("smooth",), _lbfgs(), module="optax")
CONTENDERS = (
    _DEFAULT,
    _DEFAULT._replace(make=_lbfgs(**_TUNED), setting="tuned", config=_TUNED),
    _stochastic("sgd"),
    _stochastic("adam"),
    _stochastic("adagrad"),
)
