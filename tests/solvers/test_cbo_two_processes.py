"""The same swarm in one process and in two that talk over the loopback interface."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np

PROGRAM = pathlib.Path(__file__).with_name("cbo_two_processes.py")


def run(processes):
    """Consensus, best particle and objective as each process prints them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["JAX_PLATFORMS"] = "cpu"
    children = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(i), str(processes), str(port)],
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
        assert int(lines[0][1]) == processes
        found.append([float(number) for number in lines[0][2:]])
    return found


def test_two_processes_have_the_consensus_of_one():
    alone = run(1)[0]
    assert len(alone) == 7 and np.all(np.isfinite(alone))
    for shared in run(2):
        np.testing.assert_allclose(shared, alone, rtol=1e-9)
