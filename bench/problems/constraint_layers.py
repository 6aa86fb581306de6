"""Constraint layers as problems: coefficients by least squares, differentiated in the basis.

The basis has parameters, as if it were a network; a layer returns the coefficients that make the
rows of an equation smallest, and a loss of the field is differentiated with respect to the
parameters.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxopt_ext.bench.problem import Entry
from jaxopt_ext.bench.problems.grid_equations import DiffusionSorption, GridEquation

RIDGE = 1e-4
WEIGHTS = (100.0, 1.0)  # of the equation, and of initial and boundary rows
LEVELS = (0.02, 0.18)  # of the batch, from and to
Rows = Callable[[Array, Any], Array]


class LayerProblem(NamedTuple):
    """A batch of layers.

    Attributes:
        name: Its name within the suite.
        residual: r(coefficients, (parameters, level)), a flat array with the ridge rows.
        loss: Of the coefficients, parameters and level of one solve.
        init: Where a solve begins.
        parameters: Of the basis, a flat array.
        levels: One per solve of the batch.
        linear: Whether r is affine in the coefficients.
    """

    name: str
    residual: Rows
    loss: Callable[[Array, Array, Array], Array]
    init: Float[np.ndarray, " n"]
    parameters: Float[np.ndarray, " p"]
    levels: Float[np.ndarray, " batch"]
    linear: bool


class Heat(DiffusionSorption):
    """Diffusion without sorption: affine rows."""

    def rows(self, block, values, data):
        """See `GridEquation`."""
        if block == "equation":
            return values["u_t"] - 5e-4 * values["u_xx"]
        return super().rows(block, values, data)


def features(equation: GridEquation, parameters: Array, n: int) -> Array:
    """Smooth functions on the grid: Gaussian in x, a power of time; parameters are their centres.

    Args:
        equation: Whose grid.
        parameters: Centres in x and exponents in t, 2n numbers.
        n: Number of functions.

    Returns:
        The functions (n, nt, nx).
    """
    places = equation.coordinates().T.reshape(2, 1, *equation.shape)
    t, x = jnp.asarray(places, parameters.dtype)
    centre, power = parameters[:n, None, None], parameters[n:, None, None]
    return jnp.exp(-(((x - centre) / 0.15) ** 2)) * (t + 0.05) ** power


def build(equation: GridEquation, n: int, batch: int) -> LayerProblem:
    """A batch of solves with n coefficients each.

    Args:
        equation: What is solved.
        n: Number of basis functions.
        batch: Number of solves.

    Returns:
        The problem.
    """
    blocks = equation.blocks()
    nodes = np.concatenate(list(blocks.values()))
    ends = np.cumsum([0, *(b.size for b in blocks.values())])

    def residual(c, args):
        parameters, level = args
        terms = equation.terms(features(equation, parameters, n))
        values = {name: (term[nodes] @ c) for name, term in terms.items()}
        data = equation.data(level)[nodes].astype(c.dtype)
        rows = []
        for (name, block), low in zip(blocks.items(), ends, strict=False):
            part = slice(low, low + block.size)
            here = equation.rows(name, {k: v[part] for k, v in values.items()}, data[part])
            weight = WEIGHTS[name != "equation"] / block.size**0.5
            rows.append(weight * here)
        return jnp.concatenate([*rows, RIDGE * c])

    def loss(c, parameters, level):
        field = jnp.einsum("n,n...->...", c, features(equation, parameters, n))
        return jnp.mean((field - 0.3) ** 2)

    rng = np.random.default_rng(0)
    centres = np.linspace(0, 1, n) + 0.01 * rng.standard_normal(n)
    powers = 0.5 * rng.random(n)
    return LayerProblem(
        f"{'heat' if isinstance(equation, Heat) else 'sorption'}-n{n}-batch{batch}",
        residual,
        loss,
        np.full(n, 0.1),
        np.concatenate([centres, powers]),
        np.linspace(*LEVELS, batch),
        isinstance(equation, Heat),
    )


def gradient(problem: LayerProblem, rule: Callable[[Array, Any], Array]) -> Callable[..., Any]:
    """The function of (parameters, init, levels) that a library's layer makes of a problem.

    Args:
        problem: The problem.
        rule: From a start and (parameters, level) to the coefficients.

    Returns:
        Coefficients by level and the gradient of the mean loss, to be compiled.
    """

    def total(parameters, init, levels):
        def one(level):
            c = rule(init, (parameters, level))
            return problem.loss(c, parameters, level), c

        losses, found = jax.vmap(one)(levels)
        return jnp.mean(losses), found

    return jax.grad(total, has_aux=True)


def exact_gradient(problem: LayerProblem, found: Array) -> tuple[Array, Array]:
    """Coefficients and gradient by dense linear algebra in float64, with no layer's help.

    Newton's method with the exact Hessian from the coefficients that are given, then
    −∂²f/∂θ∂c H⁻¹ ∇ℓ + ∂ℓ/∂θ.

    Args:
        problem: The problem.
        found: Coefficients near the solution, by level.

    Returns:
        Coefficients by level and the gradient with respect to the parameters.
    """
    parameters = jnp.asarray(problem.parameters)

    def objective(c, parameters, level):
        r = problem.residual(c, (parameters, level))
        return jnp.vdot(r, r) / 2

    def one(c, level):
        slope = jax.grad(objective)
        hessian = jax.hessian(objective)
        for _ in range(6):
            c = c - jnp.linalg.solve(hessian(c, parameters, level), slope(c, parameters, level))
        cotangent, direct = jax.grad(problem.loss, (0, 1))(c, parameters, level)
        adjoint = jnp.linalg.solve(hessian(c, parameters, level), cotangent)
        mixed = jax.vjp(lambda p: slope(c, p, level), parameters)[1](adjoint)[0]
        return c, direct - mixed

    c, gradients = jax.jit(jax.vmap(one))(jnp.asarray(found), jnp.asarray(problem.levels))
    return c, jnp.mean(gradients, axis=0)


def _entry(kind: Callable[[], GridEquation], n: int, batch: int, quick: bool) -> Entry:
    linear = kind is Heat
    kinds = ("layer", "affine layer" if linear else "nonlinear layer")
    return Entry(kinds, functools.partial(_build, kind, n, batch), quick=quick)


def _build(kind, n, batch):
    return build(kind(), n, batch)


ENTRIES = {
    f"{label}-n{n}-batch{batch}": _entry(kind, n, batch, n == 8 and batch == 4)
    for label, kind in (("heat", Heat), ("sorption", DiffusionSorption))
    for n, batch in ((8, 4), (16, 4), (32, 1), (16, 32))
}
