"""Error messages of the library, collected from its source: each says what came and what to do.

Run `pytest tests/test_error_messages.py -s` to read them all.
"""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(
    path
    for folder in ("jaxopt_ext/core", "jaxopt_ext/layers", "solvers", "implicit")
    for path in (ROOT / folder).glob("*.py")
)
# What the library raises on purpose; the last one where JAX itself cannot do what was asked.
REFUSALS = {"ValueError", "TypeError", "NotImplementedError"}
# What was expected, or what to do instead.
REMEDY = re.compile(
    r"\b(expected|use|take|choose|state|give|pass|declare|defines|needs|kinds of constraint)\b"
)
# Messages that are put together elsewhere: by whoever calls, from what the user's function raised.
FORWARDED = {"{message}", "{owner}: {name} could not be evaluated"}


def text(node):
    """The message as in the source, with what is filled in between braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return text(node.left) + text(node.right)
    if isinstance(node, ast.FormattedValue):
        return "{" + ast.unparse(node.value) + "}"
    return "{" + ast.unparse(node) + "}"


def messages():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            if getattr(node.exc.func, "id", None) not in REFUSALS or not node.exc.args:
                continue
            message = " ".join(text(argument) for argument in node.exc.args)
            if not message.startswith(tuple(FORWARDED)):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", message


MESSAGES = dict(messages())


def test_messages_are_found():
    print()
    for place, message in MESSAGES.items():
        print(f"{place}\n    {message}")
    assert len(MESSAGES) > 150


@pytest.mark.parametrize("place", list(MESSAGES))
def test_message_says_what_came_and_what_was_expected(place):
    message = MESSAGES[place]
    assert REMEDY.search(message), message
    assert "{" in message or len(message.split()) >= 6, f"nothing of what came: {message}"
    assert not message.rstrip().endswith("."), "one clause, without a full stop"
