"""What can be added to consensus-based optimization: memory, batches, jumps, refinement, ..."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxopt_ext.core import check
from jaxopt_ext.core.result import RESULTS
from jaxopt_ext.core.solver import AbstractSolver, Number
from jaxopt_ext.solvers.cbo_consensus import Schedule, check_schedule, exponents, scheduled
from jaxopt_ext.solvers.cbo_noise import fold, words


class Memory(eqx.Module):
    """Each particle remembers its own best point y and is drawn there too.

    The consensus is that of the remembered points, and the step gains −λ₂ dt (x − y) and the
    noise σ₂ √dt (x − y) ξ₂, both from the position before the step.

    Args:
        drift: λ₂ ≥ 0.
        sigma: σ₂ ≥ 0.

    Raises:
        ValueError: A number is negative.

    Reference:
        Riedl, "Leveraging memory effects and gradient information in consensus-based
        optimisation", 2023.
    """

    drift: Number = 0.4
    sigma: Number = 0.0

    def __check_init__(self):
        check.number("Memory", "drift", self.drift, at_least=0)
        check.number("Memory", "sigma", self.sigma, at_least=0)


class Cutoff(eqx.Module):
    """Only particles worse than the consensus drift; the noise is left as it is.

    The drift is multiplied by the Heaviside function of f(x) − f(c), or by its smooth form
    (1 + tanh(·/width)) / 2. It costs one more evaluation a step.

    Args:
        width: Of the smooth form, in units of the objective; 0 for the Heaviside function.

    Raises:
        ValueError: `width` is negative.

    Reference:
        Pinnau, Totzeck, Tse, Martin, 2017.
    """

    width: Number = 0.0

    def __check_init__(self):
        check.number("Cutoff", "width", self.width, at_least=0)

    def factor(self, above: Float[Array, " particles"]) -> Float[Array, " particles"]:
        """The factor of the drift, given f(x) − f(c)."""
        width = jnp.asarray(self.width, above.dtype)
        sharp = jnp.heaviside(above, jnp.zeros((), above.dtype))
        smooth = (1 + jnp.tanh(above / jnp.where(width > 0, width, 1))) / 2
        return jnp.where(width > 0, smooth, sharp)


class Batch(eqx.Module):
    """Random batches: each step evaluates some of the particles, and their consensus moves all.

    The particles are shuffled once per epoch and taken in turn.

    Args:
        size: Particles evaluated in a step, at least 2.
        move_all: Whether all particles move, or only those of the batch.

    Raises:
        ValueError: `size` is less than 2.

    Reference:
        Carrillo, Jin, Li, Zhu, 2021.
    """

    size: int = eqx.field(static=True)
    move_all: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        check.count("Batch", "size", self.size, at_least=2)

    def rows(
        self, key: Key[Array, ""], step: Int[Array, ""], particles: int
    ) -> Int[Array, " size"]:
        """Which particles are evaluated at `step`."""
        batches = particles // self.size
        order = shuffled(fold(key, step // batches), particles)
        return jax.lax.dynamic_slice(order, (step % batches * self.size,), (self.size,))


def shuffled(key: Key[Array, ""], count: int) -> Int[Array, " count"]:
    """A random order of 0, ..., count - 1.

    One word per index is sorted, its lowest bits replaced by the index: on a CPU, XLA sorts single
    words several times as fast as pairs. The other bits decide, 22 of 32 for 1024 indices.
    """
    low = jnp.uint32(2 ** (count - 1).bit_length() - 1)
    index = jnp.arange(count, dtype=jnp.uint32)
    tagged = (words(key, (1, count))[0] & ~low) | index
    return (jax.lax.sort(tagged) & low).astype(jnp.int32)


class Kick(eqx.Module):
    """Resampling when stagnating: normal noise on all particles after steps without a better one.

    Args:
        patience: Steps without improvement before each kick, at least 1.
        width: Standard deviation of the kick, in the variables' units, > 0.

    Raises:
        ValueError: A number outside its range.
    """

    patience: int | Array = 20
    width: Number = 0.1

    def __check_init__(self):
        if not eqx.is_array(self.patience):
            check.count("Kick", "patience", self.patience)
        check.number("Kick", "width", self.width, above=0)


class Jumps(eqx.Module):
    """Jump noise: at random times a particle jumps by normal multiples of its distance x − c.

    In a step each particle jumps with probability 1 − exp(−rate · dt), by scale · (x − c) ξ
    coordinate by coordinate.

    Args:
        rate: Jumps per unit of time, > 0.
        scale: Size of the jumps relative to the distance, > 0; a number or a schedule.

    Raises:
        ValueError: A number is not positive.

    Reference:
        Kalise, Sharma, Tretyakov, "Consensus-based optimization via jump-diffusion stochastic
        differential equations", 2023.
    """

    rate: Number = 1.0
    scale: Schedule = 1.0

    def __check_init__(self):
        check.number("Jumps", "rate", self.rate, above=0)
        check_schedule("Jumps", "scale", self.scale, above=0)

    def displacement(
        self,
        key: Key[Array, ""],
        step: Int[Array, ""],
        dt: Float[Array, ""],
        distance: Float[Array, "particles n"],
    ) -> Float[Array, "particles n"]:
        """The jumps of one step."""
        dtype, rows = distance.dtype, distance.shape[0]
        happens = jax.random.uniform(fold(key, 0), (rows, 1), dtype) < -jnp.expm1(-self.rate * dt)
        marks = jax.random.normal(fold(key, 1), distance.shape, dtype)
        jump = scheduled(self.scale, step, dtype) * distance * marks
        return jnp.where(happens, jump, 0)


class Polarized(eqx.Module):
    """A consensus for each particle, in which near particles count more: several minimizers.

    The weights of cᵢ are ∝ exp(−α f(xⱼ) − ‖xᵢ − xⱼ‖² / (2 width²)). An infinite width is the
    ordinary consensus. Time and memory grow with the square of the number of particles.

    Args:
        width: Of the Gaussian kernel, in the variables' units, > 0.

    Raises:
        ValueError: `width` is not positive.

    Reference:
        Bungert, Roith, Wacker, "Polarized consensus-based dynamics for optimization and
        sampling", 2024.
    """

    width: Number

    def __check_init__(self):
        check.number("Polarized", "width", self.width, above=0)

    def centers(
        self,
        swarm: Float[Array, "particles n"],
        points: Float[Array, "particles n"],
        energies: Float[Array, " particles"],
        alpha: Float[Array, ""],
    ) -> Float[Array, "particles n"]:
        """The consensus of each particle of `swarm` among `points`."""
        around = jnp.mean(points, axis=0, keepdims=True)  # or the squares would cancel
        a, b = swarm - around, points - around
        squared = jnp.sum(a**2, 1)[:, None] + jnp.sum(b**2, 1)[None] - 2 * a @ b.T
        near = jnp.maximum(squared, 0) / (2 * jnp.asarray(self.width, swarm.dtype) ** 2)
        logits = exponents(energies, alpha)[None] - near
        any_usable = jnp.any(logits > -jnp.inf, axis=1, keepdims=True)
        weight = jax.nn.softmax(jnp.where(any_usable, logits, 0), axis=1)
        return jnp.where(any_usable, weight @ points, swarm)


class Polish(eqx.Module):
    """Refinement of the best particle by a local solver, once the swarm has agreed.

    It runs to the solver's own stopping test within one step of the swarm. Then the solution
    satisfies its optimality conditions to that solver's tolerance, and `optimality` is known.

    Args:
        solver: A solver without random key, e.g. `GradNormSmooth()`.
        after: Steps after which it starts even if the swarm does not agree yet.
        max_steps: Steps of the solver at most.

    Raises:
        TypeError: `solver` is not a solver.
        ValueError: `solver` needs a key, or a count is less than 1.
    """

    solver: AbstractSolver
    after: int | Array = 500
    max_steps: int | Array = 200

    def __check_init__(self):
        if not isinstance(self.solver, AbstractSolver):
            raise TypeError(
                f"Polish: solver is a {type(self.solver).__name__}, expected a solver such as "
                "solvers.GradNormSmooth()"
            )
        if self.solver.needs_key:
            raise ValueError(
                f"Polish: solver is {type(self.solver).__name__}, expected a solver that needs no "
                "random key"
            )
        for name in ("after", "max_steps"):
            if not eqx.is_array(getattr(self, name)):
                check.count("Polish", name, getattr(self, name))

    def run(self, problem: Any, args: Any, value: Any, active: Array) -> tuple[Any, Any]:
        """Run the solver from `value`; no iteration where not `active`.

        Args:
            problem: What is solved.
            args: Its arguments.
            value: Starting point.
            active: Whether to run at all.

        Returns:
            The last point and what was reported there, with the result of the run as `failure`;
            arbitrary where not `active`.
        """
        state = self.solver.init(problem, value, args)
        _, shape = jax.eval_shape(lambda s: self._step(problem, args, s), state)
        info = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
        zero = jnp.zeros((), jnp.int32)

        def going(carry):
            return carry[2]

        def body(carry):
            state, info, _, steps = carry
            state, info = self._step(problem, args, state)
            done, result = self.solver.stop(problem, args, state, info)
            result = RESULTS.where(done, result, RESULTS.max_steps_reached)
            info = eqx.tree_at(lambda i: i.failure, info, result)
            done |= steps + 1 >= self.max_steps
            return state, info, ~done, steps + 1

        state, info, *_ = jax.lax.while_loop(going, body, (state, info, active, zero))
        return state.value, info

    @eqx.filter_jit
    def _step(self, problem, args, state):
        """Under `jit`, so that its type and the loop share one trace."""
        return self.solver.step(problem, args, state)
