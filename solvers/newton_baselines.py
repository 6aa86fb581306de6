"""Methods that gradient-normalized smoothness is compared with; they share its step.

All are x⁺ = x − (H + λB)⁻¹∇f(x) with a regularization λ that is searched for, one trial per step.
They differ in how λ depends on the state and in the acceptance test.
"""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from jaxopt_ext.core import check
from jaxopt_ext.core.solver import Number
from jaxopt_ext.solvers.curvature import Direction, Spectrum
from jaxopt_ext.solvers.grad_norm_smooth import RadiusRule, RegularizedNewton
from jaxopt_ext.solvers.hessian_models import (
    Eigendecomposition,
    ExactHessian,
    HessianModel,
    ZeroHessian,
)


class SuperUniversalNewton(RegularizedNewton):
    """Newton steps with λ = M ‖∇f(x)‖_*^power and M found by an adaptive search.

    A trial is accepted if −⟨∇f(x⁺), x⁺ − x⟩ ≥ ‖∇f(x⁺)‖_*² / (4λ), and then M is divided by
    `grow`; else it is divided by `shrink`. The objective may increase on non-convex problems.

    Args:
        hessian: The Hessian model, or a function (variables, args) → H.
        radius: First 1/M, > 0.
        grow: Factor on 1/M after an accepted trial, > 1.
        shrink: Factor on 1/M after a rejected trial, in (0, 1).
        metric: B, see `GradNormSmooth`.
        min_radius: Lower clamp of 1/M; a trial rejected there ends the solve.
        max_radius: Upper clamp of 1/M.
        power: Exponent of the gradient norm, in [0, 1]: 2/3 adapts to all Hölder classes of the
            Hessian and of the third derivative, 1 is for quasi-self-concordant functions.
        rtol: Tolerance relative to the gradient at the start; `None` means eps.
        atol: Tolerance on the gradient's max norm; `None` means eps^(2/3).

    Raises:
        TypeError: An unknown setting, or one that is of the wrong kind.
        ValueError: A setting outside its range.

    Reference:
        Doikov, Mishchenko, Nesterov, "Super-Universal Regularized Newton Method", SIAM J. Optim.
        34 (2024).

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> problem = jx.Minimization(lambda y, t: jnp.sum(jnp.cosh(y - t)))
        >>> print(jnp.round(jx.solve(problem, solvers.SuperUniversalNewton(), 0.0, 2.0).value, 3))
        2.0
    """

    grow: Number = 4.0
    shrink: Number = 0.25
    max_radius: Number = 1e5
    power: Number = 2 / 3

    def __check_init__(self):
        _require_number(self)
        check.number("SuperUniversalNewton", "power", self.power, at_least=0)

    def shift(self, state):
        """See `RegularizedNewton`."""
        return state.squared ** (self.power / 2) / state.radius

    def accepts_trial(self, trial, state):
        """See `RegularizedNewton`."""
        return trial.slope >= trial.squared / (4 * trial.shift)


class CubicNewton(RegularizedNewton):
    """Newton's method with cubic regularization, M found by an adaptive search.

    A trial minimizes ⟨g, h⟩ + ½⟨Hh, h⟩ + (M/6)‖h‖³ globally, from one eigendecomposition of H per
    point, and is accepted if f decreases as much as this model.

    Args:
        hessian: Fixed: the exact Hessian, by its eigendecomposition.
        radius: First 1/M, in units of variables³ / objective, > 0.
        grow: Factor on 1/M after an accepted trial, > 1.
        shrink: Factor on 1/M after a rejected trial, in (0, 1).
        metric: B, see `GradNormSmooth`.
        min_radius: Lower clamp of 1/M; a trial rejected there ends the solve.
        max_radius: Upper clamp of 1/M.
        rtol: Tolerance relative to the gradient at the start; `None` means eps.
        atol: Tolerance on the gradient's max norm; `None` means eps^(2/3).

    Raises:
        TypeError: An unknown setting, or one that is of the wrong kind.
        ValueError: A setting outside its range.

    Reference:
        Nesterov, Polyak, "Cubic Regularization of Newton Method and Its Global Performance",
        Math. Program. 108 (2006).

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> problem = jx.Minimization(lambda y, t: jnp.sum(jnp.cosh(y - t)))
        >>> print(jnp.round(jx.solve(problem, solvers.CubicNewton(), 0.0, 2.0).value, 3))
        2.0
    """

    monotone: ClassVar[bool] = True

    hessian: HessianModel = eqx.field(
        default=ExactHessian(linear_solver=Eigendecomposition(psd="none")), init=False
    )

    def __check_init__(self):
        _require_number(self)

    def direction(self, curvature, state, gradient):
        """See `RegularizedNewton`: λ = M ‖u‖ / 2, found by bisection on the spectrum."""
        assert isinstance(curvature, Spectrum)
        coordinates = curvature.basis.T @ gradient
        constant = 1 / state.radius
        low = jnp.maximum(0, -curvature.values[0])
        # at low + √(M‖g‖/2) the step is no longer than 2λ/M, because it is at most ‖g‖/(λ − low)
        width = jnp.sqrt(constant * jnp.linalg.norm(gradient) / 2)

        def halve(_, bracket):
            below, above = bracket
            middle = (below + above) / 2
            length = jnp.linalg.norm(coordinates / (curvature.values + middle))
            long = length > 2 * middle / constant
            return jnp.where(long, middle, below), jnp.where(long, above, middle)

        _, shift = jax.lax.fori_loop(0, 60, halve, (low, low + width))
        step = -curvature.basis @ (coordinates / (curvature.values + shift))
        ok = jnp.all(jnp.isfinite(step))
        return shift, Direction(jnp.where(ok, step, 0), ok, 0)

    def accepts_trial(self, trial, state):
        """See `RegularizedNewton`; uses ⟨Hh, h⟩ = ⟨−g, h⟩ − λ‖h‖² and M = 2λ / ‖h‖."""
        return trial.change >= trial.descent / 2 + trial.shift * trial.length**2 / 6


class GradientMethod(RegularizedNewton):
    """The gradient method in the metric B, x⁺ = x − B⁻¹∇f(x) / L, with L found adaptively.

    A trial is accepted if f(x) − f(x⁺) ≥ ‖∇f(x)‖_*² / (2L). For LeastSquares with linear residual A
    and B = AᵀA this is Gauss–Newton with a damped step.

    Args:
        hessian: Fixed: zero.
        radius: First 1/L, in units of variables² / objective (in the metric), > 0.
        grow: Factor on 1/L after an accepted trial, > 1.
        shrink: Factor on 1/L after a rejected trial, in (0, 1).
        metric: B, see `GradNormSmooth`.
        min_radius: Lower clamp of 1/L; a trial rejected there ends the solve.
        max_radius: Upper clamp of 1/L.
        rtol: Tolerance relative to the gradient at the start; `None` means eps.
        atol: Tolerance on the gradient's max norm; `None` means eps^(2/3).

    Raises:
        TypeError: An unknown setting, or one that is of the wrong kind.
        ValueError: A setting outside its range.

    Reference:
        Nesterov, "Lectures on Convex Optimization", 2nd ed., Springer (2018), section 1.2.3.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxopt_ext as jx
        >>> from jaxopt_ext import solvers
        >>> problem = jx.Minimization(lambda y, t: jnp.sum((y - t) ** 2))
        >>> print(jnp.round(jx.solve(problem, solvers.GradientMethod(), 0.0, 2.0).value, 3))
        2.0
    """

    monotone: ClassVar[bool] = True

    hessian: HessianModel = eqx.field(default=ZeroHessian(), init=False)

    def __check_init__(self):
        _require_number(self)

    def shift(self, state):
        """See `RegularizedNewton`."""
        return 1 / state.radius

    def accepts_trial(self, trial, state):
        """See `RegularizedNewton`."""
        return trial.change >= state.squared / (2 * trial.shift)


def _require_number(solver):
    if isinstance(solver.radius, RadiusRule):
        raise TypeError(
            f"{type(solver).__name__}: radius is a {type(solver.radius).__name__}, expected a "
            "number; rules for the radius are for GradNormSmooth"
        )
