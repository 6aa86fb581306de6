"""The documentation: links inside it lead somewhere, and the migration page leaves nothing out."""

import importlib
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
GENERATED = {"bench/report"}  # written by the build
FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1\s*$", re.MULTILINE | re.DOTALL)
TOCTREE = re.compile(r"^```\{toctree\}\n(.*?)^```", re.MULTILINE | re.DOTALL)


def prose(page):
    return FENCE.sub("", page.read_text())


def resolved(page, target):
    """The page that a `{doc}` role or a toctree on `page` means, from the root of the docs."""
    folder = DOCS if target.startswith("/") else page.parent
    return (folder / target.lstrip("/")).resolve().relative_to(DOCS.resolve()).as_posix()


def exists(name):
    return name in GENERATED or (DOCS / f"{name}.md").is_file()


def documents(page):
    """Targets of the `{doc}` roles of a page, with or without a title."""
    for text in re.findall(r"\{doc\}`([^`]+)`", prose(page)):
        titled = re.search(r"<([^>]+)>\s*$", text)
        yield titled.group(1) if titled else text


def entries(page):
    for body in TOCTREE.findall(page.read_text()):
        for line in body.splitlines():
            if line.strip() and not line.startswith(":"):
                yield line.strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_links_lead_somewhere(page):
    targets = [resolved(page, target) for target in (*documents(page), *entries(page))]
    assert [target for target in targets if not exists(target)] == []
    files = re.findall(r"(?<!!)\[[^\]]*\]\((?!https?:|mailto:|#)([^)#\s]+)[^)]*\)", prose(page))
    assert [file for file in files if not (page.parent / file).exists()] == []


def test_every_page_is_in_a_table_of_contents():
    listed = {resolved(page, entry) for page in PAGES for entry in entries(page)}
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES}
    assert pages - listed == {"index"}


def test_readme_links_lead_somewhere():
    text = FENCE.sub("", (ROOT / "README.md").read_text())
    files = re.findall(r"\]\((?!https?:)([^)#\s]+)", text) + re.findall(r"`(docs/[^`*]+)`", text)
    assert files
    built = "docs/_build"
    assert [f for f in files if not f.startswith(built) and not (ROOT / f).exists()] == []


def test_readme_example_prints_what_it_says(capsys):
    text = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (promised,) = re.findall(r"^```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        exec(compile(example, "README.md", "exec"), {})
    *lines, slopes = capsys.readouterr().out.splitlines()
    *promised_lines, promised_slopes = promised.splitlines()
    assert lines[0] == promised_lines[0]
    numbers = [[float(n) for n in row.strip("[]").split()] for row in (slopes, promised_slopes)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3)


def jaxopt_names():
    """Public names of jaxopt and of its public modules, without modules and type variables."""
    jaxopt = importlib.import_module("jaxopt")
    modules = {"jaxopt": jaxopt}
    for found in pkgutil.iter_modules(jaxopt.__path__):
        if not found.name.startswith("_") and found.name != "version":
            modules[f"jaxopt.{found.name}"] = importlib.import_module(f"jaxopt.{found.name}")
    return {
        f"{module}.{name}"
        for module, content in modules.items()
        for name, value in vars(content).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_migration_page_covers_jaxopt():
    pytest.importorskip("jaxopt", exc_type=ImportError)
    expected = jaxopt_names()
    assert len(expected) > 100
    listed = set(re.findall(r"`(jaxopt(?:\.\w+)+)`", (DOCS / "migrate_from_jaxopt.md").read_text()))
    assert expected - listed == set()
    modules = {name.rpartition(".")[0] for name in expected}
    assert listed - expected - modules == set()


def test_formulas_mean_what_was_written():
    # docutils reads \frac12 x as 12 over x, and browsers stretch only one bar of a pair.
    nodes = pytest.importorskip("docutils.nodes")
    pytest.importorskip("sphinx")
    spec = importlib.util.spec_from_file_location("docs_conf", DOCS / "conf.py")
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)

    def translated(source):
        return re.sub(r">\s+<", "><", conf.mathml(nodes.math(source, source), block=False))

    assert "<mn>1</mn><mn>2</mn></mfrac><mi>x</mi>" in translated(r"\tfrac12 x")
    assert "<mn>1</mn><mn>2</mn></mfrac><mi>x</mi>" in translated(r"\frac{1}{2} x")
    assert translated(r"\Vert x \Vert^2").count('stretchy="false"') == 2
    assert translated(r"\lVert x \rVert").count('stretchy="false"') == 2
    assert '<mo lspace="0.17em" rspace="0.17em">log</mo>' in translated(r"x \log y")
