"""The test session: 64-bit, eight devices, no silent promotion of ranks or dtypes."""

import os
import socket
import subprocess
import sys

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """Compiled programs of one module are of no use to the next, and memory is finite."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def result_of_processes():
    """Runs `PROGRAM NUMBER COUNT PORT` as that many processes that talk over the loopback.

    Each prints one line `RESULT words`; the fixture's value returns these words, a list for each.
    """

    def run(program, processes):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        environment["JAX_PLATFORMS"] = "cpu"
        children = [
            subprocess.Popen(
                [sys.executable, str(program), str(i), str(processes), str(port)],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for i in range(processes)
        ]  # fmt: skip
        try:
            outputs = [child.communicate(timeout=240)[0] for child in children]
        finally:
            for child in children:
                child.kill()
        found = []
        for output in outputs:
            lines = [line.split() for line in output.splitlines() if line.startswith("RESULT")]
            assert len(lines) == 1, output
            found.append(lines[0][1:])
        return found

    return run
