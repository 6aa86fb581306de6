"""What a report says about the rows: verdicts and tables, whatever they are printed as.

Everything is computed from the rows, the first paragraph too. Losses come before wins.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxopt_ext.bench import plots, profiles
from jaxopt_ext.bench.profiles import Instance, Ratio
from jaxopt_ext.bench.record import Row

FEW = 5  # with fewer problems in common an interval over problems says nothing
SAME = 1.1  # there a ratio of means within that is no difference
MESSAGE = 300  # characters

Titles = Mapping[str, tuple[str, str]]


class Cell(NamedTuple):
    """An entry of a table.

    Attributes:
        text: What it says.
        best: Whether it is the best of its kind.
    """

    text: str
    best: bool = False


class Sheet(NamedTuple):
    """A table.

    Attributes:
        caption: What it shows.
        head: Names of the columns.
        body: The lines; the first entry of each names it.
    """

    caption: str
    head: list[str]
    body: list[list[Cell]]


# ---- numbers as text ---------------------------------------------------------------------------


def number(value: Any) -> str:
    """A number with three digits, a dash where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"  # noqa: RUF001
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e6):
        return str(int(value))
    return f"{value:.3g}"


def ratio_text(ratio: Ratio) -> str:
    """A ratio with its interval."""
    if not ratio.problems:
        return number(None)
    if ratio.problems < FEW:
        return f"{ratio.value:.3g}"
    return f"{ratio.value:.3g} [{ratio.low:.3g}, {ratio.high:.3g}]"


def share_text(share: profiles.Share) -> str:
    """How many were solved."""
    return f"{share.tried - share.count} of {share.tried}"


def instance_name(instance: Instance, among: Iterable[Instance]) -> str:
    """The problem, with the dtype, seed and form where the others differ in them."""
    case, name = instance.case, instance.case.problem
    others = list(among)
    if len({i.case.dtype for i in others}) > 1:
        name += f", {case.dtype}"
    if len({i.case.quick for i in others}) > 1 and case.quick:
        name += ", quick"
    if len({i.seed for i in others}) > 1:
        name += f", seed {instance.seed}"
    return name


# ---- what a suite shows ------------------------------------------------------------------------


def extras_of(rows: Iterable[Row]) -> list[str]:
    """Names of the extras that are numbers."""
    found = {
        name
        for r in rows
        for name, value in r.extras.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return sorted(found)


def costs_of(rows: Sequence[Row]) -> list[str]:
    """The costs that successes of these rows carry, the one with most authority first.

    The error counts as a cost where there is no work: there the accuracy is what is compared.

    Args:
        rows: Rows of one suite.

    Returns:
        Names of costs.
    """
    rates = [f"extras.{name}" for name in extras_of(rows) if name.endswith("_per_s")]
    ok = [r for r in rows if r.status == "ok"]

    def known(cost: str) -> bool:
        measure = profiles.cost_named(cost)
        return any(math.isfinite(profiles.value_of(r, measure)) for r in ok)

    if known("work"):
        return [cost for cost in ("work", "cpu", "compile") if known(cost)]
    return [cost for cost in (*rates, "cpu", "error", "compile") if known(cost)]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the report says about a suite.

    Attributes:
        suite: Its name.
        title: Its heading.
        text: What it measures.
        rows: Its rows.
        costs: As `costs_of` gives them.
        tables: The costs of all contenders by name of the cost.
        solved: By contender, what failed of what it tried.
    """

    suite: str
    title: str
    text: str
    rows: list[Row]
    costs: list[str]
    tables: dict[str, profiles.Table]
    solved: dict[str, profiles.Share]

    @property
    def contenders(self) -> list[str]:
        """Those that tried anything, ours first."""
        return list(self.solved)

    @property
    def successes(self) -> dict[str, int]:
        """The number of instances that each contender solved."""
        return {name: share.tried - share.count for name, share in self.solved.items()}

    @property
    def pair(self) -> tuple[str, str] | None:
        """Ours and the peer with the highest scores by the first cost."""
        if not self.costs:
            return None
        mine, peer = (self.champion(side, self.costs[0]) for side in (True, False))
        return (mine, peer) if mine and peer else None

    def standing(self, cost: str) -> dict[str, float]:
        """The score of each contender by a cost, 0 where it was not measured."""
        return dict.fromkeys(self.contenders, 0.0) | profiles.scores(self.tables[cost])

    def champion(self, ours: bool, cost: str) -> str | None:
        """The contender of either side with the highest score."""
        side = [c for c in self.tables[cost].contenders if profiles.is_ours(c) == ours]
        standing = self.standing(cost)
        return max(side, key=lambda c: standing[c], default=None)


def summarize(rows: Sequence[Row], titles: Titles | None = None) -> list[Summary]:
    """The rows by suite, with all that several parts of the report need.

    Args:
        rows: All rows.
        titles: Title and summary of suites.

    Returns:
        One summary per suite, in alphabetical order.
    """
    found = []
    for suite in sorted({r.suite for r in rows}):
        of_suite = [r for r in rows if r.suite == suite]
        title, text = (titles or {}).get(suite, (suite, ""))
        costs = costs_of(of_suite)
        tables = {cost: profiles.cost_table(of_suite, cost) for cost in costs}
        shares = profiles.failures(of_suite)
        solved = {name: shares[name] for name in profiles.contenders_of(of_suite)}
        found.append(Summary(suite, title, text, of_suite, costs, tables, solved))
    return found


# ---- wins and losses ---------------------------------------------------------------------------


class Verdict(NamedTuple):
    """One comparison of ours with a peer.

    Attributes:
        measure: What is compared.
        outcome: "loss", "win" or "even".
        mine: Our contender.
        peer: The other.
        figures: The comparison in figures, with its interval.
        text: The comparison in words.
    """

    measure: str
    outcome: str
    mine: str
    peer: str
    figures: str
    text: str


def verdicts(summary: Summary) -> list[Verdict]:
    """Ours against the best peer, once per measure.

    Ours is the one contender with the highest score by the first cost and stays the same; the peer
    is chosen anew for each measure, the best by that measure.

    Args:
        summary: The suite.

    Returns:
        The verdicts; none where either side is missing.
    """
    mine = summary.champion(True, summary.costs[0]) if summary.costs else None
    if mine is None:
        return []
    found = [_solved_verdict(summary, mine)]
    for cost in summary.costs:
        peer = summary.champion(False, cost)
        if peer and mine in summary.tables[cost].contenders:
            found.append(_cost_verdict(summary, cost, mine, peer))
    return [verdict for verdict in found if verdict]


def _solved_verdict(summary: Summary, mine: str) -> Verdict | None:
    peers = [name for name in summary.solved if not profiles.is_ours(name)]
    if not peers:
        return None
    standing = summary.standing(summary.costs[0])
    peer = max(peers, key=lambda name: (summary.successes[name], standing[name]))
    both = [r for r in profiles.grid(summary.rows).values() if mine in r and peer in r]
    if not both:
        return None
    a, b = (sum(runs[name].status == "ok" for runs in both) for name in (mine, peer))
    outcome = "win" if a > b else "loss" if a < b else "even"
    figures = f"{a} against {b} of {len(both)} that both tried"
    text = f"solves {a} where {peer} solves {b} of {len(both)} problems"
    return Verdict("problems solved", outcome, mine, peer, figures, text)


def _cost_verdict(summary: Summary, cost: str, mine: str, peer: str) -> Verdict | None:
    ratio = profiles.geometric_ratios(summary.tables[cost], to=peer)[mine]
    if not ratio.problems:
        return None
    low, high = ratio.low, ratio.high
    if ratio.problems < FEW:
        low, high = ratio.value / SAME, ratio.value * SAME
    outcome = "win" if high < 1 else "loss" if low > 1 else "even"
    label = profiles.cost_named(cost).label.split(" (")[0]
    figures = f"{ratio_text(ratio)} times on {ratio.problems} in common"
    text = f"takes {ratio.value:.3g} times the {label} of {peer}"
    return Verdict(label, outcome, mine, peer, figures, text)


def lead(summaries: Sequence[Summary], noisy: bool) -> list[tuple[str, list[str]]]:
    """The first paragraph: what we lose, what we win, what is undecided.

    Args:
        summaries: All suites.
        noisy: Whether times were measured on a busy machine.

    Returns:
        Pairs of a heading and its sentences.
    """
    found = [(summary.title, verdicts(summary)) for summary in summaries]

    def clauses(outcome: str, words: Callable[[Verdict], str]) -> list[str]:
        parts = []
        for title, of_suite in found:
            if texts := [words(v) for v in of_suite if v.outcome == outcome]:
                name = of_suite[0].mine.removeprefix(f"{profiles.OURS} ")
                parts.append(f"{title}: {name} {'; '.join(texts)}.")
        return parts or ["none."]

    parts = [
        ("Losses", clauses("loss", lambda v: v.text)),
        ("Wins", clauses("win", lambda v: v.text)),
    ]
    even = [
        f"{title} ({', '.join(v.measure for v in of_suite if v.outcome == 'even')})"
        for title, of_suite in found
        if any(v.outcome == "even" for v in of_suite)
    ]
    parts.append(("No clear difference", [f"{', '.join(even) or 'none'}."]))
    if alone := [title for title, of_suite in found if not of_suite]:
        parts.append(("Nothing to compare", [f"{', '.join(alone)}."]))
    if noisy:
        parts.append(("Times", ["were measured on a busy machine; trust the counts of work."]))
    return parts


def verdict_sheet(summary: Summary) -> Sheet | None:
    """All comparisons with the best peer, losses first."""
    order = ("loss", "even", "win")
    names = {"loss": "loss", "win": "win", "even": "no clear difference"}
    found = sorted(verdicts(summary), key=lambda v: order.index(v.outcome))
    body = [
        [Cell(text) for text in (v.measure, names[v.outcome], v.figures, v.mine, v.peer)]
        for v in found
    ]
    head = ["measure", "outcome", "ours against the peer", "ours", "best peer"]
    return Sheet("Losses and wins against the best peer", head, body) if body else None


class Outcome(NamedTuple):
    """Ours against a peer on one instance.

    Attributes:
        name: The instance.
        factor: Our cost over the peer's; infinite where only the peer solved it, 0 where only we.
    """

    name: str
    factor: float

    @property
    def text(self) -> str:
        """The instance and the factor."""
        if math.isinf(self.factor):
            return f"{self.name} (only the peer solves it)"
        if not self.factor:
            return f"{self.name} (only ours solves it)"
        return f"{self.name} (×{self.factor:.3g})"  # noqa: RUF001


def outcomes(summary: Summary) -> dict[str, list[Outcome]]:
    """On which instances the `pair` loses and wins by the first cost, the largest factors first.

    Args:
        summary: The suite.

    Returns:
        Instances by "Lost", "Won" and, if any, "Tied" and "Solved by neither"; nothing where
        either side is missing.
    """
    if summary.pair is None:
        return {}
    mine, peer = summary.pair
    cost = summary.costs[0]
    table, margin = summary.tables[cost], profiles.cost_named(cost).margin
    i, j = table.contenders.index(mine), table.contenders.index(peer)
    found: dict[str, list[Outcome]] = {"Lost": [], "Won": [], "Tied": [], "Solved by neither": []}
    for instance, costs in zip(table.instances, table.values, strict=True):
        a, b = float(costs[i]), float(costs[j])
        if math.isnan(a) or math.isnan(b):
            continue
        name = instance_name(instance, table.instances)
        if math.isinf(a) and math.isinf(b):
            found["Solved by neither"].append(Outcome(name, 1.0))
            continue
        factor = a / b if math.isfinite(b) else 0.0
        if a > b * (1 + margin):
            found["Lost"].append(Outcome(name, factor))
        elif b > a * (1 + margin):
            found["Won"].append(Outcome(name, factor))
        else:
            found["Tied"].append(Outcome(name, factor))
    found["Lost"].sort(key=lambda o: -o.factor)
    found["Won"].sort(key=lambda o: o.factor)
    return {name: of for name, of in found.items() if of or name in ("Lost", "Won")}


def listing(found: Sequence[Outcome]) -> str:
    """The outcomes in one line; ties need no factor."""
    if found and found[0].factor == 1.0:
        return ", ".join(o.name for o in found)
    return ", ".join(o.text for o in found) or "none"


# ---- tables ------------------------------------------------------------------------------------


def _best(values: Iterable[float], low: bool) -> float | None:
    """The number to mark; none where more than half have it, or there is nobody to beat."""
    known = [value for value in values if math.isfinite(value)]
    if len(known) < 2:
        return None
    best = min(known) if low else max(known)
    return best if 2 * known.count(best) <= len(known) else None


def _column(values: Mapping[str, float], low: bool | None, text: Callable[[Any], str]) -> Callable:
    """Entries by contender; `low` says whether the least or the largest number is best."""
    best = None if low is None else _best(values.values(), low)

    def cell(name: str) -> Cell:
        value = values.get(name)
        return Cell(text(value), value is not None and value == best)

    return cell


def contender_sheet(summary: Summary) -> Sheet:
    """One line per contender: what it solves and what that costs.

    Args:
        summary: The suite.

    Returns:
        The table, with only those columns for which the rows hold figures.
    """
    columns: list[tuple[str, Callable[[str], Cell]]] = []
    most = _best(summary.successes.values(), low=False)
    columns.append(
        ("solved", lambda c: Cell(share_text(summary.solved[c]), summary.successes[c] == most))
    )
    for cost in ("work", "cpu"):
        if cost in summary.tables:
            ratios = profiles.geometric_ratios(summary.tables[cost])
            columns.append((f"{cost}, × best", _ratio_column(ratios)))  # noqa: RUF001
    by_name = _rows_by_name(summary.rows)

    def median(of: Callable[[Row], Any]) -> dict[str, float]:
        values = {c: [v for r in rows if (v := of(r)) is not None] for c, rows in by_name.items()}
        return {c: statistics.median(v) for c, v in values.items() if v}

    def add(label: str, low: bool | None, of: Callable[[Row], Any]) -> None:
        if values := median(of):
            columns.append((label, _column(values, low, number)))

    add("compile s", True, lambda r: r.compile_cpu_s)
    if "work" not in summary.tables:
        add("run s", True, lambda r: r.cpu if r.status == "ok" else None)
        add("error", True, lambda r: r.error)
    add("peak MiB", True, lambda r: None if r.peak_bytes is None else r.peak_bytes / 2**20)
    for extra in extras_of(summary.rows):
        low = False if extra.endswith("_per_s") else None
        add(extra.replace("_", " "), low, lambda r, extra=extra: _number_in(r, extra))
    if summary.costs:
        scores = profiles.scores(summary.tables[summary.costs[0]])
        columns.append(("score", _column(scores, False, number)))
    body = [[Cell(c), *(cell(c) for _, cell in columns)] for c in summary.contenders]
    return Sheet("Contenders", ["contender", *(label for label, _ in columns)], body)


def _ratio_column(ratios: Mapping[str, Ratio]) -> Callable[[str], Cell]:
    # who solves little may well be cheap where it does, and is not marked for that
    enough = max((ratio.problems for ratio in ratios.values()), default=0) / 2
    best = _best((r.value for r in ratios.values() if r.problems >= enough), low=True)

    def cell(name: str) -> Cell:
        ratio = ratios.get(name)
        if ratio is None:
            return Cell(number(None))
        few = f" on {ratio.problems}" if 0 < ratio.problems < FEW else ""
        marked = ratio.problems >= enough and ratio.value == best
        return Cell(f"{ratio_text(ratio)}{few}", marked)

    return cell


def _rows_by_name(rows: Sequence[Row]) -> dict[str, list[Row]]:
    tried = [r for r in rows if r.status != "skipped"]
    found: dict[str, list[Row]] = {}
    for r, name in zip(tried, profiles.names(tried), strict=True):
        found.setdefault(name, []).append(r)
    return found


def _number_in(row: Row, extra: str) -> float | None:
    value = row.extras.get(extra)
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return value if plain else None


def pair_sheet(summary: Summary) -> Sheet | None:
    """How often each of ours beats each peer, by the first cost.

    Args:
        summary: The suite.

    Returns:
        The table, `None` where either side is missing.
    """
    if not summary.costs:
        return None
    cost = profiles.cost_named(summary.costs[0])
    table = summary.tables[summary.costs[0]]
    counts = profiles.wins(table, cost.margin)
    ours = [i for i, c in enumerate(table.contenders) if profiles.is_ours(c)]
    peers = [j for j, c in enumerate(table.contenders) if not profiles.is_ours(c)]
    if not ours or not peers:
        return None
    caption = f"Problems lost : won, by {cost.label} (ties within {cost.margin:g})"
    body = []
    for i in ours:
        cells = [Cell(f"{counts[j, i]} : {counts[i, j]}") for j in peers]
        body.append([Cell(table.contenders[i]), *cells])
    return Sheet(caption, ["ours", *(table.contenders[j] for j in peers)], body)


def failure_sheet(summary: Summary) -> Sheet | None:
    """Every run that failed, with its message."""
    body = []
    for name, rows in _rows_by_name(summary.rows).items():
        for r in rows:
            if r.status != "ok":
                where = instance_name(Instance(profiles.case_of(r), r.seed), _instances(summary))
                cells = (where, name, r.status, one_line(r.message))
                body.append([Cell(text) for text in cells])
    body.sort(key=lambda cells: (cells[0].text, cells[1].text))
    head = ["problem", "contender", "status", "message"]
    return Sheet("Failures", head, body) if body else None


def _instances(summary: Summary) -> list[Instance]:
    return [Instance(profiles.case_of(r), r.seed) for r in summary.rows if r.status != "skipped"]


def skipped_sheet(summary: Summary) -> Sheet | None:
    """Who could not be tried, and why."""
    reasons: dict[tuple[str, str], int] = {}
    for r in summary.rows:
        if r.status == "skipped":
            key = (r.contender, one_line(r.message))
            reasons[key] = reasons.get(key, 0) + 1
    body = [[Cell(c), Cell(str(n)), Cell(why)] for (c, why), n in sorted(reasons.items())]
    return Sheet("Not tried", ["contender", "rows", "reason"], body) if body else None


def slope_sheet(summary: Summary) -> Sheet | None:
    """Fitted exponents of cost against size."""
    body = []
    for cost in summary.costs:
        for (family, name), fit in profiles.slopes(summary.rows, cost).items():
            theory = number(fit.theory)
            interval = plots.slope_text(fit).split(", theory")[0]
            body.append([Cell(text) for text in (f"{family}, {name}", cost, interval, theory)])
    head = ["problem, contender", "cost", "exponent [95 %]", "theory"]
    return Sheet("Cost against size", head, body) if body else None


def problem_sheet(summary: Summary) -> Sheet:
    """Every run; the best of each instance is marked."""
    columns: list[tuple[str, Callable[[Row], Any], bool]] = [
        ("work", lambda r: r.work, True),
        ("iterations", lambda r: r.iterations, False),
        ("cpu s", lambda r: r.cpu, True),
        ("compile s", lambda r: r.compile_cpu_s, False),
        ("f", lambda r: r.f, False),
        ("error", lambda r: r.error, "work" not in summary.tables),
        ("violation", lambda r: r.violation, False),
        ("max |gradient|", lambda r: r.grad_norm, False),
    ]
    for extra in extras_of(summary.rows):
        label = extra.replace("_", " ")
        columns.append((label, lambda r, extra=extra: _number_in(r, extra), False))
    columns = [c for c in columns if any(c[1](r) is not None for r in summary.rows)]
    grid = profiles.grid(summary.rows)
    body = []
    for instance, runs in grid.items():
        marks = []
        for _, of, marked in columns:
            known = [v for r in runs.values() if r.status == "ok" and (v := of(r)) is not None]
            marks.append(min(known) if marked and len(known) > 1 else None)
        for name in sorted(runs, key=lambda c: (not profiles.is_ours(c), c.lower())):
            run = runs[name]
            cells = [Cell(instance_name(instance, grid)), Cell(name), Cell(run.status)]
            for (_, of, _), best in zip(columns, marks, strict=True):
                value = of(run)
                won = best is not None and run.status == "ok" and value == best
                cells.append(Cell(number(value), won))
            body.append(cells)
    head = ["problem", "contender", "status", *(label for label, _, _ in columns)]
    return Sheet("Every run", head, body)


def environment_sheet(environments: Mapping[str, Mapping[str, Any]]) -> Sheet | None:
    """Versions, machine and threads, one column per run."""

    def flat(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from flat(inner, f"{name}.{key}" if name else str(key))
        elif isinstance(value, list | tuple):
            yield name, ", ".join(map(str, value))
        else:
            yield name, str(value)

    if not environments:
        return None
    columns = [dict(flat(environment)) for environment in environments.values()]
    fields = dict.fromkeys(field for column in columns for field in column)
    shown = [field for field in fields if field not in ("kind", "schema", "env_id")]
    body = [[Cell(f), *(Cell(one_line(column.get(f, ""))) for column in columns)] for f in shown]
    return Sheet("Environment", ["", *map(str, environments)], body)


def one_line(text: str) -> str:
    """A message without its line breaks, cut to a bearable length."""
    text = " ".join(str(text).split())
    return text if len(text) <= MESSAGE else f"{text[: MESSAGE - 1]}…"
