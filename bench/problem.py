"""A benchmark problem: functions with their data, a start, and what is known of the solution."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, PyTree

Function = Callable[[Any, Any], Any]  # (variables, data) -> value

# What a problem can be solved as; `glm` is logistic regression with data X, y and lam. The implicit
# suite has kinds of its own.
KINDS = ("smooth", "least_squares", "glm", "blackbox", "program")


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A problem that every contender gets in the same form.

    The functions take `(variables, data)`: one flat array of variables, and arrays that enter the
    compiled program as inputs, so that no contender compiles the data in as constants.

    Attributes:
        name: Its name within the suite.
        fun: The objective, a scalar.
        init: The starting point in float64; contenders cast it to the dtype of the run.
        data: PyTree of NumPy arrays or `jax.experimental.sparse.BCOO`, float64 where real.
        residual: r where the objective is ½‖r‖², a flat array.
        equality: c_E, zero where feasible, a flat array.
        inequality: c_I, nonpositive where feasible, a flat array.
        lower: Lower bounds of the variables; of the search box where the kind is `blackbox`.
        upper: Upper bounds, as `lower`.
        optimum: The least objective known, `None` if unknown.
        meta: Facts for the report: where it comes from, size, conditioning.
    """

    name: str
    fun: Function
    init: Float[np.ndarray, " n"]
    data: PyTree = ()
    residual: Function | None = None
    equality: Function | None = None
    inequality: Function | None = None
    lower: Float[np.ndarray, " n"] | None = None
    upper: Float[np.ndarray, " n"] | None = None
    optimum: float | None = None
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        """The number of variables."""
        return int(self.init.size)

    @property
    def box(self) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Lower and upper bounds, infinite where there are none."""
        lower = np.full(self.size, -np.inf) if self.lower is None else np.asarray(self.lower)
        upper = np.full(self.size, np.inf) if self.upper is None else np.asarray(self.upper)
        return lower, upper

    def digest(self) -> str:
        """Twelve hexadecimal digits that change with the start, the bounds or the data."""
        sha = hashlib.sha256(self.name.encode())
        for leaf in jax.tree.leaves((self.init, self.lower, self.upper, self.data)):
            array = np.ascontiguousarray(leaf)
            sha.update(f"{array.dtype}{array.shape}".encode())
            sha.update(array.tobytes())
        return sha.hexdigest()[:12]


class Entry(NamedTuple):
    """A problem in the list of a suite, built only where it is solved.

    Attributes:
        kinds: What it can be solved as: `KINDS`, or those of a suite with its own problems.
        build: Makes the problem, mostly a `Problem`; raises `ImportError` where a package that it
            needs is missing.
        quick: Whether it belongs to the quick form of the suite.
    """

    kinds: tuple[str, ...]
    build: Callable[[], Any]
    quick: bool = False
