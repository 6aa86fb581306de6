"""The target step size η: constant, from smoothness, estimated, by a search, decreasing."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxopt_ext.core import check
from jaxopt_ext.core.solver import Number
from jaxopt_ext.solvers.sso_metrics import dot


class Oracle(eqx.Module):
    """What a rule for η sees of an answer of the oracle.

    Attributes:
        value: ℓ(z).
        target: z.
        gradient: ∇ℓ(z).
        last: η of the step that led to z.
        first: Whether there was none.
        accepted: Whether a new surrogate is made here; else the answer of the rule is not used.
        informative: Whether ℓ changed by more than its rounding error.
        loss: ℓ as a function of the target, where it can be traced.
    """

    value: Float[Array, ""]
    target: PyTree
    gradient: PyTree
    last: Float[Array, ""]
    first: Bool[Array, ""]
    accepted: Bool[Array, ""]
    informative: Bool[Array, ""]
    loss: Callable | None

    @property
    def squared(self) -> Float[Array, ""]:
        """‖∇ℓ(z)‖²."""
        return dot(self.gradient, self.gradient, self.last.dtype)


class TargetStep(eqx.Module):
    """Base of the rules for η.

    Attributes:
        needs_safeguard: Whether the rule may begin with an η that is too large.
        uses_loss: Whether the rule evaluates the loss function itself.
    """

    needs_safeguard: ClassVar[bool] = False
    uses_loss: ClassVar[bool] = False

    def __call__(self, oracle: Oracle) -> tuple[Float[Array, ""], Int[Array, ""]]:
        """η for the surrogate at `oracle.target`, and how often the loss was evaluated for it."""
        first = jnp.asarray(self.first(oracle), oracle.last.dtype)
        eta = jnp.where(oracle.first, first, self.next(oracle))
        return eta, jnp.zeros((), jnp.int32)

    @abc.abstractmethod
    def first(self, oracle: Oracle) -> Array:
        """η at the start."""

    def next(self, oracle: Oracle) -> Array:
        """η after an accepted step; by default that of the step."""
        return oracle.last


class ConstantStep(TargetStep):
    """η the same in all steps; a plain number means this.

    Args:
        eta: η > 0, in units of target² / loss (in the metric).

    Raises:
        ValueError: `eta` is not positive.
    """

    eta: Number

    def __check_init__(self):
        check.number("ConstantStep", "eta", self.eta, above=0)

    def first(self, oracle):
        """See `TargetStep`."""
        return self.eta


class Smoothness(TargetStep):
    """η = 1/L for the stacked target, from the smoothness of the loss of one sample.

    The loss is the mean or the sum over samples, which run along the leading axis of the target:
    for the mean over n samples η = n / constant. Known constants of one sample: ½(z − y)² has 1,
    (z − y)² has 2, logistic 1/4, softmax cross-entropy 1/2.

    Args:
        constant: L of the loss of one sample, > 0, in units of loss / target².
        reduction: "mean" or "sum".
        factor: η is this times 1/L, > 0; 1/2 for the exponential schedule of the theory.

    Raises:
        ValueError: A number is not positive, or `reduction` is neither; from `solve` for a target
            whose leaves have no common leading axis.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> from jaxopt_ext.solvers import sso
        >>> problem = jx.ComposedMinimization(
        ...     loss=lambda z, args: jnp.mean((z - 1.0) ** 2) / 2, model=lambda y, args: args @ y
        ... )
        >>> X = jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
        >>> solver = solvers.SSO(sso.Smoothness(1.0), sso.ExactLeastSquares())
        >>> print(jx.solve(problem, solver, jnp.zeros(2), X).stats.counts.oracle)
        2
    """

    constant: Number
    reduction: str = eqx.field(static=True, default="mean")
    factor: Number = 1.0

    def __check_init__(self):
        check.number("Smoothness", "constant", self.constant, above=0)
        check.number("Smoothness", "factor", self.factor, above=0)
        if self.reduction not in ("mean", "sum"):
            raise ValueError(
                f"Smoothness: reduction is {self.reduction!r}, expected 'mean' or 'sum'"
            )

    def first(self, oracle):
        """See `TargetStep`."""
        samples = self._samples(oracle.target) if self.reduction == "mean" else 1
        return self.factor * samples / jnp.asarray(self.constant, oracle.last.dtype)

    def _samples(self, target):
        sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(target)}
        if len(sizes) != 1 or () in sizes:
            shapes = [leaf.shape for leaf in jax.tree.leaves(target)]
            raise ValueError(
                f"Smoothness: the target has leaves of shapes {shapes}, expected a common leading "
                "axis of samples because reduction='mean'; use reduction='sum' with the smoothness "
                "of the whole loss"
            )
        return sizes.pop()[0]


class EstimatedSmoothness(TargetStep):
    """η found by trial: from an upper bound of 1/L down, and slowly up again.

    A loss bounded below by b has ‖∇ℓ‖² ≤ 2 L (ℓ − b). So η = 2 (ℓ − b) / ‖∇ℓ‖² at the start is at
    least 1/L, and the majorization safeguard reduces it. After accepted steps η grows.

    Args:
        lower: b, a lower bound of the loss.
        grow: Factor on η after an accepted step, ≥ 1.

    Raises:
        ValueError: `grow` is less than 1.
    """

    needs_safeguard: ClassVar[bool] = True

    lower: Number = 0.0
    grow: Number = 1.1

    def __check_init__(self):
        check.number("EstimatedSmoothness", "lower", self.lower)
        check.number("EstimatedSmoothness", "grow", self.grow, at_least=1)

    def first(self, oracle):
        """See `TargetStep`."""
        squared = oracle.squared
        above = 2 * jnp.abs(oracle.value - self.lower).astype(squared.dtype)
        usable = (above > 0) & (squared > 0)
        return jnp.where(usable, above / jnp.where(usable, squared, 1), 1)

    def next(self, oracle):
        """See `TargetStep`; η does not grow on the evidence of rounding errors."""
        return jnp.where(oracle.informative, oracle.last * self.grow, oracle.last)


class TargetArmijo(TargetStep):
    """η by a backtracking search along −∇ℓ in target space; each trial evaluates the loss.

    The first η, from `grow` times the last one down, with
    ℓ(z − η∇ℓ) ≤ ℓ(z) − decrease · η ‖∇ℓ‖². It is at least min(start, 2 (1 − decrease) shrink / L).
    The test sees the loss along one line only, so it does not make the surrogate an upper bound:
    keep the safeguard.

    Args:
        decrease: Constant of the test, in (0, 1).
        shrink: Factor after a failed trial, in (0, 1).
        grow: Factor on the last η where a search begins, ≥ 1.
        start: Where the first search begins, > 0.
        trials: Most trials in one search.

    Raises:
        ValueError: A setting outside its range.

    Reference:
        Lavington et al., ICML 2023; Vaswani et al., "Painless stochastic gradient", NeurIPS 2019.
    """

    uses_loss: ClassVar[bool] = True

    decrease: Number = 0.5
    shrink: Number = 0.9
    grow: Number = 1.8
    start: Number = 1e3
    trials: int | Array = 100

    def __check_init__(self):
        check.number("TargetArmijo", "decrease", self.decrease, above=0, below=1)
        check.number("TargetArmijo", "shrink", self.shrink, above=0, below=1)
        check.number("TargetArmijo", "grow", self.grow, at_least=1)
        check.number("TargetArmijo", "start", self.start, above=0)
        if not eqx.is_array(self.trials):
            check.count("TargetArmijo", "trials", self.trials)

    def first(self, oracle):
        """Where the first search begins."""
        return self.start

    def next(self, oracle):
        """Where the next search begins."""
        return oracle.last * self.grow

    def __call__(self, oracle):
        """See `TargetStep`."""
        loss: Any = oracle.loss
        dtype, squared = oracle.last.dtype, oracle.squared
        # where the loss is rounding error, the test means nothing and any η will do
        eps = float(jnp.finfo(dtype).eps)
        noise = 10 * eps * jnp.maximum(jnp.abs(oracle.value), squared)

        def going(carry):
            _, accepted, trials = carry
            return ~accepted & (trials < jnp.asarray(self.trials, jnp.int32))

        def body(carry):
            eta, _, trials = carry
            moved = jax.tree.map(
                lambda z, g: z - eta.astype(z.dtype) * g, oracle.target, oracle.gradient
            )
            value = loss(moved).astype(dtype)
            enough = value <= oracle.value - self.decrease * eta * squared + noise
            smaller = (eta * self.shrink).astype(dtype)
            return jnp.where(enough, eta, smaller), enough, trials + 1

        start = jnp.where(oracle.first, self.first(oracle), self.next(oracle)).astype(dtype)
        nothing = ~oracle.accepted | (squared == 0)
        carry = (start, nothing, jnp.zeros((), jnp.int32))
        eta, _, trials = jax.lax.while_loop(going, body, carry)
        return eta, trials


def as_rule(step_size) -> TargetStep:
    """The rule that a setting means: a number is a constant η.

    Args:
        step_size: A `TargetStep` or a number.

    Returns:
        A rule.

    Raises:
        TypeError: It is neither.
    """
    return step_size if isinstance(step_size, TargetStep) else ConstantStep(step_size)


# ---- schedules -----------------------------------------------------------------------------------


class InverseSquareRoot(eqx.Module):
    """The factor 1/√t on η in step t = 1, 2, ...

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.solvers import sso
        >>> print(sso.InverseSquareRoot()(jnp.array(4.0)))
        0.5
    """

    def __call__(self, step: Array) -> Array:
        """The factor in step `step`."""
        return 1 / jnp.sqrt(step)


class ExponentialDecay(eqx.Module):
    """The factor (1/T)^(t/T) on η in step t of T: from about 1 to 1/T.

    Adapts to the noise: with η = 1/(2L) the error falls like exp(−T/κ) plus a term σ²/T.

    Args:
        horizon: T, the number of steps of the run, > 1.

    Raises:
        ValueError: `horizon` is not greater than 1.

    Reference:
        Li, Zhuang, Orabona, "A second look at exponential and cosine step sizes", ICML 2021.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.solvers import sso
        >>> print(f"{sso.ExponentialDecay(100.0)(jnp.array(50.0)):.2f}")
        0.10
    """

    horizon: Number

    def __check_init__(self):
        check.number("ExponentialDecay", "horizon", self.horizon, above=1)

    def __call__(self, step: Array) -> Array:
        """The factor in step `step`."""
        horizon = jnp.asarray(self.horizon, step.dtype)
        return jnp.exp(-jnp.log(horizon) * step / horizon)
