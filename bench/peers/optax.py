"""optax: L-BFGS in the loop that its documentation gives. Tuned: 30 pairs instead of 10."""

import jax
import jax.numpy as jnp

from jaxopt_ext.bench.contender import Answer, Budget, Contender
from jaxopt_ext.bench.problem import Problem


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


_TUNED = {"memory_size": 30}
_DEFAULT = Contender("optax", "lbfgs", ("smooth",), _lbfgs(), module="optax")
CONTENDERS = (
    _DEFAULT,
    _DEFAULT._replace(make=_lbfgs(**_TUNED), setting="tuned", config=_TUNED),
)
