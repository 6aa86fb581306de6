"""The surrogate of target-based methods: the loss, expanded at one target, as a function of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxopt_ext.solvers.sso_metrics import SurrogateMetric, dot


class Comparison(NamedTuple):
    """How the loss at a target compares with the surrogate.

    Attributes:
        majorized: Whether the surrogate is not below it.
        noise: The rounding error that is allowed for.
        smaller: Where it is below, the η to go on with: at most half, and small enough for the
            surrogate to have been above the loss there.
    """

    majorized: Bool[Array, ""]
    noise: Float[Array, ""]
    smaller: Float[Array, ""]


class Surrogate(eqx.Module):
    """g(ω) − ℓ(z) = ⟨G, m(ω) − z⟩ + D(m(ω), z) / η, everything but ω frozen.

    The constant ℓ(z) is left out, so that values near 0 keep their digits.

    Attributes:
        model: m(variables, args) → target.
        args: Second argument of the model, frozen: batch, random keys, statistics.
        target: z.
        gradient: G, the gradient of the loss at z.
        metric: What D is.
        weights: What D has frozen.
        eta: η, the target step size.
    """

    model: Callable
    args: PyTree
    target: PyTree
    gradient: PyTree
    metric: SurrogateMetric
    weights: PyTree
    eta: Float[Array, ""]

    def parts(self, moved: PyTree) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The linear term ⟨G, moved − z⟩, and D(moved, z)."""
        change = jax.tree.map(jnp.subtract, moved, self.target)
        linear = dot(self.gradient, change, self.eta.dtype)
        return linear, self.divergence(moved)

    @property
    def eps(self) -> float:
        """The coarsest resolution among the leaves of the target."""
        return max(float(jnp.finfo(z.dtype).eps) for z in jax.tree.leaves(self.target))

    @property
    def noise(self) -> Float[Array, ""]:
        """Rounding error of the linear term: differences of targets are as exact as targets."""
        sizes = jax.tree.map(lambda g, z: jnp.abs(g * z), self.gradient, self.target)
        ones = jax.tree.map(jnp.ones_like, sizes)
        return 10 * self.eps * dot(sizes, ones, self.eta.dtype)

    def divergence(self, moved: PyTree) -> Float[Array, ""]:
        """D(moved, z)."""
        return self.metric.divergence(self.weights, moved, self.target, self.eta.dtype)

    def at(self, moved: PyTree) -> Float[Array, ""]:
        """The surrogate at a target."""
        linear, divergence = self.parts(moved)
        return linear + divergence / self.eta

    def compare(self, moved: PyTree, rise: Array, size: Array) -> Comparison:
        """Compare with the loss at a target.

        Args:
            moved: The target.
            rise: The loss there minus ℓ(z).
            size: Magnitude of the two losses, whose difference has a rounding error.

        Returns:
            The comparison; a loss that is not finite is not majorized.
        """
        linear, divergence = self.parts(moved)
        noise = self.noise + (10 * self.eps * size).astype(self.eta.dtype)
        beyond = rise - linear
        usable = jnp.isfinite(beyond) & (beyond > 0) & (divergence > 0)
        fitting = jnp.where(usable, divergence / jnp.where(usable, beyond, 1), self.eta)
        return Comparison(
            majorized=beyond <= divergence / self.eta + noise,
            noise=noise,
            smaller=jnp.minimum(self.eta / 2, fitting).astype(self.eta.dtype),
        )

    def value_and_grad(self, point: PyTree) -> tuple[Float[Array, ""], PyTree]:
        """The surrogate at ω and its gradient there; one evaluation of the model."""
        moved, pull = jax.vjp(lambda point: self.model(point, self.args), point)
        value, cotangent = jax.value_and_grad(self.at)(moved)
        return value, pull(cotangent)[0]

    def curvature(self, point: PyTree) -> Callable[[Any], Any]:
        """V ↦ Jᵀ ∇²D J v / η with J the Jacobian of the model at `point` and ∇²D at z."""
        _, push = jax.linearize(lambda point: self.model(point, self.args), point)
        pull = jax.linear_transpose(push, point)
        weigh = jax.linearize(jax.grad(self.divergence), self.target)[1]

        def product(vector):
            found = pull(weigh(push(vector)))[0]
            return jax.tree.map(lambda leaf: leaf / self.eta.astype(leaf.dtype), found)

        return product
