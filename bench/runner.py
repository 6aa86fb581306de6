"""Runs suites: plans the tasks, serves them to one worker process per library, writes the rows."""

import contextlib
import datetime
import fnmatch
import json
import os
import platform
import queue
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxopt_ext.bench import peers, record
from jaxopt_ext.bench.contender import OURS, Contender
from jaxopt_ext.bench.suite import Suite, Task, load
from jaxopt_ext.bench.worker import blank, missing, version

PACKAGES = ("jaxopt-ext", "jax", "jaxlib", "numpy", "scipy", "optax", "equinox")


class Options(NamedTuple):
    """What the user asked for.

    Attributes:
        quick: Whether to run the quick form: the few problems marked so, default settings only.
        solvers: Patterns; a contender runs if its library or its name matches one.
        problems: Pattern of problem names.
        seeds: Seeds of random contenders; `None` means the suite's own.
        dtypes: "float64", "float32" or both.
        evaluations: Most evaluations of the objective; `None` means the suite's own.
        timeout: Wall seconds for one row.
        repeats: Most timed solves.
        threads: Threads of each worker.
    """

    quick: bool = False
    solvers: tuple[str, ...] = ("*",)
    problems: str = "*"
    seeds: tuple[int, ...] | None = None
    dtypes: tuple[str, ...] = ("float64",)
    evaluations: int | None = None
    timeout: float = 600.0
    repeats: int = 5
    threads: int = 1


def matches(contender: Contender, patterns: Iterable[str]) -> bool:
    """Whether a contender's library, method or whole name, such as "optax lbfgs", matches.

    `ours` stands for this library.

    Args:
        contender: The contender.
        patterns: Shell patterns, case ignored.

    Returns:
        Whether it does.
    """
    names = (contender.package.lower(), contender.solver.lower(), contender.name.lower())
    wanted = [OURS if p == "ours" else p.lower() for p in patterns]
    return any(fnmatch.fnmatchcase(name, p) for name in names for p in wanted)


def plan(suite: Suite, options: Options) -> list[tuple[Contender, Task]]:
    """The tasks of a suite, in the order of its problems and contenders.

    Args:
        suite: The suite.
        options: What the user asked for.

    Returns:
        Pairs of contender and task.

    Raises:
        ValueError: Nothing matches.
    """
    entries = {
        name: entry
        for name, entry in suite.entries().items()
        if fnmatch.fnmatchcase(name, options.problems) and (entry.quick or not options.quick)
    }
    contenders = [
        c
        for c in suite.contenders()
        if matches(c, options.solvers) and (c.setting == "default" or not options.quick)
    ]
    tasks = []
    for name, entry in entries.items():
        for contender in contenders:
            if not set(contender.kinds) & set(entry.kinds):
                continue
            for dtype in options.dtypes:
                for seed in _seeds(suite, contender, options):
                    task = Task(
                        suite.name,
                        name,
                        contender.name,
                        seed,
                        dtype,
                        options.quick,
                        options.repeats,
                        options.evaluations,
                    )
                    tasks.append((contender, task))
    if not tasks:
        known = ", ".join(sorted({c.package for c in suite.contenders()}))
        raise ValueError(
            f"nothing to run in {suite.name}: no problem matches {options.problems!r} for the "
            f"solvers {', '.join(options.solvers)}; libraries in this suite: {known}"
        )
    return tasks


def _seeds(suite: Suite, contender: Contender, options: Options) -> Sequence[int]:
    if not contender.random:
        return (0,)
    if options.seeds is not None:
        return options.seeds
    return range(1 if options.quick else suite.seeds)


def run(
    suites: Sequence[str], out: Path, options: Options, progress: Callable[[int, int, str], Any]
) -> list[record.Row]:
    """Run suites and append a row for each task that the file does not hold yet.

    Args:
        suites: Names.
        out: The JSON Lines file; made if missing, else resumed.
        options: What the user asked for.
        progress: Called with the number of tasks done, their total and what comes next.

    Returns:
        The rows made now.

    Raises:
        ValueError: An unknown suite, nothing to run, or a malformed file.
    """
    planned = [item for name in suites for item in plan(load(name), options)]
    made = record.read(out)[0] if out.exists() else []
    # what was skipped is tried again: the package may be there by now
    done = {row.key for row in made if row.status != "skipped"}
    planned = [(c, t) for c, t in planned if blank(t.suite, t.problem, c, t).key not in done]
    # a busy spell of the machine should not hit the same contender of each problem
    random.Random(0).shuffle(planned)
    groups: dict[tuple[str, str], list[tuple[Contender, Task]]] = {}
    for contender, task in planned:
        groups.setdefault((contender.package, task.dtype), []).append((contender, task))

    out.parent.mkdir(parents=True, exist_ok=True)
    environment = describe(options)
    rows = []
    with out.open("a+b") as end:  # the last line of an interrupted run may be incomplete
        end.seek(0)
        end.truncate(end.read().rfind(b"\n") + 1)
    with out.open("a", encoding="utf-8") as file:
        if planned:
            print(record.environment_json(environment), file=file, flush=True)
        for row in _rows(groups, options):
            row.env_id = environment["env_id"]
            print(row.to_json(), file=file, flush=True)
            rows.append(row)
            progress(len(rows), len(planned), f"{row.suite} {row.problem} {row.contender}")
        if planned:
            closing = {**environment, "load_at_end": _load()}
            closing["noisy"] = environment["noisy"] or _busy(closing["load_at_end"])
            print(record.environment_json(closing), file=file, flush=True)
    return rows


def _rows(
    groups: dict[tuple[str, str], list[tuple[Contender, Task]]], options: Options
) -> Iterator[record.Row]:
    for (_, dtype), tasks in groups.items():
        reason = missing(tasks[0][0])
        if reason is not None:
            for contender, task in tasks:
                row = blank(task.suite, task.problem, contender, task)
                row.status, row.message = "skipped", reason
                yield row
            continue
        worker: Worker | None = None
        hopeless: WorkerFailure | None = None  # it does not even start
        try:
            for contender, task in tasks:
                try:
                    if hopeless is not None:
                        raise hopeless
                    worker = worker or Worker(dtype, options.threads)
                    row = worker.ask(task, options.timeout)
                except WorkerFailure as failure:
                    if worker is not None:
                        hopeless = None if worker.ready else failure
                        worker.close()
                        worker = None
                    row = blank(task.suite, task.problem, contender, task)
                    row.version = version(contender.package)
                    row.status, row.message = failure.status, failure.message
                yield row
        finally:
            if worker is not None:
                worker.close()


class WorkerFailure(Exception):
    """A worker that did not answer.

    Attributes:
        status: "timeout" or "error".
        message: Why.
    """

    def __init__(self, status: str, message: str):
        super().__init__(message)
        self.status, self.message = status, message


class Worker:
    """A worker process.

    Args:
        dtype: "float64" or "float32"; float32 runs with JAX's 64-bit types off.
        threads: Threads that it may use.
    """

    def __init__(self, dtype: str, threads: int):
        self.errors = tempfile.TemporaryFile(mode="w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jaxopt_ext.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, **settings(dtype, threads)},
        )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.ready = False

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def _next(self, timeout: float) -> str:
        try:
            line = self.lines.get(timeout=timeout)
        except queue.Empty:
            raise WorkerFailure("timeout", f"no answer within {timeout:g} s") from None
        if not line:
            code = self.process.wait()
            self.errors.seek(0)
            last = self.errors.read().strip().splitlines()[-1:] or ["no message"]
            raise WorkerFailure("error", f"the process died with code {code}: {last[0][:300]}")
        return line

    def ask(self, task: Task, timeout: float) -> record.Row:
        """The row of a task.

        Args:
            task: The task.
            timeout: Wall seconds for the answer.

        Returns:
            The row.

        Raises:
            WorkerFailure: No answer in time, or the process died.
        """
        if not self.ready:  # starting up is not the task's time
            self._next(max(timeout, 120.0))
            self.ready = True
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(task), file=self.process.stdin, flush=True)
        return record.row(json.loads(self._next(timeout)))

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def settings(dtype: str, threads: int) -> dict[str, str]:
    """Environment variables of a worker.

    Args:
        dtype: "float64" or "float32".
        threads: Threads that it may use.

    Returns:
        The variables.
    """
    eigen = "true" if threads > 1 else "false"
    xla = f"--xla_cpu_multi_thread_eigen={eigen} intra_op_parallelism_threads={threads}"
    return {
        "XLA_FLAGS": xla,
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
        "JAX_ENABLE_X64": "1" if dtype == "float64" else "0",
    }


def describe(options: Options) -> dict[str, Any]:
    """The environment of a run: machine, versions, threads, load.

    Args:
        options: What the user asked for.

    Returns:
        The environment, with its `env_id`, which is the same for all suites.
    """
    names = sorted({*PACKAGES, *(one.package for one in peers.contenders())})
    fixed = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "settings": settings("float64", options.threads),
        "versions": {name: version(name) for name in names},
        "git": _git(),
    }
    load = _load()
    return {
        "env_id": record.digest(fixed),
        **fixed,
        "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_at_start": load,
        "noisy": _busy(load),
    }


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _busy(load: float | None) -> bool:
    return load is not None and load > (os.cpu_count() or 1)


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git() -> str:
    """The commit of the checkout that runs, with a plus sign if it was changed; empty if none."""
    here = Path(__file__).resolve().parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        run = lambda *args: subprocess.run(  # noqa: E731
            ["git", "-C", str(here), *args], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        return run("rev-parse", "--short=12", "HEAD") + ("+" if run("status", "--short") else "")
    return ""
