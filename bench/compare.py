"""The regression gate: counts and statuses of a run against those of an earlier one, never times.

The earlier run is a benchmark file, or a baseline as `baseline` writes it. A run is told by suite,
problem, contender, seed, dtype and whether it is quick; its options are not part of that, so a
changed default shows up as changed work.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from jaxopt_ext.bench import record
from jaxopt_ext.bench.record import Row

IDENTITY = ("suite", "problem", "package", "solver", "setting", "seed", "dtype", "quick")
DEFAULTS = {"setting": "default", "seed": 0, "dtype": "float64", "quick": False}
RANK = {status: rank for rank, status in enumerate(record.STATUSES)}  # from good to bad
WORST = 3


class Gate(NamedTuple):
    """What is still let through.

    Attributes:
        counts: Geometric mean over a suite of the new work over the old.
        single: The same ratio for one run.
        status: How many runs may have a worse status.
    """

    counts: float = 1.15
    single: float = 2.0
    status: int = 0


GATE = Gate()


class Change(NamedTuple):
    """A run that both files hold.

    Attributes:
        base: The earlier row.
        new: The later row.
    """

    base: Row
    new: Row

    @property
    def worse(self) -> bool:
        """Whether the status got worse."""
        return RANK[self.new.status] > RANK[self.base.status]

    @property
    def ratio(self) -> float | None:
        """New work over old where both succeed; elsewhere work only tells when it stopped."""
        if self.base.status != "ok" or self.new.status != "ok":
            return None
        if self.base.work is None or self.new.work is None:
            return None
        return max(self.new.work, 1.0) / max(self.base.work, 1.0)

    @property
    def uncounted(self) -> bool:
        """Whether the later row lost its work."""
        counted = self.base.status == self.new.status == "ok" and self.base.work is not None
        return counted and self.new.work is None


class Comparison(NamedTuple):
    """The outcome of the gate.

    Attributes:
        failures: Why the gate is shut, one sentence each; empty if it is open.
        means: Geometric mean of the work ratios by suite.
        worst: Up to three runs whose work grew most.
        changes: All runs that both hold.
        missing: Rows that only the earlier file holds.
        added: Rows that only the later file holds.
    """

    failures: list[str]
    means: dict[str, float]
    worst: list[Change]
    changes: list[Change]
    missing: list[Row]
    added: list[Row]

    @property
    def code(self) -> int:
        """The exit code: 1 if anything failed."""
        return int(bool(self.failures))

    def text(self) -> str:
        """What happened, for a person."""
        lines = [f"{len(self.changes)} runs compared"]
        lines += [f"{suite}: work x{mean:.3f}" for suite, mean in sorted(self.means.items())]
        if self.worst:
            lines.append("worst problems:")
            lines += [f"  {_name(c.new)}: {_growth(c)}" for c in self.worst]
        better = [c for c in self.changes if RANK[c.new.status] < RANK[c.base.status]]
        lines += [f"better: {_name(c.new)}: {_turn(c)}" for c in better]
        lines += [f"new: {_name(r)}" for r in self.added]
        lines += [f"FAIL: {reason}" for reason in self.failures]
        return "\n".join([*lines, "regression" if self.failures else "no regression"])


def _identity(row: Row) -> tuple:
    return tuple(getattr(row, field) for field in IDENTITY)


def _name(row: Row) -> str:
    quick = ", quick" if row.quick else ""
    return f"{row.suite}/{row.problem}, {row.contender}, seed {row.seed}, {row.dtype}{quick}"


def _turn(change: Change) -> str:
    return f"{change.base.status} -> {change.new.status}"


def _growth(change: Change) -> str:
    return f"work {change.base.work:g} -> {change.new.work:g} (x{change.ratio:.3g})"


def _tried(rows: Iterable[Row]) -> dict[tuple, Row]:
    return {_identity(r): r for r in rows if r.status != "skipped"}


def _means(changes: Iterable[Change]) -> dict[str, float]:
    logs: dict[str, list[float]] = {}
    for change in changes:
        if change.ratio is not None:
            logs.setdefault(change.new.suite, []).append(math.log(change.ratio))
    return {suite: math.exp(math.fsum(of) / len(of)) for suite, of in logs.items()}


def compare(base_rows: Iterable[Row], new_rows: Iterable[Row], gate: Gate = GATE) -> Comparison:
    """Hold a run against an earlier one.

    Args:
        base_rows: Rows of the earlier run. Those that were skipped promise nothing.
        new_rows: Rows of the later run; one that is skipped counts as missing.
        gate: What is let through.

    Returns:
        The comparison; it fails also where there is nothing to compare.
    """
    base, new = _tried(base_rows), _tried(new_rows)
    changes = [Change(row, new[key]) for key, row in base.items() if key in new]
    missing = [row for key, row in base.items() if key not in new]
    added = [row for key, row in new.items() if key not in base]
    means = _means(changes)
    grown = [c for c in changes if c.ratio is not None and c.ratio > 1]
    grown.sort(key=lambda c: c.ratio or 0.0, reverse=True)

    failures = [f"missing: {_name(row)}" for row in missing]
    if not changes:
        failures.append("no run is in both files")
    worse = [c for c in changes if c.worse]
    if len(worse) > gate.status:
        failures += [f"status {_turn(c)}: {_name(c.new)}" for c in worse]
    failures += [f"work no longer counted: {_name(c.new)}" for c in changes if c.uncounted]
    failures += [
        f"{suite}: work x{mean:.3f} in geometric mean, allowed x{gate.counts:g}"
        for suite, mean in means.items()
        if mean > gate.counts
    ]
    failures += [
        f"{_growth(c)}, allowed x{gate.single:g}: {_name(c.new)}"
        for c in grown
        if (c.ratio or 0.0) > gate.single
    ]
    return Comparison(failures, means, grown[:WORST], changes, missing, added)


def baseline(rows: Iterable[Row]) -> str:
    """The rows as a small file to commit: identity, status and counts, one line per run, sorted.

    Args:
        rows: The rows; those that are skipped are left out.

    Returns:
        JSON text that does not change unless a figure in it does.
    """

    def line(row: Row) -> str:
        kept = {f: getattr(row, f) for f in IDENTITY}
        kept = {f: v for f, v in kept.items() if f not in DEFAULTS or v != DEFAULTS[f]}
        counts = {k: int(row.counts[k]) for k in sorted(row.counts)}
        kept |= {"status": row.status, "work": row.work, "counts": counts}
        return json.dumps(kept, separators=(",", ":"), ensure_ascii=False)

    kept = _tried(rows)
    body = ",\n".join(line(kept[key]) for key in sorted(kept))
    return f'{{"kind":"baseline","schema":{record.VERSION},"rows":[\n{body}\n]}}\n'


def read(path: Path) -> list[Row]:
    """The rows of a benchmark file or of a baseline.

    Args:
        path: The file.

    Returns:
        The rows; of a baseline with the fields that it holds.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A malformed file, with its name and the reason.
    """
    try:
        whole = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        whole = None  # JSON Lines are no JSON
    if not isinstance(whole, dict) or whole.get("kind") != "baseline":
        return record.read(path)[0]
    try:
        schema = whole["schema"]
        return [record.row({"schema": schema, **fields}) for fields in whole["rows"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}, baseline: {error}") from error


def main_compare(base: Path, new: Path, gate: Gate = GATE) -> tuple[int, str]:
    """Compare two files.

    Args:
        base: The earlier benchmark file or baseline.
        new: The later one.
        gate: What is let through.

    Returns:
        The exit code and the text to print.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A malformed file.
    """
    comparison = compare(read(base), read(new), gate)
    return comparison.code, comparison.text()
