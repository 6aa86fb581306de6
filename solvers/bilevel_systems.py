"""Conditions of penalized bilevel solutions besides the penalty system itself."""

import jax
import jax.numpy as jnp
import optax

from jaxopt_ext import implicit
from jaxopt_ext.core import tree
from jaxopt_ext.solvers.bilevel_steps import mapping


class CentralSystem(implicit.PenaltySystem):
    """The penalty system of the central difference; y minimizes g + σf and z minimizes g − σf."""

    def __call__(self, xyz, *args):
        """Return the three gradient (or projected-gradient) residuals."""
        x, y, z = xyz
        sigma = jnp.asarray(self.sigma, tree.dtype_of(x))

        def above(x, y):
            return sigma * self.upper(x, y, *args) + self.lower(x, y, *args)

        def below(x, z):
            return self.lower(x, z, *args) - sigma * self.upper(x, z, *args)

        at_y, at_z = jax.grad(above, (0, 1))(x, y), jax.grad(below, (0, 1))(x, z)
        difference = optax.tree.scale(1 / (2 * sigma), optax.tree.sub(at_y[0], at_z[0]))
        return (
            mapping(self.upper_set, x, difference),
            mapping(self.lower_set, y, at_y[1]),
            mapping(self.lower_set, z, at_z[1]),
        )


class PolishedSystem(implicit.Condition):
    """A penalty system in x and a pair (w, z), and a lower-level solution y beside it."""

    penalty: implicit.PenaltySystem

    def __call__(self, unknowns, *args):
        """Return the residuals, those of w and z as a pair."""
        x, y, (w, z) = unknowns
        row_x, row_w, row_z = self.penalty((x, w, z), *args)
        gradient = jax.grad(self.penalty.lower, 1)(x, y, *args)
        return row_x, mapping(self.penalty.lower_set, y, gradient), (row_w, row_z)
