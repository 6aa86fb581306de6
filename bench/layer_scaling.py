"""How constraint layers scale: `python -m jaxopt_ext.bench.layer_scaling TABLE`.

TABLE is cost, slopes, memory or processes. Measured are forward and backward pass of least-squares
rows of u'' + a u = f with random tanh features and one parameter in front of them. Times are CPU
times, the least of several runs, except for `processes`, which compares wall times and needs a
quiet machine.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_ext import layers, solvers

REPEATS = 5


def features(theta, x, n):
    """Values and second derivatives of n features at the points x, the same for every expert."""
    random = np.random.default_rng(0)
    slopes = theta * jnp.asarray(random.uniform(4, 14, n) * random.choice([-1, 1], n))
    shifts = slopes * jnp.asarray(random.random(n))
    t = jnp.tanh(x[:, None] * slopes[None, :] - shifts[None, :])
    return t, -2 * t * (1 - t**2) * slopes[None, :] ** 2


def residual_of(n: int, cubic: bool):
    """Rows of u'' + 400 (u + u³ / 10) = f, or without the cubic term."""

    def residual(c, args):
        x, theta = args
        value, second = features(theta, x, n)
        u = value @ c
        reaction = u + 0.1 * u**3 if cubic else u
        return (second @ c + 400 * reaction - 400 * jnp.sin(9 * x)) / 400

    return residual


def layer_of(n: int, cubic: bool, backend: str, mesh: Mesh | None = None):
    """Experts with n functions each."""
    solver = solvers.GradNormSmooth(solvers.GaussNewton()) if cubic else None
    constraint = layers.HardConstraint(
        residual_of(n, cubic), solver, linear=not cubic, ridge=0.1 if cubic else 1e-3
    )
    return layers.MixtureOfExperts(constraint, backend=backend, mesh=mesh)


def step_of(layer, n: int):
    """Loss, and gradient in the parameter of the features."""

    def loss(theta, init, points):
        found = layer(init, points, theta)
        return jnp.sum(jnp.cos(found.value)), found.report.ok

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def points_of(total: int, experts: int):
    """Points of [0, 1], divided."""
    return (jnp.arange(total, dtype=float) + 0.5).reshape(experts, total // experts) / total


def cpu_time(step, *args) -> float:
    """CPU seconds of a call after compilation."""
    (_, ok), _ = jax.block_until_ready(step(*args))
    assert bool(jnp.all(ok)), "a solve did not converge"
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        jax.block_until_ready(step(*args))
        times.append(time.process_time() - start)
    return min(times)


def measure(total: int, n: int, experts: int, cubic: bool, backend: str) -> float:
    """CPU seconds of a forward and backward pass, n functions per expert."""
    layer = layer_of(n, cubic, backend)
    args = jnp.asarray(1.0), jnp.zeros((experts, n)), points_of(total, experts)
    return cpu_time(step_of(layer, n), *args)


def cost() -> list[dict]:
    """One global solve against eight experts: as many functions in all, and as many each."""
    rows = []
    for cubic, total, n in ((False, 8192, 64), (False, 8192, 128), (True, 8192, 64)):
        whole = measure(total, n, 1, cubic, "vmap")
        for functions in (n // 8, n):
            for backend in ("vmap", "map"):
                parts = measure(total, functions, 8, cubic, backend)
                rows.append(
                    {
                        "nonlinear": cubic, "points": total, "global functions": n,
                        "functions per expert": functions, "backend": backend,
                        "global s": whole, "8 experts s": parts, "ratio": whole / parts,
                    }
                )  # fmt: skip
    return rows


def slopes() -> list[dict]:
    """Exponents of cost in the number of points and of functions, with those of the theory."""
    rows = []
    sweeps = {
        "points": ([2048, 4096, 8192, 16384, 32768], 1.0),
        "functions": ([32, 64, 128, 256], 2.0),
    }
    for experts in (1, 8):
        for what, (values, theory) in sweeps.items():
            times = []
            for v in values:
                total, n = (v, 32) if what == "points" else (8192, v)
                times.append(measure(total, n, experts, False, "map"))
            exponent = np.polyfit(np.log(values), np.log(times), 1)[0]
            upper = np.polyfit(np.log(values[-2:]), np.log(times[-2:]), 1)[0]
            rows.append(
                {
                    "experts": experts, "against": what, "values": values, "seconds": times,
                    "exponent": float(exponent), "of the last two": float(upper),
                    "theory for large sizes": theory,
                }
            )  # fmt: skip
    return rows


def temporary_bytes(experts: int, devices: int, cubic: bool, total: int = 8192, n: int = 16) -> int:
    """Bytes of temporary arrays per device that the compiled forward and backward pass needs."""
    mesh = jax.make_mesh(
        (devices,), ("experts",), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,)
    )
    divided = NamedSharding(mesh, P("experts"))
    step = step_of(layer_of(n, cubic, "vmap", mesh), n)
    init = jax.device_put(jnp.zeros((experts, n)), divided)
    points = jax.device_put(points_of(total, experts), divided)
    compiled = step.lower(jnp.asarray(1.0), init, points).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def memory() -> list[dict]:
    """The same points divided among K experts on K devices, and all of 8 experts on fewer."""
    rows = []
    for cubic in (False, True):
        whole = temporary_bytes(1, 1, cubic)
        for experts, devices in ((1, 1), (2, 2), (4, 4), (8, 8), (8, 1), (8, 4)):
            size = temporary_bytes(experts, devices, cubic)
            rows.append(
                {
                    "nonlinear": cubic, "experts": experts, "devices": devices,
                    "bytes per device": size,
                    "times devices, relative to one expert": size * devices / whole,
                }
            )  # fmt: skip
    return rows


# ---- two processes -------------------------------------------------------------------------

LARGE = {"total": 65536, "n": 64, "experts": 8}


def child(number: int, count: int, port: int, cores: str, calls: int = 10) -> None:
    """One of `count` processes on some cores: wall seconds of a call, loss and gradient."""
    os.sched_setaffinity(0, {int(c) for c in cores.split(",")})
    if count > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", count, number)
    mesh = jax.make_mesh((jax.device_count(),), ("experts",), axis_types=(AxisType.Auto,))
    total, n, experts = LARGE["total"], LARGE["n"], LARGE["experts"]
    hosts = np.zeros((experts, n)), np.asarray(points_of(total, experts))
    init, points = (
        jax.make_array_from_callback(
            host.shape, NamedSharding(mesh, P("experts")), lambda place, host=host: host[place]
        )
        for host in hosts
    )
    layer = layer_of(n, True, "map", mesh)

    def loss(theta, init, points):
        found = layer(init, points, theta)
        return jnp.sum(jnp.cos(found.value)), jnp.all(found.report.ok)

    run = jax.value_and_grad(loss, has_aux=True)
    step = jax.jit(run, out_shardings=NamedSharding(mesh, P()))
    (value, ok), gradient = jax.block_until_ready(step(jnp.asarray(1.0), init, points))
    assert bool(ok), "a solve did not converge"
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(step(jnp.asarray(1.0), init, points))
        times.append(time.perf_counter() - start)
    print("RESULT", json.dumps([min(times), float(value), float(gradient)]), flush=True)


def processes() -> list[dict]:
    """One process on one core and on two, against two processes with a core each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cases = {
        "one process, one core": ["0"],
        "one process, two cores": ["0,1"],
        "two processes, a core each": ["0", "1"],
    }
    rows = []
    for name, cores in cases.items():
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "jaxopt_ext.bench.layer_scaling", "child",
                 str(i), str(len(cores)), str(port), own],
                stdout=subprocess.PIPE, text=True,
            )
            for i, own in enumerate(cores)
        ]  # fmt: skip
        outputs = [process.communicate()[0] for process in running]
        line = next(li for li in (outputs[0] or "").splitlines() if li.startswith("RESULT"))
        seconds, value, gradient = json.loads(line.removeprefix("RESULT"))
        rows.append({"case": name, "wall s": seconds, "loss": value, "gradient": gradient})
    for row in rows:
        row["times faster than one process on two cores"] = rows[1]["wall s"] / row["wall s"]
    return rows


def main() -> None:
    """Print the rows asked for, one JSON object a line."""
    jax.config.update("jax_enable_x64", True)
    if sys.argv[1:2] == ["child"]:
        number, count, port, cores = sys.argv[2:]
        child(int(number), int(count), int(port), cores)
        return
    parser = argparse.ArgumentParser(description="How constraint layers scale")
    tables = {"cost": cost, "slopes": slopes, "memory": memory, "processes": processes}
    parser.add_argument("table", choices=tables)
    table = parser.parse_args().table
    if table == "memory":
        jax.config.update("jax_num_cpu_devices", 8)
    for row in tables[table]():
        print(json.dumps(row))


if __name__ == "__main__":
    main()
