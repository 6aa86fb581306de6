"""Synthetic problems on which gradient-normalized smoothness was studied, from seeds.

Reference:
    Semenov, Jaggi, Doikov, "Gradient-Normalized Smoothness for Optimization with Approximate
    Hessians", 2025.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_ext.bench.problem import Entry, Problem

SEED = 3124


def log_sum_exp(y, data):
    """Log Σ exp(aᵢᵀy − bᵢ)."""
    return jax.nn.logsumexp(data["A"] @ y - data["b"])


def _power(u, p):
    """‖u‖ᵖ / p."""
    return jnp.sum(u**2) ** (p / 2) / p


def linear_power(y, data):
    """‖Ay − b‖ᵖ / p."""
    return _power(data["A"] @ y - data["b"], data["p"])


def rosenbrock_power(y, data):
    """‖u(y)‖ᵖ / p with u the residual of Rosenbrock's function."""
    return _power(jnp.stack([10 * (y[1] - y[0] ** 2), 1 - y[0]]), data["p"])


def chebyshev_power(y, data):
    """‖u(y)‖ᵖ / p with u = (½(1 − y₁), yᵢ₊₁ − 2yᵢ² + 1), zero at (1, …, 1)."""
    u = jnp.concatenate([(1 - y[:1]) / 2, y[1:] - 2 * y[:-1] ** 2 + 1])
    return _power(u, data["p"])


def _log_sum_exp(name: str, n: int) -> Problem:
    random = np.random.RandomState(SEED)
    A, b = random.uniform(-1, 1, (n, n)).T, random.uniform(-1, 1, n)
    shares = np.exp(-b) / np.exp(-b).sum()
    A = A - shares @ A  # so that the minimum is at 0
    optimum = float(np.log(np.exp(-b).sum()))
    return Problem(name, log_sum_exp, np.ones(n), {"A": A, "b": b}, optimum=optimum)


def _linear_power(name: str, p: float) -> Problem:
    random = np.random.RandomState(SEED)
    A, b = random.uniform(-1, 1, (100, 200)), random.uniform(-1, 1, 100)
    data = {"A": A, "b": b, "p": np.float64(p)}
    return Problem(name, linear_power, np.ones(200), data, optimum=0.0)


def _rosenbrock_power(name: str, p: float) -> Problem:
    data = {"p": np.float64(p)}
    return Problem(name, rosenbrock_power, np.array([-2.0, 2.0]), data, optimum=0.0)


def _chebyshev_power(name: str, n: int, p: float) -> Problem:
    data = {"p": np.float64(p)}
    return Problem(name, chebyshev_power, np.full(n, -2.0), data, optimum=0.0)


def _entries() -> dict[str, Entry]:
    built: dict[str, Callable[[str], Problem]] = {
        "gns-log-sum-exp-n100": lambda name: _log_sum_exp(name, 100),
        "gns-log-sum-exp-n1000": lambda name: _log_sum_exp(name, 1000),
        "gns-linear-p4-n200": lambda name: _linear_power(name, 4),
        "gns-linear-p5-n200": lambda name: _linear_power(name, 5),
        "gns-rosenbrock-p3": lambda name: _rosenbrock_power(name, 3),
        "gns-rosenbrock-p5": lambda name: _rosenbrock_power(name, 5),
        "gns-chebyshev-p2-n200": lambda name: _chebyshev_power(name, 200, 2),
        "gns-chebyshev-p4-n1000": lambda name: _chebyshev_power(name, 1000, 4),
    }
    quick = ("gns-log-sum-exp-n100", "gns-rosenbrock-p5")
    return {
        name: Entry(("smooth",), lambda name=name, make=make: make(name), name in quick)
        for name, make in built.items()
    }


ENTRIES = _entries()
