"""Rows of a benchmark file: JSON Lines, one row per problem, contender, seed and dtype.

A file holds rows of two kinds, told apart by `kind`: an `environment` per run, and a `result` that
names its environment by `env_id`.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VERSION = 1
STATUSES = {
    "ok": "the accuracy that the suite asks for is met at the point returned",
    "missed": "it stopped, or its budget ended, before that accuracy",
    "diverged": "the objective at the point returned is above that of the start",
    "nonfinite": "the point returned, or the objective there, is not finite",
    "error": "it raised an exception or its process died",
    "timeout": "it was stopped at the time limit",
    "skipped": "it could not be tried; the message says why",
}


@dataclasses.dataclass
class Row:
    """What one contender did on one problem.

    Attributes:
        suite: Name of the suite.
        problem: Name of the problem, `*` where a whole library was skipped.
        package: Distribution that the contender belongs to; `jaxopt_ext` is ours.
        solver: Name of the method.
        setting: "default", or the name of the documented tuned setting.
        seed: Seed of the contender's random numbers.
        dtype: "float64" or "float32".
        status: One of `STATUSES`.
        message: Why, where the status is not "ok".
        quick: Whether the run was of the quick form.
        env_id: The environment of the run.
        version: Of the library.
        config: Options that the contender was given.
        problem_hash: `Problem.digest()`.
        n: Number of variables.
        m: Number of constraints, or of residuals.
        params: Facts of the problem.
        f0: Objective at the start.
        f: Objective at the point returned, evaluated by us.
        f_star: Least objective known beforehand.
        error: What the suite's accuracy test compares with its tolerance.
        tolerance: That tolerance.
        grad_norm: Max norm of the gradient at the point returned, evaluated by us.
        violation: Largest violation of a constraint there.
        x_hash: Twelve hexadecimal digits of the point returned.
        iterations: As the contender reports them.
        counts: Audited evaluations by kind: value, gradient, hvp, ...
        declared: Evaluations as the contender itself reports them, where it does.
        work: The counts as one number, in evaluations of the objective.
        compile_cpu_s: CPU seconds until it is ready to solve: trace, lower, compile; `None` where
            nothing is compiled.
        run_cpu_s: CPU seconds of each timed solve after one to warm up.
        run_wall_s: Wall seconds of the same.
        peak_bytes: Temporary memory of the compiled program where the whole solve is one, else the
            growth of the process in its first solve; `None` if unknown.
        history: `work` and `f`, best objective so far against work, at most 200 points.
        extras: Further numbers of the suite by name.
    """

    suite: str
    problem: str
    package: str
    solver: str
    setting: str = "default"
    seed: int = 0
    dtype: str = "float64"
    status: str = "ok"
    message: str = ""
    quick: bool = False
    env_id: str = ""
    version: str = ""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    problem_hash: str = ""
    n: int | None = None
    m: int | None = None
    params: dict[str, Any] = dataclasses.field(default_factory=dict)
    f0: float | None = None
    f: float | None = None
    f_star: float | None = None
    error: float | None = None
    tolerance: float | None = None
    grad_norm: float | None = None
    violation: float | None = None
    x_hash: str = ""
    iterations: int | None = None
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    declared: dict[str, int] = dataclasses.field(default_factory=dict)
    work: float | None = None
    compile_cpu_s: float | None = None
    run_cpu_s: list[float] = dataclasses.field(default_factory=list)
    run_wall_s: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int | None = None
    history: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    extras: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def contender(self) -> str:
        """What tables and plots call the contender."""
        tuned = "" if self.setting == "default" else f" ({self.setting})"
        return f"{self.package} {self.solver}{tuned}"

    @property
    def key(self) -> tuple:
        """What makes a row unique within a file."""
        config = json.dumps(self.config, sort_keys=True, default=str)
        name = (self.suite, self.problem, self.package, self.solver, self.setting, config)
        return (*name, self.seed, self.dtype, self.quick)

    @property
    def cpu(self) -> float | None:
        """CPU seconds of the fastest timed solve."""
        return min(self.run_cpu_s, default=None)

    @property
    def wall(self) -> float | None:
        """Wall seconds of the fastest timed solve."""
        return min(self.run_wall_s, default=None)

    def to_json(self) -> str:
        """The row as one line; non-finite numbers become strings, as JSON has none."""
        return json.dumps({"kind": "result", "schema": VERSION, **_plain(dataclasses.asdict(self))})


_FLOATS = ("f0", "f", "f_star", "error", "tolerance", "grad_norm", "violation", "work")


def row(fields: dict[str, Any]) -> Row:
    """A row from its JSON object.

    Args:
        fields: What `Row.to_json` wrote, parsed.

    Returns:
        The row.

    Raises:
        ValueError: A missing or unknown field, an unknown status or another schema version.
    """
    fields = dict(fields)
    version = fields.pop("schema", None)
    if version != VERSION:
        raise ValueError(f"schema is {version!r}, expected {VERSION}")
    fields.pop("kind", None)
    known = {f.name: f for f in dataclasses.fields(Row)}
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"unknown fields: {', '.join(unknown)}")
    needed = [name for name in ("suite", "problem", "package", "solver") if name not in fields]
    if needed:
        raise ValueError(f"missing fields: {', '.join(needed)}")
    for name in _FLOATS:
        if isinstance(fields.get(name), str):
            fields[name] = float(fields[name])
    if fields.get("history"):
        fields["history"] = {k: [float(x) for x in v] for k, v in fields["history"].items()}
    result = Row(**fields)
    if result.status not in STATUSES:
        raise ValueError(f"status is {result.status!r}, expected one of {', '.join(STATUSES)}")
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def environment_json(environment: dict[str, Any]) -> str:
    """The environment as one line of a benchmark file."""
    return json.dumps({"kind": "environment", "schema": VERSION, **_plain(environment)})


def digest(value: Any) -> str:
    """Twelve hexadecimal digits of a JSON-like value."""
    text = json.dumps(_plain(value), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file.

    A last line without its end is half written by an interrupted run, and passed over.

    Args:
        path: The file.

    Yields:
        One object per line.

    Raises:
        ValueError: A line that is not a JSON object, with its number.
    """
    text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            return
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        yield value


def read(*paths: Path) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    """All rows and environments of benchmark files.

    Where two rows have the same key the later one stands.

    Args:
        *paths: JSON Lines files.

    Returns:
        The rows, and the environments by `env_id`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A malformed line, with the file, the line's number and the reason.
    """
    rows: dict[tuple, Row] = {}
    environments = {}
    for path in paths:
        for number, fields in enumerate(lines(Path(path)), start=1):
            try:
                if fields.get("kind") == "environment":
                    environments[fields["env_id"]] = fields
                else:
                    one = row(fields)
                    rows[one.key] = one
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, row {number}: {error}") from error
    return list(rows.values()), environments
