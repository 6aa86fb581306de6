"""Argument checks: one sentence that names the argument, what came, and what was expected."""

import dataclasses
import difflib
import math
import numbers as abstract_numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, dataclass_transform

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import PyTree


def variables(name: str, tree: PyTree) -> PyTree:
    """Return `tree` as strong floating JAX arrays.

    Raises:
        TypeError: A leaf is not a real floating array or number.
        ValueError: The tree has no leaf.
    """
    if not jax.tree.leaves(tree):
        raise ValueError(f"{name} is {tree!r}, expected a PyTree with at least one floating array")

    def convert(path, leaf):
        where = f"{name}{jax.tree_util.keystr(path)}"
        if not (isinstance(leaf, abstract_numbers.Number) or hasattr(leaf, "__array__")):
            if not isinstance(leaf, jax.Array):
                raise TypeError(f"{where} is a {type(leaf).__name__}, expected a floating array")
        array = jnp.asarray(leaf)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"{where} has dtype {array.dtype}, expected a real floating dtype: variables are "
                "differentiated; pass constants through args, or convert with jnp.asarray(x, float)"
            )
        return array.astype(array.dtype)

    return jax.tree_util.tree_map_with_path(convert, tree)


def function(owner: str, name: str, fun: Any, *, optional: bool = False) -> None:
    """Raise TypeError unless `fun` is callable (or None where that is allowed)."""
    if fun is None and optional:
        return
    if not callable(fun):
        expected = "a function or None" if optional else "a function"
        raise TypeError(f"{owner}: {name} is a {type(fun).__name__}, expected {expected}")


def number(
    owner: str,
    name: str,
    value: Any,
    *,
    above: float | int | None = None,
    below: float | int | None = None,
    at_least: float | int | None = None,
) -> None:
    """Check a scalar setting: open lower and upper limits, closed lower limit.

    Traced values pass, since they have no value yet.

    Raises:
        TypeError: `value` is not a real number.
        ValueError: `value` is outside its range.
    """
    if isinstance(value, Tracer):
        return
    is_number = isinstance(value, abstract_numbers.Real) or (
        hasattr(value, "dtype") and jnp.ndim(value) == 0 and jnp.issubdtype(value.dtype, jnp.number)
    )
    if isinstance(value, bool) or not is_number:
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.number):
            return  # a batch of settings, mapped over later
        raise TypeError(f"{owner}: {name} is a {type(value).__name__}, expected a number")
    value = float(value)
    rules = []
    if above is not None:
        rules.append((value > above, f"> {above:g}"))
    if at_least is not None:
        rules.append((value >= at_least, f">= {at_least:g}"))
    if below is not None:
        rules.append((value < below, f"< {below:g}"))
    if math.isnan(value) or not all(ok for ok, _ in rules):
        expected = " and ".join(text for _, text in rules)
        raise ValueError(f"{owner}: {name} is {value:g}, expected a number {expected}")


def count(owner: str, name: str, value: Any, *, at_least: int = 1, optional: bool = False) -> None:
    """Raise TypeError or ValueError unless `value` is a Python integer of at least `at_least`."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, abstract_numbers.Integral):
        raise TypeError(f"{owner}: {name} is a {type(value).__name__}, expected an integer")
    if value < at_least:
        raise ValueError(f"{owner}: {name} is {value}, expected an integer >= {at_least}")


def choice(owner: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        listed = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{owner}: {name} is {value!r}, expected one of: {listed}")


@dataclass_transform(field_specifiers=(eqx.field,))
class SettingsMeta(type(eqx.Module)):
    """Metaclass of what has settings: an unknown one is refused with the nearest known name."""

    if not TYPE_CHECKING:  # type checkers read the settings from the dataclass fields

        def __call__(cls, *args, **kwargs):
            """Construct, after checking that every keyword is a setting."""
            fields = [field for field in dataclasses.fields(cls) if field.init]
            known = [field.name for field in fields]
            positional = [field.name for field in fields if not field.kw_only]
            if len(args) > len(positional):
                names = f"; name them: {', '.join(known)}" if known else ""
                raise TypeError(
                    f"{cls.__name__} got {len(args)} settings without a name, expected at most "
                    f"{len(positional)}{names}"
                )
            for name in kwargs:
                if name not in known:
                    near = difflib.get_close_matches(name, known, n=1)
                    hint = f" (did you mean {near[0]!r}?)" if near else ""
                    raise TypeError(
                        f"{cls.__name__} has no setting {name!r}{hint}, expected one of: "
                        f"{', '.join(known) or 'none'}"
                    )
            return super().__call__(*args, **kwargs)


def call(owner: str, name: str, trace: Callable[[], Any], value: PyTree, args: PyTree) -> Any:
    """Run `trace`, which calls the user's function `name`; explain a failure by the arguments.

    Raises:
        ValueError: The function does not fit `value` and `args`; the original error is the cause.
    """
    from jaxopt_ext.core.tree import describe

    try:
        return trace()
    except (TypeError, ValueError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{owner}: {name} could not be evaluated with init {describe(value)} and args "
            f"{describe(args)}: {type(error).__name__}: {first_line}"
        ) from error
