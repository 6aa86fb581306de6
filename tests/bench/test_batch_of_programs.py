"""The batch of programs: both ways find the same optima."""

import jax
import pytest

from jaxopt_ext.bench import batch_of_programs


def test_batch_and_loop_agree():
    pytest.importorskip("cyipopt")
    problem, parameters = batch_of_programs.family(5)
    batch = batch_of_programs.ours(problem, parameters, jax.vmap)
    loop = batch_of_programs.loop_over_ipopt(problem, parameters)
    assert batch["solved"] == loop["solved"] == 5
    assert batch["mean objective"] == pytest.approx(loop["mean objective"], rel=1e-6)
