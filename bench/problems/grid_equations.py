"""Differential equations on a space-time grid, as blocks of rows for layers and for losses.

A field is affine in coefficients: `base + terms @ coefficients` at every node, for the field itself
and for each derivative that the equation needs. Derivatives are taken on the whole grid, so a part
of the domain sees the basis functions of its neighbours.
"""

import abc
import functools
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxopt_ext.bench.problems import physics

Values = dict[str, Array]  # by name of the term, the nodes along the first axis
FINER = 4  # the reference of the diffusion problem is solved on a grid finer by this factor


class GridEquation(eqx.Module):
    """What a layer, a loss and a test need of an equation on a grid; axes are time, then space.

    Attributes:
        shape: Nodes along each axis.
        channels: Inputs of the network.
        periodic: Whether space is.
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    channels: ClassVar[int]
    periodic: ClassVar[bool]

    @property
    def size(self) -> int:
        """Number of nodes."""
        return int(np.prod(self.shape))

    def coordinates(self) -> np.ndarray:
        """Places of the nodes, every axis scaled to [0, 1], one row per node."""
        lines = [
            np.linspace(0, 1, n, endpoint=axis == 0 or not self.periodic)
            for axis, n in enumerate(self.shape)
        ]
        return np.stack(np.meshgrid(*lines, indexing="ij"), -1).reshape(self.size, -1)

    @abc.abstractmethod
    def blocks(self) -> dict[str, np.ndarray]:
        """The nodes of each block of rows; `equation` is the differential equation."""

    @abc.abstractmethod
    def sample(self, key: Array) -> Array:
        """A random parameter."""

    @abc.abstractmethod
    def inputs(self, parameter: Array) -> Float[Array, "channels ..."]:
        """What the network sees."""

    @abc.abstractmethod
    def basis(self, output: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """Basis functions from the output of the network."""

    @abc.abstractmethod
    def terms(self, basis: Float[Array, "n ..."]) -> Values:
        """The basis functions and their derivatives, arrays (nodes, n)."""

    @abc.abstractmethod
    def base(self, parameter: Array) -> Values:
        """The same of the part of the field that is not learned, arrays (nodes,)."""

    @abc.abstractmethod
    def data(self, parameter: Array) -> Float[Array, " nodes"]:
        """What the rows need of the parameter, at the nodes."""

    @abc.abstractmethod
    def rows(self, block: str, values: Values, data: Array) -> Array:
        """The rows of a block at some of its nodes, dimensionless but for the equation."""

    @abc.abstractmethod
    def reference(self, parameter: Array) -> Array:
        """The solution on the grid, found by a solver that does not use these rows."""


def _central(field: Array, axis: int, spacing: float) -> Array:
    """First derivative from three points, one-sided at the ends."""
    f = jnp.moveaxis(field, axis, 0)
    low, high = -3 * f[0] + 4 * f[1] - f[2], 3 * f[-1] - 4 * f[-2] + f[-3]
    ends = jnp.concatenate([low[None], f[2:] - f[:-2], high[None]])
    return jnp.moveaxis(ends / (2 * spacing), 0, axis)


def _second(field: Array, axis: int, spacing: float) -> Array:
    """Second derivative from three points; the ends repeat their neighbour."""
    f = jnp.moveaxis(field, axis, 0)
    inner = f[2:] - 2 * f[1:-1] + f[:-2]
    ends = jnp.concatenate([inner[:1], inner, inner[-1:]])
    return jnp.moveaxis(ends / spacing**2, 0, axis)


class DiffusionSorption(GridEquation):
    """Diffusion with sorption; the parameter is the initial level. See `physics`."""

    shape: tuple[int, ...] = eqx.field(static=True, default=(26, 32))
    channels: ClassVar[int] = 3
    periodic: ClassVar[bool] = False

    def times(self) -> Array:
        """Of the nodes, seconds."""
        return jnp.linspace(0.0, physics.FINAL_TIME, self.shape[0])

    def blocks(self):
        """See `GridEquation`."""
        nodes = np.arange(self.size).reshape(self.shape)
        return {
            "equation": nodes[1:, 1:-1].ravel(),
            "initial": nodes[0],
            "left": nodes[1:, 0],
            "right": nodes[1:, -1],
        }

    def sample(self, key):
        """See `GridEquation`."""
        return jax.random.uniform(key, (), float, 0.0, 0.2)

    def _start(self, level):
        return physics.sorption_start(level, jnp.linspace(0.0, 1.0, self.shape[1]))

    def inputs(self, parameter):
        """See `GridEquation`."""
        places = jnp.asarray(self.coordinates().T.reshape(2, *self.shape))
        start = jnp.broadcast_to(self._start(parameter), self.shape)
        return jnp.concatenate([places, start[None]])

    def basis(self, output):
        """See `GridEquation`."""
        return output

    def terms(self, basis):
        """See `GridEquation`."""
        dt, dx = physics.FINAL_TIME / (self.shape[0] - 1), 1 / (self.shape[1] - 1)
        every = {
            "u": basis,
            "u_t": _central(basis, 1, dt),
            "u_x": _central(basis, 2, dx),
            "u_xx": _second(basis, 2, dx),
        }
        return {name: term.reshape(-1, self.size).T for name, term in every.items()}

    def base(self, parameter):
        """See `GridEquation`."""
        zero = jnp.zeros(self.size)
        return {"u": zero, "u_t": zero, "u_x": zero, "u_xx": zero}

    def data(self, parameter):
        """See `GridEquation`."""
        return jnp.broadcast_to(self._start(parameter), self.shape).ravel()

    def rows(self, block, values, data):
        """See `GridEquation`; the equation in 1/s."""
        u = values["u"]
        if block == "equation":
            speed = physics.DIFFUSION / physics.retardation(u)
            return values["u_t"] - speed * values["u_xx"]
        if block == "initial":
            return (u - data) / (data + 0.02)
        return u - 1 if block == "left" else u + physics.DIFFUSION * values["u_x"]

    def reference(self, parameter):
        """See `GridEquation`."""
        x = jnp.linspace(0.0, 1.0, FINER * (self.shape[1] - 1) + 1)
        start = physics.sorption_start(parameter, x)
        return physics.diffusion_sorption(start, self.times(), 40)[:, ::FINER]


class NavierStokes(GridEquation):
    """Vorticity on the periodic square; the parameter is the initial vorticity. See `physics`.

    The field is the initial one plus t times the basis functions, so it starts right by
    construction. The velocity of an expert's part is that of its coefficients on the whole grid.

    Args:
        shape: Nodes along time and both axes of space.
        viscosity: ν, in units of length² / time.
        final: Last time.
    """

    shape: tuple[int, ...] = eqx.field(static=True, default=(16, 32, 32))
    viscosity: float = eqx.field(static=True, default=1e-3)
    final: float = eqx.field(static=True, default=1.0)
    channels: ClassVar[int] = 4
    periodic: ClassVar[bool] = True

    def times(self) -> Array:
        """Of the nodes."""
        return jnp.linspace(0.0, self.final, self.shape[0])

    def blocks(self):
        """See `GridEquation`."""
        return {"equation": np.arange(self.size).reshape(self.shape)[1:].ravel()}

    def sample(self, key):
        """See `GridEquation`."""
        return physics.random_vorticity(key, self.shape[1])

    def inputs(self, parameter):
        """See `GridEquation`."""
        places = jnp.asarray(self.coordinates().T.reshape(3, *self.shape))
        return jnp.concatenate([places, jnp.broadcast_to(parameter, self.shape)[None]])

    def basis(self, output):
        """See `GridEquation`."""
        output = output - jnp.mean(output, axis=(2, 3), keepdims=True)
        return output * jnp.linspace(0.0, 1.0, self.shape[0])[:, None, None]

    def terms(self, basis):
        """See `GridEquation`."""
        each = functools.partial(self._spatial, basis.reshape(-1, *self.shape[1:]))
        w_x, w_y = each(physics.gradient)
        u, v = each(physics.velocity)
        dt = self.final / (self.shape[0] - 1)
        every = {
            "w": basis,
            "w_t": _central(basis, 1, dt),
            "w_x": w_x,
            "w_y": w_y,
            "u": u,
            "v": v,
            "laplacian": each(physics.laplacian),
        }
        return {name: term.reshape(-1, self.size).T for name, term in every.items()}

    @staticmethod
    def _spatial(slices, operator):
        return jax.vmap(operator)(slices)

    def base(self, parameter):
        """See `GridEquation`."""
        constant = jnp.broadcast_to(parameter, (1, *self.shape))
        return {name: term[:, 0] for name, term in self.terms(constant).items()}

    def data(self, parameter):
        """See `GridEquation`."""
        return jnp.zeros(self.size)

    def rows(self, block, values, data):
        """See `GridEquation`."""
        transport = values["u"] * values["w_x"] + values["v"] * values["w_y"]
        return values["w_t"] + transport - self.viscosity * values["laplacian"]

    def reference(self, parameter):
        """See `GridEquation`."""
        n = self.shape[1]
        equation = physics.navier_stokes(n, self.viscosity, parameter.dtype)
        return physics.evolve(equation, parameter, self.times(), 20)
