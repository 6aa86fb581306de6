"""In which geometry the target moves: the term D(moved, z) / η of the surrogate."""

import math
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxopt_ext.core import check
from jaxopt_ext.core.solver import Number


def dot(a: PyTree, b: PyTree, dtype) -> Float[Array, ""]:
    """⟨a, b⟩ over all leaves, which may differ in dtype."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum((jnp.vdot(x, y).astype(dtype) for x, y in pairs), jnp.zeros((), dtype))


class SurrogateMetric(eqx.Module):
    """Base of the metrics: D(moved, z) = ½ Σ wᵢ (movedᵢ − zᵢ)² with weights w frozen at z.

    Attributes:
        quadratic: Whether D is of this form.
        uses_loss: Whether the weights come from the loss function itself.
        needs_rows: Whether it must know which samples a target belongs to.
    """

    quadratic: ClassVar[bool] = True
    uses_loss: ClassVar[bool] = False
    needs_rows: ClassVar[bool] = False

    def products(self, target: PyTree) -> int:
        """Hessian-vector products of the loss that `weights` costs."""
        return 0

    def init(self, target: PyTree) -> PyTree:
        """What the metric remembers before the first oracle call.

        Args:
            target: Shapes of the target of all samples.

        Returns:
            A PyTree of arrays.
        """
        return None

    def remember(self, memory: PyTree, gradient: PyTree, rows: Array | None) -> PyTree:
        """The memory after one more gradient of the loss.

        Args:
            memory: From `init` or the last `remember`.
            gradient: Of the loss, like the target that the oracle was asked at.
            rows: Indices of its samples; `None` for all of them.

        Returns:
            The new memory.
        """
        return memory

    def weights(
        self, memory: PyTree, target: PyTree, rows: Array | None, loss: Callable | None
    ) -> PyTree:
        """W for the surrogate at `target`: a PyTree like it, with leaves that broadcast.

        Args:
            memory: What `remember` returned.
            target: z.
            rows: Indices of its samples; `None` for all of them.
            loss: The loss as a function of the target, where it can be traced.

        Returns:
            The weights.
        """
        return jax.tree.map(lambda z: jnp.ones((), z.dtype), target)

    def divergence(self, weights: PyTree, moved: PyTree, target: PyTree, dtype) -> Array:
        """D(moved, z).

        Args:
            weights: From `weights`.
            moved: A target.
            target: z.
            dtype: Of the result.

        Returns:
            A scalar, 0 where both targets are equal.
        """
        change = jax.tree.map(jnp.subtract, moved, target)
        return dot(jax.tree.map(jnp.multiply, weights, change), change, dtype) / 2


class Euclidean(SurrogateMetric):
    """D = ½‖moved − z‖², an upper bound for η ≤ 1/L where ∇ℓ is L-Lipschitz.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.solvers import sso
        >>> metric, z = sso.Euclidean(), jnp.zeros(2)
        >>> weights = metric.weights(None, z, None, None)
        >>> print(metric.divergence(weights, jnp.array([3.0, 4.0]), z, jnp.float32))
        12.5
    """


class ScalarAdaGrad(SurrogateMetric):
    """D = ½ √S ‖moved − z‖², S the sum of ‖∇ℓ‖² over all oracle calls so far.

    η then has the unit of a length in target space.

    Args:
        floor: Added to √S, in its units, ≥ 0.

    Raises:
        ValueError: `floor` is negative.

    Reference:
        Duchi, Hazan, Singer, "Adaptive subgradient methods", JMLR 2011; in target space: Lavington
        et al., ICML 2023.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.solvers import sso
        >>> metric, z = sso.ScalarAdaGrad(floor=0.0), jnp.zeros(2)
        >>> memory = metric.remember(metric.init(z), jnp.array([3.0, 4.0]), None)
        >>> print(metric.weights(memory, z, None, None))
        5.0
    """

    floor: Number = 1e-6

    def __check_init__(self):
        check.number("ScalarAdaGrad", "floor", self.floor, at_least=0)

    def init(self, target):
        """See `SurrogateMetric`."""
        return jnp.zeros((), jnp.result_type(*jax.tree.leaves(target)))

    def remember(self, memory, gradient, rows):
        """See `SurrogateMetric`."""
        return memory + dot(gradient, gradient, memory.dtype)

    def weights(self, memory, target, rows, loss):
        """See `SurrogateMetric`."""
        weight = jnp.sqrt(memory) + jnp.asarray(self.floor, memory.dtype)
        return jax.tree.map(lambda z: weight.astype(z.dtype), target)


class DiagonalAdaGrad(SurrogateMetric):
    """D = ½ Σ √Sᵢ (movedᵢ − zᵢ)², Sᵢ the sum of (∂ℓ/∂zᵢ)² so far, for each output of each sample.

    It needs to know which samples a gradient belongs to. A sample that occurs twice in a batch
    counts twice.

    Args:
        samples: Number of all samples where `init` is given a part of them only (a stream of
            minibatches); `None` means as many as the target has.
        floor: Least S, in its units, > 0: samples not seen yet.

    Raises:
        ValueError: `samples` is less than 1, or `floor` is not positive.

    Reference:
        Duchi, Hazan, Singer, "Adaptive subgradient methods", JMLR 2011; in target space: Lavington
        et al., ICML 2023.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.solvers import sso
        >>> metric = sso.DiagonalAdaGrad(samples=3)
        >>> rows = jnp.array([2, 0, 2])
        >>> memory = metric.remember(metric.init(jnp.zeros(2)), jnp.array([3.0, 2.0, 4.0]), rows)
        >>> print(memory)
        [ 4.  0. 25.]
    """

    needs_rows: ClassVar[bool] = True

    samples: int | None = eqx.field(static=True, default=None)
    floor: Number = 1e-10

    def __check_init__(self):
        if self.samples is not None:
            check.count("DiagonalAdaGrad", "samples", self.samples)
        check.number("DiagonalAdaGrad", "floor", self.floor, above=0)

    def init(self, target):
        """See `SurrogateMetric`."""

        def zeros(z):
            shape = z.shape if self.samples is None else (self.samples, *z.shape[1:])
            return jnp.zeros(shape, z.dtype)

        return jax.tree.map(zeros, target)

    def remember(self, memory, gradient, rows):
        """See `SurrogateMetric`."""
        if rows is None:
            return jax.tree.map(lambda s, g: s + g**2, memory, gradient)
        return jax.tree.map(lambda s, g: s.at[rows].add(g**2), memory, gradient)

    def weights(self, memory, target, rows, loss):
        """See `SurrogateMetric`."""
        own = memory if rows is None else jax.tree.map(lambda s: s[rows], memory)
        return jax.tree.map(lambda s: jnp.sqrt(jnp.maximum(s, self.floor)).astype(s.dtype), own)


class DiagonalHessian(SurrogateMetric):
    """D = ½ Σ wᵢ (movedᵢ − zᵢ)², w the diagonal of ∇²ℓ at z: online Newton in target space.

    With η = 1 it is the second-order expansion of a loss whose outputs do not interact (squares,
    logistic). Samples, along the leading axis of each leaf, must not interact in the loss. Costs
    one Hessian-vector product of the loss per output and oracle call.

    Args:
        damping: Least weight, as a share of the largest one, > 0.

    Raises:
        ValueError: `damping` is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxopt_ext.solvers import sso
        >>> z = jnp.array([0.0, 2.0])
        >>> loss = lambda z: jnp.sum(jnp.cosh(z))
        >>> print(sso.DiagonalHessian().weights(None, z, None, loss).round(1))
        [1.  3.8]
    """

    uses_loss: ClassVar[bool] = True

    damping: Number = 1e-5

    def __check_init__(self):
        check.number("DiagonalHessian", "damping", self.damping, above=0)

    def products(self, target):
        """See `SurrogateMetric`."""
        return sum(_outputs(leaf) for leaf in jax.tree.leaves(target))

    def weights(self, memory, target, rows, loss):
        """See `SurrogateMetric`."""
        leaves, structure = jax.tree.flatten(target)
        assert loss is not None
        product = jax.linearize(jax.grad(loss), target)[1]
        zeros = [jnp.zeros_like(leaf) for leaf in leaves]

        def diagonal(i):
            leaf = leaves[i]

            def one(unit):  # the same output of all samples at once
                spread = jnp.broadcast_to(unit.reshape(leaf.shape[1:]), leaf.shape)
                direction = jax.tree.unflatten(structure, [*zeros[:i], spread, *zeros[i + 1 :]])
                return jax.tree.leaves(product(direction))[i] * spread

            return jnp.sum(jax.vmap(one)(jnp.eye(_outputs(leaf), dtype=leaf.dtype)), axis=0)

        found = [jnp.abs(diagonal(i)) for i in range(len(leaves))]
        largest = jnp.max(jnp.stack([jnp.max(w).astype(zeros[0].dtype) for w in found]))
        least = jnp.where(largest > 0, self.damping * largest, 1)
        clipped = [jnp.maximum(w, least.astype(w.dtype)) for w in found]
        return jax.tree.unflatten(structure, clipped)


def _outputs(leaf):
    return math.prod(leaf.shape[1:])


class Bregman(SurrogateMetric):
    """D = Φ(moved) − Φ(z) − ⟨∇Φ(z), moved − z⟩ for a convex function Φ of the target.

    The surrogate is an upper bound where ℓ is (1/η)-smooth relative to Φ.

    Args:
        phi: Φ, a function from targets to scalars.

    Raises:
        TypeError: `phi` is not a function.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.solvers import sso
        >>> metric, z = sso.Bregman(lambda z: jnp.sum(z**4)), jnp.ones(2)
        >>> weights = metric.weights(None, z, None, None)
        >>> print(metric.divergence(weights, 2 * z, z, jnp.float32))
        22.0
    """

    quadratic: ClassVar[bool] = False

    phi: Callable

    def __check_init__(self):
        check.function("Bregman", "phi", self.phi)

    def weights(self, memory, target, rows, loss):
        """See `SurrogateMetric`; here Φ(z) and its gradient."""
        return jax.value_and_grad(self.phi)(target)

    def divergence(self, weights, moved, target, dtype):
        """See `SurrogateMetric`."""
        phi, gradient = weights
        change = jax.tree.map(jnp.subtract, moved, target)
        return (self.phi(moved) - phi).astype(dtype) - dot(gradient, change, dtype)


def _above_tangent(u):
    """exp(u) − 1 − u without cancellation."""
    small = jnp.abs(u) < 0.25
    inner = jnp.where(small, u, 0)
    series = jnp.ones_like(u)
    for k in range(14, 1, -1):  # 1 + u/3 (1 + u/4 (1 + ...))
        series = 1 + inner / (k + 1) * series
    return jnp.where(small, inner**2 / 2 * series, jnp.expm1(jnp.where(small, 0, u)) - u)


class LogSumExp(SurrogateMetric):
    """The Bregman divergence of Φ = Σ log Σ exp(z), the inner sum over the last axis.

    With softmax cross-entropy, summed over the samples, and η = 1 the surrogate *is* the loss
    (η = n for the mean over n samples).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxopt_ext.solvers import sso
        >>> metric, z = sso.LogSumExp(), jnp.zeros(2)
        >>> weights = metric.weights(None, z, None, None)
        >>> print(metric.divergence(weights, jnp.array([1.0, -1.0]), z, jnp.float32))
        0.4337808
    """

    quadratic: ClassVar[bool] = False

    def weights(self, memory, target, rows, loss):
        """See `SurrogateMetric`; here the softmax of z."""
        return jax.tree.map(lambda z: jax.nn.softmax(z, axis=-1), target)

    def divergence(self, weights, moved, target, dtype):
        """See `SurrogateMetric`."""

        def leaf(p, a, z):
            change = a - z
            centered = change - jnp.sum(p * change, axis=-1, keepdims=True)
            # log Σ p exp(u) with Σ p u = 0; for large u its largest term is taken out
            near = jnp.log1p(jnp.sum(p * _above_tangent(jnp.clip(centered, -2, 2)), axis=-1))
            far = jax.nn.logsumexp(centered, axis=-1, b=p)
            small = jnp.max(jnp.abs(centered), axis=-1) < 2
            return jnp.sum(jnp.where(small, near, far)).astype(dtype)

        return sum(
            jax.tree.leaves(jax.tree.map(leaf, weights, moved, target)), jnp.zeros((), dtype)
        )


class NegativeEntropy(SurrogateMetric):
    """The Bregman divergence of Φ = Σ z log z for positive targets, such as probabilities.

    D = Σ moved · log(moved / z) − moved + z. Targets below `floor` are clipped to it.

    Args:
        floor: Smallest target, > 0.

    Raises:
        ValueError: `floor` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxopt_ext.solvers import sso
        >>> metric, z = sso.NegativeEntropy(), jnp.array([0.5, 0.5])
        >>> weights = metric.weights(None, z, None, None)
        >>> print(metric.divergence(weights, jnp.array([0.0, 1.0]), z, jnp.float32))
        0.6931472
    """

    quadratic: ClassVar[bool] = False

    floor: Number = 1e-30

    def __check_init__(self):
        check.number("NegativeEntropy", "floor", self.floor, above=0)

    def divergence(self, weights, moved, target, dtype):
        """See `SurrogateMetric`."""

        def leaf(a, z):
            floor = jnp.asarray(self.floor, z.dtype)
            a, z = jnp.maximum(a, floor), jnp.maximum(z, floor)
            change = a - z
            near = jnp.abs(change) < z / 2  # there log1p keeps the digits of the difference
            logarithm = jnp.where(
                near, jnp.log1p(jnp.where(near, change, 0) / z), jnp.log(a) - jnp.log(z)
            )
            return jnp.sum(a * logarithm - change).astype(dtype)

        parts = jax.tree.leaves(jax.tree.map(leaf, moved, target))
        return sum(parts, jnp.zeros((), dtype))
