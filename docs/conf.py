"""Sphinx configuration: MyST notebooks, executed on every build; nothing is fetched."""

import html
import importlib.metadata
import re

from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

project = "jaxopt_ext"
author = "The jaxopt_ext developers"
copyright = author
release = version = importlib.metadata.version("jaxopt-ext")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "generated"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True
nb_render_markdown_format = "myst"  # with tables, unlike plain CommonMark

# Docstrings are Google style; single backticks in them mean code.
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"

# Types of other libraries have no page here.
nitpick_ignore_regex = [
    (r"py:.*", r"'.*'|Array|Bool|Float|Int|Key|Num|PyTree|UInt32|ndarray"),
    (r"py:.*", r"jaxopt_ext\..*\._[A-Z].*"),
    (r"py:.*", r"(collections|equinox|jax|jaxlib|jaxtyping|numpy|optax|typing)\..*"),
]

html_theme = "furo"
html_title = f"jaxopt_ext {release}"
html_math_renderer = "mathml"
html_copy_source = False

HELD_COLON = "\N{ZERO WIDTH SPACE}"
logger = logging.getLogger(__name__)


def mathml(node, block):
    """Translate a formula to MathML, which browsers draw without a script."""
    source = node.astext()
    try:
        return tex2mathml(source, as_block=block)
    except MathError as error:
        logger.warning("formula %r: %s", source, error, location=node)
        return f"<code>{html.escape(source)}</code>"


def inline_math(translator, node):
    """Write a formula inside a sentence."""
    translator.body.append(mathml(node, block=False))
    raise SkipNode


def block_math(translator, node):
    """Write a displayed formula."""
    translator.body.append(f'<div class="math">{mathml(node, block=True)}</div>\n')
    raise SkipNode


def quote_plain_text(app, what, name, obj, options, lines):
    """Docstrings are plain text: `*`, `|` in a sentence are not markup, a colon is a colon."""
    in_code = in_example = False
    for i, line in enumerate(lines):
        in_example = line.strip() != "" and (in_example or line.lstrip().startswith(">>>"))
        if in_example:
            continue
        parts = []
        for j, part in enumerate(line.split("`")):
            in_code = in_code != (j > 0)
            parts.append(part if in_code else re.sub(r"[*|]|(?<=: )[A-Za-z]\.$", r"\\\g<0>", part))
        lines[i] = "`".join(parts)
        if what == "property":  # napoleon would take what precedes a colon for a type
            lines[i] = lines[i].replace(":", HELD_COLON)


def shorten_types(app, what, name, obj, options, lines):
    """Write the types of attributes as the source does: Float[Array, ""]."""
    for i, line in enumerate(lines):
        line = line.replace(HELD_COLON, ":")
        if line.lstrip().startswith(":vartype"):
            line = re.sub(r"\b(jaxtyping|jax\.jaxlib\._jax|jaxlib\._jax|jax)\.(?=[A-Z])", "", line)
            line = re.sub(r"\b(jaxopt_ext\.[a-z_.]+)\.([A-Z]\w*)", r"~\1.\2", line)
            line = line.replace("*", r"\*")
        lines[i] = line


def setup(app):
    """Register the formula renderer, and docstring hooks before and after napoleon's."""
    app.add_html_math_renderer(
        "mathml", inline_renderers=(inline_math, None), block_renderers=(block_math, None)
    )
    app.connect("autodoc-process-docstring", quote_plain_text, priority=100)
    app.connect("autodoc-process-docstring", shorten_types, priority=900)
