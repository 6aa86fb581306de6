"""F2SA and F3SA: the first-order stochastic methods with a growing multiplier, as published."""

import equinox as eqx
import jax.numpy as jnp

from jaxopt_ext.core import check
from jaxopt_ext.core.solver import Number
from jaxopt_ext.solvers.bilevel_steps import PowerLaw
from jaxopt_ext.solvers.cbo_consensus import Schedule, check_schedule, scheduled
from jaxopt_ext.solvers.penalty_bilevel import PenaltyMethod


class F2SA(PenaltyMethod):
    """Fully first-order stochastic approximation; with `momentum` it is F3SA.

    With multiplier λ_k = 1/σ_k, `lower_steps` times

        z ← z − γ_k ∇_y g(x, z),    y ← y − α_k (∇_y f(x, y) + λ_k ∇_y g(x, y)),

    then x ← x − ξ α_k (∇_x f(x, y) + λ_k (∇_x g(x, y) − ∇_x g(x, z))). Other than in
    `PenaltyBilevel`, y and z have step sizes of their own and, by default, see independent
    samples; x moves after both, at the price of one more evaluation. It is here to reproduce and
    compare; `PenaltyBilevel` is the better choice. With momentum all three move at once.

    Its multiplier grows without end, so a run ends with its budget, and derivatives of the
    solution are those at λ of step 10⁹.

    Args:
        lower_steps: T, at least 1.
        sampler: Draws the `args` of one evaluation, as a function (key, args) → args of the same
            types. The solver then needs a key.
        alpha: α_k: a number > 0 or a schedule. The default exponents of α and γ are those for
            noise in both levels.
        gamma: γ_k, likewise.
        multiplier: λ_k, likewise; `None` means γ_k / (2 α_k).
        ratio: ξ > 0.
        momentum: η in (0, 1], weight of the new sample in recursive (STORM) estimates; needs
            `lower_steps=1`.
        common_samples: Whether y and z see the same samples.
        rtol: Tolerance relative to the scale; `None` means eps.
        atol: Tolerance on the max norm; `None` means eps^(2/3).

    Raises:
        TypeError: An unknown setting, or one of the wrong kind.
        ValueError: A setting outside its range, or settings that exclude each other.

    Reference:
        Kwon, Kwon, Wright, Nowak, "A Fully First-Order Method for Stochastic Bilevel
        Optimization", ICML 2023, algorithms 1 and 2.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> problem = jx.Bilevel(
        ...     upper=lambda x, y, args: (y - 1.0) ** 2, lower=lambda x, y, args: (y - x) ** 2
        ... )
        >>> solver = solvers.F2SA(alpha=1e-3, gamma=0.2, multiplier=100.0, ratio=20.0)
        >>> x, y = jx.solve(problem, solver, (jnp.array(0.0), jnp.array(0.0))).value
        >>> print(round(float(x), 2))
        1.0
    """

    alpha: Schedule = PowerLaw(0.1, -5 / 7, 10.0)
    gamma: Schedule = PowerLaw(0.2, -4 / 7, 10.0)
    multiplier: Schedule | None = None
    ratio: Number = 1.0
    momentum: Schedule | None = None
    common_samples: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        owner = type(self).__name__
        for name in ("alpha", "gamma"):
            check_schedule(owner, name, getattr(self, name), above=0)
        for name in ("multiplier", "momentum"):
            if getattr(self, name) is not None:
                check_schedule(owner, name, getattr(self, name), above=0)
        check.number(owner, "ratio", self.ratio, above=0)
        if self.momentum is not None and self.lower_steps != 1:
            raise ValueError(
                f"{owner}: lower_steps is {self.lower_steps}, expected 1 with momentum"
            )

    def _sigma(self, step, dtype):
        if self.multiplier is not None:
            return 1 / scheduled(self.multiplier, step, dtype)
        gamma, alpha = (scheduled(rate, step, dtype) for rate in (self.gamma, self.alpha))
        return 2 * alpha / gamma

    def _rules(self):
        def upper(step):
            alpha = jnp.asarray(self.alpha(step) if callable(self.alpha) else self.alpha)
            return jnp.asarray(self.ratio, alpha.dtype) * alpha

        def with_f(step):  # in units of h_σ = σf + g
            alpha = jnp.asarray(self.alpha(step) if callable(self.alpha) else self.alpha)
            return alpha / self._sigma(step, alpha.dtype)

        return upper, with_f, self.gamma

    @property
    def _independent(self):
        return not self.common_samples

    @property
    def _apart(self):
        return self.momentum is None

    def _eta(self, step, dtype):
        return None if self.momentum is None else scheduled(self.momentum, step, dtype)
