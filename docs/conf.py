"""Sphinx configuration: MyST notebooks, executed on every build; nothing is fetched."""

import html
import importlib.metadata
import re

from docutils.nodes import SkipNode, Text, math
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

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
napoleon_custom_sections = ["Reference"]
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
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False

HELD_COLON = "\N{ZERO WIDTH SPACE}"
PLAIN_OR_MARKUP = re.compile(r"^\s*\* |(?<!\S)\*\w+\*(?!\w)|([*|]|(?<=: )[A-Za-z]\.$)")
logger = logging.getLogger(__name__)
NAMED_FUNCTION = re.compile(
    r"(</(?!mo>)m\w+>\s*)?<mi>([a-z]+)</mi>\s*<mo>&ApplyFunction;</mo>(\s*<mo[^>]*>[({\[])?"
)
LIMIT = re.compile(r'<mo( movablelimits="true")?>([a-z]+)</mo>')  # min, max
BRACKET = re.compile(r'<mo(?: class="\w+")?>([|‖⟨⟩{}])</mo>')
BAR_ABOVE = re.compile(r'accent="true"(?=>\s*<mi>\w</mi>\s*<mo stretchy="false">ˉ)')


def with_space(match):
    """Set the name of a function off from its neighbours, as TeX does: E log x and not Elogx."""
    before, name, opening = (part or "" for part in match.groups())
    left = "0.17em" if before else "0"
    right = "0" if opening else "0.17em"
    return f'{before}<mo lspace="{left}" rspace="{right}">{name}</mo>{opening}'


def mathml(node, block):
    """Translate a formula to MathML, which browsers draw without a script."""
    source = node.astext()
    # To docutils the arguments of \frac12 x are 12 and x.
    separate = re.sub(r"\\([td]?frac)(\d)(\d)", r"\\\1{\2}{\3}", source)
    try:
        formula = NAMED_FUNCTION.sub(with_space, tex2mathml(separate, as_block=block))
        # Of a pair, browsers stretch the one without an exponent. A bar would touch its letter.
        formula = BRACKET.sub(r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', formula)
        formula = LIMIT.sub(r'<mo\1 lspace="0.17em" rspace="0.17em">\2</mo>', formula)
        return BAR_ABOVE.sub('accent="false"', formula)
    except MathError as error:
        logger.warning("formula %r: %s", source, error, location=node)
        return f"<code>{html.escape(source)}</code>"


def inline_math(translator, node):
    """Write a formula inside a sentence, in one piece with what touches it."""
    parts = node.get("before", ""), mathml(node, block=False), node.get("after", "")
    translator.body.append('<span class="formula">{}{}{}</span>'.format(*parts))
    raise SkipNode


def join_punctuation(app, doctree, docname):
    """Else browsers begin a line with the comma after a formula."""
    for formula in list(doctree.findall(math)):
        siblings = formula.parent.children
        i = siblings.index(formula)
        for side, j, pattern in (("before", i - 1, r"\S+$"), ("after", i + 1, r"^\S+")):
            text = siblings[j] if 0 <= j < len(siblings) else None
            touching = re.search(pattern, text) if isinstance(text, Text) else None
            if touching:
                formula[side] = html.escape(touching[0])
                formula.parent[j] = Text(re.sub(pattern, "", text))


def block_math(translator, node):
    """Write a displayed formula and its number, if it has one."""
    translator.body.append(f'<div class="math">{mathml(node, block=True)}')
    if node["number"]:
        translator.body.append(f'<span class="eqno">({get_node_equation_number(translator, node)})')
        translator.add_permalink_ref(node, "Link to this equation")
        translator.body.append("</span>")
    translator.body.append("</div>\n")
    raise SkipNode


def quoted(match):
    """Put a backslash before what is not markup."""
    return rf"\{match[1]}" if match[1] else match[0]


def quote_plain_text(app, what, name, obj, options, lines):
    """Docstrings are plain text: `*`, `|` in a sentence are not markup, a colon is a colon.

    Markup are the star of a list and a pair of stars around one word.
    """
    in_code = in_example = False
    for i, line in enumerate(lines):
        in_example = line.strip() != "" and (in_example or line.lstrip().startswith(">>>"))
        if in_example:
            continue
        parts = []
        for j, part in enumerate(line.split("`")):
            in_code = in_code != (j > 0)
            parts.append(part if in_code else PLAIN_OR_MARKUP.sub(quoted, part))
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


def skip_field_aliases(app, what, name, obj, skip, options):
    """Fields of a named tuple are described by its class."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field") else None


def setup(app):
    """Register the formula renderer, and docstring hooks before and after napoleon's."""
    app.add_html_math_renderer(
        "mathml", inline_renderers=(inline_math, None), block_renderers=(block_math, None)
    )
    app.connect("doctree-resolved", join_punctuation)
    app.connect("autodoc-skip-member", skip_field_aliases)
    app.connect("autodoc-process-docstring", quote_plain_text, priority=100)
    app.connect("autodoc-process-docstring", shorten_types, priority=900)
