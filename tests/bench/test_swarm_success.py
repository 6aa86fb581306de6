"""Success rates of swarms: the interval, and both libraries on one small problem."""

import numpy as np
import pytest

from jaxopt_ext.bench import swarm_success


def test_interval_is_wilsons():
    # Newcombe 1998, table I: 81 of 263, and none of 20
    np.testing.assert_allclose(swarm_success.interval(81, 263), (0.2553, 0.3662), atol=5e-5)
    np.testing.assert_allclose(swarm_success.interval(0, 20), (0.0, 0.1611), atol=5e-5)


def test_both_libraries_find_an_easy_minimum_and_miss_what_is_out_of_reach():
    pytest.importorskip("cbx")
    found = {variant.name: variant for variant in swarm_success.variants()}
    easy = found["isotropic"]._replace(
        fun=lambda module, x: ((x - 0.7) ** 2).sum(-1), n=2, particles=20, steps=200
    )
    never = easy._replace(judge=lambda best, swarm: False)
    for run in (swarm_success.run_ours, swarm_success.run_peer):
        assert run(easy, 5)[0] == 5
        assert run(never, 5)[0] == 0
