"""Figures: well-formed, the same each time, legible without colour, and safe inside a page."""

import pathlib
import re
import sys
import xml.etree.ElementTree as ET

import matplotlib
import pytest

from jaxopt_ext.bench import plots, profiles
from jaxopt_ext.bench.record import Row

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from rows import every_row, implicit_rows, scale_rows, solved_rows, transform_rows

SVG = "{http://www.w3.org/2000/svg}"
ROWS = solved_rows(problems=4)


@pytest.fixture(scope="module")
def drawn():
    """Every kind of figure once."""
    return {
        **plots.profile_figure(ROWS, "performance"),
        **plots.profile_figure(ROWS, "performance", "cpu"),
        **plots.profile_figure(ROWS, "performance", tolerances=[1e-3]),
        **plots.profile_figure(ROWS, "data", tolerances=[1e-3]),
        **plots.profile_figure(ROWS, "ecdf"),
        **plots.convergence_figure(ROWS[:7]),
        **plots.convergence_figure(ROWS[:7], "cpu"),
        **plots.ratio_figure(ROWS),
        **plots.scaling_figure(scale_rows()),
    }


def test_names_tell_suite_kind_and_cost(drawn):
    assert list(drawn) == [
        "smooth-performance-work",
        "smooth-performance-cpu",
        "smooth-performance-1e-03",
        "smooth-data-1e-03",
        "smooth-ecdf",
        "smooth-problem-00-float64-full-convergence-work",
        "smooth-problem-00-float64-full-convergence-cpu",
        "smooth-ratio-work",
        "scale-ridge-scaling-cpu",
    ]


def test_figures_are_well_formed_and_labelled(drawn):
    for name, text in drawn.items():
        root = ET.fromstring(text)
        assert root.tag == f"{SVG}svg"
        assert root.get("id") == name and root.get("role") == "img"
        label = root.get("aria-label")
        assert label is not None and len(label) > 40 and "jaxopt_ext" in label
        words = " ".join("".join(e.itertext()) for e in root.iter(f"{SVG}text"))
        assert "jaxopt_ext" in words


def test_figures_can_share_a_page(drawn):
    page = "".join(drawn.values())
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for name, text in drawn.items():
        own = set(re.findall(r'\bid="([^"]+)"', text))
        used = re.findall(r'href="#([^"]+)"', text) + re.findall(r"url\(#([^)]+)\)", text)
        assert used and set(used) <= own
        styles = re.findall(r"<style[^>]*>(.*?)</style>", text)
        assert all(style.startswith(f"#{name} *{{") for style in styles)
        assert "<metadata" not in text and "<!--" not in text


def test_figures_are_the_same_each_time(drawn):
    for kind in plots.KINDS:
        for name, text in plots.profile_figure(ROWS, kind, tolerances=[1e-3]).items():
            assert drawn[name] == text
    with matplotlib.rc_context({"font.size": 20, "axes.grid": False, "svg.fonttype": "path"}):
        again = plots.ratio_figure(ROWS)
    assert again["smooth-ratio-work"] == drawn["smooth-ratio-work"]


def test_looks_differ_without_colour_and_hold_through_a_suite():
    names = profiles.contenders_of(ROWS) + [f"peer {i}" for i in range(5)]
    looks = plots.styles(names)
    dashes = [(str(s["linestyle"]), s["marker"]) for s in looks.values()]
    assert len(set(dashes)) == len(names)
    assert all((s["linestyle"] == "-") == profiles.is_ours(c) for c, s in looks.items())


def test_only_the_best_of_many_are_drawn_and_the_label_says_so():
    rows = [
        Row("s", f"p{p}", "lib", f"solver {i:02d}", work=float(10 + i), n=2)
        for i in range(plots.MOST + 3)
        for p in range(2)
    ]
    (text,) = plots.profile_figure(rows).values()
    assert "the 3 with the lowest scores are not drawn" in text
    assert "solver 00" in text and "solver 12" not in text


def test_hostile_names_stay_text():
    rows = [
        Row("s <b>", f'p" onload="x{n}', "lib", 'a <script>$\\frac$ & "b" -->', n=n, work=9.0 + n)
        for n in (2, 3, 5)
    ]
    for row in rows:
        row.params, row.f0, row.f, row.f_star = {"family": "<i>∇☃$x$"}, 9.0, 1.0, 0.0
        row.history = {"work": [1.0, 5.0], "f": [9.0, 1.0]}
    figures = {
        **plots.profile_figure(rows),
        **plots.convergence_figure(rows),
        **plots.ratio_figure(rows),
        **plots.scaling_figure(rows, "work"),
    }
    assert len(figures) == 6
    for text in figures.values():
        root = ET.fromstring(text)
        assert not list(root.iter(f"{SVG}script"))
        assert not any("onload" in element.attrib for element in root.iter())
    words = "".join(ET.fromstring(plots.ratio_figure(rows)["s-b-ratio-work"]).itertext())
    assert 'a <script>$\\frac$ & "b" -->' in words


@pytest.mark.parametrize("rows", [[], implicit_rows(), transform_rows(), every_row()[-20:]])
def test_nothing_to_draw_gives_no_figure(rows):
    for kind in ("data", "ecdf"):
        assert plots.profile_figure(rows, kind) == {}
    assert plots.convergence_figure(rows) == {}


def test_a_failed_suite_gives_no_figure():
    rows = [Row("s", "p", "x", "a", status="error", n=3)]
    for kind in plots.KINDS:
        assert plots.profile_figure(rows, kind) == {}
    assert plots.ratio_figure(rows) == {} and plots.scaling_figure(rows) == {}


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="kind is 'pie', expected one of performance"):
        plots.profile_figure(ROWS, "pie")
    with pytest.raises(ValueError, match="cost is 'price'"):
        plots.profile_figure(ROWS, cost="price")
    for kind, tolerances in [("data", None), ("ecdf", None), ("performance", [0.1])]:
        with pytest.raises(ValueError, match="cost is 'cpu', expected work"):
            plots.profile_figure(ROWS, kind, "cpu", tolerances)
    with pytest.raises(ValueError, match="against is 'wall', expected work or cpu"):
        plots.convergence_figure(ROWS, "wall")


def test_importing_plots_does_not_import_matplotlib():
    import subprocess

    code = "import sys, jaxopt_ext.bench.report; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
