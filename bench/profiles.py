"""Statistics of benchmark rows: profiles, wins, ratios and slopes, in NumPy.

Conventions that hold throughout: an *instance* is a problem with a dtype and a seed; a contender
that ran with one seed only stands with that run at every seed. A run that fails costs infinity. A
contender that did not try an instance costs NaN there: profiles count that as not solved, wins and
ratios pass it over. In shares and means every problem weighs the same, whatever its seeds.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import stdtrit

from jaxopt_ext.bench.record import Row

OURS = "jaxopt_ext"
BEST = "the best"
COUNT_MARGIN = 1e-12  # counts are exact; this only absorbs rounding
TIME_MARGIN = 0.1
TOLERANCES = (1e-1, 1e-3, 1e-5, 1e-7)
TARGETS = np.logspace(2, -8, 51)
LOG2_RATIO = 5.0  # the score integrates profiles over log2 of the ratio up to here

Vector = Float[np.ndarray, " k"]
Matrix = Float[np.ndarray, "instances contenders"]


class Cost(NamedTuple):
    """What a run costs.

    Attributes:
        field: Attribute of the row that holds it.
        label: What tables and axes call it.
        margin: Costs that are closer than this, relatively, are a tie.
        floor: Costs below it count as it, since zero has no ratio.
    """

    field: str
    label: str
    margin: float = TIME_MARGIN
    floor: float = 1e-7


COSTS = {
    "work": Cost("work", "work (evaluations of the objective)", COUNT_MARGIN, 1.0),
    "iterations": Cost("iterations", "iterations", COUNT_MARGIN, 1.0),
    "cpu": Cost("cpu", "CPU seconds"),
    "wall": Cost("wall", "wall seconds"),
    "compile": Cost("compile_cpu_s", "CPU seconds to compile"),
    "memory": Cost("peak_bytes", "peak memory (bytes)", TIME_MARGIN, 1.0),
    "error": Cost("error", "error", TIME_MARGIN, 1e-16),
}


def cost_named(name: str) -> Cost:
    """The cost with a name of `COSTS`, or `extras.NAME` for a number among the row's extras.

    Args:
        name: Its name. A rate, `extras.NAME_per_s`, is turned into seconds.

    Returns:
        The cost.

    Raises:
        ValueError: An unknown name.
    """
    if name in COSTS:
        return COSTS[name]
    if name.startswith("extras."):
        extra = name.removeprefix("extras.")
        rate = extra.endswith("_per_s")
        label = f"seconds per {extra.removesuffix('_per_s').rstrip('s')}" if rate else extra
        return Cost(name, label.replace("_", " "), floor=1e-300)
    raise ValueError(f"cost is {name!r}, expected one of {', '.join(COSTS)} or extras.NAME")


def value_of(row: Row, cost: Cost) -> float:
    """What the run cost; NaN where that was not measured."""
    extra = cost.field.startswith("extras.")
    name = cost.field.removeprefix("extras.")
    value = row.extras.get(name) if extra else getattr(row, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    if extra and name.endswith("_per_s"):
        value = 1 / value if value > 0 else math.inf
    return max(float(value), cost.floor)


# ---- rows as a grid: instances x contenders ----------------------------------------------------


class Case(NamedTuple):
    """A problem as a contender meets it: all that instances share whatever the seed."""

    suite: str
    problem: str
    dtype: str = "float64"
    quick: bool = False


class Instance(NamedTuple):
    """A case with a seed."""

    case: Case
    seed: int = 0


def case_of(row: Row) -> Case:
    """The case that the row belongs to."""
    return Case(row.suite, row.problem, row.dtype, row.quick)


def is_ours(contender: str) -> bool:
    """Whether a contender's name is of this library."""
    return contender.split(" ")[0] == OURS


def names(rows: Sequence[Row]) -> list[str]:
    """What to call the contender of each row.

    That is `Row.contender`, but where it ran an instance with several configurations the options
    that differ are added, so that no row hides another.

    Args:
        rows: Any rows.

    Returns:
        One name per row.
    """
    runs = Counter((case_of(r), r.seed, r.contender) for r in rows)
    unclear = {(case.suite, name) for (case, _, name), count in runs.items() if count > 1}
    configs: dict[tuple[str, str], dict[str, set[str]]] = {}
    for r in rows:
        values = configs.setdefault((r.suite, r.contender), {})
        for option, value in r.config.items():
            values.setdefault(option, set()).add(repr(value))

    def name(r: Row) -> str:
        if (r.suite, r.contender) not in unclear:
            return r.contender
        seen = configs[r.suite, r.contender]
        differ = [f"{k}={r.config.get(k)}" for k in sorted(seen) if len(seen[k]) > 1]
        return f"{r.contender} [{', '.join(differ)}]" if differ else r.contender

    return [name(r) for r in rows]


def grid(rows: Sequence[Row]) -> dict[Instance, dict[str, Row]]:
    """The runs by instance and contender; rows that are skipped have no place in it.

    Args:
        rows: Any rows.

    Returns:
        The instances in order, each with the runs of the contenders that tried it.
    """
    tried = [r for r in rows if r.status != "skipped"]
    cases: dict[Case, dict[str, dict[int, Row]]] = {}
    for r, name in zip(tried, names(tried), strict=True):
        cases.setdefault(case_of(r), {}).setdefault(name, {})[r.seed] = r
    found = {}
    for case, contenders in sorted(cases.items()):
        for seed in sorted({seed for runs in contenders.values() for seed in runs}):
            found[Instance(case, seed)] = {
                name: runs[seed] if seed in runs else next(iter(runs.values()))
                for name, runs in contenders.items()
                if seed in runs or len(runs) == 1
            }
    return found


def contenders_of(rows: Sequence[Row]) -> list[str]:
    """The names in the grid, ours first, then in alphabetical order."""
    found = {name for runs in grid(rows).values() for name in runs}
    return sorted(found, key=lambda name: (not is_ours(name), name.lower()))


@dataclasses.dataclass(frozen=True)
class Table:
    """Costs: infinite where the contender failed, NaN where it did not try or nobody measured.

    Attributes:
        instances: Names of the rows of the matrix.
        contenders: Names of its columns.
        values: The costs.
    """

    instances: tuple[Instance, ...]
    contenders: tuple[str, ...]
    values: Matrix

    @property
    def solvable(self) -> Bool[np.ndarray, " instances"]:
        """Which instances at least one contender solved."""
        return np.any(np.isfinite(self.values), axis=1)

    def weights(self) -> Float[np.ndarray, " instances"]:
        """Share of each instance in the whole: problems weigh the same, whatever their seeds."""
        clusters = self.clusters()
        sizes = np.bincount(clusters)
        return 1 / (sizes[clusters] * max(len(sizes), 1))

    def clusters(self) -> Int[np.ndarray, " instances"]:
        """The number of each instance's problem: what the bootstrap draws."""
        order: dict[Case, int] = {}
        return np.array([order.setdefault(i.case, len(order)) for i in self.instances], dtype=int)


def cost_table(rows: Sequence[Row], cost: str = "work") -> Table:
    """What it cost each contender to reach the accuracy that the suite asks for.

    Args:
        rows: Rows, usually of one suite.
        cost: Name of the cost, as `cost_named` takes it.

    Returns:
        The table. A contender whose successes carry no such figure is left out of it.
    """
    measure = cost_named(cost)

    def entry(run: Row | None) -> float:
        if run is None:
            return math.nan
        return value_of(run, measure) if run.status == "ok" else math.inf

    cells = grid(rows)
    keep = []
    for name in contenders_of(rows):
        solved = [runs[name] for runs in cells.values() if name in runs]
        solved = [run for run in solved if run.status == "ok"]
        if not solved or any(math.isfinite(value_of(run, measure)) for run in solved):
            keep.append(name)
    values = [[entry(runs.get(name)) for name in keep] for runs in cells.values()]
    return Table(tuple(cells), tuple(keep), np.array(values).reshape(len(cells), len(keep)))


# ---- targets on the objective ------------------------------------------------------------------


def trajectory(row: Row) -> tuple[Vector, Vector]:
    """Work and the best objective so far, the point returned included.

    Of a run that ends infeasible nothing counts: on the way, too, a low objective may just be
    infeasible. The runner writes no history where there are constraints other than bounds.

    Args:
        row: The run.

    Returns:
        Both as arrays of equal length, empty if nothing is known.
    """
    if row.violation is not None and not row.violation <= (row.tolerance or 0.0):
        return np.zeros(0), np.zeros(0)
    work, f = list(row.history.get("work", [])), list(row.history.get("f", []))
    if row.work is not None and row.f is not None:
        work, f = [*work, row.work], [*f, row.f]
    length = min(len(work), len(f))
    best = np.fmin.accumulate(np.array(f[:length], dtype=float)) if length else np.zeros(0)
    return np.array(work[:length], dtype=float), best


def reached(row: Row, targets: Vector) -> Vector:
    """Work at which the objective first is at or below each target, infinite if never.

    A history is thinned, so the figure may be late by the gap between two of its points.

    Args:
        row: The run.
        targets: Values of the objective.

    Returns:
        One figure per target.
    """
    work, best = trajectory(row)
    if not len(work):
        return np.full(len(targets), np.inf)
    hit = best[None, :] <= np.asarray(targets)[:, None]
    return np.where(hit.any(axis=1), np.maximum(work[hit.argmax(axis=1)], 1.0), np.inf)


def best_values(rows: Sequence[Row]) -> dict[Case, float]:
    """The least objective known per case: over all rows given, and the known optimum.

    Args:
        rows: All rows there are.

    Returns:
        f_L by case; cases without any objective are absent.
    """
    best: dict[Case, float] = {}
    for r in rows:
        known = [] if r.f_star is None else [r.f_star]
        for value in (*known, *trajectory(r)[1][-1:]):
            if math.isfinite(value):
                best[case_of(r)] = min(value, best.get(case_of(r), math.inf))
    return best


def fixed_values(rows: Sequence[Row], reference: Mapping[Case, float] | None) -> dict[Case, float]:
    """f_L that does not depend on who takes part: the known optimum, else the reference.

    Args:
        rows: The rows to profile.
        reference: `best_values` of some fixed set of rows, for cases without a known optimum.

    Returns:
        f_L by case. A case with neither is absent, so it is in no data profile.
    """
    known = {case_of(r): r.f_star for r in rows if r.f_star is not None}
    return {**(reference or {}), **known}


def anytime(rows: Sequence[Row]) -> list[str]:
    """The contenders whose way to the solution is known, so that targets can be read from it.

    The others would be charged all their work for the first target, which says nothing.

    Args:
        rows: Any rows.

    Returns:
        Names of contenders with a history, ours first.
    """
    known = {
        name
        for runs in grid(rows).values()
        for name, run in runs.items()
        if run.history.get("work")
    }
    return [name for name in contenders_of(rows) if name in known]


def _start(runs: Mapping[str, Row]) -> float:
    return next((run.f0 for run in runs.values() if run.f0 is not None), math.nan)


def target_table(
    rows: Sequence[Row], tolerance: float, values: Mapping[Case, float] | None = None
) -> Table:
    """Work until f ≤ f_L + tolerance (f₀ − f_L), the test of Moré and Wild.

    Args:
        rows: Rows, usually of one suite.
        tolerance: Share of the possible decrease that may be left.
        values: f_L by case; by default `best_values(rows)`, so it depends on who takes part.

    Returns:
        The table of the `anytime` contenders. Instances without f_L or f₀, or that start at f_L,
        are left out.

    Reference:
        Moré, Wild, "Benchmarking Derivative-Free Optimization Algorithms", SIAM J. Optim. 2009.
    """
    values = best_values(rows) if values is None else values
    contenders = anytime(rows)
    instances, costs = [], []
    for instance, runs in grid(rows).items() if contenders else ():
        least, start = values.get(instance.case, math.nan), _start(runs)
        if not start > least:  # also where one is NaN
            continue
        target = np.array([least + tolerance * (start - least)])
        instances.append(instance)
        costs.append([reached(runs[c], target)[0] if c in runs else math.nan for c in contenders])
    matrix = np.array(costs).reshape(len(instances), len(contenders))
    return Table(tuple(instances), tuple(contenders), matrix)


# ---- profiles ----------------------------------------------------------------------------------


class Curves(NamedTuple):
    """Step functions, continuous from the right.

    Attributes:
        x: Where any of them jumps, ascending.
        y: By contender, the share at each `x`.
        instances: Number of instances that the shares refer to.
    """

    x: Vector
    y: dict[str, Vector]
    instances: int


def _shares(costs: Matrix, table: Table, least: float) -> Curves:
    x = np.unique(np.append(costs[np.isfinite(costs)], least))
    weights = table.weights()[:, None]
    shares = {
        # a plain sum, since a matrix product rounds differently with other contenders present
        name: np.minimum((weights * (costs[:, j, None] <= x)).sum(axis=0), 1.0)
        for j, name in enumerate(table.contenders)
    }
    return Curves(x, shares, len(costs))


def ratios_to_best(table: Table) -> Matrix:
    """Cost over the least cost of the instance; infinite where failed or not tried."""
    costs = np.where(np.isnan(table.values), np.inf, table.values)
    if not costs.size:
        return costs
    best = costs.min(axis=1, keepdims=True)
    ratio = np.divide(costs, best, out=np.full_like(costs, np.inf), where=np.isfinite(costs))
    return np.where(ratio <= 1 + COUNT_MARGIN, 1.0, ratio)


def performance_profile(table: Table) -> Curves:
    """Share of problems that each contender solves within a factor of the best.

    Args:
        table: The costs.

    Returns:
        ρ against the factor; ρ(1) is the share of wins, the last value that of solved instances.

    Reference:
        Dolan, Moré, "Benchmarking optimization software with performance profiles", Math.
        Program. 2002. The order of contenders behind the best depends on who takes part: Gould,
        Scott, "A Note on Performance Profiles for Benchmarking Software", ACM TOMS 2016.
    """
    return _shares(ratios_to_best(table), table, 1.0)


def data_profile(
    rows: Sequence[Row], tolerance: float, reference: Mapping[Case, float] | None = None
) -> Curves:
    """Share of problems solved within k simplex gradients, work / (n + 1).

    Unlike a performance profile, a curve does not depend on the other contenders: f_L is that of
    `fixed_values`.

    Args:
        rows: Rows, usually of one suite; those without `n` are left out.
        tolerance: As `target_table` takes it.
        reference: f_L of cases without a known optimum.

    Returns:
        The shares against work / (n + 1).

    Reference:
        Moré, Wild, "Benchmarking Derivative-Free Optimization Algorithms", SIAM J. Optim. 2009.
    """
    sized = [r for r in rows if r.n is not None]
    table = target_table(sized, tolerance, fixed_values(sized, reference))
    sizes = {case_of(r): r.n or 0 for r in sized}
    units = np.array([sizes[i.case] + 1.0 for i in table.instances]).reshape(-1, 1)
    return _shares(table.values / units, table, 0.0)


class Band(NamedTuple):
    """A curve with its interval.

    Attributes:
        y: The curve.
        low: Lower end of the 95 % bootstrap interval over problems.
        high: Upper end.
    """

    y: Vector
    low: Vector
    high: Vector


def _draws(clusters: Int[np.ndarray, " instances"], samples: int, seed: int) -> np.ndarray:
    """How often each problem is drawn in each bootstrap sample."""
    number = int(clusters.max()) + 1
    chances = np.full(number, 1 / number)
    return np.random.default_rng(seed).multinomial(number, chances, size=samples)


def ecdf(
    rows: Sequence[Row],
    reference: Mapping[Case, float] | None = None,
    targets: Vector = TARGETS,
    samples: int = 500,
    seed: int = 0,
) -> tuple[Vector, dict[str, Band]]:
    """Share of (problem, target) pairs reached against work / n, as COCO shows it.

    The targets are f_L + Δ. Problems weigh the same, whatever their number of seeds.

    Args:
        rows: Rows, usually of one suite; those without `n` are left out.
        reference: f_L of cases without a known optimum.
        targets: The Δ, in the units of the objective.
        samples: Bootstrap samples, drawn over problems.
        seed: Seed of the bootstrap.

    Returns:
        Work / n, and the curves by `anytime` contender; both empty if no target is reached.

    Reference:
        Hansen et al., "COCO: a platform for comparing continuous optimizers in a black-box
        setting", Optim. Methods Softw. 2021.
    """
    sized = [r for r in rows if r.n]
    values = fixed_values(sized, reference)
    cells = {i: runs for i, runs in grid(sized).items() if i.case in values}
    never = np.full(len(targets), np.inf)
    hits: dict[str, list[Vector]] = {name: [] for name in anytime(sized)}
    for instance, runs in cells.items():
        goals = values[instance.case] + targets
        for name, of_name in hits.items():
            run = runs.get(name)
            of_name.append(never if run is None else reached(run, goals) / (run.n or 1))
    finite = [h[np.isfinite(h)] for of_name in hits.values() for h in of_name]
    every = np.concatenate([*finite, np.zeros(0)])
    if not len(every):
        return np.zeros(0), {}
    x = np.geomspace(every.min(), max(every.max(), 2 * every.min()), 121)
    x[-1] = max(x[-1], every.max())  # geomspace rounds its ends
    clusters = Table(tuple(cells), (), np.zeros((len(cells), 0))).clusters()
    sizes = np.bincount(clusters)[:, None]
    draws = _draws(clusters, samples, seed)
    bands = {}
    for name, of_name in hits.items():
        shares = np.stack([(h[:, None] <= x).mean(axis=0) for h in of_name])
        problems = np.zeros((len(sizes), len(x)))
        np.add.at(problems, clusters, shares)
        problems /= sizes
        low, high = np.percentile(draws @ problems / len(sizes), [2.5, 97.5], axis=0)
        bands[name] = Band(problems.mean(axis=0), low, high)
    return x, bands


# ---- numbers -----------------------------------------------------------------------------------


def scores(table: Table) -> dict[str, float]:
    """Area under the performance profile over log₂ of the factor in [0, 5], divided by 5.

    Args:
        table: The costs.

    Returns:
        A number in [0, 1] by contender: 1 is the best everywhere, 0 is never within 32 times.
    """
    logs = np.log2(ratios_to_best(table))
    areas = table.weights() @ np.clip(LOG2_RATIO - logs, 0, None) / LOG2_RATIO
    return {name: float(area) for name, area in zip(table.contenders, areas, strict=True)}


class Share(NamedTuple):
    """Some of many.

    Attributes:
        count: How many.
        tried: Of how many.
    """

    count: int
    tried: int


def failures(rows: Sequence[Row]) -> dict[str, Share]:
    """The instances that each contender tried and did not solve."""
    found = {name: Share(0, 0) for name in contenders_of(rows)}
    for runs in grid(rows).values():
        for name, run in runs.items():
            found[name] = Share(found[name].count + (run.status != "ok"), found[name].tried + 1)
    return found


def wins(table: Table, margin: float) -> Int[np.ndarray, "contenders contenders"]:
    """Number of instances on which the contender of the row beats that of the column.

    Only instances that both tried count; against a failure every success wins.

    Args:
        table: The costs.
        margin: Costs that are closer than this, relatively, are a tie.

    Returns:
        The counts.
    """
    costs = table.values
    mine, theirs = costs[:, :, None], costs[:, None, :]
    with np.errstate(invalid="ignore"):  # infinity against infinity is no win
        return (mine * (1 + margin) < theirs).sum(axis=0)


class Ratio(NamedTuple):
    """A geometric mean of cost ratios.

    Attributes:
        value: The mean; NaN without instances.
        low: Lower end of the 95 % bootstrap interval over problems.
        high: Upper end.
        problems: Number of problems that both solved.
    """

    value: float
    low: float
    high: float
    problems: int


def geometric_ratios(
    table: Table, to: str = BEST, samples: int = 1000, seed: int = 0
) -> dict[str, Ratio]:
    """Geometric-mean ratio of each contender's cost to that of another, or of the best.

    Only instances that both solve count, so the share of failures belongs beside it. Each problem
    counts once: first the mean over its seeds is taken.

    Args:
        table: The costs.
        to: A contender of the table, or `BEST` for the least cost of each instance.
        samples: Bootstrap samples, drawn over problems.
        seed: Seed of the bootstrap.

    Returns:
        The ratios by contender.
    """
    finite = np.where(np.isfinite(table.values), table.values, np.inf)
    if not finite.size:
        return {name: Ratio(math.nan, math.nan, math.nan, 0) for name in table.contenders}
    base = finite.min(axis=1) if to == BEST else finite[:, table.contenders.index(to)]
    clusters = table.clusters()
    found = {}
    for j, name in enumerate(table.contenders):
        both = np.isfinite(finite[:, j]) & np.isfinite(base)
        _, group = np.unique(clusters[both], return_inverse=True)
        if not len(group):
            found[name] = Ratio(math.nan, math.nan, math.nan, 0)
            continue
        logs = np.log(finite[both, j] / base[both])
        problems = np.bincount(group, weights=logs) / np.bincount(group)
        means = _draws(group, samples, seed) @ problems / len(problems)
        low, high = np.exp(np.percentile(means, [2.5, 97.5]))
        value = float(np.exp(problems.mean()))
        found[name] = Ratio(value, float(low), float(high), len(problems))
    return found


class Slope(NamedTuple):
    """A line fitted to the logarithms of cost against those of size.

    Attributes:
        slope: The exponent.
        low: Lower end of its 95 % interval (Student); NaN with two sizes.
        high: Upper end.
        sizes: The sizes.
        costs: Geometric mean of the costs at each size.
        constant: The fit is `constant * size**slope`.
        theory: The exponent that theory gives, `None` if the rows do not tell.
    """

    slope: float
    low: float
    high: float
    sizes: Vector
    costs: Vector
    constant: float
    theory: float | None


def family_of(row: Row) -> str:
    """What the problem is called whatever its size: `params["family"]`, or its own name."""
    return str(row.params.get("family", row.problem))


def slopes(rows: Sequence[Row], cost: str = "work") -> dict[tuple[str, str], Slope]:
    """How cost grows with the number of variables, by family of problems and contender.

    Theory is read from `extras["theory"]`, a mapping from the name of a cost to the exponent.

    Args:
        rows: Rows of one suite, with `n`.
        cost: Name of the cost.

    Returns:
        The fits, for those that solved problems of at least two sizes.
    """
    measure = cost_named(cost)
    points: dict[tuple[str, str], dict[int, list[float]]] = {}
    theory: dict[tuple[str, str], float] = {}
    for r, name in zip(rows, names(rows), strict=True):
        value = value_of(r, measure)
        if r.status == "ok" and r.n and math.isfinite(value):
            key = (family_of(r), name)
            points.setdefault(key, {}).setdefault(r.n, []).append(math.log(value))
            if isinstance(said := r.extras.get("theory"), dict) and cost in said:
                theory[key] = float(said[cost])
    found = {}
    for key, by_size in sorted(points.items()):
        if len(by_size) < 2:
            continue
        sizes = np.array(sorted(by_size), dtype=float)
        logs = np.array([np.mean(by_size[int(n)]) for n in sizes])
        x = np.log(sizes) - np.log(sizes).mean()
        slope = float(x @ logs / (x @ x))
        constant = math.exp(logs.mean() - slope * np.log(sizes).mean())
        free, half = len(sizes) - 2, math.nan
        if free:
            left = logs - logs.mean() - slope * x
            half = float(stdtrit(free, 0.975) * math.sqrt(left @ left / free / (x @ x)))
        fit = (sizes, np.exp(logs), constant, theory.get(key))
        found[key] = Slope(slope, slope - half, slope + half, *fit)
    return found
