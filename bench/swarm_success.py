"""Success rates of consensus-based optimization here and in CBXPy, variant by variant.

    python -m jaxopt_ext.bench.swarm_success --runs 100

Both get the same settings, the same law of the start, the same number of evaluations and as many
independent runs. Intervals are Wilson's at 95 %. A difference is called one if they are disjoint.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxopt_ext as jx
from jaxopt_ext import implicit, solvers
from jaxopt_ext.solvers import cbo

NEAR = 0.25  # of the minimizer, in the max norm
Objective = Callable[[Any, Any], Any]


class Variant(NamedTuple):
    """One variant of both libraries.

    Attributes:
        name: Of the variant.
        problem: What is minimized, for the table.
        fun: f(module, x) along the last axis of x, for `numpy` and `jax.numpy` alike.
        n: Number of variables.
        particles: N.
        steps: Of each run.
        box: Law of the start: uniform in it.
        ours: Settings of `CBO`.
        peer: Name of CBXPy's class.
        theirs: Its settings.
        judge: (best point, final particles) → whether a run succeeded.
        dual: From the start of a mirror method to what CBXPy takes as its start.
    """

    name: str
    problem: str
    fun: Objective
    n: int
    particles: int
    steps: int
    box: tuple[float, float]
    ours: dict[str, Any]
    peer: str
    theirs: dict[str, Any]
    judge: Callable[[np.ndarray, np.ndarray], bool]
    dual: Callable[[np.ndarray], np.ndarray] | None = None


# ---- problems ----------------------------------------------------------------------------------


def rastrigin(shift: float, module, x):
    """With its minimizer at (shift, ..., shift)."""
    z = x - shift
    return (z**2 - 10 * module.cos(2 * np.pi * z) + 10).sum(-1)


def ackley(target, module, x):
    """With its minimizer at `target`."""
    z = x - module.asarray(target)
    size = module.sqrt((z**2).mean(-1))
    return (
        -20 * module.exp(-0.2 * size) - module.exp(module.cos(2 * np.pi * z).mean(-1)) + 20 + np.e
    )


def two_wells(module, x):
    """Equal minima at (2, 2) and (−2, −2), with ripples."""
    ripples = (1 - module.cos(2 * np.pi * x)).sum(-1) / 10
    return module.minimum(((x - 2) ** 2).sum(-1), ((x + 2) ** 2).sum(-1)) / 4 + ripples


def bump(module, x):
    """Rastrigin's function around a point of the simplex."""
    z = 4 * (x - module.asarray(SHARES))
    return (z**2 - module.cos(2 * np.pi * z) + 1).sum(-1)


def quadratic(module, x):
    """−log of a normal density, up to a constant: mean (1, −1), standard deviations (1, 0.5)."""
    z = (x - module.asarray([1.0, -1.0])) / module.asarray([1.0, 0.5])
    return (z**2).sum(-1) / 2


POLE = np.array([1.0, 2.0, 2.0]) / 3
SHARES = np.array([0.4, 0.3, 0.15, 0.1, 0.05])


def _close(target):
    return lambda best, swarm: bool(np.max(np.abs(best - target)) < NEAR)


def _both(best, swarm):
    return all(np.min(np.max(np.abs(swarm - w), axis=1)) < NEAR for w in (2.0, -2.0))


def _moments(best, swarm):
    """Mean and standard deviations of the sample, within four standard errors of 400 draws."""
    spread = np.array([1.0, 0.5])
    mean = np.abs(swarm.mean(0) - np.array([1.0, -1.0])) <= 4 * spread / 20
    deviation = np.abs(swarm.std(0) / spread - 1) <= 4 / np.sqrt(800)
    return bool(np.all(mean & deviation))


def _on_sphere(best, swarm):
    return bool(abs(np.linalg.norm(best) - 1) < 1e-6 and np.max(np.abs(best - POLE)) < NEAR)


def _near_sphere(best, swarm):
    return bool(abs(np.linalg.norm(best) - 1) < 1e-2 and np.max(np.abs(best - POLE)) < NEAR)


def variants() -> tuple[Variant, ...]:
    """All that both libraries have.

    Returns:
        The variants.
    """
    far, near = functools.partial(rastrigin, 1.2), functools.partial(rastrigin, 0.7)
    pole = functools.partial(ackley, POLE)
    box = (-3.0, 3.0)
    return (
        Variant(
            "anisotropic", "Rastrigin, n = 20", far, 20, 100, 1000, box,
            {"sigma": 8.5}, "CBO", {"noise": "anisotropic", "sigma": 8.5}, _close(1.2),
        ),
        Variant(  # σ by which they explore as much; CBXPy has Gaussian increments only
            "uniform increments", "Rastrigin, n = 20", far, 20, 100, 1000, box,
            {"sigma": 10.2, "increments": cbo.uniform}, "CBO",
            {"noise": "anisotropic", "sigma": 8.5}, _close(1.2),
        ),
        Variant(
            "Rademacher increments", "Rastrigin, n = 20", far, 20, 100, 1000, box,
            {"sigma": 12.0, "increments": cbo.rademacher}, "CBO",
            {"noise": "anisotropic", "sigma": 8.5}, _close(1.2),
        ),
        Variant(
            "isotropic", "Rastrigin, n = 4", near, 4, 100, 1000, box,
            {"sigma": 0.7, "dt": 0.05, "alpha": 1e5, "noise": cbo.Isotropic()},
            "CBO", {"noise": "isotropic", "sigma": 0.7, "dt": 0.05, "alpha": 1e5}, _close(0.7),
        ),
        Variant(
            "memory, same settings", "Rastrigin, n = 10", far, 10, 50, 1000, box,
            {"sigma": 8.5, "memory": cbo.Memory(0.4, 0.4 * 8.5)},
            "CBOMemory", {"noise": "anisotropic", "sigma": 8.5}, _close(1.2),
        ),
        Variant(  # CBXPy shakes the particles around their memory too, by default
            "memory, own defaults", "Rastrigin, n = 10", far, 10, 50, 1000, box,
            {"memory": cbo.Memory()},
            "CBOMemory", {"noise": "anisotropic", "sigma": 8.5}, _close(1.2),
        ),
        Variant(
            "random batches", "Rastrigin, n = 4", near, 4, 100, 1000, box,
            {"sigma": 8.5, "batch": cbo.Batch(50)}, "CBO",
            {"noise": "anisotropic", "sigma": 8.5,
             "batch_args": {"size": 50, "partial": False}}, _close(0.7),
        ),
        Variant(
            "polarized, both minima", "two wells, n = 2", two_wells, 2, 100, 500, box,
            {"sigma": 1.0, "alpha": 10.0, "polarized": cbo.Polarized(1.0)},
            "PolarCBO",
            {"noise": "anisotropic", "sigma": 1.0, "alpha": 10.0, "kappa": 1.0,
             "kernel_factor_mode": "const"}, _both,
        ),
        Variant(
            "on the sphere", "Ackley, n = 3", pole, 3, 50, 500, (-1.0, 1.0),
            {"sigma": 1.0, "alpha": 1e3, "noise": cbo.Isotropic(), "projection": cbo.Sphere()},
            "HyperSurfaceCBO", {"noise": "isotropic", "sigma": 1.0, "alpha": 1e3}, _on_sphere,
        ),
        Variant(
            "drift to the sphere", "Ackley, n = 3", pole, 3, 50, 500, (-1.0, 1.0),
            {"sigma": 1.0, "alpha": 1e3, "constraint_drift": cbo.ConstraintDrift(_sphere, 0.01)},
            "DriftConstrainedCBO",
            {"noise": "anisotropic", "sigma": 1.0, "alpha": 1e3, "eps": 0.01,
             "constraints": ({"name": "sphere"},)}, _near_sphere,
        ),
        Variant(
            "mirror map to the simplex", "ripples, n = 5", bump, 5, 50, 500, (-1.0, 1.0),
            {"sigma": 5.0, "alpha": 1e3, "mirror": jax.nn.softmax},
            "MirrorCBO",
            {"noise": "anisotropic", "sigma": 5.0, "alpha": 1e3, "mirrormap": "EntropySimplex"},
            lambda best, swarm: bool(np.max(np.abs(best - SHARES)) < NEAR / 4),
            lambda dual: np.exp(dual) / np.exp(dual).sum(-1, keepdims=True),
        ),
        Variant(
            "sampling", "normal law, n = 2", quadratic, 2, 400, 200, box,
            {}, "CBS", {"alpha": 1.0, "dt": 0.5, "mode": "sampling"}, _moments,
        ),
    )  # fmt: skip


def _sphere(y, args):
    return jnp.sum(y**2) - 1


# ---- runs --------------------------------------------------------------------------------------


def interval(successes: int, runs: int) -> tuple[float, float]:
    """Wilson's interval at 95 % of a rate."""
    z, rate = 1.959964, successes / runs
    center = (rate + z**2 / (2 * runs)) / (1 + z**2 / runs)
    half = z * np.sqrt(rate * (1 - rate) / runs + z**2 / (4 * runs**2)) / (1 + z**2 / runs)
    return max(0.0, center - half), min(1.0, center + half)


def run_ours(variant: Variant, runs: int, seed: int = 0) -> tuple[int, float]:
    """How many runs succeed, and the CPU seconds of all after compilation."""
    start = cbo.Uniform(*variant.box)
    if variant.peer == "CBS":
        solver = cbo.consensus_based_sampling(particles=variant.particles, start=start)
    else:
        # no run ends early, so that both spend all evaluations
        solver = solvers.CBO(
            particles=variant.particles, start=start, rtol=0.0, atol=0.0, **variant.ours
        )

    def one(key):
        found = jx.solve(
            jx.Minimization(lambda x, args: variant.fun(jnp, x)),
            solver,
            jnp.zeros(variant.n),
            key=key,
            max_steps=variant.steps,
            adjoint=implicit.DetachedAdjoint(),
        )
        return found.value, solver.ask(found.state.solver)

    keys = jax.random.split(jax.random.key(seed), runs)
    program = jax.jit(jax.vmap(one)).lower(keys).compile()
    before = time.process_time()
    best, swarms = map(np.asarray, jax.block_until_ready(program(keys)))
    seconds = time.process_time() - before
    return sum(map(variant.judge, best, swarms)), seconds


def run_peer(variant: Variant, runs: int, seed: int = 0) -> tuple[int, float]:
    """The same for CBXPy."""
    from cbx import dynamics
    from cbx.scheduler import scheduler

    np.random.seed(seed)  # it draws from NumPy's global generator
    shape = (runs, variant.particles, variant.n)
    x = np.random.uniform(*variant.box, shape)
    if variant.dual is not None:
        x = variant.dual(x)
    options = {"verbosity": 0, "max_it": variant.steps, "f_dim": "3D", **variant.theirs}
    before = time.process_time()
    dynamic = getattr(dynamics, variant.peer)(
        lambda x: variant.fun(np, x), x=x, seed=seed, **options
    )
    # by default α grows by 5 % a step; a given one is meant to stay
    dynamic.optimize(sched=scheduler([]) if "alpha" in variant.theirs else "default")
    seconds = time.process_time() - before
    return sum(map(variant.judge, dynamic.best_particle, dynamic.x)), seconds


def _rate(successes: int, runs: int) -> str:
    low, high = interval(successes, runs)
    return f"{successes / runs:.2f} [{low:.2f}, {high:.2f}]"


def main(arguments: list[str] | None = None) -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description="Success rates here and in CBXPy.")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--only", default="", help="part of a variant's name")
    options = parser.parse_args(arguments)
    print("| variant | problem | particles, steps | here | CBXPy | CPU seconds, CBXPy / here |")
    print("| --- | --- | --- | --- | --- | --- |")
    for variant in variants():
        if options.only in variant.name:
            (ours, own), (theirs, other) = (f(variant, options.runs) for f in (run_ours, run_peer))
            print(
                f"| {variant.name} | {variant.problem} | {variant.particles}, {variant.steps} "
                f"| {_rate(ours, options.runs)} | {_rate(theirs, options.runs)} "
                f"| {other / own:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
