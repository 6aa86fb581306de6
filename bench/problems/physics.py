"""Partial differential equations with reference solvers: finite volumes and pseudo-spectral.

The solvers are plain functions that can be compiled and batched. They are accurate on their own
grid; `tests/bench/test_physics_problems.py` holds them against closed forms.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax.linalg import tridiagonal_solve
from jaxtyping import Array, Float

from jaxopt_ext import layers

# ---- diffusion and sorption, finite volumes around nodes -------------------------------------

DIFFUSION = 5e-4  # length² / second
SORPTION = (1 - 0.29) / 0.29 * 2880 * 3.5e-4 * 0.874  # dimensionless: porosity, density, Freundlich
EXPONENT = 0.874
FINAL_TIME = 500.0  # seconds
CLIP = 1e-2  # width of the smooth max(u, 0) in the retardation, in units of u
EDGE = 0.08  # width of the layers of the start at both ends, in units of length
DIAGONAL = 1 - 2**-0.5  # of the two-stage L-stable Runge-Kutta method


def retardation(u: Array) -> Array:
    """R(u) of the Freundlich isotherm, with a smooth clip at zero; dimensionless.

    Args:
        u: Concentration, dimensionless.

    Returns:
        R, at least 1.
    """
    return 1 + SORPTION * (layers.smooth_positive(u, CLIP) + 1e-6) ** (EXPONENT - 1)


def sorption_start(level: Array, x: Float[Array, " nodes"]) -> Float[Array, " nodes"]:
    """An initial concentration that fits the boundary conditions at both ends.

    Args:
        level: Concentration away from the ends, in [0, 0.2].
        x: Nodes in [0, 1].

    Returns:
        u at time 0: 1 at x = 0, nearly 0 at x = 1, the level between.
    """
    left, right = jnp.exp(-((x / EDGE) ** 2)), jnp.exp(-(((1 - x) / EDGE) ** 2))
    return level * (1 - right) + (1 - level) * left


def diffusion_sorption(
    start: Float[Array, " nodes"],
    times: Float[Array, " times"],
    substeps: int = 20,
    sorption: bool = True,
) -> Float[Array, "times nodes"]:
    """Solve u_t = D/R(u) u_xx on [0, 1] with u(t, 0) = 1 and u(t, 1) = −D u_x(t, 1).

    Second order in space (three points) and time (two-stage L-stable diagonally implicit
    Runge-Kutta, Newton's method on a tridiagonal matrix).

    Args:
        start: u at the first time, on equally spaced nodes with both ends.
        times: When to report, ascending, seconds.
        substeps: Steps between two reports.
        sorption: Whether R is that of `retardation`; else it is 1, the heat equation.

    Returns:
        u at all times.
    """
    dx = 1 / (start.size - 1)
    exchange = DIFFUSION / dx

    def ends(u):
        return u.at[0].set(1).at[-1].set(exchange * u[-2] / (1 + exchange))

    def speed(u):
        return DIFFUSION / (retardation(u) if sorption else jnp.ones_like(u))

    def rate(u):
        """The right-hand side at inner nodes, for given end values."""
        second = (u[:-2] - 2 * u[1:-1] + u[2:]) / dx**2
        return jnp.zeros_like(u).at[1:-1].set(speed(u)[1:-1] * second)

    def implicit_stage(base, h):
        """Solve v = base + h rate(v) at inner nodes with the boundary rows at the ends."""

        def newton(_, v):
            second = jnp.zeros_like(v).at[1:-1].set((v[:-2] - 2 * v[1:-1] + v[2:]) / dx**2)
            slope = jax.jvp(speed, (v,), (jnp.ones_like(v),))[1]  # speed acts entry by entry
            inner = jnp.ones_like(v).at[jnp.array([0, -1])].set(0)
            off = -h * speed(v) / dx**2 * inner
            middle = 1 - 2 * off - h * slope * second * inner
            lower = off.at[-1].set(-exchange / (1 + exchange))
            defect = v - base - h * rate(v)
            defect = defect.at[0].set(v[0] - 1)
            defect = defect.at[-1].set(v[-1] - exchange * v[-2] / (1 + exchange))
            return v - tridiagonal_solve(lower, middle, off, defect[:, None])[:, 0]

        return jax.lax.fori_loop(0, 4, newton, base)

    def advance(u, h):
        first = implicit_stage(u, DIAGONAL * h)
        k = (first - u) / (DIAGONAL * h)
        return implicit_stage(u + (1 - DIAGONAL) * h * k, DIAGONAL * h)

    def between(u, span):
        h = span / substeps
        u = jax.lax.fori_loop(0, substeps, lambda _, v: advance(v, h), u)
        return u, u

    _, rest = jax.lax.scan(between, ends(start), jnp.diff(times))
    return jnp.concatenate([start[None], rest])


# ---- periodic equations, pseudo-spectral -----------------------------------------------------


class Spectral(NamedTuple):
    """A periodic equation û_t = L û + N(û) on the unit interval or square.

    Attributes:
        linear: L, one number per wave.
        nonlinear: N, from transformed to transformed field.
    """

    linear: Array
    nonlinear: Callable[[Array], Array]


def derivatives(shape: tuple[int, ...], dtype) -> tuple[list[Array], Array]:
    """Symbols 2πik of the derivatives of the real transform, and the two-thirds mask.

    Args:
        shape: Points along each axis.
        dtype: Floating dtype.

    Returns:
        One complex array per axis, broadcastable to the transform; the mask of waves that are kept.
    """
    symbols, keep = [], jnp.array(True)
    for axis, n in enumerate(shape):
        last = axis == len(shape) - 1
        k = jnp.fft.rfftfreq(n, 1 / n) if last else jnp.fft.fftfreq(n, 1 / n)
        k = k.astype(dtype).reshape([-1 if a == axis else 1 for a in range(len(shape))])
        symbols.append(jax.lax.complex(jnp.zeros_like(k), 2 * jnp.pi * k))
        keep = keep & (jnp.abs(k) <= n // 3)
    return symbols, keep


def _real(transformed, shape):
    return jnp.fft.irfftn(transformed, s=shape, axes=range(len(shape)))


def _transform(field):
    return jnp.fft.rfftn(field, axes=range(field.ndim))


def burgers(points: int, viscosity: float, dtype) -> Spectral:
    """Burgers' equation u_t + u u_x = ν u_xx on the periodic unit interval.

    Args:
        points: Grid points.
        viscosity: ν, in units of length² / time.
        dtype: Floating dtype.

    Returns:
        The equation.
    """
    (along,), keep = derivatives((points,), dtype)

    def nonlinear(u):
        square = _transform(_real(u, (points,)) ** 2 / 2)
        return jnp.where(keep, -along * square, 0)

    return Spectral(viscosity * along**2, nonlinear)


def velocity(vorticity: Float[Array, "x y"]) -> tuple[Float[Array, "x y"], Float[Array, "x y"]]:
    """The divergence-free velocity (u, v) of mean zero with v_x − u_y = ω on the periodic square.

    Args:
        vorticity: ω; its mean has no velocity and is ignored.

    Returns:
        u and v.
    """
    (x, y), _ = derivatives(vorticity.shape, vorticity.dtype)
    symbol = (x**2 + y**2).real
    inverse = jnp.where(symbol < 0, -1 / jnp.where(symbol < 0, symbol, 1), 0)
    stream = _transform(vorticity) * inverse.astype(x.dtype)
    return _real(y * stream, vorticity.shape), _real(-x * stream, vorticity.shape)


def gradient(field: Float[Array, "x y"]) -> tuple[Float[Array, "x y"], Float[Array, "x y"]]:
    """Spectral derivatives along both axes of the periodic unit square."""
    (x, y), _ = derivatives(field.shape, field.dtype)
    transformed = _transform(field)
    return _real(x * transformed, field.shape), _real(y * transformed, field.shape)


def laplacian(field: Float[Array, "x y"]) -> Float[Array, "x y"]:
    """Spectral Laplacian on the periodic unit square."""
    (x, y), _ = derivatives(field.shape, field.dtype)
    return _real((x**2 + y**2) * _transform(field), field.shape)


def navier_stokes(points: int, viscosity: float, dtype) -> Spectral:
    """Vorticity form ω_t + u·∇ω = ν Δω on the periodic unit square.

    Args:
        points: Grid points along each axis.
        viscosity: ν, in units of length² / time.
        dtype: Floating dtype.

    Returns:
        The equation.
    """
    shape = (points, points)
    (x, y), keep = derivatives(shape, dtype)

    def nonlinear(w):
        field = _real(w, shape)
        u, v = velocity(field)
        w_x, w_y = gradient(field)
        return jnp.where(keep, -_transform(u * w_x + v * w_y), 0)

    return Spectral(viscosity * (x**2 + y**2), nonlinear)


def evolve(
    equation: Spectral, start: Array, times: Float[Array, " times"], substeps: int = 20
) -> Array:
    """Solve a periodic equation by Heun's method with Crank-Nicolson for the linear part.

    Args:
        equation: What to solve.
        start: The field at the first time.
        times: When to report, ascending.
        substeps: Steps between two reports.

    Returns:
        The field at all times, times first.
    """

    def between(w, span):
        h = (span / substeps).astype(equation.linear.dtype)
        grow, shrink = 1 + h * equation.linear / 2, 1 - h * equation.linear / 2

        def step(_, w):
            now = equation.nonlinear(w)
            ahead = (grow * w + h * now) / shrink
            return (grow * w + h / 2 * (now + equation.nonlinear(ahead))) / shrink

        w = jax.lax.fori_loop(0, substeps, step, w)
        return w, _real(w, start.shape)

    _, rest = jax.lax.scan(between, _transform(start), jnp.diff(times))
    return jnp.concatenate([start[None], rest])


def random_vorticity(key: Array, points: int, length: float = 0.8) -> Float[Array, "x y"]:
    """A Gaussian field of mean zero, covariance exp(−Σ sin²(πd) / (2 length²)) of distances d.

    Args:
        key: Random key.
        points: Grid points along each axis.
        length: Correlation length, dimensionless.

    Returns:
        ω on the periodic unit square.
    """
    d = jnp.linspace(0.0, 1.0, points, endpoint=False)
    row = jnp.fft.fft(jnp.exp(-(jnp.sin(jnp.pi * d) ** 2) / (2 * length**2))).real
    spectrum = jnp.maximum(row, 0)[:, None] * jnp.maximum(row, 0)[None, :]
    spectrum = spectrum.at[0, 0].set(0)
    noise = jax.random.normal(key, (points, points), d.dtype)
    transformed = jnp.fft.fft2(noise)
    return jnp.fft.ifft2(jnp.sqrt(spectrum).astype(transformed.dtype) * transformed).real
