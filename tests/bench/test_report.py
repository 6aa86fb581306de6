"""The report: it says what the rows say, is safe, refers to nothing outside and fits a phone."""

import dataclasses
import html
import html.parser
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from jaxopt_ext.bench import profiles, report, summary
from jaxopt_ext.bench.record import Row

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from rows import ENVIRONMENT, every_row, implicit_rows, odd_rows, solved_rows

TITLES = {"smooth": ("Smooth <minimization>", "Unconstrained & smooth problems.")}
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(html.parser.HTMLParser):
    """Elements, attributes and text, with a check that tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "new" / "folder"
    return report.write(every_row(), {"abc123": ENVIRONMENT}, out, TITLES)


@pytest.fixture(scope="module")
def page(written):
    return written[0].read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def parsed(page):
    return Page(page)


def one(solver, package="jaxopt_ext", problem="p", **fields):
    return Row("s", problem, package, solver, **fields)


def race(mine, theirs, problems=6, **fields):
    """Two contenders with fixed work on every problem."""
    rows = []
    for p in range(problems):
        rows.append(one("A", problem=f"p{p}", work=mine * (1 + 0.01 * p), **fields))
        rows.append(one("B", "peer", f"p{p}", work=theirs * (1 + 0.02 * p), **fields))
    return rows


# ---- files -------------------------------------------------------------------------------------


def test_where_the_files_go(written, tmp_path):
    assert [path.name for path in written] == ["report.html", "report.md"]
    rows = implicit_rows()
    for name in ("a.html", "a.md"):
        page, text = report.write(rows, {}, tmp_path / name)
        assert (page, text) == (tmp_path / "a.html", tmp_path / "a.md")
    with pytest.raises(ValueError, match="rows is empty"):
        report.write([], {}, tmp_path)


def test_the_same_rows_give_the_same_report(written, tmp_path):
    again = report.write(every_row(), {"abc123": ENVIRONMENT}, tmp_path, TITLES)
    for old, new in zip(written, again, strict=True):
        assert old.read_bytes() == new.read_bytes()


# ---- safety ------------------------------------------------------------------------------------


def test_nothing_outside_is_referred_to(page, parsed):
    for tag, name, value in parsed.attributes:
        if name in ("href", "src", "xlink:href", "action", "data", "srcset"):
            assert value.startswith("#"), (tag, name, value)
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    assert not re.search(r"@import|url\((?!#)", page)
    outside = re.findall(r"https?://[^\s<&]*", page)
    assert set(outside) == {"http://example.org/x"}  # as text of a message
    assert "http" not in re.sub(r">[^<]*<", "><", page)


def test_text_is_escaped(parsed, written):
    words = " ".join("".join(parsed.words).split())
    assert "bad <script>alert('x')</script> & \"quotes\" | pipe `tick` ∇f≤ε second line" in words
    assert "Smooth <minimization>" in words and "HS71 <b>" in words
    assert not any(name.startswith("on") for _, name, _ in parsed.attributes)
    text = written[1].read_text(encoding="utf-8")
    assert "<script" not in text and "<img" not in text and "&lt;script&gt;" in text


def test_markdown_tables_keep_their_columns(written):
    text = written[1].read_text(encoding="utf-8")
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) > 10
    for block in tables:
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(counts) == 1


def test_ids_are_unique_and_links_arrive(parsed):
    ids = [value for _, name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = [value[1:] for tag, name, value in parsed.attributes if (tag, name) == ("a", "href")]
    assert len(links) == 6 and set(links) <= set(ids)


# ---- what it says ------------------------------------------------------------------------------


def test_the_first_paragraph_names_losses_before_wins(page):
    first = page[page.index("<p>") : page.index("</p>")]
    assert first.index("Losses:") < first.index("Wins:") < first.index("No clear difference:")
    assert "takes 104 times the CPU seconds of scipy L-BFGS-B" in first
    assert "measured on a busy machine" in first
    assert "class=" not in first and "style=" not in first  # one type size


@pytest.mark.parametrize(
    ("mine", "theirs", "outcome"),
    [(10.0, 30.0, "win"), (30.0, 10.0, "loss"), (10.0, 10.2, "even")],
)
@pytest.mark.parametrize("problems", [1, 6])
def test_verdicts_on_work(mine, theirs, outcome, problems):
    rows = race(mine, theirs, problems)
    if outcome == "even":  # as often ahead as behind
        rows = [dataclasses.replace(r, work=10.0 + (i // 2 + i) % 2) for i, r in enumerate(rows)]
        rows = rows if problems > 1 else [dataclasses.replace(r, work=10.0) for r in rows]
    (of,) = summary.summarize(rows)
    found = {verdict.measure: verdict for verdict in summary.verdicts(of)}
    assert found["work"].outcome == outcome
    assert found["problems solved"].outcome == "even"
    assert ("jaxopt_ext A", "peer B") == (found["work"].mine, found["work"].peer)


def test_unsolved_problems_are_a_loss_whatever_the_work():
    rows = race(1.0, 100.0)
    rows[0].status = "timeout"
    (of,) = summary.summarize(rows)
    solved, work = summary.verdicts(of)
    assert (solved.outcome, solved.figures) == ("loss", "5 against 6 of 6 that both tried")
    assert work.outcome == "win"
    heading, sentences = summary.lead([of], noisy=False)[0]
    assert heading == "Losses"
    assert sentences == ["s: A solves 5 where peer B solves 6 of 6 problems."]
    lists = summary.outcomes(of)
    assert [o.text for o in lists["Lost"]] == ["p0 (only the peer solves it)"]
    assert len(lists["Won"]) == 5 and lists["Won"][0].text == "p5 (×0.00955)"  # noqa: RUF001


def test_the_peer_is_the_best_by_each_measure():
    rows = []
    for p in range(6):
        rows.append(one("A", problem=f"p{p}", work=10.0, run_cpu_s=[2.0]))
        rows.append(one("thrifty", "peer", f"p{p}", work=20.0, run_cpu_s=[9.0]))
        rows.append(one("fast", "peer", f"p{p}", work=90.0, run_cpu_s=[1.0]))
    (of,) = summary.summarize(rows)
    found = [(v.measure, v.outcome, v.peer) for v in summary.verdicts(of)[1:]]
    assert found == [("work", "win", "peer thrifty"), ("CPU seconds", "loss", "peer fast")]


def test_without_peers_there_is_nothing_to_compare():
    (of,) = summary.summarize([one("A", work=3.0)])
    assert summary.verdicts(of) == [] and summary.outcomes(of) == {}
    assert ("Nothing to compare", ["s."]) in summary.lead([of], noisy=False)
    assert summary.verdict_sheet(of) is None and summary.pair_sheet(of) is None


def test_contender_table():
    rows = race(10.0, 20.0, compile_cpu_s=1.5, peak_bytes=3 * 2**20)
    rows[1].status = "missed"
    (of,) = summary.summarize(rows)
    sheet = summary.contender_sheet(of)
    assert sheet.head == ["contender", "solved", "work, × best", "compile s", "peak MiB", "score"]  # noqa: RUF001
    ours, peer = sheet.body
    assert ours[1] == ("6 of 6", True) and peer[1] == ("5 of 6", False)
    assert ours[2] == ("1 [1, 1]", True) and peer[2].text.startswith("2.0")
    assert ours[4].text == "3"


def test_marks_are_for_those_who_stand_out():
    rows = [one(s, "peer", f"p{p}", work=w) for p in range(6) for s, w in [("A", 9.0), ("B", 20.0)]]
    rows.append(one("rare", "peer", "p0", work=1.0))
    rows += [one("rare", "peer", f"p{p}", status="missed") for p in range(1, 6)]
    (of,) = summary.summarize(rows)
    found = {cells[0].text: cells[1:] for cells in summary.contender_sheet(of).body}
    # two of three solve all, so that is no distinction; the least ratio on one problem is none
    assert [cells[0] for cells in found.values()] == [
        ("6 of 6", False),
        ("6 of 6", False),
        ("1 of 6", False),
    ]
    assert found["peer rare"][1] == ("1 on 1", False)
    assert found["peer A"][1].best and not found["peer B"][1].best


def test_only_what_both_tried_decides_who_solves_more():
    rows = race(10.0, 20.0)
    rows += [one("B", "peer", f"q{p}", work=5.0) for p in range(3)]
    (of,) = summary.summarize(rows)
    assert summary.verdicts(of)[0].figures == "6 against 6 of 6 that both tried"


def test_suites_without_work_show_what_they_have():
    (of,) = summary.summarize(implicit_rows())
    assert of.costs == ["cpu", "error", "compile"]
    head = summary.contender_sheet(of).head
    assert {"error", "run s", "compile s", "condition"} <= set(head)
    assert "nested" not in head and "linear solver" not in head
    runs = summary.problem_sheet(of)
    assert "error" in runs.head and "work" not in runs.head and len(runs.body) == 6


def test_only_skipped_rows():
    rows = [row for row in odd_rows() if row.status == "skipped"]
    text = Page(report.html_page(rows, {})).words
    assert "cyipopt IPOPT" in text and "Not tried" in text
    assert "Not tried" in report.markdown(rows, {})


def test_every_failure_and_skip_is_listed(parsed):
    words = "".join(parsed.words)
    rows = every_row()
    for status in ("missed", "nonfinite", "error", "timeout"):
        assert status in words
    failed = [row for row in rows if row.status not in ("ok", "skipped")]
    listed = [int(k) for k in re.findall(r"Failures \((\d+)\)", words)]
    assert sum(listed) == len(failed) and words.count("cyipopt IPOPT") >= 2


def test_every_run_is_there(parsed):
    words = "".join(parsed.words)
    listed = sum(int(k) for k in re.findall(r"Every run \((\d+)\)", words))
    assert listed == sum(len(runs) for runs in profiles.grid(every_row()).values())


def test_slopes_and_environment_are_shown(parsed):
    words = "".join(parsed.words)
    assert "ridge, jaxopt_ext SSO" in words and "versions.jax" in words
    assert "Some CPU <fast> & cheap" in words


def test_best_entries_are_marked_without_colour(page):
    assert "<td><b>★ " in page


def test_problem_names_tell_what_differs():
    rows = solved_rows(problems=1, seeds=(0, 1))
    rows += [dataclasses.replace(r, dtype="float32", quick=True) for r in rows]
    among = list(profiles.grid(rows))
    found = [summary.instance_name(i, among) for i in among]
    assert found[0] == "problem 00, float32, quick, seed 0"
    assert found[-1] == "problem 00, float64, seed 1"


# ---- in a browser ------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
PROBE = """<!DOCTYPE html><body>
<iframe width="360" height="640" srcdoc="{page}"></iframe>
<iframe width="360" height="640" srcdoc="<div style='width:500px'>wide</div>"></iframe>
<pre id="found"></pre>
<script>addEventListener("load", () => {{
  const measure = (frame) => {{
    const root = frame.contentDocument.documentElement;
    root.querySelectorAll("details").forEach((part) => (part.open = true));
    const empty = [...root.querySelectorAll("svg")].filter((s) => s.getBBox().width < 50);
    return {{width: root.scrollWidth, room: root.clientWidth, empty: empty.length}};
  }};
  const frames = [...document.querySelectorAll("iframe")];
  document.getElementById("found").textContent = JSON.stringify(frames.map(measure));
}});</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")
def test_the_page_fits_a_phone(page, tmp_path):
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.format(page=html.escape(page)), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/user"]
    command = [str(CHROMIUM), *options, "--dump-dom", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.findall(r'<pre id="found">(\[.*?\])</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    ours, too_wide = json.loads(found[-1])
    assert ours["width"] <= ours["room"] <= 360
    assert ours["empty"] == 0
    assert too_wide["width"] > too_wide["room"]  # the probe would see it
