"""Run time, compile time and accuracy of hypergradients against other libraries.

Run it as `python -m jaxopt_ext.bench.hypergradients`.

Four inner problems with a closed-form hypergradient: ridge regression with one regularizer per
feature, a deep-equilibrium layer, a quadratic program with equality constraints, and the lasso.
Every package gets the same condition F(x, θ) = 0 and the same exact solution, computed beforehand,
so that only its derivative rule is timed. What is measured is `jax.jit(jax.grad(loss))`: tracing
and lowering, compilation, and then many calls. The error is the largest over the arrays of θ of
the relative error (Euclidean norm) against the closed form in float64; float32 runs get the same
numbers rounded, with JAX's 64-bit types off, so that their error holds the rounding of the data
too.

Each package runs in a process of its own, on one thread; the processes take turns for several
rounds, and every figure is the least of all rounds. A process first starts XLA and LAPACK, and each
row is lowered once before it is timed, with JAX's caches emptied in between, so that no row pays
for what Python imports or sets up at first use.

A variant that declares structure or names another linear solver is a row of its own, for us and
for the others. In the summary one of our rows is compared with the fastest row of another package
that is as accurate: its error is at most ten times ours, or ten units of rounding. "Best" is the
fastest of our rows with an error below 1e-9 (float64) or 1e-5 (float32).
"""

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxopt_ext import implicit
from jaxopt_ext.bench.compile_time import Skipped, start_up

THREADS = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
DTYPES = ("float64", "float32")
ACCURATE = {"float64": 1e-9, "float32": 1e-5}
TIGHT = {"float64": 1e-12, "float32": 1e-6}
CALLS = 200
QUICK_CALLS = 30
BATCH = 10


# ---- problems with a closed-form hypergradient -------------------------------------------------


class Problem(NamedTuple):
    """An inner problem at its exact solution, in NumPy float64.

    Attributes:
        residual: F(x, θ, data), zero at the solution, a PyTree like x.
        loss: The outer loss as a function of (x, data).
        x: The solution.
        theta: The parameters θ.
        data: Everything else, not differentiated.
        gradient: The derivative of the loss with respect to θ by its closed form.
        facts: Size and conditioning in words.
    """

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


def ridge(samples: int = 200, features: int = 100, seed: int = 0) -> Problem:
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
    return Problem(jax.grad(ridge_objective), _distance, x, theta, data, gradient, facts)


def equilibrium_residual(x: Array, theta: dict[str, Array], data: PyTree) -> Array:
    """The residual x − tanh(Wx + b)."""
    return x - jnp.tanh(theta["W"] @ x + theta["b"])


def equilibrium(size: int = 256, contraction: float = 0.8, seed: int = 0) -> Problem:
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
    return Problem(equilibrium_residual, _distance, x, theta, {"target": target}, gradient, facts)


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


def kkt(variables: int = 100, constraints: int = 30, seed: int = 0) -> Problem:
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
    return Problem(kkt_residual, _kkt_loss, (y, nu), theta, {"target": target}, gradient, facts)


def lasso_residual(x: Array, theta: Array, data: dict[str, Array]) -> Array:
    """The residual x − prox(x − gradient step); the weight of the 1-norm is exp(θ)."""
    v = x - data["step"] * (data["A"].T @ (data["A"] @ x - data["b"]))
    return x - jnp.sign(v) * jnp.maximum(jnp.abs(v) - data["step"] * jnp.exp(theta), 0)


def lasso(samples: int = 200, features: int = 100, seed: int = 0) -> Problem:
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
    return Problem(lasso_residual, _distance, x, theta, data, np.asarray(gradient), facts)


def _cond(matrix: np.ndarray) -> str:
    return f"{np.linalg.cond(matrix):.3g}"


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "ridge": ridge,
    "equilibrium": equilibrium,
    "kkt": kkt,
    "lasso": lasso,
}


# ---- derivative rules --------------------------------------------------------------------------

Function = Callable[[PyTree, PyTree], PyTree]
Rule = Callable[[Function, PyTree, PyTree], PyTree]  # (condition, x, θ) -> x with a derivative


class SymmetricRoot(implicit.Root):
    """F(x, θ) = 0 with a symmetric Jacobian."""

    symmetric: ClassVar[bool] = True


class PositiveDefiniteRoot(SymmetricRoot):
    """F(x, θ) = 0 with a symmetric positive definite Jacobian."""

    positive_definite: ClassVar[bool] = True


def ours(
    dtype: str,
    kind: type[implicit.Root] = implicit.Root,
    solver: str | None = None,
    **options: Any,
) -> Rule:
    """`implicit.attach`, with a linear solver of `jaxopt_ext.implicit` by name."""
    linear_solver = None
    if solver is not None:
        make = getattr(implicit, solver, None)
        if make is None:
            raise LookupError(f"jaxopt_ext.implicit has no {solver}")
        linear_solver = make(**options)

    def rule(condition, x, theta):
        return implicit.attach(kind(condition), x, theta, linear_solver=linear_solver)

    return rule


def jaxopt(dtype: str, solver: str | None = None, tight: bool = False) -> Rule:
    """`custom_root` of jaxopt around a solver that knows the solution."""
    from jax.flatten_util import ravel_pytree
    from jaxopt import implicit_diff, linear_solve

    options: dict[str, Any] = {}
    if solver is not None:
        solve = getattr(linear_solve, solver)
        if tight:
            options["solve"] = functools.partial(solve, tol=TIGHT[dtype])
        else:

            def dense(matvec, b):  # its dense solvers take no PyTrees
                flat, unravel = ravel_pytree(b)
                return unravel(solve(lambda v: ravel_pytree(matvec(unravel(v)))[0], flat))

            options["solve"] = dense

    def rule(condition, x, theta):
        return implicit_diff.custom_root(condition, **options)(lambda init, theta: init)(x, theta)

    return rule


def _known(inputs):
    return inputs[1], None


def _rewrite(root, residual, inputs):
    return inputs[0](root, inputs[2])


def optimistix(dtype: str, tag: str | None = None, solver: str | None = None) -> Rule:
    """`ImplicitAdjoint` of optimistix around a solver that knows the solution.

    The condition is closure-converted first, as `optimistix.root_find` does.
    """
    import lineax
    import optimistix as optx

    tags = frozenset() if tag is None else frozenset([getattr(lineax, tag)])
    adjoint = optx.ImplicitAdjoint()
    if solver is not None:
        linear_solver = getattr(lineax, solver)(rtol=TIGHT[dtype], atol=TIGHT[dtype])
        adjoint = optx.ImplicitAdjoint(linear_solver)

    def rule(condition, x, theta):
        fun = eqx.filter_closure_convert(condition, x, theta)
        return adjoint.apply(_known, _rewrite, (fun, x, theta), tags)[0]

    return rule


class Contender(NamedTuple):
    """A package with one choice of options.

    Attributes:
        package: The name of the distribution.
        variant: "default", or what is chosen.
        build: From the name of the dtype to the rule.
        problems: The problems it is meant for.
    """

    package: str
    variant: str
    build: Callable[[str], Rule]
    problems: tuple[str, ...] = tuple(PROBLEMS)

    @property
    def name(self) -> str:
        """What the tables call it."""
        return f"{self.package} {self.variant}"


def _contender(package, variant, problems=tuple(PROBLEMS), **options) -> Contender:
    build = {"jaxopt_ext": ours, "jaxopt": jaxopt, "optimistix": optimistix}[package]
    return Contender(package, variant, functools.partial(build, **options), problems)


OURS = "jaxopt_ext"
DEFAULT = f"{OURS} default"
LIBRARIES = (OURS, "jaxopt", "optimistix")
_definite, _rest = ("ridge",), ("equilibrium", "kkt", "lasso")
CONTENDERS = (
    _contender(OURS, "default"),
    _contender(OURS, "pos. definite", _definite, kind=PositiveDefiniteRoot),
    _contender(OURS, "CG", _definite, kind=PositiveDefiniteRoot, solver="CG"),
    _contender(OURS, "symmetric", ("kkt",), kind=SymmetricRoot),
    _contender(OURS, "MINRES", ("kkt",), kind=SymmetricRoot, solver="MINRES"),
    _contender(OURS, "Neumann(30)", ("equilibrium",), solver="Neumann", terms=30),
    _contender(OURS, "Neumann(100)", ("lasso",), solver="Neumann", terms=100),
    _contender(OURS, "NormalCG", ("equilibrium", "lasso"), solver="NormalCG"),
    _contender("jaxopt", "default"),
    _contender("jaxopt", "normal CG, tight", solver="solve_normal_cg", tight=True),
    _contender("jaxopt", "CG, tight", _definite, solver="solve_cg", tight=True),
    _contender("jaxopt", "Cholesky", _definite, solver="solve_cholesky"),
    _contender("jaxopt", "LU", _rest, solver="solve_lu"),
    _contender("optimistix", "default"),
    _contender("optimistix", "pos. definite", _definite, tag="positive_semidefinite_tag"),
    _contender("optimistix", "CG", _definite, tag="positive_semidefinite_tag", solver="CG"),
    _contender("optimistix", "symmetric", ("kkt",), tag="symmetric_tag"),
)


# ---- one package, in its own process -----------------------------------------------------------


class Measurement(NamedTuple):
    """What is known of one contender on one problem in one dtype.

    Attributes:
        lower: Seconds of tracing and lowering.
        compile: Seconds of compilation.
        run: Seconds of the fastest call.
        cpu: CPU seconds per call, in the batch of calls with the least.
        error: Relative error of the hypergradient.
        version: The package's version.
    """

    lower: float
    compile: float
    run: float
    cpu: float
    error: float
    version: str


class Key(NamedTuple):
    """Which measurement.

    Attributes:
        problem: A key of `PROBLEMS`.
        dtype: Name of the floating dtype.
        contender: A name from `CONTENDERS`.
    """

    problem: str
    dtype: str
    contender: str


Results = dict[Key, Measurement | Skipped]


def hypergradient(problem: Problem, rule: Rule) -> Callable[[PyTree, PyTree, PyTree], PyTree]:
    """The function of (θ, x, data) that a package's rule makes of a problem.

    Args:
        problem: The inner problem.
        rule: How the solution gets its derivative.

    Returns:
        The gradient of the outer loss with respect to θ, to be compiled.
    """

    def loss(theta, x, data):
        def condition(x, theta):
            return problem.residual(x, theta, data)

        return problem.loss(rule(condition, x, theta), data)

    return jax.grad(loss)


def inputs_of(problem: Problem, dtype: str) -> tuple[PyTree, PyTree, PyTree]:
    """(θ, x, data) as JAX arrays of a dtype."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf, dtype), (problem.theta, problem.x, problem.data)
    )


def relative_error(found: PyTree, expected: PyTree) -> float:
    """The largest over the leaves of ‖found − expected‖ / ‖expected‖, in float64."""

    def of_leaf(a, b):
        return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)

    return float(np.max(jax.tree.leaves(jax.tree.map(of_leaf, found, expected))))


def measure(problem: Problem, rule: Rule, dtype: str, calls: int, version: str = "") -> Measurement:
    """Compile and run one hypergradient in this process.

    Args:
        problem: The inner problem.
        rule: The derivative rule of a package.
        dtype: Name of the floating dtype.
        calls: How many calls to time.
        version: The package's version, for the record.

    Returns:
        The measurement.
    """
    with jax.enable_x64(dtype == "float64"):
        return _measure(problem, rule, dtype, calls, version)


def _measure(problem, rule, dtype, calls, version) -> Measurement:
    inputs = inputs_of(problem, dtype)
    jax.jit(hypergradient(problem, rule)).lower(*inputs)  # first use
    jax.clear_caches()
    began = time.perf_counter()
    lowered = jax.jit(hypergradient(problem, rule)).lower(*inputs)
    between = time.perf_counter()
    executable = lowered.compile()
    ended = time.perf_counter()
    error = relative_error(executable(*inputs), problem.gradient)
    run = cpu = float("inf")
    for _ in range(-(-calls // BATCH)):
        cpu_began = time.process_time()
        for _ in range(BATCH):
            call_began = time.perf_counter()
            jax.block_until_ready(executable(*inputs))
            run = min(run, time.perf_counter() - call_began)
        cpu = min(cpu, (time.process_time() - cpu_began) / BATCH)
    return Measurement(between - began, ended - between, run, cpu, error, version)


def measure_library(package: str, dtypes: Sequence[str], calls: int) -> Results:
    """All rows of one package in this process; meaningful only if the process is fresh.

    Args:
        package: One of `LIBRARIES`.
        dtypes: Names of floating dtypes.
        calls: How many calls to time.

    Returns:
        Measurement or reason by row.
    """
    problems = {name: make() for name, make in PROBLEMS.items()}
    results: Results = {}
    reason = None
    try:
        version = importlib.metadata.version(package.replace("_", "-"))
        next(c for c in CONTENDERS if c.package == package).build("float64")
        start_up()
    except ImportError as error:  # also importlib.metadata.PackageNotFoundError
        version, reason = "", str(error)
    for dtype in dtypes:
        for name, problem in problems.items():
            for contender in CONTENDERS:
                if contender.package != package or name not in contender.problems:
                    continue
                key = Key(name, dtype, contender.name)
                if reason is not None:
                    results[key] = Skipped(reason)
                    continue
                try:
                    rule = contender.build(dtype)
                    results[key] = measure(problem, rule, dtype, calls, version)
                except LookupError as error:
                    results[key] = Skipped(str(error.args[0]))
                except Exception as error:  # one row that fails must not hide the others
                    first = (str(error).strip().splitlines() or [""])[0]
                    results[key] = Skipped(f"failed: {type(error).__name__}: {first}")
    return results


def measure_in_new_process(package: str, dtypes: Sequence[str], calls: int) -> Results:
    """Run `measure_library` in a fresh interpreter on one thread.

    Args:
        package: One of `LIBRARIES`.
        dtypes: Names of floating dtypes.
        calls: How many calls to time.

    Returns:
        Its answer, or the last line of its error output for every row where it failed.
    """
    command = [sys.executable, "-m", "jaxopt_ext.bench.hypergradients", "--worker", package]
    command += ["--calls", str(calls), "--dtypes", *dtypes]
    environment = {**os.environ, **THREADS}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {
            Key(problem, dtype, contender.name): Skipped(f"failed: {last}")
            for dtype in dtypes
            for contender in CONTENDERS
            if contender.package == package
            for problem in contender.problems
        }
    results: Results = {}
    for line in done.stdout.strip().splitlines():
        record = json.loads(line)
        key = Key(*(record.pop(field) for field in Key._fields))
        results[key] = Skipped(**record) if "reason" in record else Measurement(**record)
    return results


# ---- all of them -------------------------------------------------------------------------------


def least(runs: Sequence[Measurement | Skipped]) -> Measurement | Skipped:
    """The least of every figure over the rounds; a skipped one only if no round succeeded."""
    measured = [run for run in runs if isinstance(run, Measurement)]
    if not measured:
        return runs[0]
    return measured[0]._replace(
        **{
            field: min(getattr(run, field) for run in measured)
            for field in ("lower", "compile", "run", "cpu")
        }
    )


def library_of(contender: str) -> str:
    """The package that a contender's name starts with."""
    return contender.split(" ", 1)[0]


def fastest_peer(
    mine: Measurement, rows: dict[str, Measurement | Skipped], dtype: str
) -> tuple[str, Measurement] | None:
    """The fastest row of another package that is as accurate as one of ours.

    Args:
        mine: Our row.
        rows: All rows of the same problem and dtype by contender.
        dtype: Name of the floating dtype.

    Returns:
        Name and row, or `None` if there is none with an error of at most ten times ours or ten
        units of rounding.
    """
    limit = 10 * max(mine.error, float(jnp.finfo(dtype).eps))
    peers = [
        (name, run)
        for name, run in rows.items()
        if library_of(name) != OURS and isinstance(run, Measurement) and run.error <= limit
    ]
    return min(peers, key=lambda peer: peer[1].run, default=None)


def best_of_ours(
    rows: dict[str, Measurement | Skipped], dtype: str
) -> tuple[str, Measurement] | None:
    """Our fastest row among the accurate ones, or `None`."""
    mine = [
        (name, run)
        for name, run in rows.items()
        if library_of(name) == OURS
        and isinstance(run, Measurement)
        and run.error <= ACCURATE[dtype]
    ]
    return min(mine, key=lambda own: own[1].run, default=None)


def table(rows: dict[str, Measurement | Skipped]) -> str:
    """The rows of one problem and dtype as text.

    Args:
        rows: Measurement or reason by contender.

    Returns:
        One line per contender; a skipped one says why.
    """
    lines = [
        f"{'':28} {'version':>8} {'lower (s)':>10} {'compile (s)':>12} {'run (ms)':>9} "
        f"{'CPU (ms)':>9} {'error':>8}"
    ]
    for name, run in rows.items():
        if isinstance(run, Skipped):
            lines.append(f"{name:28} skipped: {run.reason}")
            continue
        lines.append(
            f"{name:28} {run.version:>8} {run.lower:10.3f} {run.compile:12.3f} "
            f"{1e3 * run.run:9.3f} {1e3 * run.cpu:9.3f} {run.error:8.1e}"
        )
    return "\n".join(lines)


def by_problem(results: Results) -> dict[tuple[str, str], dict[str, Measurement | Skipped]]:
    """Rows by contender, for each problem and dtype, in the order of `CONTENDERS`."""
    groups: dict[tuple[str, str], dict[str, Measurement | Skipped]] = {}
    for problem in PROBLEMS:
        for dtype in DTYPES:
            rows = {
                contender.name: results[key]
                for contender in CONTENDERS
                if (key := Key(problem, dtype, contender.name)) in results
            }
            if rows:
                groups[problem, dtype] = rows
    return groups


def summary(results: Results) -> str:
    """Our default and our best row against the fastest peer that is as accurate.

    Args:
        results: Measurement or reason by row.

    Returns:
        Two lines per problem and dtype: ratios of the time of a call and of the time from the
        Python function to the executable (below 1 is a win), and against whom.
    """
    lines = [f"{'':12} {'':8} {'':8} {'run':>6} {'compile':>8}"]
    for (problem, dtype), rows in by_problem(results).items():
        default = rows.get(DEFAULT)
        choices = {
            "default": (DEFAULT, default) if isinstance(default, Measurement) else None,
            "best": best_of_ours(rows, dtype),
        }
        for label, choice in choices.items():
            head = f"{problem:12} {dtype:8} {label:8}"
            if choice is None:
                lines.append(f"{head} no measurement of ours")
                continue
            name, mine = choice
            peer = fastest_peer(mine, rows, dtype)
            if peer is None:
                lines.append(f"{head} {name}: no other package as accurate ({mine.error:.1e})")
                continue
            ratio = mine.run / peer[1].run
            start = (mine.lower + mine.compile) / (peer[1].lower + peer[1].compile)
            outcome = "win" if ratio < 1 else "loss"
            lines.append(f"{head} {ratio:6.2f} {start:8.2f}  {outcome}: {name} vs {peer[0]}")
    return "\n".join(lines)


def records(results: Results, calls: int, rounds: int) -> list[dict[str, Any]]:
    """One JSON-ready record per row, with versions, machine and settings."""
    common = {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": THREADS,
        "load": os.getloadavg(),
        "seed": 0,
        "calls": calls,
        "rounds": rounds,
    }
    return [{**key._asdict(), **run._asdict(), **common} for key, run in results.items()]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every package and print the tables and the summary.

    Args:
        argv: Command line; `None` means that of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m jaxopt_ext.bench.hypergradients",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="float64, one round, few calls")
    parser.add_argument("--rounds", type=int, help="fresh processes per package (3; quick: 1)")
    parser.add_argument(
        "--calls", type=int, help=f"timed calls per row ({CALLS}; quick: {QUICK_CALLS})"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: both")
    parser.add_argument("--out", help="file to write JSON lines to")
    parser.add_argument("--worker", choices=LIBRARIES, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    calls = options.calls or (QUICK_CALLS if options.quick else CALLS)
    rounds = options.rounds or (1 if options.quick else 3)
    dtypes = options.dtypes or (DTYPES[:1] if options.quick else DTYPES)
    if calls < 1 or rounds < 1:
        parser.error(f"--calls is {calls} and --rounds is {rounds}, expected at least 1")
    if options.worker is not None:
        # a cache would hide what is measured
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_enable_compilation_cache", False)
        for key, run in measure_library(options.worker, dtypes, calls).items():
            print(json.dumps({**key._asdict(), **run._asdict()}))
        return

    load = os.getloadavg()[0]
    runs: dict[Key, list[Measurement | Skipped]] = {}
    for turn in range(rounds):  # round robin, so a busy spell hits everyone
        for package in LIBRARIES:
            print(f"\rround {turn + 1} of {rounds}: {package:20}", end="", file=sys.stderr)
            for key, run in measure_in_new_process(package, dtypes, calls).items():
                runs.setdefault(key, []).append(run)
    print(f"\r{'':60}\r", end="", file=sys.stderr)
    results = {key: least(of_one) for key, of_one in runs.items()}

    print("Hypergradients at a given exact solution, one CPU thread")
    print(f"least of {rounds} fresh processes per package and of {calls} calls in each")
    print(f"tight: relative tolerance {TIGHT['float64']:g} (float64), {TIGHT['float32']:g}")
    print(f"load average {load:.1f} before, {os.getloadavg()[0]:.1f} after, {os.cpu_count()} cores")
    for (problem, dtype), rows in by_problem(results).items():
        print(f"\n{problem}, {dtype} ({PROBLEMS[problem]().facts})\n{table(rows)}")
    print("\nours / fastest row of another package with an error of at most ten times ours")
    print(summary(results))
    if options.out is not None:
        with open(options.out, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in records(results, calls, rounds))


if __name__ == "__main__":
    main()
