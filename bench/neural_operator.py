"""A small Fourier neural operator: fields on a grid to fields on the same grid."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Pointwise(eqx.Module):
    """An affine map of the channels, the same at every point."""

    weight: Float[Array, "out in"]
    bias: Float[Array, " out"]

    def __init__(self, inputs: int, outputs: int, key: Array):
        bound = inputs**-0.5
        one, two = jax.random.split(key)
        self.weight = jax.random.uniform(one, (outputs, inputs), minval=-bound, maxval=bound)
        self.bias = jax.random.uniform(two, (outputs,), minval=-bound, maxval=bound)

    def __call__(self, x: Float[Array, "in ..."]) -> Float[Array, "out ..."]:
        """Apply it, channels first."""
        bias = self.bias.reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.einsum("oi,i...->o...", self.weight, x) + bias


class SpectralConvolution(eqx.Module):
    """A convolution given by its lowest Fourier coefficients; real and imaginary part apart."""

    real: Float[Array, "in out ..."]
    imaginary: Float[Array, "in out ..."]
    modes: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, inputs: int, outputs: int, modes: tuple[int, ...], key: Array):
        # both signs of the frequency along all axes but the last
        shape = (inputs, outputs, *(2 * m for m in modes[:-1]), modes[-1])
        scale = ((inputs + outputs) / 2) ** -0.5 / np.sqrt(np.prod(shape[2:]))
        one, two = jax.random.split(key)
        self.real = scale * jax.random.normal(one, shape)
        self.imaginary = scale * jax.random.normal(two, shape)
        self.modes = modes

    def __call__(self, x: Float[Array, "in ..."]) -> Float[Array, "out ..."]:
        """Apply it, channels first."""
        grid, axes = x.shape[1:], tuple(range(1, x.ndim))
        transformed = jnp.fft.rfftn(x, axes=axes, norm="forward")
        lowest = [np.r_[0:m, n - m : n] for n, m in zip(grid[:-1], self.modes[:-1], strict=True)]
        index = np.ix_(*lowest, np.arange(self.modes[-1]))
        weight = jax.lax.complex(self.real, self.imaginary)
        mixed = jnp.einsum("io...,i...->o...", weight, transformed[(slice(None), *index)])
        out = jnp.zeros((weight.shape[1], *transformed.shape[1:]), mixed.dtype)
        out = out.at[(slice(None), *index)].set(mixed)
        return jnp.fft.irfftn(out, s=grid, axes=axes, norm="forward")


class FourierOperator(eqx.Module):
    """Lift, Fourier layers with a pointwise bypass and GELU between them, head of two layers.

    Args:
        inputs: Channels that go in.
        outputs: Channels that come out.
        width: Channels between.
        depth: Number of Fourier layers.
        modes: Frequencies kept along each axis of the grid, at most half its points.
        key: Random key.

    Reference:
        Li et al., "Fourier Neural Operator for Parametric Partial Differential Equations", ICLR
        2021.
    """

    lift: Pointwise
    spectral: list[SpectralConvolution]
    bypass: list[Pointwise]
    head: tuple[Pointwise, Pointwise]

    def __init__(
        self, inputs: int, outputs: int, width: int, depth: int, modes: tuple[int, ...], key: Array
    ):
        keys = jax.random.split(key, 2 * depth + 3)
        self.lift = Pointwise(inputs, width, keys[-1])
        self.spectral = [SpectralConvolution(width, width, modes, k) for k in keys[:depth]]
        self.bypass = [Pointwise(width, width, k) for k in keys[depth : 2 * depth]]
        self.head = (
            Pointwise(width, 2 * width, keys[-2]),
            Pointwise(2 * width, outputs, keys[-3]),
        )

    def __call__(self, x: Float[Array, "in ..."]) -> Float[Array, "out ..."]:
        """Apply it to one sample, channels first."""
        x = self.lift(x)
        for spectral, bypass in zip(self.spectral, self.bypass, strict=True):
            x = jax.nn.gelu(spectral(x) + bypass(x))
        first, second = self.head
        return second(jax.nn.gelu(first(x)))
