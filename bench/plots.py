"""Figures of benchmark rows as SVG text.

They are drawn to be read on a phone and in black and white: every contender keeps its colour, its
dashes and its marker through all figures of a suite; ours are drawn thicker and solid. The same
rows give the same text. Matplotlib is imported only here, and only where something is drawn.
"""

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxopt_ext.bench import profiles
from jaxopt_ext.bench.contender import OURS
from jaxopt_ext.bench.profiles import Case
from jaxopt_ext.bench.record import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

KINDS = ("performance", "data", "ecdf")
WIDTH = 3.7  # inches: near 1:1 on a phone
MOST = 10  # more curves than that cannot be told apart

# Okabe and Ito's palette without its yellow, which is too light on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES = ("--", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2, 2, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*", "h")
RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxopt_ext",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "legend.fontsize": 8,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "path.simplify": True,
}

Style = dict[str, Any]


def styles(contenders: Sequence[str]) -> dict[str, Style]:
    """A look for each contender.

    Args:
        contenders: All contenders of a suite, in order.

    Returns:
        Keywords of `Axes.plot` by contender.
    """
    looks = {}
    for i, name in enumerate(contenders):
        ours = profiles.is_ours(name)
        colour = COLOURS[i % len(COLOURS)]
        looks[name] = {
            "color": colour,
            "linestyle": "-" if ours else DASHES[i % len(DASHES)],
            "linewidth": 2.2 if ours else 1.4,
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 4.5,
            "markerfacecolor": colour if ours else "white",
            "zorder": 3 if ours else 2.5,
        }
    return looks


# ---- from a figure to text ---------------------------------------------------------------------


def svg_text(figure: "Figure", name: str, label: str) -> str:
    """A figure as SVG that can stand inside a page among others.

    Args:
        figure: The figure.
        name: Prefix of its ids, unique in the page.
        label: What it shows, for people who do not see it.

    Returns:
        The `svg` element, without date or other metadata.
    """
    file = io.StringIO()
    with warnings.catch_warnings():
        # the reader's fonts draw the text, so it does not matter what matplotlib's own lack
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(file, format="svg")
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"\s*<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    # hundredths of a point are seen by nobody and make a third of the text
    text = re.sub(r"(?<=[\s(\"])-?\d+\.\d{3,}(?=[\s,)\"])", _shorter, text)
    # matplotlib's style sheet addresses everything in the page that it lands in
    text = text.replace('<style type="text/css">*{', f'<style type="text/css">#{name} *{{')
    head = f'<svg id="{name}" role="img" aria-label="{html.escape(label)}"'
    return text.replace("<svg", head, 1).strip() + "\n"


def _shorter(number: re.Match) -> str:
    return f"{float(number.group()):.2f}".rstrip("0").rstrip(".")


def _draw(
    name: str,
    label: str,
    paint: Callable[["Axes"], None],
    lines: int = 0,
    height: float = 2.0,
    left: float = 0.55,
) -> str:
    """Paint on axes of that height, with room below for a legend of so many lines."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    legend = 0.165 * lines
    top, bottom = 0.25, 0.52 + legend
    tall = top + height + bottom
    # the user's own settings would make figures differ from machine to machine
    settings: Any = {**matplotlib.rcParamsDefault, **RC}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH, tall))
        FigureCanvasSVG(figure)
        wide = WIDTH - left - 0.12
        axes = figure.add_axes((left / WIDTH, bottom / tall, wide / WIDTH, height / tall))
        paint(axes)
        if lines:
            figure.legend(
                *axes.get_legend_handles_labels(),
                loc="upper left",
                bbox_to_anchor=(0.0, (legend + 0.06) / tall),
                frameon=False,
                borderaxespad=0,
                borderpad=0.2,
                handlelength=3.6,
                labelspacing=0.35,
            )
        return svg_text(figure, name, label)


def _short(name: str, most: int = 42) -> str:
    """A contender's name for a legend: cut to the width, and no formula."""
    name = name if len(name) <= most else f"{name[: most - 1]}…"
    return name.replace("$", r"\$")


def _plain_ticks(axis: "Axis", most: int = 7) -> None:
    """1, 2, 4 instead of powers of two and of ten, on a short logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(base=2, numticks=most))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_locator(NullLocator())


def _slug(*parts: object) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", "-".join(map(str, parts))).strip("-")


def _percent(axes: "Axes", label: str) -> None:
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
    axes.set_ylabel(label)
    axes.set_axisbelow(True)


def _shown(contenders: Sequence[str], standing: Mapping[str, float]) -> tuple[list[str], str]:
    """The best `MOST` by standing, in the given order, and a note about the others."""
    best = sorted(contenders, key=lambda name: -standing.get(name, 0.0))[:MOST]
    left = len(contenders) - len(best)
    note = f"; the {left} with the lowest scores are not drawn" if left else ""
    return [name for name in contenders if name in best], note


# ---- profiles ----------------------------------------------------------------------------------


def profile_figure(
    rows: Sequence[Row],
    kind: str = "performance",
    cost: str = "work",
    tolerances: Sequence[float] | None = None,
    reference: Mapping[Case, float] | None = None,
) -> dict[str, str]:
    """Profiles of every suite among the rows.

    Args:
        rows: Rows of any suites.
        kind: "performance", "data" or "ecdf".
        cost: Name of the cost. Targets on the objective are known against work only, so "data",
            "ecdf" and anything with tolerances needs "work".
        tolerances: Tolerances of the test of Moré and Wild, one figure each. `None` means the
            suite's own accuracy for "performance", and `profiles.TOLERANCES` for "data".
        reference: f_L of cases without a known optimum, by default `profiles.best_values(rows)`.

    Returns:
        SVG text by name; suites that hold nothing to draw are absent.

    Raises:
        ValueError: An unknown kind or cost, or a cost that the kind cannot count.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    profiles.cost_named(cost)
    if cost != "work" and (kind != "performance" or tolerances is not None):
        raise ValueError(f"cost is {cost!r}, expected work for targets on the objective")
    reference = profiles.best_values(rows) if reference is None else reference
    found = {}
    for suite in sorted({r.suite for r in rows}):
        of_suite = [r for r in rows if r.suite == suite]
        if kind == "ecdf":
            figures = {_slug(suite, "ecdf"): _ecdf(of_suite, reference)}
        elif kind == "performance" and tolerances is None:
            figures = {_slug(suite, "performance", cost): _performance(of_suite, cost, None)}
        else:
            figures = {}
            for tolerance in profiles.TOLERANCES if tolerances is None else tolerances:
                name = _slug(suite, kind, f"{tolerance:.0e}")
                if kind == "performance":
                    figures[name] = _performance(of_suite, "work", tolerance)
                else:
                    figures[name] = _data(of_suite, tolerance, reference)
        for name, make in figures.items():
            if text := make(name):
                found[name] = text
    return found


Make = Callable[[str], str]


def _performance(rows: Sequence[Row], cost: str, tolerance: float | None) -> Make:
    if tolerance is None:
        table, accuracy = profiles.cost_table(rows, cost), "to the accuracy of the suite"
    else:
        table = profiles.target_table(rows, tolerance)
        accuracy = _accuracy(tolerance)
    if not table.solvable.any():
        return lambda name: ""
    word = profiles.cost_named(cost).label.split(" (")[0]
    curves = profiles.performance_profile(table)
    return _steps(curves, rows, profiles.scores(table), f"factor of the least {word}", accuracy)


def _data(rows: Sequence[Row], tolerance: float, reference: Mapping[Case, float]) -> Make:
    curves = profiles.data_profile(rows, tolerance, reference)
    if len(curves.x) < 2:
        return lambda name: ""
    standing = profiles.scores(profiles.cost_table(rows))
    return _steps(curves, rows, standing, "work / (n + 1)", _accuracy(tolerance))


def _accuracy(tolerance: float) -> str:
    return f"to {tolerance:.0e} of the possible decrease"


def _steps(
    curves: profiles.Curves,
    rows: Sequence[Row],
    standing: Mapping[str, float],
    axis: str,
    accuracy: str,
) -> Make:
    looks = styles(profiles.contenders_of(rows))
    shown, note = _shown(list(curves.y), standing)
    first = max(curves.x[curves.x > 0].min(), 1e-12)
    last = max(float(curves.x.max()), 2 * first) * 1.15

    def paint(axes: "Axes") -> None:
        for name in shown:
            start = curves.y[name][np.searchsorted(curves.x, first, side="right") - 1]
            later = curves.x > first
            x = [first, *curves.x[later], last]
            y = [start, *curves.y[name][later], curves.y[name][-1]]
            gap = max(len(x) // 6, 1)
            look = {**looks[name], "markevery": (shown.index(name) % gap, gap)}
            axes.step(x, y, where="post", label=_short(name), clip_on=False, **look)
        axes.set_xscale("log")
        axes.set_xlim(first, last)
        if last / first < 2**12:
            _plain_ticks(axes.xaxis)
        axes.set_xlabel(axis)
        axes.set_title(f"solved {accuracy}", loc="left")
        _percent(axes, "% of problems")

    ends = "; ".join(f"{c} {100 * curves.y[c][-1]:.0f} %" for c in shown)
    label = f"Share of problems solved {accuracy} against {axis}; at the right end: {ends}{note}."
    return lambda name: _draw(name, label, paint, len(shown))


def _ecdf(rows: Sequence[Row], reference: Mapping[Case, float]) -> Make:
    x, bands = profiles.ecdf(rows, reference)
    if not bands:
        return lambda name: ""
    looks = styles(profiles.contenders_of(rows))
    shown, note = _shown(list(bands), {name: band.y.mean() for name, band in bands.items()})

    def paint(axes: "Axes") -> None:
        for i, name in enumerate(shown):
            band, at = bands[name], slice(3 * i % 24, None, 24)
            look = {**looks[name], "markevery": (at.start, at.step)}
            axes.vlines(x[at], band.low[at], band.high[at], color=look["color"], linewidth=0.9)
            axes.plot(x, band.y, label=_short(name), clip_on=False, **look)
        axes.set_xscale("log")
        axes.set_xlim(x[0], x[-1])
        if x[-1] / x[0] < 2**12:
            _plain_ticks(axes.xaxis)
        axes.set_xlabel("work / n")
        axes.set_title("51 targets; bars: 95 % over problems", loc="left")
        _percent(axes, "% of targets reached")

    ends = "; ".join(f"{c} {100 * bands[c].y[-1]:.0f} %" for c in shown)
    label = f"Share of 51 targets reached against work / n; at the right end: {ends}{note}."
    return lambda name: _draw(name, label, paint, len(shown))


# ---- convergence, ratios, scaling --------------------------------------------------------------


def convergence_figure(
    rows: Sequence[Row], against: str = "work", reference: Mapping[Case, float] | None = None
) -> dict[str, str]:
    """Best f − f_L so far, one figure per problem.

    Args:
        rows: Rows of one or more problems; of each contender the lowest seed is drawn.
        against: "work", or "cpu": work times the measured seconds per unit of work, so the time
            is spread evenly over the solve.
        reference: f_L of cases without a known optimum, by default `profiles.best_values(rows)`.

    Returns:
        SVG text by name; problems without two points of any history are absent.

    Raises:
        ValueError: Another `against`.
    """
    if against not in ("work", "cpu"):
        raise ValueError(f"against is {against!r}, expected work or cpu")
    reference = profiles.best_values(rows) if reference is None else reference
    values = profiles.fixed_values(rows, reference)
    looks = {
        suite: styles(profiles.contenders_of([r for r in rows if r.suite == suite]))
        for suite in {r.suite for r in rows}
    }
    runs: dict[Case, dict[str, Row]] = {}
    for instance, found in profiles.grid(rows).items():
        for name, run in found.items():
            runs.setdefault(instance.case, {}).setdefault(name, run)
    figures = {}
    for case, found in runs.items():
        name = _slug(*case[:3], "quick" if case.quick else "full", "convergence", against)
        text = _convergence(name, case, found, looks[case.suite], against, values.get(case))
        if text:
            figures[name] = text
    return figures


def _convergence(
    name: str,
    case: Case,
    runs: Mapping[str, Row],
    looks: Mapping[str, Style],
    against: str,
    least: float | None,
) -> str:
    if least is None:
        return ""
    floor = 1e-16 * max(1.0, abs(least))  # what is equal in float64 shows at the bottom
    curves = {}
    for contender, run in runs.items():
        work, best = profiles.trajectory(run)
        scale = 1.0
        if against == "cpu":
            scale = run.cpu / run.work if run.cpu is not None and run.work else math.nan
        gap = np.maximum(best - least, floor)
        seen = np.isfinite(gap) & np.isfinite(work * scale)
        if seen.sum() > 1:
            curves[contender] = (np.maximum(work, 1)[seen] * scale, gap[seen])
    if not curves:
        return ""
    shown, note = _shown(list(looks), {c: -gap.min() for c, (_, gap) in curves.items()})
    shown = [c for c in shown if c in curves]

    def paint(axes: "Axes") -> None:
        for i, contender in enumerate(shown):
            x, gap = curves[contender]
            every = max(len(x) // 6, 1)
            look = {**looks[contender], "markevery": (i % every, every)}
            axes.step(x, gap, where="post", label=_short(contender), **look)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("work" if against == "work" else "CPU seconds (work x seconds per work)")
        axes.set_ylabel("f above the least")
        axes.set_title(_short(case.problem, 50), loc="left")

    ends = "; ".join(f"{c} {curves[c][1].min():.1e}" for c in shown)
    label = f"{case.problem}: gap of the objective against {against}; least gap: {ends}{note}."
    return _draw(name, label, paint, len(shown), left=0.62)


class Spread(NamedTuple):
    """A curve over several seeds.

    Attributes:
        x: Abscissae, positive.
        low: The least of the seeds.
        middle: Their median.
        high: The largest.
    """

    x: np.ndarray
    low: np.ndarray
    middle: np.ndarray
    high: np.ndarray


def spread_figure(
    name: str, title: str, x: str, y: str, curves: Mapping[str, Spread], ours: Sequence[str]
) -> str:
    """Medians over seeds with the range of the seeds as a band, both axes logarithmic.

    Args:
        name: Name of the figure.
        title: Its title.
        x: What the abscissa is.
        y: What the ordinate is.
        curves: The curves by label.
        ours: The labels that belong to this library.

    Returns:
        SVG text.
    """
    looks = styles([f"{OURS} {label}" if label in ours else label for label in curves])

    def paint(axes: "Axes") -> None:
        for i, (label, look) in enumerate(zip(curves, looks.values(), strict=True)):
            curve = curves[label]
            every = max(len(curve.x) // 5, 1)
            axes.fill_between(curve.x, curve.low, curve.high, color=look["color"], alpha=0.12, lw=0)
            look = {**look, "markevery": (i % every, every)}
            axes.plot(curve.x, curve.middle, label=_short(label), **look)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_title(_short(title, 50), loc="left")

    ends = "; ".join(f"{label} {curve.middle[-1]:.1e}" for label, curve in curves.items())
    text = f"{title}: {y} against {x}; at the end: {ends}."
    return _draw(name, text, paint, len(curves), left=0.62)


def ratio_figure(rows: Sequence[Row], cost: str = "work") -> dict[str, str]:
    """Geometric-mean ratio of every contender to the best, with its interval, by suite.

    Args:
        rows: Rows of any suites.
        cost: Name of the cost.

    Returns:
        SVG text by name; suites without such a cost are absent.

    Raises:
        ValueError: An unknown cost.
    """
    word = profiles.cost_named(cost).label.split(" (")[0]
    figures = {}
    for suite in sorted({r.suite for r in rows}):
        of_suite = [r for r in rows if r.suite == suite]
        ratios = profiles.geometric_ratios(profiles.cost_table(of_suite, cost))
        known = {name: ratio for name, ratio in ratios.items() if ratio.problems}
        if known:
            name = _slug(suite, "ratio", cost)
            figures[name] = _ratios(name, known, styles(profiles.contenders_of(of_suite)), word)
    return figures


def _ratios(
    name: str, ratios: Mapping[str, profiles.Ratio], looks: Mapping[str, Style], word: str
) -> str:
    order = sorted(ratios, key=lambda contender: ratios[contender].value)

    def paint(axes: "Axes") -> None:
        axes.set_xscale("log")
        top = max(max(ratio.high for ratio in ratios.values()), 2.0)
        axes.set_xlim(0.93, top * 1.15)
        if top < 2**12:
            _plain_ticks(axes.xaxis)
        for i, contender in enumerate(order):
            ratio, look = ratios[contender], looks[contender]
            axes.plot([ratio.low, ratio.high], [i, i], color=look["color"], linewidth=1.4)
            dot = {key: look[key] for key in ("color", "marker", "markerfacecolor")}
            axes.plot([ratio.value], [i], markersize=6, linestyle="none", **dot)
            weight = "bold" if profiles.is_ours(contender) else "normal"
            text = f"{_short(contender)}: {ratio.value:.2f} ({ratio.problems})"
            # in axes units, so a label cannot leave the figure
            place = axes.get_yaxis_transform()
            axes.text(0.01, i - 0.3, text, fontsize=8, fontweight=weight, transform=place)
        axes.axvline(1, color="0.4", linewidth=0.8)
        axes.set_ylim(len(order) - 0.4, -0.8)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"times the least {word} (problems solved)")

    values = "; ".join(f"{c} {ratios[c].value:.2f}" for c in order)
    label = f"Geometric mean of {word} over the least of each problem: {values}."
    return _draw(name, label, paint, height=0.1 + 0.36 * len(order), left=0.12)


def scaling_figure(rows: Sequence[Row], cost: str = "cpu") -> dict[str, str]:
    """Cost against size on logarithmic axes, with the fitted and the theoretical slope.

    Args:
        rows: Rows with `n`; see `profiles.slopes`.
        cost: Name of the cost.

    Returns:
        SVG text by name, one figure per suite and family of problems.

    Raises:
        ValueError: An unknown cost.
    """
    word = profiles.cost_named(cost).label
    figures = {}
    for suite in sorted({r.suite for r in rows}):
        of_suite = [r for r in rows if r.suite == suite]
        looks = styles(profiles.contenders_of(of_suite))
        families: dict[str, dict[str, profiles.Slope]] = {}
        for (family, contender), fit in profiles.slopes(of_suite, cost).items():
            families.setdefault(family, {})[contender] = fit
        for family, fits in families.items():
            name = _slug(suite, family, "scaling", cost)
            figures[name] = _scaling(name, family, fits, looks, word)
    return figures


def slope_text(fit: profiles.Slope) -> str:
    """A fitted slope, its interval and what theory says, in a few characters."""
    text = f"{fit.slope:.2f}"
    if math.isfinite(fit.low):
        text += f" [{fit.low:.2f}, {fit.high:.2f}]"
    return text if fit.theory is None else f"{text}, theory {fit.theory:g}"


def _scaling(
    name: str,
    family: str,
    fits: Mapping[str, profiles.Slope],
    looks: Mapping[str, Style],
    word: str,
) -> str:
    order = [contender for contender in looks if contender in fits][:MOST]

    def paint(axes: "Axes") -> None:
        for contender in order:
            fit, look = fits[contender], looks[contender]
            ends = np.array([fit.sizes[0], fit.sizes[-1]])
            line = {key: look[key] for key in ("color", "linestyle", "linewidth", "zorder")}
            dots = {key: look[key] for key in ("color", "marker", "markersize", "markerfacecolor")}
            axes.plot(fit.sizes, fit.costs, linestyle="none", **dots)
            axes.plot(ends, fit.constant * ends**fit.slope, **line)
            axes.plot([], [], label=f"{_short(contender, 26)}: {slope_text(fit)}", **look)
            if fit.theory is not None:
                middle = float(np.exp(np.log(fit.sizes).mean()))
                height = fit.constant * middle**fit.slope
                theory = height * (ends / middle) ** fit.theory
                axes.plot(ends, theory, color=look["color"], linewidth=0.7, alpha=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("number of variables (thin line: slope of the theory)")
        axes.set_ylabel(word)
        axes.set_title(_short(family, 50), loc="left")

    values = "; ".join(f"{c} {slope_text(fits[c])}" for c in order)
    label = f"{family}: {word} against size; slopes: {values}."
    return _draw(name, label, paint, len(order), left=0.62)
