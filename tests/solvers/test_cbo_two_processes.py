"""The same swarm in one process and in two that talk over the loopback interface."""

import pathlib

import numpy as np

PROGRAM = pathlib.Path(__file__).with_name("cbo_two_processes.py")


def test_two_processes_have_the_consensus_of_one(result_of_processes):
    def run(processes):
        found = result_of_processes(PROGRAM, processes)
        assert [int(count) for count, *_ in found] == [processes] * processes
        return [[float(number) for number in numbers] for _, *numbers in found]

    (alone,) = run(1)
    assert len(alone) == 7 and np.all(np.isfinite(alone))
    for shared in run(2):
        np.testing.assert_allclose(shared, alone, rtol=1e-9)
