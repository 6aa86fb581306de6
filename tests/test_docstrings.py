"""Public docstrings: complete, and their examples run."""

import dataclasses
import doctest
import importlib
import inspect
import pkgutil

import jax
import pytest

import jaxopt_ext
from jaxopt_ext import implicit, solvers

MODULES = sorted(
    {"jaxopt_ext"}
    | {
        module.name
        for module in pkgutil.walk_packages(jaxopt_ext.__path__, "jaxopt_ext.")
        if "__main__" not in module.name
    }
)
PUBLIC = {
    f"{room.__name__}.{name}": getattr(room, name)
    for room in (jaxopt_ext, implicit, solvers)
    for name in room.__all__
    if not inspect.ismodule(getattr(room, name))
}


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def test_every_room_is_walked():
    assert {"jaxopt_ext.core.drive", "jaxopt_ext.solvers.grad_norm_smooth"} <= set(MODULES)
    assert len(MODULES) >= 20


@pytest.mark.parametrize("name", [n for n, o in PUBLIC.items() if inspect.isfunction(o)])
def test_functions_say_what_they_take_return_and_show(name):
    fun = PUBLIC[name]
    text = inspect.getdoc(fun) or ""
    assert text
    parameters = [p for p in inspect.signature(fun).parameters if p not in ("self", "cls")]
    if parameters:
        assert "Args:" in text
        for parameter in parameters:
            assert f"{parameter}:" in text, parameter
    assert "Returns:" in text


@pytest.mark.parametrize("name", [n for n, o in PUBLIC.items() if inspect.isclass(o)])
def test_classes_document_their_fields(name):
    cls = PUBLIC[name]
    text = inspect.getdoc(cls) or ""
    assert text.split("\n")[0].rstrip().endswith((".", ":")) or "," in text
    own = getattr(cls, "__annotations__", {})
    names = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    fields = [name for name in names if name in own]
    if name.endswith((".Counts", ".Condition")):
        return  # one sentence covers all their fields
    for field in fields:
        assert f"{field}:" in text, f"{name}.{field} is not documented"
