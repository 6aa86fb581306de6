"""Inner problems at their exact solution, with the hypergradient in closed form.

Ridge regression with one regularizer per feature, a deep-equilibrium layer, a quadratic program
with equality constraints, and the lasso. Every library gets the same condition F(x, θ) = 0 and the
same exact solution, so that only its derivative rule is measured.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxopt_ext.bench.problem import Entry


class HypergradientProblem(NamedTuple):
    """An inner problem at its exact solution, in NumPy float64.

    Attributes:
        name: Its name within the suite.
        residual: F(x, θ, data), zero at the solution, a PyTree like x.
        loss: The outer loss as a function of (x, data).
        x: The solution.
        theta: The parameters θ.
        data: Everything else, not differentiated.
        gradient: The derivative of the loss with respect to θ by its closed form.
        facts: Size and conditioning in words.
    """

    name: str
    residual: Callable[[PyTree, PyTree, PyTree], PyTree]
    loss: Callable[[PyTree, PyTree], Array]
    x: PyTree
    theta: PyTree
    data: PyTree
    gradient: PyTree
    facts: str


def _half_square(v: Array) -> Array:
    return jnp.vdot(v, v) / 2


def _distance(x: Float[Array, " n"], data: dict[str, Array]) -> Float[Array, ""]:
    return _half_square(x - data["target"])


def ridge_objective(x: Array, theta: Array, data: dict[str, Array]) -> Array:
    """½‖Ax − b‖² + ½ Σ exp(θᵢ) xᵢ²."""
    return _half_square(data["A"] @ x - data["b"]) + jnp.vdot(jnp.exp(theta), x**2) / 2


def ridge(samples: int = 200, features: int = 100, seed: int = 0) -> HypergradientProblem:
    """Ridge regression; θ holds the logarithm of one regularizer per feature.

    With H = AᵀA + diag(exp θ) and x = H⁻¹Aᵀb, the hypergradient is −exp(θ) x H⁻¹∇ℓ(x), entry by
    entry.
    """
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((samples, features)) / np.sqrt(samples)
    b = rng.standard_normal(samples)
    target = rng.standard_normal(features)
    theta = -3 + rng.standard_normal(features) / 2
    hessian = A.T @ A + np.diag(np.exp(theta))
    x = np.linalg.solve(hessian, A.T @ b)
    gradient = -np.exp(theta) * x * np.linalg.solve(hessian, x - target)
    facts = f"{samples} x {features}, {features} log-regularizers, cond {_cond(hessian)}"
    data = {"A": A, "b": b, "target": target}
    return HypergradientProblem(
        "ridge", jax.grad(ridge_objective), _distance, x, theta, data, gradient, facts
    )


def equilibrium_residual(x: Array, theta: dict[str, Array], data: PyTree) -> Array:
    """The residual x − tanh(Wx + b)."""
    return x - jnp.tanh(theta["W"] @ x + theta["b"])


def equilibrium(size: int = 256, contraction: float = 0.8, seed: int = 0) -> HypergradientProblem:
    """Deep-equilibrium layer x = tanh(Wx + b) with ‖W‖₂ = `contraction`; θ is W and b.

    With D = diag(1 − x²) and (I − DW)ᵀu = ∇ℓ(x), the hypergradient is (D u xᵀ, D u).
    """
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((size, size))
    W *= contraction / np.linalg.norm(W, 2)
    b = rng.standard_normal(size)
    target = rng.standard_normal(size)
    x = np.zeros(size)
    for _ in range(500):
        x = np.tanh(W @ x + b)
    slope = 1 - x**2
    jacobian = np.eye(size) - slope[:, None] * W
    u = slope * np.linalg.solve(jacobian.T, x - target)
    gradient = {"W": np.outer(u, x), "b": u}
    facts = f"d = {size}, |W| = {contraction:g}, cond {_cond(jacobian)}"
    theta = {"W": W, "b": b}
    return HypergradientProblem(
        "equilibrium",
        equilibrium_residual,
        _distance,
        x,
        theta,
        {"target": target},
        gradient,
        facts,
    )


def kkt_residual(
    x: tuple[Array, Array], theta: dict[str, Array], data: PyTree
) -> tuple[Array, Array]:
    """The gradient of the Lagrangian of ½yᵀQy + cᵀy s.t. Ay = b, and Ay − b, at x = (y, ν)."""
    y, multipliers = x

    def lagrangian(y):
        objective = jnp.vdot(y, theta["Q"] @ y) / 2 + jnp.vdot(theta["c"], y)
        return objective + jnp.vdot(multipliers, theta["A"] @ y - theta["b"])

    return jax.grad(lagrangian)(y), theta["A"] @ y - theta["b"]


def _kkt_loss(x: tuple[Array, Array], data: dict[str, Array]) -> Array:
    return _distance(x[0], data)


def kkt(variables: int = 100, constraints: int = 30, seed: int = 0) -> HypergradientProblem:
    """Quadratic program with equality constraints; x = (y, ν), θ is Q, c, A and b.

    With K (u, p) = (∇ℓ(y), 0) for the KKT matrix K, the hypergradient is −(uyᵀ + yuᵀ)/2 for Q
    (the objective sees only its symmetric part), −u for c, −(νuᵀ + pyᵀ) for A and p for b.
    """
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((variables, variables)) / np.sqrt(variables)
    Q = factor @ factor.T + np.eye(variables) / 10
    c = rng.standard_normal(variables)
    A = rng.standard_normal((constraints, variables)) / np.sqrt(variables)
    b = rng.standard_normal(constraints)
    target = rng.standard_normal(variables)
    matrix = np.block([[Q, A.T], [A, np.zeros((constraints, constraints))]])
    y, nu = np.split(np.linalg.solve(matrix, np.concatenate([-c, b])), [variables])
    cotangent = np.concatenate([y - target, np.zeros(constraints)])
    u, p = np.split(np.linalg.solve(matrix, cotangent), [variables])
    gradient = {
        "Q": -(np.outer(u, y) + np.outer(y, u)) / 2,
        "c": -u,
        "A": -(np.outer(nu, u) + np.outer(p, y)),
        "b": p,
    }
    theta = {"Q": Q, "c": c, "A": A, "b": b}
    facts = f"{variables} variables, {constraints} equalities, cond {_cond(matrix)}"
    return HypergradientProblem(
        "kkt", kkt_residual, _kkt_loss, (y, nu), theta, {"target": target}, gradient, facts
    )


def lasso_residual(x: Array, theta: Array, data: dict[str, Array]) -> Array:
    """The residual x − prox(x − gradient step); the weight of the 1-norm is exp(θ)."""
    v = x - data["step"] * (data["A"].T @ (data["A"] @ x - data["b"]))
    return x - jnp.sign(v) * jnp.maximum(jnp.abs(v) - data["step"] * jnp.exp(theta), 0)


def lasso(samples: int = 200, features: int = 100, seed: int = 0) -> HypergradientProblem:
    """The lasso ½‖Ax − b‖² + exp(θ)‖x‖₁ as a fixed point of the proximal gradient step.

    On the support S with signs s, x_S = (A_SᵀA_S)⁻¹(A_Sᵀb − exp(θ) s), so the hypergradient is
    −exp(θ) ∇ℓ(x)_Sᵀ(A_SᵀA_S)⁻¹s.
    """
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((samples, features)) / np.sqrt(samples)
    truth = np.where(np.arange(features) < max(2, features // 6), 2.0, 0.0)
    b = A @ truth + rng.standard_normal(samples) / 10
    target = rng.standard_normal(features)
    weight = 0.25
    step = 1 / np.linalg.norm(A, 2) ** 2
    x = np.zeros(features)
    for _ in range(2000):  # until the support is found; the values follow in closed form
        v = x - step * (A.T @ (A @ x - b))
        x = np.sign(v) * np.maximum(np.abs(v) - step * weight, 0)
    support, signs = np.flatnonzero(x), np.sign(x[x != 0])
    gram = A[:, support].T @ A[:, support]
    x[support] = np.linalg.solve(gram, A[:, support].T @ b - weight * signs)
    gradient = -weight * np.vdot((x - target)[support], np.linalg.solve(gram, signs))
    data = {"A": A, "b": b, "target": target, "step": np.asarray(step)}
    facts = f"{samples} x {features}, {len(support)} active, cond {_cond(gram)} on the support"
    theta = np.asarray(np.log(weight))
    return HypergradientProblem(
        "lasso", lasso_residual, _distance, x, theta, data, np.asarray(gradient), facts
    )


def _cond(matrix: np.ndarray) -> str:
    return f"{np.linalg.cond(matrix):.3g}"


def hypergradient(
    problem: HypergradientProblem, rule: Callable[[Any, PyTree, PyTree], PyTree]
) -> Callable[[PyTree, PyTree, PyTree], PyTree]:
    """The function of (θ, x, data) that a library's derivative rule makes of a problem.

    Args:
        problem: The inner problem.
        rule: From the condition F(x, θ), x and θ to x with a derivative with respect to θ.

    Returns:
        The gradient of the outer loss with respect to θ, to be compiled.
    """

    def loss(theta, x, data):
        def condition(x, theta):
            return problem.residual(x, theta, data)

        return problem.loss(rule(condition, x, theta), data)

    return jax.grad(loss)


# The name of the problem is a kind too: some settings are meant for one problem.
ENTRIES = {
    "ridge": Entry(("hypergradient", "ridge"), ridge, quick=True),
    "equilibrium": Entry(("hypergradient", "equilibrium"), equilibrium, quick=True),
    "kkt": Entry(("hypergradient", "kkt"), kkt, quick=True),
    "lasso": Entry(("hypergradient", "lasso"), lasso, quick=True),
}
