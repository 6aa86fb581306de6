"""The same experts in one process and in two that talk over the loopback interface."""

import pathlib

import numpy as np

PROGRAM = pathlib.Path(__file__).with_name("two_processes.py")


def test_two_processes_give_the_same_loss_and_gradient(result_of_processes):
    def run(processes):
        found = result_of_processes(PROGRAM, processes)
        assert [(int(count), ok) for count, ok, *_ in found] == [(processes, "True")] * processes
        return [(float(value), float(gradient)) for *_, value, gradient in found]

    (alone,) = run(1)
    for pair in run(2):
        np.testing.assert_allclose(pair, alone, rtol=1e-9)
