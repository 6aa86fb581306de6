"""The report: one HTML file that opens anywhere without a network, and a Markdown summary.

Both say what `summary` computes from the rows.
"""

import html
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxopt_ext.bench import plots, profiles, record, summary
from jaxopt_ext.bench.profiles import Case
from jaxopt_ext.bench.record import Row
from jaxopt_ext.bench.summary import Cell, Sheet, Summary, Titles

CURVES = 4  # problems per suite whose convergence is drawn

# ---- figures -----------------------------------------------------------------------------------


def figures(of: Summary, reference: Mapping[Case, float]) -> dict[str, dict[str, str]]:
    """The pictures of a suite by heading.

    Args:
        of: The suite.
        reference: f_L of cases without a known optimum.

    Returns:
        SVG text by name, by heading.
    """
    rows = of.rows
    main: dict[str, str] = {}
    for cost in of.costs[:2]:
        main |= plots.profile_figure(rows, "performance", cost)
    scaling: dict[str, str] = {}
    for cost in ("cpu", "work"):
        scaling |= plots.scaling_figure(rows, cost)
    for cost in of.costs[:2]:
        main |= plots.ratio_figure(rows, cost)
    main |= plots.profile_figure(rows, "ecdf", reference=reference)
    drawn = [r for r in rows if profiles.case_of(r) in _chosen(rows)]
    curves: dict[str, str] = {}
    by_work = plots.convergence_figure(drawn, "work", reference)
    by_time = plots.convergence_figure(drawn, "cpu", reference)
    for name, svg in by_work.items():  # the two of a problem side by side
        curves[name] = svg
        other = f"{name.removesuffix('work')}cpu"
        curves |= {other: by_time[other]} if other in by_time else {}
    targets = profiles.TOLERANCES
    accuracies = plots.profile_figure(rows, "data", "work", targets, reference)
    accuracies |= plots.profile_figure(rows, "performance", "work", targets)
    found = {
        "Profiles": main,
        "Cost against size": scaling,
        "Convergence": curves,
        "Profiles at other accuracies": accuracies,
    }
    return {heading: svgs for heading, svgs in found.items() if svgs}


def _chosen(rows: Sequence[Row]) -> set[Case]:
    """Problems evenly spaced in their least work, so that nobody picks them."""
    least: dict[Case, float] = {}
    for r in rows:
        if len(r.history.get("work", [])) > 1 and r.work is not None:
            case = profiles.case_of(r)
            least[case] = min(r.work, least.get(case, math.inf))
    order = sorted(least, key=lambda case: (least[case], case))
    places = np.linspace(0, len(order) - 1, min(CURVES, len(order))).round().astype(int)
    return {order[i] for i in places}


NOTES = {
    "Profiles": "Performance profile: the share of problems that a contender solves within that "
    "factor of the cheapest; at the left end its wins, at the right end all that it solves. "
    "Ratios: geometric mean over the problems that the contender solves, 95 % bootstrap interval "
    "over problems. ECDF: the share of targets f* + 1e2 … 1e-8 reached.",
    "Cost against size": "Lines are fitted to the logarithms; the thin line has the exponent that "
    "theory gives.",
    "Convergence": "Problems evenly spaced in their least work, lowest seed. Time is work times "
    "the measured CPU seconds per unit of work, compilation apart.",
    "Profiles at other accuracies": "Solved means f ≤ f_L + tolerance (f₀ - f_L). A data profile "
    "does not depend on who else takes part; f_L is the known optimum, else the least value "
    "in this report.",
}

# ---- HTML --------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 0 1rem 3rem; background: #fff; color: #1a1a1a;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.3rem; margin-top: 2.5rem; border-top: 2px solid #1a1a1a; padding-top: .8rem; }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .4rem; }
a { color: #0054a6; }
nav ul { padding-left: 1.2rem; columns: 12rem; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd;
  vertical-align: top; white-space: nowrap; }
thead th { border-bottom: 2px solid #888; vertical-align: bottom; }
th:first-child { text-align: left; position: sticky; left: 0; background: #fff; min-width: 8rem;
  max-width: 11rem; white-space: normal; overflow-wrap: break-word; }
.words td, .words thead th, .runs :is(td, th):is(:nth-child(2), :nth-child(3)) { text-align: left; }
.words td:last-child { white-space: normal; min-width: 16rem; overflow-wrap: anywhere; }
tbody tr:nth-child(even) > * { background: #f6f6f6; }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%,
  20rem), 1fr)); }
.figures svg { width: 100%; max-width: 31rem; height: auto; }
.note { font-size: .875rem; color: #444; }
summary { cursor: pointer; font-weight: 600; padding: .4rem 0; }
@media print {
  @page { margin: 12mm; }
  html { font-size: 9pt; }
  body { max-width: none; padding: 0; }
  nav { display: none; }
  .scroll { overflow: visible; }
  table { width: 100%; font-size: 6.5pt; }
  th, td, th:first-child, .words td:last-child { white-space: normal; min-width: 0;
    padding: 1pt 2pt; position: static; overflow-wrap: anywhere; }
  thead { display: table-header-group; }
  tr, .figures > * { break-inside: avoid; }
  h2, h3, caption, summary { break-after: avoid; }
  .figures { grid-template-columns: 1fr 1fr; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""


def printable(text: str) -> str:
    """Text without line breaks and other control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


def escape(text: str) -> str:
    """Text that means nothing to HTML."""
    return html.escape(printable(text))


def html_table(sheet: Sheet, kind: str = "") -> str:
    """A table in a box of its own to scroll in; the best entries are bold and starred.

    Args:
        sheet: The table.
        kind: "words" if its columns are text, "runs" if only its second and third are.

    Returns:
        The element.
    """

    def entry(cell: Cell) -> str:
        text = escape(cell.text)
        return f"<td><b>★ {text}</b></td>" if cell.best else f"<td>{text}</td>"

    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in sheet.head)
    lines = [
        f'<tr><th scope="row">{escape(first.text)}</th>{"".join(map(entry, others))}</tr>'
        for first, *others in sheet.body
    ]
    caption = escape(sheet.caption)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">'
        f'<table class="{kind}"><caption>{caption}</caption><thead><tr>{head}</tr></thead>\n<tbody>'
        + "\n".join(lines)
        + "</tbody></table></div>"
    )


def details(summary: str, body: str) -> str:
    """A part that is folded on the screen and open in print."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}\n</details>"


def _anchor(suite: str) -> str:
    return "suite-" + re.sub(r"[^A-Za-z0-9_-]", "-", suite)


def _svg_in_page(svg: str) -> str:
    """HTML knows the namespaces, so the page can do without any address."""
    bare = re.sub(r' xmlns(:[a-z]+)?="[^"]*"', "", svg)
    return f"<div>{bare}</div>"


def _html_figures(heading: str, svgs: Mapping[str, str]) -> str:
    note = f'<p class="note">{escape(NOTES[heading])}</p>'
    return f'{note}<div class="figures">{"".join(map(_svg_in_page, svgs.values()))}</div>'


def _outcome_title(of: Summary) -> str:
    mine, peer = of.pair or ("", "")
    return f"Problem by problem, {mine} against {peer}, by {profiles.cost_named(of.costs[0]).label}"


def _html_outcomes(of: Summary) -> str:
    items = [
        f"<li><b>{heading} ({len(found)}).</b> {escape(summary.listing(found))}</li>"
        for heading, found in summary.outcomes(of).items()
    ]
    return f"<p>{escape(_outcome_title(of))}:</p><ul>{''.join(items)}</ul>" if items else ""


def html_suite(of: Summary, reference: Mapping[Case, float]) -> str:
    """The section of a suite."""
    parts = [f'<section id="{_anchor(of.suite)}"><h2>{escape(of.title)}</h2>']
    if of.text:
        parts.append(f"<p>{escape(of.text)}</p>")
    parts.append(html_table(summary.contender_sheet(of)))
    if sheet := summary.verdict_sheet(of):
        parts.append(html_table(sheet, "words"))
    parts.append(_html_outcomes(of))
    if sheet := summary.pair_sheet(of):
        parts.append(html_table(sheet))
    for sheet in (summary.slope_sheet(of), summary.skipped_sheet(of)):
        if sheet:
            parts.append(html_table(sheet, "words"))
    if sheet := summary.failure_sheet(of):
        parts.append(details(f"Failures ({len(sheet.body)})", html_table(sheet, "words")))
    for heading, svgs in figures(of, reference).items():
        body = _html_figures(heading, svgs)
        folded = heading == "Profiles at other accuracies"
        parts.append(details(heading, body) if folded else f"<h3>{heading}</h3>{body}")
    runs = summary.problem_sheet(of)
    parts.append(details(f"Every run ({len(runs.body)})", html_table(runs, "runs")))
    return "\n".join([part for part in parts if part] + ["</section>"])


LEGEND = (
    "Work is the number of evaluations of the objective, derivatives converted to them; it does "
    "not depend on the machine and has the most authority, then CPU seconds after compilation. "
    "Ratios are geometric means over the least cost of each problem, taken over the problems that "
    "the contender solves. Score: area under the performance profile over the factors 1 to 32, "
    "1 is best. Best entries are bold with a star. In Losses and Wins ours is the one contender "
    "with the highest score in the suite, the peer the best by the measure in question; a factor "
    "counts if its 95 % interval excludes 1, on fewer than five problems if it exceeds 10 %. "
    "Problems that a contender did not try count as not solved in profiles."
)


def html_page(
    rows: Sequence[Row], environments: Mapping[str, Mapping[str, Any]], titles: Titles | None = None
) -> str:
    """The whole report as HTML.

    Args:
        rows: All rows.
        environments: The environments by `env_id`.
        titles: Title and summary of suites.

    Returns:
        A page that refers to nothing outside of itself.
    """
    summaries = summary.summarize(rows, titles)
    reference = profiles.best_values(rows)
    first = " ".join(
        f"<b>{escape(heading)}:</b> {escape(' '.join(sentences))}"
        for heading, sentences in summary.lead(summaries, _noisy(environments))
    )
    links = "".join(
        f'<li><a href="#{_anchor(s.suite)}">{escape(s.title)}</a></li>' for s in summaries
    )
    environment = summary.environment_sheet(environments)
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{TITLE}</title>\n<style>{STYLE}</style></head>\n<body><main>",
        f"<h1>{TITLE}</h1>\n<p>{first}</p>",
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>',
        f'<p class="note">{escape(LEGEND)} {escape(statuses_text())}</p>',
        details("Environment", html_table(environment, "words")) if environment else "",
        *(html_suite(of, reference) for of in summaries),
        "</main></body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


TITLE = "Benchmark report of jaxopt_ext"


def statuses_text() -> str:
    """What the statuses mean."""
    meanings = "; ".join(f"{name}: {text}" for name, text in record.STATUSES.items())
    return f"Statuses. {meanings}."


def _noisy(environments: Mapping[str, Mapping[str, Any]]) -> bool:
    return any(environment.get("noisy") for environment in environments.values())


# ---- Markdown ----------------------------------------------------------------------------------


def markdown_text(text: str) -> str:
    """Text that means nothing to Markdown or HTML, on one line."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(printable(text), quote=False))


def markdown_table(sheet: Sheet) -> str:
    """A table; the best entries are bold and starred."""

    def entry(cell: Cell) -> str:
        text = markdown_text(cell.text)
        return f"**★ {text}**" if cell.best else text

    lines = [[markdown_text(name) for name in sheet.head], ["---"] * len(sheet.head)]
    lines += [[entry(cell) for cell in cells] for cells in sheet.body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_suite(of: Summary) -> str:
    """The part of a suite."""
    parts = [f"## {markdown_text(of.title)}", markdown_text(of.text)]
    parts.append(markdown_table(summary.contender_sheet(of)))
    if outcomes := summary.outcomes(of):
        lines = [
            f"* **{heading} ({len(found)}).** {markdown_text(summary.listing(found))}"
            for heading, found in outcomes.items()
        ]
        parts += [f"{markdown_text(_outcome_title(of))}:", "\n".join(lines)]
    sheets = (summary.verdict_sheet, summary.slope_sheet, summary.skipped_sheet)
    for sheet in (make(of) for make in (*sheets, summary.failure_sheet)):
        if sheet:
            parts += [f"### {sheet.caption}", markdown_table(sheet)]
    return "\n\n".join(part for part in parts if part)


def markdown(
    rows: Sequence[Row],
    environments: Mapping[str, Mapping[str, Any]],
    titles: Titles | None = None,
) -> str:
    """The summary as Markdown: the same beginning and tables, without figures and single runs.

    Args:
        rows: All rows.
        environments: The environments by `env_id`.
        titles: Title and summary of suites.

    Returns:
        The text.
    """
    summaries = summary.summarize(rows, titles)
    first = []
    for heading, sentences in summary.lead(summaries, _noisy(environments)):
        texts = list(map(markdown_text, sentences))
        listed = "\n\n" + "\n".join(f"* {text}" for text in texts)
        first.append(f"**{heading}:**" + (listed if len(texts) > 1 else f" {texts[0]}"))
    parts = [f"# {TITLE}", *first, LEGEND]
    if environment := summary.environment_sheet(environments):
        parts += ["## Environment", markdown_table(environment)]
    return "\n\n".join([*parts, *map(markdown_suite, summaries)]) + "\n"


# ---- files -------------------------------------------------------------------------------------


def write(
    rows: Sequence[Row],
    environments: Mapping[str, Mapping[str, Any]],
    out: Path,
    titles: Titles | None = None,
) -> tuple[Path, Path]:
    """Write the report and its summary.

    Args:
        rows: All rows.
        environments: The environments by `env_id`, as `record.read` gives them.
        out: A file ending in .html or .md, beside which the other lands, or a folder, which then
            gets report.html and report.md.
        titles: Title and summary of suites by name.

    Returns:
        The HTML file and the Markdown file.

    Raises:
        ValueError: There are no rows.
    """
    if not rows:
        raise ValueError("rows is empty, expected the rows of at least one run")
    out = Path(out)
    base = out if out.suffix in (".html", ".md") else out / "report.html"
    base.parent.mkdir(parents=True, exist_ok=True)
    page, text = base.with_suffix(".html"), base.with_suffix(".md")
    page.write_text(html_page(rows, environments, titles), encoding="utf-8")
    text.write_text(markdown(rows, environments, titles), encoding="utf-8")
    return page, text
