"""The contract of a contender: a method of a library with its settings, ours or a peer's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxopt_ext.bench.problem import Problem

OURS = "jaxopt_ext"
LARGEST_DENSE = 5000  # 200 MB a matrix


class Budget(NamedTuple):
    """What a contender may spend and what it should reach.

    Attributes:
        tolerance: The accuracy that the suite will test, in the suite's measure.
        steps: Most iterations.
        evaluations: Most evaluations of the objective.
        seed: Seed of its random numbers.
        dtype: "float64" or "float32".
    """

    tolerance: float
    steps: int
    evaluations: int
    seed: int
    dtype: str


class Answer(NamedTuple):
    """What a contender returns.

    Attributes:
        x: The point, a flat array.
        iterations: As the contender counts them.
        declared: Evaluations as the contender counts them, by kind.
        message: Its own word on how it ended; a traced contender has none.
    """

    x: Any
    iterations: Any = None
    declared: dict[str, Any] = {}  # noqa: RUF012
    message: str = ""


class Contender(NamedTuple):
    """A method with its settings.

    Attributes:
        package: Distribution that it belongs to.
        solver: Name of the method.
        kinds: The kinds of problem that it is run on.
        make: From problem and budget to what solves it: a function of (start, data) that can be
            traced, or, where `traced` is false, one without arguments that is ready to run. A
            library is imported here, not with its adapter.
        traced: Whether JAX traces the whole solve.
        setting: "default", or the name of the documented tuned setting.
        config: What the setting consists of.
        random: Whether it draws random numbers, so that seeds make a difference.
        module: The module that must be installed.
        dense: Whether it keeps a dense n x n matrix; then it is not tried above `LARGEST_DENSE`
            variables.
    """

    package: str
    solver: str
    kinds: tuple[str, ...]
    make: Callable[[Any, Budget], Callable[..., Any]]
    traced: bool = True
    setting: str = "default"
    config: dict[str, Any] = {}  # noqa: RUF012
    random: bool = False
    module: str = ""
    dense: bool = False

    @property
    def name(self) -> str:
        """What tables and the command line call it."""
        tuned = "" if self.setting == "default" else f" ({self.setting})"
        return f"{self.package} {self.solver}{tuned}"

    def prepare(self, problem: Problem, budget: Budget) -> "Prepared":
        """Compile everything for one problem.

        Args:
            problem: The problem.
            budget: What the contender may spend.

        Returns:
            What is ready to run.
        """
        solve = self.make(problem, budget)
        if not self.traced:
            return Prepared(solve, None)
        start, data = cast((problem.init, problem.data), budget.dtype)
        fun = jax.jit(lambda start, data: tuple(solve(start, data))[:3])
        program = fun.lower(start, data).compile()
        return Prepared(
            lambda: Answer(*jax.block_until_ready(program(start, data))), temporary_bytes(program)
        )


class Prepared(NamedTuple):
    """A contender with everything compiled for one problem.

    Attributes:
        solve: Blocks until its answer is there.
        temporary_bytes: Memory of a traced contender's program besides its inputs and outputs.
    """

    solve: Callable[[], Answer]
    temporary_bytes: int | None


def temporary_bytes(program: Any) -> int | None:
    """Memory that a compiled program needs besides its inputs and outputs.

    Args:
        program: What `jax.stages.Lowered.compile` returned.

    Returns:
        Bytes, `None` where the platform does not tell.
    """
    memory = program.memory_analysis()
    return None if memory is None else int(memory.temp_size_in_bytes)


def cast(tree: PyTree, dtype: str) -> PyTree:
    """The arrays of a PyTree on the device, real ones in `dtype`.

    Args:
        tree: NumPy or JAX arrays.
        dtype: "float64" or "float32".

    Returns:
        JAX arrays of the same structure.
    """

    def one(leaf):
        leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        return jnp.asarray(leaf, dtype if np.issubdtype(leaf.dtype, np.floating) else leaf.dtype)

    return jax.tree.map(one, tree)


def compiled(fun: Callable, *args: Any) -> Callable[..., Any]:
    """`fun` compiled ahead of time for arguments like `args`; its calls block.

    Args:
        fun: A function of PyTrees of arrays.
        *args: Arguments of the shapes and dtypes that it will get.

    Returns:
        The compiled function.
    """
    program = jax.jit(fun).lower(*args).compile()
    return lambda *args: jax.block_until_ready(program(*args))
