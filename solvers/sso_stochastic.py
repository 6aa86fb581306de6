"""The solver `StochasticSSO`: surrogates in target space from minibatches."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from jaxopt_ext.core import check, tree
from jaxopt_ext.core.problem import ComposedMinimization, Problem
from jaxopt_ext.core.result import RESULTS
from jaxopt_ext.core.solver import Counts, Info
from jaxopt_ext.solvers.sso_solver import Answer, Parts, Surrogates
from jaxopt_ext.solvers.sso_steps import Oracle
from jaxopt_ext.solvers.sso_surrogate import Surrogate

TRIALS = 30  # surrogates for one minibatch, each with a smaller η than the last


class Minibatches(Problem):
    """A problem on all samples, of which a solver may draw some.

    Its conditions and its objective are those of `problem` with the `args` of all samples; a
    stochastic solver calls the same loss and model with the `args` of a part of them. So both must
    be written for any number of samples, and the expected loss of a minibatch should be that of all
    samples: a mean over samples, not a sum.

    Args:
        problem: A `ComposedMinimization`.
        size: Samples in a minibatch, at least 1.
        replace: Whether they are drawn with replacement. Otherwise each epoch is a random
            permutation, cut into minibatches; samples that do not fill one are left out.
        take: (args, rows) → args of these samples; `None` takes the rows of every array in args.
        samples: Number of samples; `None` reads it off the arrays in args.

    Raises:
        TypeError: A setting of the wrong type.
        ValueError: `size` is less than 1; from `solve` if the arrays in args have no common leading
            axis, or `size` is larger than it.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext.solvers import sso
        >>> problem = jx.ComposedMinimization(
        ...     loss=lambda z, data: jnp.mean((z - data["y"]) ** 2),
        ...     model=lambda w, data: data["X"] @ w,
        ... )
        >>> data = {"X": jnp.ones((6, 2)), "y": jnp.arange(6.0)}
        >>> print(sso.Minibatches(problem, 2).part(data, jnp.array([0, 5]))["y"])
        [0. 5.]
    """

    problem: ComposedMinimization
    size: int = eqx.field(static=True)
    replace: bool = eqx.field(static=True, default=False)
    take: Callable | None = None
    samples: int | None = eqx.field(static=True, default=None)
    batch: ComposedMinimization | None = None  # traced for a minibatch, by `trace`

    def __check_init__(self):
        if not isinstance(self.problem, ComposedMinimization):
            raise TypeError(
                f"Minibatches: problem is a {type(self.problem).__name__}, expected a "
                "ComposedMinimization"
            )
        check.count("Minibatches", "size", self.size)
        check.function("Minibatches", "take", self.take, optional=True)
        if self.samples is not None:
            check.count("Minibatches", "samples", self.samples)

    @property
    def has_aux(self) -> bool:
        """Whether the loss has auxiliary output."""
        return self.problem.has_aux

    def count(self, args: PyTree) -> int:
        """Number of samples in args."""
        if self.samples is not None:
            return self.samples
        sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(args)}
        if len(sizes) != 1 or () in sizes:
            raise ValueError(
                f"Minibatches: args is {tree.describe(args)}, expected arrays with a common "
                "leading axis of samples; or give take and samples"
            )
        return sizes.pop()[0]

    def part(self, args: PyTree, rows: Int[Array, " size"]) -> PyTree:
        """The args of some samples."""
        if self.take is not None:
            return self.take(args, rows)
        return jax.tree.map(lambda leaf: leaf[rows], args)

    def trace(self, value, args):
        """See `Problem.trace`; loss and model are called with all samples, and with a minibatch."""
        count = self.count(args)
        if self.size > count:
            raise ValueError(
                f"Minibatches: size is {self.size}, expected at most the {count} samples"
            )
        rows = jnp.zeros(self.size, jnp.int32)
        take = None if self.take is None else self._hoist("take", value, args, args, rows)
        selected = self._with(take=take)
        few = jax.eval_shape(selected.part, args, rows)
        batch = self.problem.trace(value, few)
        return selected._with(problem=self.problem.trace(value, args), batch=batch)

    def objective(self, value, args):
        """See `Problem.objective`: of all samples."""
        return self.problem.objective(value, args)

    def condition(self):
        """The conditions of the problem on all samples."""
        return self.problem.condition()

    def rows(self, key: Array, step: Int[Array, ""] | int, count: int) -> Int[Array, " size"]:
        """The samples of the minibatch of a step.

        Args:
            key: Random key of the run.
            step: Number of the step.
            count: Number of all samples.

        Returns:
            Their indices.
        """
        if self.replace:
            drawn = jax.random.randint(jax.random.fold_in(key, step), (self.size,), 0, count)
            return drawn.astype(jnp.int32)
        batches = count // self.size
        order = jax.random.permutation(
            jax.random.fold_in(key, step // batches), jnp.arange(count, dtype=jnp.int32)
        )
        return jax.lax.dynamic_slice(order, (step % batches * self.size,), (self.size,))


class StochasticSSOState(eqx.Module):
    """State of `StochasticSSO`.

    Attributes:
        value: The last point at which the oracle was asked.
        objective: The loss of that minibatch there.
        aux: Auxiliary output there.
        optimality: Max norm of the gradient of that minibatch there.
        optimality_scale: The same at the start.
        trial: Where the oracle is asked next: the newest iterate.
        eta: Target step size before the schedule.
        metric: What the metric remembers.
        inner: What the inner solver remembers.
        key: Data of the random key; empty without one.
        steps: Steps so far.
        evaluated: Whether `value` has been evaluated (not before the first step).
        model_evaluations: Evaluations of the model so far; a product with its Jacobian counts as
            one.
        surrogate_gradients: Gradients of surrogates so far.
        counts: Other evaluations so far: `oracle` for values and gradients of the loss, `value`
            for values alone, `linear_solve`.
        impl: The kind of random key.
    """

    value: PyTree
    objective: Float[Array, ""]
    aux: PyTree
    optimality: Float[Array, ""]
    optimality_scale: Float[Array, ""]
    trial: PyTree
    eta: Float[Array, ""]
    metric: PyTree
    inner: PyTree
    key: UInt32[Array, " words"]
    steps: Int[Array, ""]
    evaluated: Bool[Array, ""]
    model_evaluations: Int[Array, ""]
    surrogate_gradients: Int[Array, ""]
    counts: Counts
    impl: str = eqx.field(static=True)


class Sample(eqx.Module):
    """The minibatch of a step.

    Attributes:
        parts: Model and loss; the model of all samples with `scope="full"`.
        losses: Model and loss of the minibatch.
        args: What that model is given.
        batch: Args of the minibatch.
        rows: Which samples it has, where that is known.
        full: Whether the target is that of all samples.
    """

    parts: Parts
    losses: Parts
    args: PyTree
    batch: PyTree
    rows: Array | None
    full: bool = eqx.field(static=True)

    def model(self, point):
        """The target, of all samples or of the minibatch."""
        return self.parts.model(point, self.args)

    def pick(self, target):
        """The targets of the minibatch."""
        return jax.tree.map(lambda z: z[self.rows], target) if self.full else target

    def loss(self, target, dtype):
        """The loss of the minibatch as a function of its targets, and aux."""
        return self.losses.loss(target, self.batch, dtype)


class Try(eqx.Module):
    """A surrogate of a minibatch and where it led."""

    eta: Float[Array, ""]
    trial: PyTree
    inner: PyTree
    majorized: Bool[Array, ""]
    tries: Int[Array, ""]
    models: Int[Array, ""]
    gradients: Int[Array, ""]
    linear_solves: Int[Array, ""]


class StochasticSSO(Surrogates):
    """Surrogate optimization in target space with minibatches.

    As `SSO`, but each step asks the oracle about a new minibatch and then always moves on. Give
    `solve` a problem `sso.Minibatches(problem, size)` and a key; or call `step` with one minibatch
    after the other as `args`. With `sso.Minibatches` `args` are all samples.

    The scope is a choice with consequences. With `"full"`, D measures the change of the targets of
    all samples: this is projected stochastic gradient descent in target space, unbiased, at the
    price of the model of all samples in each inner step. With `"batch"`, D sees the minibatch only.
    That is cheap, but unless the model can fit all samples at once, the method tends to a mean of
    the minimizers of single minibatches, whatever the step sizes, if the inner solver is exact; use
    few inner steps then.

    `objective` and `optimality` are those of a minibatch, so a small `optimality` does not stop the
    solve, and the last iterate is returned, not the best. The newest iterate, not evaluated yet, is
    `state.trial`.

    Args:
        step_size: η: a number, `sso.Smoothness(L)`, `sso.EstimatedSmoothness()` or
            `sso.TargetArmijo()`.
        inner: The inner solver: `sso.GradientSteps`, `sso.OptaxSteps`, `sso.Subsolver` or
            `sso.ExactLeastSquares`.
        metric: D, e.g. `sso.Euclidean()`, `sso.DiagonalAdaGrad()`.
        safeguard: Whether a surrogate that the loss of the minibatch exceeds is made again with a
            smaller η, which stays; costs one value of the loss per step.
        scope: "batch" or "full".
        decay: Factor on η, a function of the step 1, 2, ...: `sso.InverseSquareRoot()`,
            `sso.ExponentialDecay(T)`, or any other.
        rtol: Not used by the method itself.
        atol: Not used by the method itself.

    Raises:
        TypeError: An unknown setting, or one of the wrong kind.
        ValueError: A setting outside its range, or settings that exclude each other.

    Reference:
        Lavington, Vaswani, Babanezhad, Schmidt, Le Roux, "Target-based surrogates for stochastic
        optimization", ICML 2023, arXiv 2302.02607.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> from jaxopt_ext.solvers import sso
        >>> X = jax.random.normal(jax.random.key(0), (64, 2))
        >>> data = {"X": X, "y": X @ jnp.array([1.0, -2.0])}  # can be fitted exactly
        >>> problem = jx.ComposedMinimization(
        ...     loss=lambda z, data: jnp.mean((z - data["y"]) ** 2) / 2,
        ...     model=lambda w, data: data["X"] @ w,
        ... )
        >>> solver = solvers.StochasticSSO(sso.Smoothness(1.0), sso.GradientSteps(20))
        >>> minibatches = sso.Minibatches(problem, 8)
        >>> key = jax.random.key(1)
        >>> found = jx.solve(minibatches, solver, jnp.zeros(2), data, key=key, max_steps=50)
        >>> print(found.value.round(2))
        [ 1. -2.]
    """

    accepts: ClassVar = (Minibatches, ComposedMinimization)
    monotone: ClassVar[bool] = True  # so that the driver returns the last iterate

    scope: str = eqx.field(static=True, default="batch")
    decay: Callable | None = None

    def __check_init__(self):
        if self.scope not in ("batch", "full"):
            raise ValueError(f"StochasticSSO: scope is {self.scope!r}, expected 'batch' or 'full'")
        check.function("StochasticSSO", "decay", self.decay, optional=True)
        if self.scope == "full" and self.metric.uses_loss:
            raise ValueError(
                f"StochasticSSO: metric is {type(self.metric).__name__}, expected one that does "
                "not need the loss of all samples with scope='full'"
            )

    def init(self, problem, value, args, key=None):
        """See `AbstractSolver.init`; neither loss nor model is evaluated."""
        sampled = isinstance(problem, Minibatches)
        if sampled and key is None:
            raise ValueError(
                "StochasticSSO: key is None, expected a key such as jax.random.key(0) to draw "
                "minibatches"
            )
        if self.scope == "full" and not sampled:
            raise ValueError(
                "StochasticSSO: scope is 'full' and the problem a ComposedMinimization, expected "
                "sso.Minibatches(problem, size), which knows all samples"
            )
        dtype = tree.dtype_of(value)
        whole = Parts(problem.problem if sampled else problem)
        target = jax.eval_shape(whole.model, value, args)
        data, impl = jnp.zeros(0, jnp.uint32), ""
        if key is not None:
            typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
            key = key if typed else jax.random.wrap_key_data(key)
            data, impl = jax.random.key_data(key), str(jax.random.key_impl(key))
        zero, count = jnp.zeros((), dtype), jnp.zeros((), jnp.int32)
        batch = problem.batch if sampled and problem.batch is not None else problem
        return StochasticSSOState(
            value=value,
            objective=jnp.array(jnp.inf, dtype),
            aux=self._aux(batch, value, self._few(problem, args)),
            optimality=jnp.array(jnp.inf, dtype),
            optimality_scale=zero,
            trial=value,
            eta=jnp.ones((), dtype),
            metric=self.metric.init(target),
            inner=self.inner.init(value),
            key=data,
            steps=count,
            evaluated=jnp.array(False),
            model_evaluations=count,
            surrogate_gradients=count,
            counts=Counts.zero(),
            impl=impl,
        )

    def ask(self, problem, args, state):
        """See `Surrogates.ask`; `args` is a minibatch."""
        if isinstance(problem, Minibatches):
            raise TypeError(
                "StochasticSSO.ask: problem is a Minibatches, expected a ComposedMinimization "
                "whose args are a minibatch"
            )
        return super().ask(problem, args, state)

    def _few(self, problem, args):
        """Args of the size of a minibatch."""
        if not isinstance(problem, Minibatches):
            return args
        return problem.part(args, jnp.zeros(problem.size, jnp.int32))

    def step(self, problem, args, state, rows=None):
        """See `AbstractSolver.step`: one oracle call, then the next iterate.

        Args:
            problem: `Minibatches`, or a `ComposedMinimization` of which `args` is a minibatch.
            args: All samples, or the minibatch.
            state: The state after the previous step.
            rows: Indices of the samples: which samples the minibatch in `args` has, for
                `DiagonalAdaGrad`; with `Minibatches`, which to take instead of drawing them.

        Returns:
            The next state and what the step reports.
        """
        dtype = state.objective.dtype
        sample = self._sample(problem, args, state, rows)
        target, pull = jax.vjp(sample.model, state.trial)
        (value, aux), gradient = jax.value_and_grad(
            lambda picked: sample.loss(picked, dtype), has_aux=True
        )(sample.pick(target))
        answer = Answer(value, gradient, aux)
        return self._from_answer(sample, state, target, pull, answer, traced=True)

    def _advance(self, problem, args, state, target, pull, answer, loss, rows=None):
        """For `tell`: the same step from an answer that came from outside."""
        if self.safeguard:
            raise ValueError(
                "StochasticSSO.tell: safeguard is True, expected False, as it evaluates the loss "
                "itself"
            )
        sample = self._sample(problem, args, state, rows)
        return self._from_answer(sample, state, target, lambda g: (pull(g),), answer, traced=False)

    def _sample(self, problem, args, state, rows) -> Sample:
        if not isinstance(problem, Minibatches):
            if self.metric.needs_rows and rows is None:
                raise ValueError(
                    f"StochasticSSO.step: rows is None, expected the indices of the samples in "
                    f"args, which {type(self.metric).__name__} needs; or use sso.Minibatches"
                )
            return Sample(Parts(problem), Parts(problem), args, args, rows, False)
        key = jax.random.wrap_key_data(state.key, impl=state.impl)
        if rows is None:
            rows = problem.rows(key, state.steps, problem.count(args))
        batch = problem.part(args, rows)
        losses = Parts(problem.problem if problem.batch is None else problem.batch)
        if self.scope == "full":
            return Sample(Parts(problem.problem), losses, args, batch, rows, True)
        return Sample(losses, losses, batch, batch, rows, False)

    def _from_answer(self, sample, state, target, pull, answer, traced):
        dtype = state.objective.dtype
        spread = answer.gradient
        if sample.full:  # a sample that occurs twice adds up
            spread = jax.tree.map(
                lambda z, g: jnp.zeros_like(z).at[sample.rows].add(g), target, answer.gradient
            )
        gradient = pull(spread)[0]
        finite = jnp.isfinite(answer.value) & tree.all_finite((answer.gradient, gradient))
        optimality = tree.max_norm(gradient).astype(dtype)

        def loss(picked):
            return sample.loss(picked, dtype)[0]

        oracle = Oracle(
            *(answer.value, sample.pick(target), answer.gradient, state.eta),
            *(~state.evaluated, finite, jnp.array(True), loss if traced else None),
        )
        base, values = self.step_size(oracle)
        factor = jnp.ones((), dtype)
        if self.decay is not None:
            factor = jnp.asarray(self.decay((state.steps + 1).astype(dtype)), dtype)
        memory = self.metric.remember(state.metric, answer.gradient, sample.rows)
        own = None if sample.full else sample.rows
        weights = self.metric.weights(memory, target, own, loss if traced else None)
        surrogate = Surrogate(
            *(sample.parts.model, sample.args, target, spread, self.metric, weights),
            base * factor,
        )
        done = self._majorized(surrogate, sample, state, gradient, answer.value, loss)
        counts = state.counts.add(
            oracle=1,
            value=values + (done.tries if self.safeguard else 0),
            linear_solve=done.linear_solves,
            hvp=self.metric.products(target),
        )
        first = ~state.evaluated
        new = StochasticSSOState(
            value=state.trial,
            objective=answer.value,
            aux=answer.aux,
            optimality=optimality,
            optimality_scale=jnp.where(first, optimality, state.optimality_scale),
            trial=done.trial,
            eta=done.eta / factor,
            metric=memory,
            inner=done.inner,
            key=state.key,
            steps=state.steps + 1,
            evaluated=jnp.array(True),
            model_evaluations=state.model_evaluations + done.models + 1,
            surrogate_gradients=state.surrogate_gradients + done.gradients,
            counts=counts,
            impl=state.impl,
        )
        kept = eqx.tree_at(lambda s: (s.counts, s.steps), state, (counts, new.steps))
        new = tree.where(finite, new, kept)
        return new, self._info(state, new, finite, answer)

    def _majorized(self, surrogate, sample, state, gradient, value, loss) -> Try:
        """Minimize the surrogate, with a smaller η until the loss is below it."""

        def going(now: Try):
            return ~now.majorized & (now.tries < TRIALS)

        def body(now: Try):
            at = eqx.tree_at(lambda s: s.eta, surrogate, now.eta)
            run = self.inner.run(at, state.trial, gradient, now.inner)
            majorized, smaller, models = tree.all_finite(run.value), now.eta / 2, 0
            if self.safeguard:
                moved = sample.model(run.value)
                reached = loss(sample.pick(moved))
                size = jnp.maximum(jnp.abs(reached), jnp.abs(value))
                found = at.compare(moved, reached - value, size)
                majorized, smaller, models = majorized & found.majorized, found.smaller, 1
            return Try(
                eta=jnp.where(majorized, now.eta, smaller).astype(now.eta.dtype),
                trial=tree.where(majorized, run.value, state.trial),
                inner=run.memory,
                majorized=majorized,
                tries=now.tries + 1,
                models=now.models + run.models + models,
                gradients=now.gradients + run.gradients,
                linear_solves=now.linear_solves + run.linear_solves,
            )

        zero = jnp.zeros((), jnp.int32)
        start = (surrogate.eta, state.trial, state.inner, jnp.array(False), zero, zero, zero, zero)
        return jax.lax.while_loop(going, body, Try(*start))

    def _info(self, old, new, finite, answer):
        first = ~old.evaluated
        broken = RESULTS.where(first, RESULTS.nonfinite_start, RESULTS.nonfinite_step)
        moved = jax.tree.map(jnp.subtract, old.trial, old.value)
        return Info(
            objective=new.objective,
            optimality=new.optimality,
            optimality_scale=new.optimality_scale,
            feasibility=jnp.zeros_like(new.objective),
            step_size=optax.tree.norm(moved).astype(new.objective.dtype),
            value_change=jnp.where(first, jnp.inf, old.objective - answer.value),
            accepted=finite,
            counts=new.counts,
            failure=RESULTS.where(finite, RESULTS.successful, broken),
            aux=new.aux,
            extras={
                "eta": new.eta,
                "model_evaluations": new.model_evaluations,
                "surrogate_gradients": new.surrogate_gradients,
            },
        )

    def stop(self, problem: Any, args: Any, state: Any, info: Info):
        """See `AbstractSolver.stop`: only on a failure, as a minibatch proves nothing."""
        return info.failure != RESULTS.successful, info.failure
