"""The suite `sso` as a page: oracle calls, curves over seeds, and what an update costs.

`python -m jaxopt_ext.bench.oracle_calls rows.jsonl -o docs/bench` writes the tables and pictures of
the documentation from the rows of a run.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxopt_ext.bench import plots, record, report
from jaxopt_ext.bench.contender import OURS
from jaxopt_ext.bench.record import Row
from jaxopt_ext.bench.summary import Cell, Sheet, number

LABELS = {
    f"{OURS} SSO m=1": "m = 1",
    f"{OURS} SSO m=5": "m = 5",
    f"{OURS} SSO m=10": "m = 10",
    f"{OURS} SSO m=100": "m = 100",
    f"{OURS} SSO m=10 (exponential)": "m = 10, decaying",
    f"{OURS} SSO m=100 (exponential)": "m = 100, decaying",
    "optax sgd": "SGD",
    "jaxopt ArmijoSGD": "SLS",
    "optax adam": "Adam",
    "optax adagrad": "AdaGrad",
    "reference SVRG": "SVRG",
}
FLOOR = 1e-12  # of a relative gap in a picture: what is zero shows at the bottom

Runs = dict[str, dict[str, list[Row]]]


def runs(rows: Sequence[Row]) -> Runs:
    """The rows of the suite by problem and label, one for each seed.

    Args:
        rows: Any rows; those of other suites and contenders are left out.

    Returns:
        Rows in the order of seeds.
    """
    found: Runs = {}
    for row in sorted(rows, key=lambda row: (row.problem, row.seed)):
        if row.suite == "sso" and row.contender in LABELS and row.status != "skipped":
            found.setdefault(row.problem, {}).setdefault(LABELS[row.contender], []).append(row)
    return found


def _labels(of: Runs) -> list[str]:
    seen = {label for by_label in of.values() for label in by_label}
    return [label for label in LABELS.values() if label in seen]


def _median(rows: Sequence[Row]) -> float:
    """Calls until the problem is solved, infinite where half of the seeds do not get there."""
    calls = [row.work if row.status == "ok" and row.work is not None else np.inf for row in rows]
    return float(np.median(calls))


def _entry(rows: Sequence[Row]) -> str:
    solved = sorted(row.work for row in rows if row.status == "ok" and row.work is not None)
    if len(solved) == len(rows):
        text = number(statistics.median(solved))
        spread = f" ({number(solved[0])}–{number(solved[-1])})"  # noqa: RUF001
        return text + (spread if solved[0] < solved[-1] else "")
    if solved:
        return f"{len(solved)} of {len(rows)} seeds: {', '.join(map(number, solved))}"
    gaps = [row.error for row in rows if row.error is not None]
    return f"{number(100 * statistics.median(gaps))} % left" if gaps else rows[0].status


def calls_sheet(rows: Sequence[Row]) -> Sheet:
    """Oracle calls until a problem is solved, the median over seeds and their range.

    Args:
        rows: Rows of the suite.

    Returns:
        A line for each problem; where no seed is solved, the share of the gap that is left.
    """
    of = {name: found for name, found in runs(rows).items() if not name.startswith("cost-")}
    labels = _labels(of)
    body = []
    for problem, found in of.items():
        least = min(map(_median, found.values()))
        seeds = max(map(len, found.values()))
        cells = [Cell(f"{problem}, {seeds} seed{'s' if seeds > 1 else ''}")]
        for label in labels:
            if label in found:
                best = np.isfinite(least) and _median(found[label]) == least
                cells.append(Cell(_entry(found[label]), bool(best)))
            else:
                cells.append(Cell(number(None)))
        body.append(cells)
    return Sheet("Oracle calls until 1 % of the gap is left", ["problem", *labels], body)


def cost_sheet(rows: Sequence[Row]) -> Sheet:
    """CPU time of an update over that of SGD, for oracles of growing cost.

    Args:
        rows: Rows of the problems `cost-…`.

    Returns:
        A line for each cost; none where SGD was not run.
    """
    of = {name: found for name, found in runs(rows).items() if name.startswith("cost-")}
    seconds = {
        name: {
            label: min(row.extras["seconds_per_update"] for row in found if row.status == "ok")
            for label, found in by_label.items()
        }
        for name, by_label in of.items()
    }
    labels = [label for label in _labels(of) if label != "SGD"]
    body = []
    for name in sorted(seconds, key=lambda name: int(name.removeprefix("cost-"))):
        base = seconds[name].get("SGD")
        if base is None:
            continue
        ratios = [Cell(number(seconds[name][label] / base)) for label in labels]
        cost = int(name.removeprefix("cost-"))
        body.append([Cell(f"2 × {cost}"), Cell(f"{number(1e3 * base)} ms"), *ratios])  # noqa: RUF001
    head = ["products with the matrix in the oracle", "an update of SGD", *labels]
    return Sheet("An update, times one of SGD", head, body)


def _gaps(row: Row) -> np.ndarray:
    assert row.f0 is not None and row.f_star is not None
    gap = (np.array(row.history["f"][1:]) - row.f_star) / (row.f0 - row.f_star)
    return np.maximum(gap, FLOOR)


def _gradients(row: Row) -> np.ndarray:
    return np.array(row.extras["grad_norms"])


MEASURES: dict[str, tuple[str, Callable[[Row], np.ndarray]]] = {
    "gap": ("best gap so far, relative", _gaps),
    "gradient": ("max norm of the gradient", _gradients),
}


def figures(rows: Sequence[Row], problem: str) -> dict[str, str]:
    """Objective and gradient over all samples against oracle calls.

    Args:
        rows: Rows of the suite.
        problem: Name of a problem among them.

    Returns:
        Two pictures as SVG text, by name.
    """
    found = runs(rows)[problem]
    drawn = {label: found[label] for label in _labels({problem: found}) if label != "m = 5"}
    pictures = {}
    for kind, (title, measure) in MEASURES.items():
        curves = {}
        for label, seeds in drawn.items():
            seeds = [row for row in seeds if row.history and np.all(np.isfinite(measure(row)))]
            if seeds:
                values = np.stack([measure(row) for row in seeds])
                low, high = np.min(values, axis=0), np.max(values, axis=0)
                calls = np.array(seeds[0].history["work"][1:])
                curves[label] = plots.Spread(calls, low, np.median(values, axis=0), high)
        name = f"sso-{problem}-{kind}"
        ours = [label for label in curves if label.startswith("m = ")]
        pictures[name] = plots.spread_figure(name, problem, "oracle calls", title, curves, ours)
    return pictures


def write(rows: Sequence[Row], folder: Path, problems: Sequence[str]) -> list[Path]:
    """Write tables and pictures.

    Args:
        rows: Rows of the suite.
        folder: Gets `sso_calls.inc` and `sso_cost.inc`, Markdown to be included, and `pictures/`.
        problems: The problems to be drawn.

    Returns:
        The files.
    """
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    sheets = {"sso_calls.inc": calls_sheet(rows), "sso_cost.inc": cost_sheet(rows)}
    texts = {
        folder / name: f"{report.markdown_table(sheet)}\n"
        for name, sheet in sheets.items()
        if sheet.body
    }
    for problem in problems:
        for name, svg in figures(rows, problem).items():
            texts[pictures / f"{name}.svg"] = svg
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return list(texts)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; `None` means those of the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m jaxopt_ext.bench.oracle_calls")
    parser.add_argument("files", nargs="+", type=Path, help="rows of the suite sso")
    parser.add_argument("-o", "--out", type=Path, default=Path(), help="folder")
    parser.add_argument("--draw", default="", help="names of problems, comma separated")
    options = parser.parse_args(argv)
    rows, _ = record.read(*options.files)
    for path in write(rows, options.out, [name for name in options.draw.split(",") if name]):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
