"""One of several processes that share the particles; run by the test beside it."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_ext as jx
from jaxopt_ext import implicit
from jaxopt_ext.solvers import CBO, cbo


def rastrigin(y, shift):
    z = y - shift
    return jnp.sum(z**2 - 10 * jnp.cos(2 * jnp.pi * z) + 10)


def main(process, processes, port):
    jax.config.update("jax_enable_x64", True)
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    mesh = jax.make_mesh(
        (jax.device_count(),), ("particles",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    solver = CBO(particles=16, start=cbo.Uniform(-3.0, 3.0), mesh=mesh)

    def run(shift):
        found = jx.solve(
            jx.Minimization(rastrigin),
            solver,
            jnp.zeros(3),
            shift,
            key=jax.random.key(0),
            max_steps=30,
            adjoint=implicit.DetachedAdjoint(),
        )
        return found.state.solver.consensus, found.value, found.objective

    shared = jax.jit(run, out_shardings=NamedSharding(mesh, P()))
    found = shared(jnp.array([0.3, -1.1, 0.8]))
    numbers = np.concatenate([np.ravel(part) for part in found])
    print("RESULT", jax.process_count(), *map(repr, numbers.tolist()))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
