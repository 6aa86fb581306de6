"""The command line `python -m jaxopt_ext.bench`: list, run, profile, report, compare."""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxopt_ext.bench import record
from jaxopt_ext.bench.suite import NAMES, load


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; `None` means those of the process.

    Returns:
        The exit code: 0 if all went well, 1 if a comparison found a regression, 2 on bad input.
    """
    options = parser().parse_args(argv)
    try:
        return options.command(options)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The parser of the command line.

    Returns:
        The parser.
    """
    top = argparse.ArgumentParser(
        prog="python -m jaxopt_ext.bench",
        description="Compare solvers, ours and those of other libraries, in one run.",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("list", help="suites, contenders, problems or data sets")
    one.add_argument("what", nargs="?", default="suites", help="suites, solvers, problems or data")
    one.add_argument("--suite", help="only this suite")
    one.set_defaults(command=command_list)

    one = commands.add_parser("run", help="run suites and write one row per solve")
    one.add_argument(
        "suites", nargs="+", metavar="SUITE", help=f"{', '.join(NAMES)}, all, or a module"
    )
    one.add_argument("--quick", action="store_true", help="few problems, default settings")
    one.add_argument("--solvers", default="*", help="libraries or names, comma separated: ours,sc*")
    one.add_argument("--problems", default="*", help="pattern of problem names: bbob-f0?-d02-*")
    one.add_argument("--seeds", type=_seeds, help="of random contenders, as 0:5 or 3")
    one.add_argument("--budget", type=_budget, default={}, help="evals=1e4 or cpu=20, or both")
    one.add_argument("--repeat", type=_positive, default=5, help="most timed solves per row")
    one.add_argument("--threads", type=_positive, default=1, help="threads of each worker")
    one.add_argument("--x32", action="store_true", help="float32 instead of float64")
    one.add_argument("--x64", action="store_true", help="float64; with --x32, both")
    one.add_argument("--timeout", type=float, default=600.0, help="wall seconds for one row")
    one.add_argument("--data", type=Path, help="folder with further data sets")
    one.add_argument(
        "--out", type=Path, default=Path("bench.jsonl"), help="file to write or resume"
    )
    one.set_defaults(command=command_run)

    one = commands.add_parser("profile", help="performance, data or ECDF profiles as SVG")
    one.add_argument("files", nargs="+", type=Path)
    one.add_argument("--kind", choices=("performance", "data", "ecdf"), default="performance")
    one.add_argument("--cost", choices=("work", "iterations", "cpu", "wall"), default="work")
    one.add_argument("--tol", type=_floats, help="1e-1,1e-3: targets instead of the suite's own")
    one.add_argument("-o", "--out", type=Path, default=Path("profiles"), help="folder")
    one.set_defaults(command=command_profile)

    one = commands.add_parser("report", help="one HTML file and a Markdown summary")
    one.add_argument("files", nargs="+", type=Path)
    one.add_argument("-o", "--out", type=Path, default=Path("report.html"))
    one.set_defaults(command=command_report)

    one = commands.add_parser("compare", help="exit 1 if counts or statuses of NEW are worse")
    one.add_argument("base", type=Path, help="rows or a baseline")
    one.add_argument("new", type=Path, help="rows")
    one.add_argument("--gate", type=_gate, default={}, help="counts=1.15,single=2,status=0")
    one.add_argument("--update-baseline", action="store_true", help="write NEW's counts to BASE")
    one.set_defaults(command=command_compare)
    return top


def command_list(options: argparse.Namespace) -> int:
    """Print what there is.

    Args:
        options: Parsed arguments.

    Returns:
        The exit code.
    """
    from jaxopt_ext.bench.worker import missing

    if options.what not in ("suites", "solvers", "problems", "data"):
        raise ValueError(f"list {options.what!r}, expected suites, solvers, problems or data")
    if options.what == "data":
        from jaxopt_ext.bench import datasets

        for name in datasets.TWINS:
            print(f"{name:24}synthetic twin")
        for name in datasets.PACKAGED:
            print(f"{name:24}from an installed package")
        for name, path in datasets.local().items():
            print(f"{name:24}{path}")
        return 0
    for name in [options.suite] if options.suite else NAMES:
        suite = load(name)
        entries = suite.entries()
        if options.what == "suites":
            quick = sum(entry.quick for entry in entries.values())
            print(f"{name:12}{len(entries):4} problems, {quick:2} in the quick form: {suite.title}")
        elif options.what == "problems":
            for problem, entry in entries.items():
                print(f"{name:12}{problem:32}{'quick' if entry.quick else ''}")
        else:
            for contender in suite.contenders():
                print(f"{name:12}{contender.name:48}{missing(contender) or ''}")
    return 0


def command_run(options: argparse.Namespace) -> int:
    """Run suites.

    Args:
        options: Parsed arguments.

    Returns:
        The exit code.
    """
    from jaxopt_ext.bench import runner

    if options.data is not None:
        if not options.data.is_dir():
            raise ValueError(f"--data is {options.data}, expected a folder")
        os.environ["JAXOPT_EXT_DATA"] = str(options.data.resolve())  # workers inherit it
    if options.timeout <= 0:
        raise ValueError(f"--timeout is {options.timeout:g}, expected a positive number of seconds")
    dtypes = ("float32",) if options.x32 else ("float64",)
    if options.x32 and options.x64:
        dtypes = ("float64", "float32")
    asked = runner.Options(
        quick=options.quick,
        solvers=tuple(options.solvers.split(",")),
        problems=options.problems,
        seeds=options.seeds,
        dtypes=dtypes,
        evaluations=options.budget.get("evals"),
        timeout=options.budget.get("cpu", options.timeout),
        repeats=options.repeat,
        threads=options.threads,
    )
    suites = NAMES if "all" in options.suites else options.suites
    with _progress() as progress:
        rows = runner.run(suites, options.out, asked, progress)
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.status] = counts.get(row.status, 0) + 1
    summary = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
    print(f"{len(rows)} rows into {options.out}: {summary or 'all were there already'}")
    for library, message in sorted({(r.package, r.message) for r in rows if r.status == "skipped"}):
        print(f"skipped {library}: {message}")
    return 0


class _progress:
    """A bar with the remaining time on a terminal, one line per row elsewhere."""

    def __enter__(self):
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(unit="row", dynamic_ncols=True)
        return self

    def __call__(self, done: int, total: int, what: str) -> None:
        if self.bar is None:
            print(f"[{done}/{total}] {what}", file=sys.stderr)
            return
        self.bar.total = total
        self.bar.set_description(what[:40], refresh=False)
        self.bar.update(done - self.bar.n)

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()


def command_profile(options: argparse.Namespace) -> int:
    """Write profiles as SVG files.

    Args:
        options: Parsed arguments.

    Returns:
        The exit code.
    """
    from jaxopt_ext.bench import plots

    rows, _ = record.read(*options.files)
    figures = plots.profile_figure(rows, options.kind, options.cost, options.tol)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, svg in figures.items():
        path = options.out / f"{name}.svg"
        path.write_text(svg, encoding="utf-8")
        print(path)
    return 0


def command_report(options: argparse.Namespace) -> int:
    """Write the report.

    Args:
        options: Parsed arguments.

    Returns:
        The exit code.
    """
    from jaxopt_ext.bench import report

    rows, environments = record.read(*options.files)
    if not rows:
        raise ValueError(f"no rows in {', '.join(map(str, options.files))}")
    suites = {}
    for name in sorted({row.suite for row in rows}):
        with contextlib.suppress(ValueError):  # a suite of somebody else's
            suites[name] = (load(name).title, load(name).summary)
    for path in report.write(rows, environments, options.out, suites):
        print(path)
    return 0


def command_compare(options: argparse.Namespace) -> int:
    """Compare two files.

    Args:
        options: Parsed arguments.

    Returns:
        1 on a regression, else 0.
    """
    from jaxopt_ext.bench import compare

    if options.update_baseline:
        rows, _ = record.read(options.new)
        options.base.write_text(compare.baseline(rows), encoding="utf-8")
        print(options.base)
        return 0
    code, text = compare.main_compare(options.base, options.new, compare.Gate(**options.gate))
    print(text)
    return code


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return number


def _seeds(text: str) -> tuple[int, ...]:
    try:
        first, _, last = text.partition(":")
        return tuple(range(int(first), int(last))) if last else (int(first),)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected seeds as 3 or 0:5") from None


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _pairs(text: str, known: tuple[str, ...]) -> dict[str, float]:
    pairs = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r}, expected {' or '.join(known)}=NUMBER")
        pairs[name] = float(number)
    return pairs


def _budget(text: str) -> dict[str, float]:
    pairs = _pairs(text, ("evals", "cpu"))
    return {**pairs, "evals": int(pairs["evals"])} if "evals" in pairs else pairs


def _gate(text: str) -> dict[str, float]:
    return _pairs(text, ("counts", "single", "status"))
