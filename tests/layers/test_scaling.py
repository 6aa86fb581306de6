"""Memory per device, and the program that measures how layers scale."""

import jax.numpy as jnp
import numpy as np

from jaxopt_ext.bench import layer_scaling


def test_memory_per_device_falls_with_the_number_of_experts_at_fixed_functions_of_each():
    two, eight = (layer_scaling.temporary_bytes(k, k, False, total=16384) for k in (2, 8))
    assert eight * 4 <= 1.05 * two


def test_measured_step_has_the_derivative_of_its_loss():
    n, experts = 6, 2
    layer = layer_scaling.layer_of(n, False, "map")
    step = layer_scaling.step_of(layer, n)
    args = jnp.zeros((experts, n)), layer_scaling.points_of(64, experts)
    (_, _), gradient = step(jnp.asarray(1.0), *args)
    h = 1e-5
    up, down = (step(jnp.asarray(1.0 + s), *args)[0][0] for s in (h, -h))
    np.testing.assert_allclose(gradient, (up - down) / (2 * h), rtol=1e-6)
