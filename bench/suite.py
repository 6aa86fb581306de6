"""A suite: problems x contenders, a measure of accuracy, and what a run may spend."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxopt_ext.bench.contender import Contender
from jaxopt_ext.bench.problem import Entry
from jaxopt_ext.bench.record import Row


class Task(NamedTuple):
    """One row to be made.

    Attributes:
        suite: Name of the suite.
        problem: Name of the problem.
        contender: Name of the contender.
        seed: Seed of the contender's random numbers.
        dtype: "float64" or "float32".
        quick: Whether the run is of the quick form.
        repeats: Most timed solves.
        evaluations: Most evaluations of the objective; `None` means the suite's own budget.
    """

    suite: str
    problem: str
    contender: str
    seed: int
    dtype: str
    quick: bool
    repeats: int
    evaluations: int | None = None


class Suite(NamedTuple):
    """A suite.

    Attributes:
        name: As on the command line.
        title: Heading of its part of the report.
        summary: What is measured, on what, and when a problem counts as solved.
        entries: The problems by name; cheap, builds none.
        kinds: The kinds of problem whose contenders take part.
        execute: Measures one task and fills its row.
        seeds: Number of seeds for random contenders in the full form; the quick form has one.
        traced: Whether only contenders take part whose whole solve JAX traces.
        own: Contenders of this suite alone.
    """

    name: str
    title: str
    summary: str
    entries: Callable[[], dict[str, Entry]]
    kinds: tuple[str, ...]
    execute: Callable[[Row, Entry, Contender, Task], Any]
    seeds: int = 1
    traced: bool = False
    own: tuple[Contender, ...] = ()

    def contenders(self) -> tuple[Contender, ...]:
        """Everybody who takes part, ours first; no peer is imported.

        Returns:
            The contenders.
        """
        from jaxopt_ext.bench import ours, peers

        everybody = (*self.own, *ours.CONTENDERS, *peers.contenders())
        return tuple(
            one
            for one in everybody
            if set(one.kinds) & set(self.kinds) and (one.traced or not self.traced)
        )


NAMES = (
    "smooth",
    "glm",
    "nlp",
    "blackbox",
    "implicit",
    "transform",
    "scale",
    "sso",
    "bilevel",
    "physics",
)


def load(name: str) -> Suite:
    """The suite of that name.

    Args:
        name: One of `NAMES`, or a module of your own that has a `SUITE`, as `my.module`.

    Returns:
        The suite.

    Raises:
        ValueError: No such suite.
    """
    module = f"jaxopt_ext.bench.suites.{name}" if name in NAMES else name
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise  # the suite is there, something that it imports is not
        raise ValueError(
            f"suite is {name!r}, expected one of {', '.join(NAMES)}, or an importable module"
        ) from None
    suite = getattr(found, "SUITE", None)
    if not isinstance(suite, Suite):
        raise ValueError(f"suite is {name!r}: the module has no SUITE")
    return suite
