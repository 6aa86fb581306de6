"""One of several processes that share the experts; run by the test beside it."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_ext import layers


def residual(c, args):
    x, theta = args
    order = jnp.arange(4, dtype=x.dtype)[None, :]
    u = jnp.cos(theta * order * x[:, None] + order) @ c
    return u + 0.1 * u**3 - jnp.cos(3 * x)


def main(process, processes, port):
    jax.config.update("jax_enable_x64", True)
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    mesh = jax.make_mesh(
        (jax.device_count(),), ("experts",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    layer = layers.MixtureOfExperts(layers.HardConstraint(residual, ridge=0.1), mesh=mesh)
    points = np.linspace(-1.6, 1.6, 64).reshape(4, 16)
    local, init = (
        jax.make_array_from_callback(
            host.shape, NamedSharding(mesh, P("experts")), lambda place, host=host: host[place]
        )
        for host in (points, np.zeros((4, 4)))
    )

    def loss(theta, init, local):
        found = layer(init, local, theta)
        return jnp.sum(jnp.cos(found.value)), jnp.all(found.report.ok)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), out_shardings=NamedSharding(mesh, P()))
    (value, ok), gradient = run(jnp.asarray(1.3), init, local)
    print("RESULT", jax.process_count(), bool(ok), repr(float(value)), repr(float(gradient)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
