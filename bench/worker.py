"""A worker process: reads tasks as JSON lines from its input, answers each with a row.

One worker serves one library in one dtype, so that libraries cannot disturb each other and a crash
or a time-out costs one task. Run by `runner`, not by hand.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys
import time
import traceback
from typing import TextIO

from jaxopt_ext.bench.contender import Contender
from jaxopt_ext.bench.problem import Entry
from jaxopt_ext.bench.record import Row
from jaxopt_ext.bench.suite import Suite, Task, load


def blank(suite: str, problem: str, contender: Contender, task: Task) -> Row:
    """The row of a task before anything is known.

    Args:
        suite: Name of the suite.
        problem: Name of the problem.
        contender: The contender.
        task: The task.

    Returns:
        A row with its key filled in.
    """
    return Row(
        suite=suite,
        problem=problem,
        package=contender.package,
        solver=contender.solver,
        setting=contender.setting,
        config=dict(contender.config),
        seed=task.seed,
        dtype=task.dtype,
        quick=task.quick,
    )


def missing(contender: Contender) -> str | None:
    """Why a contender cannot run here, `None` if it can.

    Args:
        contender: The contender; its library is looked for, not imported.

    Returns:
        The reason.
    """
    if contender.module and importlib.util.find_spec(contender.module) is None:
        return f"{contender.package} is not installed"
    return None


def version(package: str) -> str:
    """The installed version of a distribution, empty if it is not installed.

    Args:
        package: Name of the distribution.

    Returns:
        The version.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def execute(suite: Suite, entry: Entry, contender: Contender, task: Task) -> Row:
    """The row of a task; an exception becomes a row too.

    Args:
        suite: The suite.
        entry: The problem.
        contender: The contender.
        task: The task.

    Returns:
        The row.
    """
    row = blank(suite.name, task.problem, contender, task)
    row.version = version(contender.package)
    reason = missing(contender)
    if reason is not None:
        row.status, row.message = "skipped", reason
        return row
    try:
        suite.execute(row, entry, contender, task)
    except ImportError as error:
        row.status, row.message = "skipped", str(error)
    except Exception as error:
        row.status = "error"
        row.message = "".join(traceback.format_exception_only(error)).strip()[:500]
        traceback.print_exc()
    return row


def main() -> None:
    """Serve tasks until the input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is not an answer
    import jax

    # rows tell compile time, which a cache would hide
    jax.config.update("jax_enable_compilation_cache", False)
    serve(sys.stdin, answers)


def serve(tasks: TextIO, answers: TextIO) -> None:
    """Answer each line of `tasks`.

    Args:
        tasks: One JSON list per line, the fields of a `Task`.
        answers: Gets one JSON object per line: "ready" once, then rows.
    """
    warm_up()
    print(json.dumps({"kind": "ready"}), file=answers, flush=True)
    suites: dict[str, tuple[Suite, dict[str, Entry], dict[str, Contender]]] = {}
    for line in tasks:
        task = Task(*json.loads(line))
        if task.suite not in suites:
            suite = load(task.suite)
            contenders = {one.name: one for one in suite.contenders()}
            suites[task.suite] = suite, suite.entries(), contenders
        suite, entries, contenders = suites[task.suite]
        row = execute(suite, entries[task.problem], contenders[task.contender], task)
        print(row.to_json(), file=answers, flush=True)


def warm_up() -> None:
    """Start XLA and LAPACK, so that the first row does not pay for it."""
    import jax.numpy as jnp

    matrix = jnp.eye(2)
    jnp.linalg.cholesky(matrix).block_until_ready()
    jnp.linalg.eigh(matrix)[0].block_until_ready()
    time.process_time()


if __name__ == "__main__":
    main()
